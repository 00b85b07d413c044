"""What the project does with a file from a stranger, and what may come of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.inspection import text
from orthrus_gguf.inspection.diff import diff_metadata, diff_tensors
from orthrus_gguf.inspection.report import inspect, report_json
from orthrus_gguf.inspection.verify import overall, verify
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.text.tokenizer import load_tokenizer

PROMPT = "abc d\n<|endoftext|> é▁</s>"
MAX_MESSAGE = 1000  # characters, without the path


def check(path: Path, base: Path, heads: Path) -> str:
    """Use the file at `path` in every way there is; returns "refused", "opened" or "used".

    base, heads: files that belong together, each tried with `path` as its counterpart.
    Whatever is in the file, nothing but OrthrusError may be raised, with a proper message.
    """
    if not _accepts(path, lambda: _open(path)):
        return "refused"
    ways = [(path, None), (base, path), (path, heads)]
    used = [_accepts(path, partial(_use, model, twins)) for model, twins in ways]
    _inspect(path, base)
    return "used" if any(used) else "opened"


def _accepts(path: Path, action: Callable[[], None]) -> bool:
    try:
        action()
    except OrthrusError as error:
        text = str(error)
        assert text.isprintable(), repr(text)
        assert len(text.replace(str(path), "")) < MAX_MESSAGE, text
        return False
    return True


def _open(path: Path) -> None:
    with GGUFFile.open(path) as file:
        for name, info in file.tensors.items():
            assert file.data(name).size == info.n_bytes


def _inspect(path: Path, other: Path) -> None:
    """All that orthrus-inspect does; a file that opens must not make it fail."""
    report = inspect(path, context=1 << 20)
    json.dumps(report_json(report), allow_nan=False)
    checks = list(verify(report.tensors, threads=1))
    n_bytes = report.summary.total.n_bytes
    with GGUFFile.open(path) as one, GGUFFile.open(other) as two:
        metadata, tensors = diff_metadata(one, two), diff_tensors(one, two)
    for output in (
        text.report_text(report, 80, all_tensors=True),
        text.verify_text(checks, dict(overall(checks)), n_bytes),
        text.diff_text(metadata, tensors, 80),
    ):
        assert output.replace("\n", "").isprintable()


def _use(path: Path, heads: Path | None) -> None:
    """Open a model, and its tokenizer; encode and decode with it."""
    with ModelFile.open(path, heads) as model:
        assert model.config.n_vocab == model.tensors["token_embd.weight"].shape[0]
        tokenizer = load_tokenizer(model.metadata, path=path, n_vocab=model.config.n_vocab)
        ids = tokenizer.encode(PROMPT)
        assert all(0 <= id < model.config.n_vocab for id in ids)
        tokenizer.decode(ids)
