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
    """Prompts that the base writes: it goes on from an open user turn, or, where it has no chat
    template, from a token drawn at random."""

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

    def beginning(self, rng: np.random.Generator) -> tuple[int, ...]:
        """What the base goes on from, sampled, to write a prompt."""
        if self._open:
            return self._open
        while True:
            token = int(rng.integers(self._tokenizer.n_vocab))
            if not self._tokenizer.is_special(token):
                return (token,)

    def prompt(self, beginning: tuple[int, ...], said: tuple[int, ...]) -> Prompt | None:
        """The prompt that came of it; None if it is none."""
        if said and said[-1] in self._tokenizer.eog:
            said = said[:-1]
        if not said:
            return None
        if not self._open:
            return Prompt("invented", beginning + said)
        words = self._tokenizer.decode(said).strip()
        if len(words) < 12 or "\ufffd" in words or any(map(self._tokenizer.is_special, said)):
            return None
        turn = tuple(self._tokenizer.encode(words, special=False, add_bos=False))
        return Prompt("invented", self._open + turn + self._close)
