"""Ways to damage a checkpoint, and the check that the converter says so in one line."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_checkpoint import (
    CONFIG,
    random_weights,
    tokenizer,
    write_json,
    write_raw_safetensors,
    write_safetensors,
)

Damage = Callable[[Path], None]


def check_refusal(run: Any, *expected: str) -> None:
    """`run`, of the command, ended in one line with the texts `expected`, and left nothing."""
    assert run.code == 1
    assert run.stdout == ""
    assert run.files == []
    assert len(run.stderr.splitlines()) == 1, run.stderr
    assert run.stderr.startswith("orthrus-convert: error: ")
    for text in expected:
        assert text in run.stderr


def config(**changes: Any) -> Damage:
    """Change fields of config.json; ... removes one."""

    def apply(folder: Path) -> None:
        values = {**CONFIG, **changes}
        kept = {key: value for key, value in values.items() if value is not ...}
        write_json(folder / "config.json", kept)

    return apply


def text(name: str, content: str | bytes) -> Damage:
    """Replace a file."""

    def apply(folder: Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return apply


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def rename(old: str, new: str) -> Damage:
    def apply(folder: Path) -> None:
        (folder / old).rename(folder / new)

    return apply


def resize(by: int) -> Damage:
    """Make the safetensors file longer or shorter."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        os.truncate(path, path.stat().st_size + by)

    return apply


def slow_tokenizer(name: str) -> Damage:
    """A vocab.json in place of tokenizer.json, but no merges.txt."""

    def apply(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        write_json(folder / "vocab.json", tokenizer()["model"]["vocab"])
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": name})

    return apply


def weights(change: Callable[[dict[str, Any]], object], dtype: str = "BF16") -> Damage:
    """Change the weights before they are written."""

    def apply(folder: Path) -> None:
        values = random_weights(CONFIG)
        change(values)
        write_safetensors(folder / "model.safetensors", values, dtype)

    return apply


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the safetensors file and keep its data."""

    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        write_raw_safetensors(path, entries, data[8 + length :])

    return apply


def tokens(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change tokenizer.json."""

    def apply(folder: Path) -> None:
        value = tokenizer()
        change(value)
        write_json(folder / "tokenizer.json", value)

    return apply


def rope(settings: dict[str, Any]) -> Damage:
    kept = {key: value for key, value in settings.items() if value is not ...}
    return config(rope_parameters=kept)


def yarn(**changes: Any) -> Damage:
    settings = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    return rope({**settings, "original_max_position_embeddings": 32, **changes})


def llama3(**changes: Any) -> Damage:
    settings = {"rope_type": "llama3", "rope_theta": 1e6, "factor": 4.0}
    settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return rope({**settings, "original_max_position_embeddings": 32, **changes})
