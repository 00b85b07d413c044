"""Prompts: read from files, or written by the base itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.text.chat import ChatTemplate
from orthrus_gguf.text.tokenizer import Tokenizer

#: Stands where the user's words come in a chat, to find where their turn begins and ends.
_PLACE = "ORTHRUS-USER-TURN"


#: Kinds of prompts that a base with a chat template writes, and how such a turn may begin: left to
#: itself, a base writes nearly the same few.
KINDS = {
    "open": ("",),
    "chat": ("What", "Why", "How", "Can you", "I am", "Tell me about", "Explain", "Should I"),
    "code": (
        *("Write a Python function that", "Write a function", "Fix this code:\n", "Implement"),
        *("Write a SQL query", "Write a JavaScript", "What does this code do?\n"),
    ),
    "lists": ("List", "Name", "Give me", "What are the", "Write a list of", "Suggest", "Compare"),
    "maths": (
        *("Calculate", "Solve", "If", "How many", "What is the sum of", "A train", "Prove that"),
        *("There are", "Find the"),
    ),
    "repetition": (
        *("Repeat", "Rewrite", "Correct the mistakes in this text:\n", "Translate", "Summarize"),
        *("Sort", "Edit the following", "Replace"),
    ),
}

#: Of texts that are no chats.
PLAIN_TEXT = "text"


@dataclass(frozen=True)
class Beginning:
    """What the base goes on from to write a prompt of a kind. words: the user's first."""

    kind: str
    words: str
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """Tokens that the base is to go on from. domain: what kind of text, for the report."""

    domain: str
    tokens: tuple[int, ...]


def read_prompts(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate | None, window: int
) -> list[Prompt]:
    """The prompts of a file, or of all files below a folder. Raises OrthrusError.

    `.jsonl`: a chat a line (`messages`, or `prompt`; `domain` where it is known). Anything else is
    text, of which windows of `window` tokens are taken. A file's stem is its domain.
    """
    if not path.exists():
        raise OrthrusError(f"{path}: no such file or folder; name prompts with --prompts")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    found: list[Prompt] = []
    for file in files:
        text = _text(file)
        if file.suffix == ".jsonl":
            found += _chats(file, text, tokenizer, template)
        else:
            ids = tokenizer.encode(text, special=False)
            starts = range(0, max(len(ids) - window + 1, 0), window)
            found += [Prompt(file.stem, tuple(ids[at : at + window])) for at in starts]
    if not found:
        raise OrthrusError(
            f"{path}: holds no prompt (text of at least {window} tokens, or lines of JSONL); "
            "name other files with --prompts, or leave it out"
        )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise OrthrusError(
            f"{path}: is not UTF-8 (byte {error.start}); convert it: iconv -t utf-8"
        ) from error
    except OSError as error:
        raise OrthrusError(f"{path}: cannot be read: {error.strerror or error}") from error


def _chats(
    path: Path, text: str, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry: Any = json.loads(line)
        except ValueError as error:
            raise OrthrusError(f"{path}, line {number}: is no JSON: {error}; mend it") from error
        words = entry.get("prompt") if isinstance(entry, dict) else None
        messages = entry.get("messages") if isinstance(entry, dict) else None
        if isinstance(words, str):
            messages = [{"role": "user", "content": words}]
        if not isinstance(messages, list) or not messages:
            raise OrthrusError(
                f'{path}, line {number}: expected {{"prompt": TEXT}} or {{"messages": […]}}; '
                "mend it"
            )
        if template is not None:
            ids = tokenizer.encode(template.render(messages), add_bos=False)
        elif isinstance(words, str):
            ids = tokenizer.encode(words)
        else:
            raise OrthrusError(
                f"{path}, line {number}: the base has no chat template; give texts as prompt"
            )
        if not ids:
            raise OrthrusError(f"{path}, line {number}: the prompt is empty; leave the line out")
        yield Prompt(str(entry.get("domain", path.stem)), tuple(ids))


class Invented:
    """Prompts that the base writes: it goes on from a user's turn that begins like one of KINDS,
    or, where it has no chat template, from a token drawn at random."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._open: tuple[int, ...] = ()
        self._close: tuple[int, ...] = ()
        if template is not None:
            rendered = template.render([{"role": "user", "content": _PLACE}])
            before, found, after = rendered.partition(_PLACE)
            if not found:
                raise OrthrusError(
                    "the base's chat template leaves out what the user says; give --prompts"
                )
            self._open = tuple(tokenizer.encode(before, add_bos=False))
            self._close = tuple(tokenizer.encode(after, add_bos=False))

    def beginning(self, rng: np.random.Generator) -> Beginning:
        """What the base goes on from, sampled, to write a prompt."""
        if self._open:
            kind = list(KINDS)[rng.integers(len(KINDS))]
            words = KINDS[kind][rng.integers(len(KINDS[kind]))]
            return Beginning(kind, words, self._open + self._turn(words))
        while True:
            token = int(rng.integers(self._tokenizer.n_vocab))
            if not self._tokenizer.is_special(token):
                return Beginning(PLAIN_TEXT, "", (token,))

    def prompt(self, begun: Beginning, said: tuple[int, ...]) -> Prompt | None:
        """The prompt that came of it; None if it is none."""
        if said and said[-1] in self._tokenizer.eog:
            said = said[:-1]
        if not said:
            return None
        if not self._open:
            return Prompt(begun.kind, begun.tokens + said)
        words = (begun.words + self._tokenizer.decode(said)).strip()
        if len(words) < 12 or "\ufffd" in words or any(map(self._tokenizer.is_special, said)):
            return None
        return Prompt(begun.kind, self._open + self._turn(words) + self._close)

    def _turn(self, words: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(words, special=False, add_bos=False))
