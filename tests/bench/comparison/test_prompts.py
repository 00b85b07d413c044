"""The built-in prompts, files of prompts, and what the chat template is for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orthrus_gguf.bench.comparison.prompts import BUILTIN, encode, read_texts
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.text.tokenizer import load_tokenizer


class Letters:
    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]


class Shouts:
    """A chat template."""

    def render(self, messages: list[Any]) -> str:
        (message,) = messages
        return f"<{message.role}>{message.content.upper()}"


def test_the_built_in_set(demo_file: Callable[..., Path]) -> None:
    texts = read_texts(BUILTIN, ())
    assert list(texts) == ["code", "prose", "list", "chat", "repetition"]
    every = [text for parts in texts.values() for text in parts]
    assert {len(parts) for parts in texts.values()} == {4}
    assert len(set(every)) == len(every)
    # Where a prompt ends in a blank, tokenizers cut the text as its continuation would not.
    assert not [text for text in every if text.endswith(" ")]
    with ModelFile.open(demo_file("f16")) as file:
        tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
    prompts = encode(texts, tokenizer, None)
    assert max(len(prompt.tokens) for prompt in prompts) < 400
    assert prompts[5].name == "prose 2"
    assert prompts[5].tokens == tuple(tokenizer.encode(texts["prose"][1]))


def test_the_template_is_for_chat_alone() -> None:
    tokenizer: Any = Letters()
    template: Any = Shouts()
    texts = {"code": ["ab"], "chat": ["ab"], "chatty": ["ab"], "chat code": ["ab"]}
    plain = encode(texts, tokenizer, None)
    assert [prompt.tokens for prompt in plain] == [(97, 98)] * 4
    code, chat, chatty, chat_code = encode(texts, tokenizer, template)
    assert code.tokens == chatty.tokens == (97, 98)
    assert "".join(map(chr, chat.tokens)) == "<user>AB"
    assert chat_code.tokens == chat.tokens
    assert chat_code.name == "chat code 1"


def test_files_and_domains(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    texts = {"a": ["é\n", "2"], "b": ["3"]}
    path.write_text(json.dumps(texts), encoding="utf-8")
    assert read_texts(str(path), ()) == texts
    assert read_texts(str(path), ("b",)) == {"b": ["3"]}
    with pytest.raises(OrthrusError, match=r"^--domains c: .*mine\.json has prompts for a, b$"):
        read_texts(str(path), ("b", "c"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"def f():\n", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[1]", "not an object"),
        (b"{}", "not an object"),
        (b'{"a": "text"}', "'a' is not a list"),
        (b'{"a": []}', "'a' is not a list"),
        (b'{"a": ["x", 1]}', "a prompt of 'a' is not a text, or empty"),
        (b'{"a": [""]}', "a prompt of 'a' is not a text, or empty"),
        (None, "cannot be read"),
    ],
)
def test_bad_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OrthrusError, match=f"^--prompts {path}: {message}") as caught:
        read_texts(str(path), ())
    assert "\n" not in str(caught.value)
