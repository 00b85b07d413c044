"""What a pass reads, against the converter's plan, the kernels' layout and known figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from orthrus_converters.file_types import find_file_type
from orthrus_converters.source_tensor import SourceTensor
from orthrus_converters.type_plan import TypeChoice, is_matrix, plan_types
from orthrus_kernels.packing.pack import pack
from orthrus_kernels.packing.quant_tensor import row_bytes

from orthrus_gguf.bench.prediction.shapes import (
    FILE_TYPES,
    PACKED_BITS,
    PassShape,
    all_tensors,
    cache_bytes_per_layer,
    chain_shape,
    following_shape,
    packed_bytes,
    pass_shape,
    record_bytes,
    state_bytes_per_layer,
    tensor_types,
    weights_of,
)
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.shapes import HYBRID_SHAPES, SHAPES
from orthrus_gguf.runtime.protocol import View

CONFIG = SHAPES["qwen3-8b"]
Type = gguf.GGMLQuantizationType


def by_view(shape: PassShape) -> dict[View | None, dict[Type, int]]:
    """Weights by type of the products of each view, and of all rows (None)."""
    return {
        view: weights_of({p: n for p, n in shape.products.items() if p.view is view})
        for view in (View.AR, View.DIFFUSION, None)
    }


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("model", SHAPES | HYBRID_SHAPES)
def test_types_are_the_converters(model: str, file_type: str) -> None:
    config = (SHAPES | HYBRID_SHAPES)[model]
    sources = {
        name: SourceTensor(name, "F32", shape, Path("none"), 0, 4 * math.prod(shape))
        for name, shape in all_tensors(config).items()
    }
    choice = TypeChoice(find_file_type(file_type))
    planned = plan_types(sources, config, choice, has_imatrix=False).types
    expected = {name: planned[name] for name in sources if is_matrix(name, sources[name].shape)}
    assert tensor_types(config, file_type) == expected


def test_types_that_have_no_prediction() -> None:
    """Rows of 576 and 896 do not divide into 256s."""
    for model in ("smollm2-135m", "qwen2.5-0.5b"):
        config = SHAPES[model]
        assert tensor_types(config, "q4_k_m")["token_embd.weight"].name == "Q8_0"
        with pytest.raises(OrthrusError, match=r"q4_k_m: no prediction for .*, which rows of"):
            pass_shape(config, "q4_k_m", ())
        assert {*weights_of(pass_shape(config, "q8_0", ()).products)} == {Type.Q8_0}


@pytest.mark.parametrize("kind", PACKED_BITS)
def test_packed_bits_are_the_kernels(kind: Type) -> None:
    packed = pack(torch.zeros(128, row_bytes(kind, 512), dtype=torch.uint8), kind, 512)
    assert packed.nbytes * 8 / (128 * 512) == PACKED_BITS[kind]


def test_8b() -> None:
    """By hand: per layer q and o of 4096², k and v of 1024 x 4096, three of 12288 x 4096."""
    weights = by_view(pass_shape(CONFIG, "q4_k_m", ()))
    ar, diffusion, shared = weights.values()
    attention = 36 * (2 * 4096**2 + 2 * 1024 * 4096)
    assert sum(ar.values()) == sum(diffusion.values()) == attention
    assert sum(shared.values()) == 36 * 3 * 12288 * 4096 + 151_936 * 4096
    assert diffusion == {Type.Q4_K: attention}
    assert ar[Type.Q6_K] == 18 * 1024 * 4096
    # kernels/LOG.md: 7.6e9 weights in matrices
    total = sum(ar.values()) + sum(shared.values())
    assert total == pytest.approx(7.6e9, rel=0.01)
    # The same 4.67 GB per pass in GGUF's own qblocks (03-kernels and LOG.md).
    sizes = {Type.Q4_K: 144 / 256, Type.Q6_K: 210 / 256}
    raw = sum(n * sizes[kind] for part in (ar, shared) for kind, n in part.items())
    assert raw == pytest.approx(4.67e9, rel=0.002)
    assert packed_bytes(ar) + packed_bytes(shared) == pytest.approx(4.77e9, rel=0.002)


def test_a_tied_head_is_read_like_any_other() -> None:
    config = SHAPES["qwen3-1.7b"]
    shared = by_view(pass_shape(config, "q4_k_m", ()))[None]
    assert shared[Type.Q6_K] > 151_936 * 2048
    assert sum(shared.values()) == 28 * 3 * 6144 * 2048 + 151_936 * 2048


def test_cache_and_launches() -> None:
    assert 36 * cache_bytes_per_layer(CONFIG) == 147_456
    shape = pass_shape(CONFIG, "q4_k_m", ())
    assert shape.launches([View.AR]) == shape.launches([View.DIFFUSION]) == 36 * 9 + 5
    assert shape.launches([*View]) == 36 * 11 + 5


def test_fused_reads_six_tenths_of_two_passes() -> None:
    """02-decoding: 0.60 for 1.7B and for 8B."""
    for model in ("qwen3-1.7b", "qwen3-8b"):
        weights = by_view(pass_shape(SHAPES[model], "q4_k_m", ()))
        ar, diffusion, shared = map(packed_bytes, weights.values())
        fused = (ar + diffusion + shared) / (ar + diffusion + 2 * shared)
        assert fused == pytest.approx(0.60, abs=0.01)


def test_one_matrix_takes_its_product_to_fp16() -> None:
    """A DeltaNet's alpha and beta are then a product of their own."""
    shape = pass_shape(HYBRID_SHAPES["qwen3.6-27b"], "q4_k_m", {Type.Q4_K})
    mixed = [p for p in shape.products if len({kind for kind, _ in p.matrices}) > 1]
    assert mixed
    assert not any(p.int8 for p in mixed)
    assert {p.int8 for p in shape.products if p.matrices == ((Type.Q4_K, 96),)} == {True}


