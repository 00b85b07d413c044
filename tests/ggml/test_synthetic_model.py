"""The maker of random models, since benchmarks and tests rest on it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from synthetic_model import SLOW_TYPES, model_shape, q4_k_m, qwen3_0_6b, uniform, write_model

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.architectures import ARCHITECTURES, Architecture
from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.tensors import base_tensors

API = load_library().api
TYPES = gguf.GGMLQuantizationType


@pytest.mark.parametrize("block_size", [None, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_the_file_says_what_was_asked_for(
    tmp_path: Path, block_size: int | None, tied: bool
) -> None:
    config = model_shape(block_size=block_size, tied=tied, rope=Rope(1e4, 2.0, 2048, 1.0))
    write_model(API, tmp_path / "m.gguf", config, uniform(TYPES.Q8_0))
    with ModelFile.open(tmp_path / "m.gguf") as file:
        assert file.config == config
        kinds = {info.type for info in file.tensors.values() if len(info.shape) == 2}
        assert kinds == {TYPES.Q8_0}


@pytest.mark.parametrize(
    "arch",
    [arch for arch in ARCHITECTURES.values() if not arch.hybrid],
    ids=lambda arch: str(arch.name),
)
@pytest.mark.parametrize(
    "rope", [Rope(1e4), Rope(1e4, 4.0), Rope(1e4, freq_factors=(1.0, 8.0) * 16)]
)
def test_the_file_is_of_its_architecture(tmp_path: Path, arch: Architecture, rope: Rope) -> None:
    config = model_shape(architecture=arch, rope=rope)
    write_model(API, tmp_path / "m.gguf", config, uniform(TYPES.Q8_0))
    with ModelFile.open(tmp_path / "m.gguf") as file:
        assert file.config == config


@pytest.mark.parametrize("name", ["F32", "Q4_K", *sorted(SLOW_TYPES)])
def test_rows_have_unit_length(tmp_path: Path, name: str) -> None:
    write_model(API, tmp_path / "m.gguf", model_shape(), uniform(gguf.GGMLQuantizationType[name]))
    with ModelFile.open(tmp_path / "m.gguf") as file:
        info = file.tensors["blk.0.ffn_up.weight"]
        rows = file.data(info.name).reshape(info.shape[0], -1)
        lengths = np.linalg.norm(quants.dequantize(rows, info.type), axis=1)
        assert np.median(lengths) == pytest.approx(1, rel=0.15)


def test_q4_k_m_is_llama_quantizes() -> None:
    """Layer by layer for the 28 of Qwen3-0.6B: `use_more_bits` of llama-quantize."""
    rule = q4_k_m(28)
    more = {0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27}
    for name, shape in base_tensors(qwen3_0_6b()).items():
        if len(shape) == 1:
            continue
        parts = name.split(".")
        special = name == "token_embd.weight" or (
            parts[0] == "blk" and parts[2] in ("attn_v", "ffn_down") and int(parts[1]) in more
        )
        assert (rule(name) is TYPES.Q6_K) == special, name
