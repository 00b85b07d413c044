"""DrafterFile: what is read of a drafter, and every file that is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.drafter import DIALECTS, DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.window import Window
from tests.tiny_model import (
    BLOCK_SIZE,
    MASK,
    N_EMBD,
    N_LAYERS,
    N_VOCAB,
    REMOVE,
    write_drafter,
    write_model,
)


def opened(path: Path, target: Path) -> DrafterFile:
    with ModelFile.open(target) as model:
        return DrafterFile.open(path, model.config, model.metadata)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return write_model(tmp_path / "target.gguf", "qwen3")


def test_what_is_read(tmp_path: Path, target: Path) -> None:
    with opened(write_drafter(tmp_path / "drafter.gguf"), target) as drafter:
        config = drafter.config
        assert (config.n_layers, config.n_embd, config.n_vocab) == (N_LAYERS, N_EMBD, N_VOCAB)
        assert (config.block_size, config.mask_token) == (BLOCK_SIZE, MASK)
        assert drafter.target_layers == (1, 2)  # the last: what is behind the last layer
        assert len(drafter.data("fc.weight")) == 4 * N_EMBD * 2 * N_EMBD


def test_keys_at_their_defaults_are_fine(tmp_path: Path, target: Path) -> None:
    keys = {
        "dflash.attention.causal": np.bool_(False),
        "dflash.attention.sliding_window": np.uint32(0),
        "dflash.has_confidence_head": np.bool_(False),
        "dflash.sample_from_anchor": np.bool_(True),
    }
    opened(write_drafter(tmp_path / "drafter.gguf", metadata=keys), target).close()


def test_without_tokens_their_number_counts(tmp_path: Path, target: Path) -> None:
    keys = dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"), REMOVE)
    for size, fine in ((N_VOCAB, True), (N_VOCAB - 1, False)):
        path = tmp_path / f"{size}.gguf"
        write_drafter(path, metadata={**keys, "dflash.vocab_size": np.uint32(size)})
        if fine:
            opened(path, target).close()
        else:
            assert "dflash.vocab_size: is 39, the model has 40 tokens" in refusal(path, target)


def refusal(path: Path, target: Path) -> str:
    """The message that opening gives."""
    with pytest.raises(OrthrusError) as caught:
        opened(path, target)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert "; " in message, "says what to do"
    return message


TOKENS = [f"token{i}" for i in range(N_VOCAB)]

WINDOW, PATTERN = "dflash.attention.sliding_window", "dflash.attention.sliding_window_pattern"

BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "other word": (
        {"tokenizer.ggml.tokens": [*TOKENS[:7], "seven", *TOKENS[8:]]},
        "tokenizer.ggml.tokens: token 7 is 'seven', the model's is 'token7'",
    ),
    "fewer words": (
        {"tokenizer.ggml.tokens": TOKENS[:-1]},
        "tokenizer.ggml.tokens: is an array of 39 strings, the model has 40",
    ),
    "no target layers": ({"dflash.target_layers": REMOVE}, "dflash.target_layers: is missing"),
    "fractions": (
        {"dflash.target_layers": np.ones(2, np.float32)},
        "dflash.target_layers: expected an array of integers",
    ),
    "a layer too many": (
        {"dflash.target_layers": np.array([1, 3], np.int32)},
        "dflash.target_layers: names layer 3, Tiny has 1 to 2",
    ),
    "counted from 0": (
        {"dflash.target_layers": np.array([0, 1], np.int32)},
        "dflash.target_layers: names layer 0",
    ),
    "width": ({"dflash.embedding_length": np.uint32(64)}, "is 64, the rows of Tiny have 32"),
    "no block": ({"dflash.block_size": REMOVE}, "dflash.block_size: is missing"),
    "block of one": ({"dflash.block_size": np.uint32(1)}, "dflash.block_size: expected 2 to"),
    "no mask": ({"tokenizer.ggml.mask_token_id": REMOVE}, "mask_token_id: is missing"),
    "no such mask": (
        {"tokenizer.ggml.mask_token_id": np.uint32(N_VOCAB)},
        "mask_token_id: expected 0 to 39",
    ),
    "older": ({"dflash.mask_token_id": np.uint32(MASK)}, "may be off by one"),
    "causal": ({"dflash.attention.causal": np.bool_(True)}, "causal: True is not supported"),
    "window without layers": (
        {WINDOW: np.uint32(2048)},
        "sliding_window_pattern: expected a yes or no for each of 2 layers, found nothing",
    ),
    "layers without a window": (
        {PATTERN: np.ones(2, np.bool_)},
        "sliding_window: is missing, and yet there is dflash.attention.sliding_window_pattern",
    ),
    "layers of another network": (
        {WINDOW: np.uint32(2048), PATTERN: np.ones(3, np.bool_)},
        "for each of 2 layers, found an array of 3 bool",
    ),
    "a period": (
        {WINDOW: np.uint32(2048), PATTERN: np.uint32(5)},
        "for each of 2 layers, found 5",
    ),
    "numbers": (
        {WINDOW: np.uint32(2048), PATTERN: np.array([1, 2], np.int32)},
        "for each of 2 layers, found an array of 2 int32",
    ),
    "shorter than a block": (
        {WINDOW: np.uint32(BLOCK_SIZE - 1), PATTERN: np.ones(2, np.bool_)},
        f"sliding_window: expected at least the {BLOCK_SIZE} rows of a block",
    ),
    "confidence": ({"dflash.has_confidence_head": np.bool_(True)}, "has_confidence_head: True"),
    "rope": ({"dflash.rope.freq_base": REMOVE}, "dflash.rope.freq_base: is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_metadata(name: str, tmp_path: Path, target: Path) -> None:
    change, message = BAD[name]
    path = write_drafter(tmp_path / "drafter.gguf", metadata=change)
    assert message in refusal(path, target)


BAD_TENSORS: dict[str, tuple[str, Any, str]] = {
    "no fc": ("fc.weight", REMOVE, "tensor fc.weight is missing"),
    "fc of three": ("fc.weight", np.zeros((32, 96), np.float32), "fc.weight: expected shape"),
    "no norm": ("enc.output_norm.weight", REMOVE, "enc.output_norm.weight is missing"),
    "its own output": ("output.weight", np.zeros((40, 32), np.float32), "output.weight"),
    "a layer more": ("blk.2.attn_q.weight", np.zeros((64, 32), np.float32), "2 layers"),
    "names": ("dflash_fc.weight", np.zeros((32, 64), np.float32), "dialect dflash-draft"),
    "markov": ("markov_w1.weight", np.zeros((32, 64), np.float32), "dialect dspark"),
    "confidence": ("conf_proj.weight", np.zeros((1, 32), np.float32), "dialect dspark"),
    "convolutions": ("blk.0.conv.weight", np.zeros((32, 4), np.float32), "dialect dflash2"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(name: str, tmp_path: Path, target: Path) -> None:
    tensor, value, message = BAD_TENSORS[name]
    path = write_drafter(tmp_path / "drafter.gguf", tensors={tensor: value})
    assert message in refusal(path, target)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_other_dialects_are_named(dialect: str, tmp_path: Path, target: Path) -> None:
    path = write_drafter(tmp_path / "drafter.gguf", dialect)
    assert f"dialect {dialect} (" in refusal(path, target)


def test_a_model_is_no_drafter(target: Path) -> None:
    assert "expected 'dflash', found 'qwen3'" in refusal(target, target)


def test_a_drafter_is_no_model(tmp_path: Path) -> None:
    path = write_drafter(tmp_path / "drafter.gguf")
    with pytest.raises(OrthrusError, match=r"is a drafter .*; open that model, with --drafter "):
        ModelFile.open(path)


def test_windows(tmp_path: Path, target: Path) -> None:
    """Causal, unless the file says that they are not; none where no layer has one."""
    sliding = {WINDOW: np.uint32(64), PATTERN: np.array([1, 0], np.bool_)}
    for more, expected in (
        (sliding, Window(64, (True, False), causal=True)),
        (
            {**sliding, "dflash.attention.causal": np.bool_(False)},
            Window(64, (True, False), causal=False),
        ),
        ({**sliding, PATTERN: np.zeros(2, np.bool_)}, None),
        ({}, None),
    ):
        with opened(write_drafter(tmp_path / "drafter.gguf", metadata=more), target) as drafter:
            assert drafter.window == expected
