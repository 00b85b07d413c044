"""A GGUF weight matrix, packed for the kernels: what it is, and which planes hold it.

**Order of the weights.** Inside 256 consecutive k of one row, write k = 64r + 32j + 16h + 2c + e
(r 0-3, j 0-1, h 0-1, c 0-7, e 0-1). One 16-bit *element* (r, c, e) holds the codes of all four
(j, h): byte h, and inside it nibble j. Elements with neighbouring e are what one MMA register
takes, so that a code becomes a pair of fp16 numbers with one shift and one LOP3.

Two layouts hold the same planes in two orders, chosen once per tensor by the kind of activations:

- `A16`: elements ordered (c, r, e). The four threads that share a row in an MMA fragment then work
  on four different r, so that each unpacks the scales of its own 64 weights only. The activations
  are *interleaved* in the same order (activations.py).
- `A8`: bytes in natural order: byte k % 32 of run r holds two groups of 32 (j = 0, 1), each one
  int8 MMA step. The activations stay in natural order.

Rows are cut into panels of 64 and K into steps of 256 (both padded with zero weights); a tile is
contiguous. Planes, with P = panels and B = steps:

| plane | A16 | A8 |
|---|---|---|
| main, 4 bits | u16 [P, B, 64, 64] | u8 [P, B, 64, 4, 32] |
| main, 8 bits | u16 [P, B, 2(j), 64, 64] | u8 [P, B, 2(j), 64, 4, 32] |
| 2 bits | u16 [P, B, 64, 32], bit 8h + 4(c // 4) + 2j | u8 [P, B, 64, 2, 32], bit 4(r % 2) + 2j |
| 1 bit | u16 [P, B, 64, 16], bit 8h + 2(c // 2) + j | u8 [P, B, 64, 32], bit 2r + j |
| scales | u32 [P, B, 64, 4(r)] | u32 [P, B, 4(r), 64] |
| super (d, dmin) | u32 [P, B, 64] | the same |

`high` holds the *lowest* bits of 3-, 5- and 6-bit codes, `main` the rest. A scale word of r holds
the scales of k = 64r ... 64r + 63; see `ScaleForm`. (2-bit types in A8, whose scales go into the
integers: u32 [P, B, 2(r // 2), 64, 2(h)], byte 2(r % 2) + j.) F16 and BF16 have one plane
[P, 4B, 64, 64], interleaved, in both layouts.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import IQ4_NL

PANEL_ROWS = 64
STEP = 256
"""Rows per panel and k per step of the packed layouts."""


IQ4_VALUES = tuple(int(value) for value in IQ4_NL.kvalues)
"""The 16 values that the codes of the IQ4 types index (int8)."""


class Layout(enum.Enum):
    """Which kind of activations the planes are ordered for: fp16 or int8."""

    A16 = "a16"
    A8 = "a8"


class ScaleForm(enum.IntEnum):
    """What the four scale words of 256 weights hold (word r, for k = 64r ... 64r + 63)."""

    HALF_32 = 0  # two fp16 scales, one per 32 weights
    MIN_32 = 1  # two times (scale byte, min byte), one pair per 32 weights; times d and dmin
    BYTE_16 = 2  # four scale bytes, one per 16 weights; times d
    MIN_16 = 3  # four bytes of scale | min << 4, one per 16 weights; times d and dmin


@dataclass(frozen=True)
class TypeTraits:
    """How a GGUF type maps to planes: weight = (code - bias) * (scale - scale_bias) * d - min."""

    main_bits: int
    high_bits: int
    scale_form: ScaleForm
    bias: int
    scale_bias: int = 0
    table: bool = False  # the code is an index of IQ4_VALUES, to which `bias` belongs

    @property
    def has_min(self) -> bool:
        """Whether groups have a minimum that is subtracted."""
        return self.scale_form in (ScaleForm.MIN_32, ScaleForm.MIN_16) and self.bias == 0

    @property
    def has_super(self) -> bool:
        """Whether the `super` plane (d, dmin per 256 weights) exists."""
        return self.scale_form is not ScaleForm.HALF_32

    @property
    def largest_codes(self) -> tuple[int, int]:
        """Largest |scale code| and largest min code, where scales are codes times d."""
        if self.scale_form is ScaleForm.MIN_16:
            return 15, 15
        if self.scale_bias:
            return self.scale_bias, 0
        return 63, 63

    @property
    def group(self) -> int:
        """Weights per scale."""
        return 16 if self.scale_form in (ScaleForm.BYTE_16, ScaleForm.MIN_16) else 32


_T = GGMLQuantizationType

TRAITS: dict[GGMLQuantizationType, TypeTraits] = {
    _T.Q4_K: TypeTraits(4, 0, ScaleForm.MIN_32, 0),
    _T.Q5_K: TypeTraits(4, 1, ScaleForm.MIN_32, 0),
    _T.Q6_K: TypeTraits(4, 2, ScaleForm.BYTE_16, 32, 128),
    _T.Q8_0: TypeTraits(8, 0, ScaleForm.HALF_32, 128),
    _T.Q4_0: TypeTraits(4, 0, ScaleForm.HALF_32, 8),
    _T.Q5_0: TypeTraits(4, 1, ScaleForm.HALF_32, 16),
    _T.Q3_K: TypeTraits(2, 1, ScaleForm.BYTE_16, 4, 32),
    _T.Q2_K: TypeTraits(2, 0, ScaleForm.MIN_16, 0),
    _T.IQ4_NL: TypeTraits(4, 0, ScaleForm.HALF_32, 128, table=True),
    _T.IQ4_XS: TypeTraits(4, 0, ScaleForm.MIN_32, 128, 32, table=True),
}
"""Every quantized type that has kernels."""

PLAIN_TYPES = (_T.F16, _T.BF16)
"""Types whose plane holds the numbers themselves."""


@dataclass(frozen=True)
class QuantTensor:
    """One weight matrix [rows, k] in the packed layout; `planes` on one device.

    `planes` maps plane names ("main", "high", "scales", "super"; "main" only for F16 and BF16) to
    contiguous tensors. `rows` and `k` are the logical sizes, without padding.
    """

    type: GGMLQuantizationType
    rows: int
    k: int
    layout: Layout
    planes: dict[str, torch.Tensor]

    @property
    def padded_rows(self) -> int:
        """Rows including the zero rows that fill the last panel."""
        return -(-self.rows // PANEL_ROWS) * PANEL_ROWS

    @property
    def padded_k(self) -> int:
        """K including the zero weights that fill the last step."""
        return -(-self.k // STEP) * STEP

    @property
    def nbytes(self) -> int:
        """Bytes that one pass over the matrix reads."""
        return sum(plane.numel() * plane.element_size() for plane in self.planes.values())

    @property
    def device(self) -> torch.device:
        """Where the planes are."""
        return self.planes["main"].device

    def first_rows(self, rows: int) -> QuantTensor:
        """Its first rows, in the same memory."""
        panels = -(-rows // PANEL_ROWS)
        planes = {name: plane[:panels] for name, plane in self.planes.items()}
        return QuantTensor(self.type, rows, self.k, self.layout, planes)

    def to(self, device: torch.device | str) -> QuantTensor:
        """The same tensor on another device."""
        moved = {name: plane.to(device) for name, plane in self.planes.items()}
        return QuantTensor(self.type, self.rows, self.k, self.layout, moved)


def row_bytes(kind: GGMLQuantizationType, k: int) -> int:
    """Bytes of one GGUF row of k weights; ValueError unless k is whole qblocks."""
    weights, size = GGML_QUANT_SIZES[kind]
    if k % weights:
        raise ValueError(f"{kind.name}: row of {k} weights is not a multiple of {weights}")
    return k // weights * int(size)
