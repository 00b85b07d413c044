"""Scorers that cannot score say so."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vocabularies import bpe_metadata

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.prefill.compression import Compression, Compressor
from orthrus_gguf.prefill.scorer import Scorer, layers_of
from orthrus_gguf.text.tokenizer import load_tokenizer

#: A model with attention in every fourth layer.
HYBRID = cast(
    Any,
    SimpleNamespace(
        name="mixed",
        n_layers=8,
        layer_kinds=([LayerKind.DELTA_NET] * 3 + [LayerKind.ATTENTION]) * 2,
    ),
)


def test_a_prompt_without_a_route_to_the_other_vocabulary(checkpoint: Path) -> None:
    """Half a character is no text. Nothing of the prompt is remembered, and no model is asked."""
    metadata = bpe_metadata(json.loads((checkpoint / "tokenizer.json").read_text("utf-8")))
    count = len(metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    tokenizer = load_tokenizer(metadata, path=Path("bpe.gguf"), n_vocab=count)
    ids = tokenizer.encode("import os\n" * 60 + "世")
    assert "�" in tokenizer.decode(ids[:-1])
    scorer = Scorer("small", cast(Any, None), (0,), tokenizer, own=tokenizer)
    compressor = Compressor(scorer, Compression(0.1, 50))
    for _ in range(2):
        with pytest.raises(OrthrusError, match="vocabulary of small cannot spell this prompt; use"):
            compressor.select(ids[:-1])


def test_layers_that_can_score() -> None:
    assert layers_of(HYBRID, None) == layers_of(HYBRID, 8) == (3, 7)
    assert layers_of(HYBRID, 4) == (3,)
    words = r"self:3: none .* has attention; .* that has is layer 4"
    with pytest.raises(OrthrusError, match=words):
        layers_of(HYBRID, 3)
