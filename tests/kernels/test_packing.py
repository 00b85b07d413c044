"""GGUF bytes -> packed planes -> the same bytes, and what packing refuses."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as T
from orthrus_kernels.elementwise.activations import deinterleave, interleave
from orthrus_kernels.packing.pack import interleave_rows, pack, unpack
from orthrus_kernels.packing.planes import fill_planes, new_planes
from orthrus_kernels.packing.quant_tensor import PLAIN_TYPES, TRAITS, Layout, row_bytes
from orthrus_kernels.packing.words import to_words
from quant_rows import dequantized, random_rows

ALL_TYPES = (*TRAITS, *PLAIN_TYPES)


def arbitrary_rows(kind: T, rows: int, k: int) -> torch.Tensor:
    """Any bytes at all where packing copies bits; finite numbers where it looks at values."""
    if kind == T.BF16:
        return random_rows(kind, rows, k)
    generator = torch.Generator().manual_seed(rows * k)
    return torch.randint(0, 256, (rows, row_bytes(kind, k)), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("rows", "k"), [(128, 512), (70, 768), (5, 256), (64, 1280)])
def test_a8_layout_gives_every_byte_back(kind: T, rows: int, k: int) -> None:
    raw = arbitrary_rows(kind, rows, k)
    packed = pack(raw, kind, k, Layout.A8)
    assert torch.equal(unpack(packed), raw)
    assert packed.padded_rows % 64 == 0
    assert packed.planes["main"].is_contiguous()


@pytest.mark.parametrize("kind", ALL_TYPES, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("rows", "k"), [(128, 512), (70, 768), (5, 256)])
def test_a16_layout_gives_every_byte_back(kind: T, rows: int, k: int) -> None:
    raw = random_rows(kind, rows, k)
    assert torch.equal(unpack(pack(raw, kind, k, Layout.A16)), raw)


@pytest.mark.parametrize("kind", [T.Q8_0, T.Q4_0, T.Q5_0, T.IQ4_NL, T.F16])
@pytest.mark.parametrize("layout", Layout)
def test_k_tail_of_whole_qblocks(kind: T, layout: Layout) -> None:
    """K = 256 + 32 is padded to 512 in the planes, and cut again."""
    raw = random_rows(kind, 3, 288)
    packed = pack(raw, kind, 288, layout)
    assert (packed.padded_k, packed.padded_rows) == (512, 64)
    assert torch.equal(unpack(packed), raw)


def test_chunks_meet_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = random_rows(T.Q6_K, 200, 512)
    whole = pack(raw, T.Q6_K, 512)
    monkeypatch.setattr("orthrus_kernels.packing.pack._chunk_weights", lambda device: 64 * 512)
    pieces = pack(raw, T.Q6_K, 512)
    assert all(torch.equal(whole.planes[name], pieces.planes[name]) for name in whole.planes)
    assert torch.equal(unpack(pieces), raw)


@pytest.mark.parametrize("kind", TRAITS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("layout", Layout)
def test_nothing_looks_at_the_numbers(kind: T, layout: Layout) -> None:
    """Packing runs on tensors without numbers: no step waits for a device, or needs the host."""
    meta = torch.device("meta")
    raw = random_rows(kind, 64, 512).to(meta)
    planes = new_planes(TRAITS[kind], 1, 2, layout, meta)
    fill_planes(planes, 0, to_words(kind, raw), TRAITS[kind], layout)
    assert {plane.device for plane in planes.values()} == {meta}


def test_any_place_in_memory() -> None:
    """A tensor that starts at an odd byte, or has gaps between its rows, is packed all the same."""
    raw = random_rows(T.Q4_K, 70, 512)
    expected = pack(raw, T.Q4_K, 512, device="cpu").planes
    shifted = torch.empty(raw.numel() + 1, dtype=torch.uint8)[1:].view(raw.shape).copy_(raw)
    spaced = torch.empty(70, raw.shape[1] + 3, dtype=torch.uint8)[:, 3:].copy_(raw)
    for given in (shifted, spaced):
        found = pack(given, T.Q4_K, 512).planes
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_padding_is_exactly_zero() -> None:
    """Rows and columns that fill panels and steps: zero weights, whatever their codes are."""
    for kind in TRAITS:
        k = 256 if row_bytes_of_step(kind) else 288
        padded = pack(random_rows(kind, 3, k), kind, k)
        whole = dataclasses.replace(padded, rows=64, k=padded.padded_k)
        weights = dequantized(kind, unpack(whole))
        assert not weights[3:].any()
        assert not weights[:, k:].any()
        assert weights[:3, :k].any()


def row_bytes_of_step(kind: T) -> bool:
    """Whether a qblock is a whole step."""
    return GGML_QUANT_SIZES[kind][0] == 256


def test_one_byte_by_hand() -> None:
    """Q4_K, row 0, k = 0 (low nibble of byte 0) and k = 32 (its high nibble): element (r=0, c=0,
    e=0), byte h = 0, nibbles j = 0 and 1. k = 17 is h = 1, c = 0, e = 1."""
    raw = torch.zeros(1, 144, dtype=torch.uint8)
    raw[0, 16] = 0xA5
    raw[0, 16 + 17] = 0x07
    main = pack(raw, T.Q4_K, 256).planes["main"].view(torch.int16)
    assert int(main[0, 0, 0, 0]) == 0x00A5
    assert int(main[0, 0, 0, 1]) == 0x0700
    assert int((main != 0).sum()) == 2


def test_interleaved_rows_alternate_in_eights() -> None:
    gate, up = random_rows(T.Q8_0, 16, 256, seed=1), random_rows(T.Q8_0, 16, 256, seed=2)
    both = interleave_rows(gate, up)
    assert torch.equal(both[:8], gate[:8])
    assert torch.equal(both[8:16], up[:8])
    assert torch.equal(both[16:24], gate[8:])
    with pytest.raises(ValueError, match="multiples of 8"):
        interleave_rows(gate[:9], up[:9])


def test_interleaved_activations() -> None:
    x = torch.arange(2 * 300).reshape(2, 300).half()
    placed = interleave(x)
    assert placed.shape == (2, 512)
    for k in (0, 1, 2, 63, 64, 129, 255, 256, 299):
        run, pair, e = k % 256 // 64, k % 64 // 2, k % 2
        assert placed[1, k // 256 * 256 + 8 * pair + 2 * run + e] == x[1, k]
    assert torch.equal(deinterleave(placed, 300), x)
    assert placed.sum(dtype=torch.float64) == x.sum(dtype=torch.float64)


@pytest.mark.parametrize("kind", [T.Q4_1, T.Q5_1])
def test_types_without_a_kernel_are_refused(kind: T) -> None:
    """Whoever loads them dequantizes them, and says so."""
    with pytest.raises(ValueError, match=f"ffn_down: {kind.name} has no kernel: dequantize it"):
        pack(random_rows(kind, 4, 256), kind, 256, name="ffn_down")


def test_refusals() -> None:
    raw = random_rows(T.Q4_K, 4, 512)
    with pytest.raises(ValueError, match=r"blk: Q4_K rows of 256 weights are u8 \[rows, 144\]"):
        pack(raw, T.Q4_K, 256, name="blk")
    with pytest.raises(ValueError, match="not a multiple of 256"):
        pack(raw, T.Q4_K, 300)
    huge = random_rows(T.Q4_K, 4, 256, scales=(500.0,))
    with pytest.raises(ValueError, match="beyond fp16"):
        pack(huge, T.Q4_K, 256)
    assert torch.equal(unpack(pack(huge, T.Q4_K, 256, Layout.A8)), huge)
    bf16 = torch.full((1, 256), 1e6, dtype=torch.bfloat16).view(torch.uint8)
    with pytest.raises(ValueError, match="beyond fp16"):
        pack(bf16, T.BF16, 256)
