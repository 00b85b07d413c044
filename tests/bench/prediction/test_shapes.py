"""What a pass reads, against the converter's plan, the kernels' layout and known figures."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from orthrus_converters.synthetic import plan_synthetic
from orthrus_kernels.packing.pack import pack
from orthrus_kernels.packing.quant_tensor import row_bytes

from orthrus_gguf.bench.prediction.shapes import (
    FILE_TYPES,
    PACKED_BITS,
    cache_bytes_per_token,
    flops_per_row,
    launches,
    packed_bytes,
    pass_weights,
    tensor_type,
)
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.shapes import SHAPES

CONFIG = SHAPES["qwen3-8b"]
Type = gguf.GGMLQuantizationType


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("model", SHAPES)
def test_types_are_the_converters(tmp_path: Path, model: str, file_type: str) -> None:
    config = SHAPES[model]
    for tensor in plan_synthetic(tmp_path / "x.gguf", config, file_type).tensors:
        if len(tensor.shape) == 2:
            found = tensor_type(tensor.name, tensor.shape[-1], config, file_type)
            assert found == tensor.type, tensor.name


def test_types_that_have_no_prediction() -> None:
    """Rows of 576 and 896 do not divide into 256s."""
    for model, kind in (("smollm2-135m", "Q8_0"), ("qwen2.5-0.5b", "Q8_0")):
        config = SHAPES[model]
        assert tensor_type("token_embd.weight", config.n_embd, config, "q4_k_m").name == kind
        with pytest.raises(OrthrusError, match=r"q4_k_m: no prediction for Q5_0, which rows of"):
            pass_weights(config, "q4_k_m")
        assert {*pass_weights(config, "q8_0").ar} == {Type.Q8_0}


@pytest.mark.parametrize("kind", PACKED_BITS)
def test_packed_bits_are_the_kernels(kind: Type) -> None:
    packed = pack(torch.zeros(128, row_bytes(kind, 512), dtype=torch.uint8), kind, 512)
    assert packed.nbytes * 8 / (128 * 512) == PACKED_BITS[kind]


def test_8b() -> None:
    """By hand: per layer q and o of 4096², k and v of 1024 x 4096, three of 12288 x 4096."""
    weights = pass_weights(CONFIG, "q4_k_m")
    attention = 36 * (2 * 4096**2 + 2 * 1024 * 4096)
    assert sum(weights.ar.values()) == sum(weights.diffusion.values()) == attention
    assert sum(weights.shared.values()) == 36 * 3 * 12288 * 4096 + 151_936 * 4096
    assert weights.diffusion == {Type.Q4_K: attention}
    assert weights.ar[Type.Q6_K] == 18 * 1024 * 4096
    assert flops_per_row(weights.ar) == 2 * attention
    # kernels/LOG.md: 7.6e9 weights in matrices
    total = sum(weights.ar.values()) + sum(weights.shared.values())
    assert total == pytest.approx(7.6e9, rel=0.01)
    # The same 4.67 GB per pass in GGUF's own qblocks (03-kernels and LOG.md).
    sizes = {Type.Q4_K: 144 / 256, Type.Q6_K: 210 / 256}
    raw = sum(n * sizes[kind] for part in (weights.ar, weights.shared) for kind, n in part.items())
    assert raw == pytest.approx(4.67e9, rel=0.002)
    assert packed_bytes(weights.ar) + packed_bytes(weights.shared) == pytest.approx(
        4.77e9, rel=0.002
    )


def test_a_tied_head_is_read_like_any_other() -> None:
    config = SHAPES["qwen3-1.7b"]
    weights = pass_weights(config, "q4_k_m")
    assert weights.shared[Type.Q6_K] > 151_936 * 2048
    assert sum(weights.shared.values()) == 28 * 3 * 6144 * 2048 + 151_936 * 2048


def test_cache_and_launches() -> None:
    assert cache_bytes_per_token(CONFIG) == 147_456
    assert cache_bytes_per_token(SHAPES["qwen3-1.7b"]) == 28 * 2 * 8 * 128 * 2
    assert launches(CONFIG, both_views=False) == 36 * 9 + 5
    assert launches(CONFIG, both_views=True) == 36 * 11 + 5


def test_fused_reads_six_tenths_of_two_passes() -> None:
    """02-decoding: 0.60 for 1.7B and for 8B."""
    for model in ("qwen3-1.7b", "qwen3-8b"):
        weights = pass_weights(SHAPES[model], "q4_k_m")
        ar, diffusion = packed_bytes(weights.ar), packed_bytes(weights.diffusion)
        shared = packed_bytes(weights.shared)
        fused = (ar + diffusion + shared) / (ar + diffusion + 2 * shared)
        assert fused == pytest.approx(0.60, abs=0.01)


def test_other_file_types_have_no_prediction() -> None:
    with pytest.raises(OrthrusError, match="q2_k: no prediction; choose from q4_k_m"):
        pass_weights(CONFIG, "q2_k")
