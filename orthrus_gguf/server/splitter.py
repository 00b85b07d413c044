"""An answer's text as it streams, split into thoughts, what is said, and calls of tools."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

THINK, THOUGHT = "<think>", "</think>"
CALL, CALLED = "<tool_call>", "</tool_call>"

#: How a call begins that can be streamed: its name first.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')


class Part(Enum):
    """What a piece of text is."""

    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"
    ARGUMENTS = "arguments"


@dataclass(frozen=True)
class Delta:
    """A piece. text: of a CALL, the tool's name. index: of the call that it belongs to."""

    part: Part
    text: str
    index: int = 0


class Splitter:
    """Push text, and get what it means; `flush` at the end.

    thinking: the answer begins within a thought, as the prompt has it. tools: whether calls are
    looked for. Qwen3's forms: `<think>…</think>` first, `<tool_call>{"name", "arguments"}
    </tool_call>` anywhere behind it. What only looks like a call is content.
    """

    def __init__(self, *, thinking: bool, tools: bool) -> None:
        self._text, self._tools = "", tools
        self._state = self._thinking if thinking else self._beginning
        self._started = False  # whether anything of the present part has been told
        self._scan = _Scan()
        self.calls = 0

    def push(self, text: str) -> list[Delta]:
        """What can be told now."""
        self._text += text
        return list(self._told(last=False))

    def flush(self) -> list[Delta]:
        """What was held back."""
        return list(self._told(last=True))

    def _told(self, *, last: bool) -> Iterator[Delta]:
        while True:
            state, held = self._state, self._text
            yield from state(last)
            if (self._state == state and self._text == held) or not self._text:
                return

    def _beginning(self, last: bool) -> Iterator[Delta]:
        stripped = self._text.lstrip()
        if stripped.startswith(THINK):
            self._text, self._state = stripped.removeprefix(THINK), self._thinking
        elif last or not THINK.startswith(stripped):
            self._state, self._started = self._content, True
        yield from ()

    def _thinking(self, last: bool) -> Iterator[Delta]:
        thought, end, rest = self._text.partition(THOUGHT)
        if not end:
            keep = 0 if last else _held_back(thought, THOUGHT)
            thought, rest = thought[: len(thought) - keep], thought[len(thought) - keep :]
        yield from self._tell(Part.REASONING, thought, rest, trim=True, over=bool(end) or last)
        if end:
            self._text, self._state, self._started = rest, self._content, False

    def _content(self, last: bool) -> Iterator[Delta]:
        said, call, rest = self._text.partition(CALL) if self._tools else (self._text, "", "")
        if not call:
            keep = _held_back(said, CALL) if self._tools and not last else 0
            said, rest = said[: len(said) - keep], said[len(said) - keep :]
        trim = self._tools and not (last and not call)
        yield from self._tell(Part.CONTENT, said, rest, trim=trim, over=bool(call) or last)
        if call:
            self._text, self._state = rest, self._calling

    def _tell(self, part: Part, text: str, rest: str, *, trim: bool, over: bool) -> Iterator[Delta]:
        """Text, and what stays behind it. trim: the white space at its end waits for what follows,
        and is dropped if nothing does (over)."""
        if not self._started:
            text = text.lstrip()
        shown = text.rstrip() if trim else text
        self._text = rest if over else text[len(shown) :] + rest
        if shown:
            self._started = True
            yield Delta(part, shown)

    def _calling(self, last: bool) -> Iterator[Delta]:
        head = _HEAD.match(self._text)
        if head is not None:
            self.calls += 1
            yield Delta(Part.CALL, json.loads(head[1]), self.calls - 1)
            self._text, self._state, self._scan = self._text[head.end() :], self._args, _Scan()
            return
        body, end, rest = self._text.partition(CALLED)
        if not end and not last:
            return
        call = _whole_call(body)
        if call is None:
            yield Delta(Part.CONTENT, CALL + body + end)
        else:
            self.calls += 1
            yield Delta(Part.CALL, call[0], self.calls - 1)
            yield Delta(Part.ARGUMENTS, call[1], self.calls - 1)
        self._text, self._state = rest, self._content

    def _args(self, last: bool) -> Iterator[Delta]:
        end = self._scan.end(self._text)
        text = self._text if end is None else self._text[:end]
        if text:
            yield Delta(Part.ARGUMENTS, text, self.calls - 1)
        self._text = self._text[len(text) :]
        if end is not None:
            self._state = self._closing

    def _closing(self, last: bool) -> Iterator[Delta]:
        """What closes a call: nobody needs it."""
        _, end, rest = self._text.partition(CALLED)
        if end or last:
            self._text, self._state, self._started = rest, self._content, False
        yield from ()


class _Scan:
    """Finds where a JSON object ends, piece by piece."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._escaped = 0, False, False

    def end(self, text: str) -> int | None:
        """The place behind the object; None if it goes on."""
        for place, char in enumerate(text, start=1):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._quoted = False
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return place
        return None


def _held_back(text: str, mark: str) -> int:
    """Length of the longest proper prefix of `mark` that ends `text`."""
    most = min(len(text), len(mark) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(mark[:n])), 0)


def _whole_call(body: str) -> tuple[str, str] | None:
    """Name and arguments of a call in another order of fields."""
    try:
        call = json.loads(body)
    except ValueError:
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    return call["name"], json.dumps(call.get("arguments") or {}, ensure_ascii=False)