def test_27b() -> None:
    """Millions of operations per row and DeltaNet, attention and MLP, as a design page has them;
    states of 3 MiB; and no cache but in a quarter of the layers."""
    config = HYBRID_SHAPES["qwen3.6-27b-mtp"]
    shape = pass_shape(config, "q8_0", ())
    total = sum(weights_of(shape.products).values())
    head = 248_320 * 5120
    parts = 48 * 232e6 + 16 * 210e6 + 64 * 535e6
    assert 2 * (total - head) == pytest.approx(parts, rel=0.005)
    assert (shape.attention, shape.recurrences) == (16, 48)
    assert 48 * state_bytes_per_layer(config) == 144 << 20
    assert 16 * cache_bytes_per_layer(config) == 65_536
    # 3.4 MiB a row in all layers.
    assert 48 * record_bytes(config) == pytest.approx(3.4 * 2**20, rel=0.02)


def test_mtp_block() -> None:
    """It reads its own layer, what makes one vector of two, and the head."""
    config = HYBRID_SHAPES["qwen3.6-27b-mtp"]
    chain, following = (
        sum(weights_of(of(config, "q4_k_m", ()).products).values())
        for of in (chain_shape, following_shape)
    )
    layer = 5120 * (2 * 6144 + 2 * 1024) + 6144 * 5120 + 3 * 17_408 * 5120
    assert chain == layer + 2 * 5120**2 + 248_320 * 5120
    assert following == 2 * 5120**2 + 2 * 1024 * 5120


def test_other_file_types_have_no_prediction() -> None:
    with pytest.raises(OrthrusError, match="q2_k: no prediction; choose from q4_k_m"):
        pass_shape(CONFIG, "q2_k", ())


def test_heads_of_hybrids_have_no_prediction() -> None:
    config = replace(HYBRID_SHAPES["qwen3.5-4b"], block_size=16, mask_token=1)
    with pytest.raises(OrthrusError, match=r"Qwen3\.5-4B: no prediction for heads of hybrids"):
        pass_shape(config, "q4_k_m", ())
