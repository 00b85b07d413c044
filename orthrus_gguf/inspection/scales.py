"""Where the scales of each tensor type lie, and which of them are NaN or infinite.

One bad scale turns a whole qblock, and soon all logits, into NaN. Layouts: ggml-common.h of ggml.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Number:
    """A number format. It is NaN or infinite (or reserved) when all bits of `exponent` are set."""

    dtype: str
    exponent: int


F16 = Number("<u2", 0x7C00)
BF16 = Number("<u2", 0x7F80)
F32 = Number("<u4", 0x7F80_0000)
F64 = Number("<u8", 0x7FF0 << 48)
E8M0 = Number("u1", 0xFF)

#: Type -> its scales and minimums: (byte offset in the qblock, format). Types of plain integers,
#: and NVFP4 (whose 8-bit scales are finite whatever their bits), have none.
SCALES: dict[str, tuple[tuple[int, Number], ...]] = {
    "F32": ((0, F32),),
    "F16": ((0, F16),),
    "BF16": ((0, BF16),),
    "F64": ((0, F64),),
    "Q4_0": ((0, F16),),
    "Q4_1": ((0, F16), (2, F16)),
    "Q5_0": ((0, F16),),
    "Q5_1": ((0, F16), (2, F16)),
    "Q8_0": ((0, F16),),
    "Q2_K": ((80, F16), (82, F16)),
    "Q3_K": ((108, F16),),
    "Q4_K": ((0, F16), (2, F16)),
    "Q5_K": ((0, F16), (2, F16)),
    "Q6_K": ((208, F16),),
    "Q8_K": ((0, F32),),
    "IQ1_S": ((0, F16),),
    "IQ2_XXS": ((0, F16),),
    "IQ2_XS": ((0, F16),),
    "IQ2_S": ((0, F16),),
    "IQ3_XXS": ((0, F16),),
    "IQ3_S": ((0, F16),),
    "IQ4_NL": ((0, F16),),
    "IQ4_XS": ((0, F16),),
    "TQ1_0": ((52, F16),),
    "TQ2_0": ((64, F16),),
    "MXFP4": ((0, E8M0),),
    "Q1_0": ((0, F16),),
    **dict.fromkeys(("I8", "I16", "I32", "I64", "NVFP4"), ()),
}

#: IQ1_M keeps the four nibbles of an F16 scale in the high nibbles of its last four 16-bit words;
#: the exponent lies in these bits of the words at these offsets.
_IQ1_M = ((52, 0xC000), (54, 0x7000))


def is_known(qtype: gguf.GGMLQuantizationType) -> bool:
    """Whether the scales of this type can be checked."""
    return qtype.name in SCALES or qtype.name == "IQ1_M"


def bad_qblocks(data: NDArray[np.uint8], qtype: gguf.GGMLQuantizationType) -> NDArray[np.intp]:
    """Numbers of the qblocks in `data` (whole qblocks) that have a NaN or infinite scale, sorted.

    The type must be a known one. Elements of plain types count as qblocks.
    """
    if qtype.name == "IQ1_M":
        fields = [(offset, Number("<u2", bits)) for offset, bits in _IQ1_M]
        masks = [_all_set(data, qtype, offset, number) for offset, number in fields]
        return np.flatnonzero(masks[0] & masks[1])
    found = [np.empty(0, np.intp)]
    for offset, number in SCALES[qtype.name]:
        found.append(np.flatnonzero(_all_set(data, qtype, offset, number)))
    return np.unique(np.concatenate(found)) if sum(map(len, found)) else found[0]


def _all_set(
    data: NDArray[np.uint8], qtype: gguf.GGMLQuantizationType, offset: int, number: Number
) -> NDArray[np.bool_]:
    """For each qblock, whether the number at `offset` has all bits of its exponent set."""
    _, size = gguf.GGML_QUANT_SIZES[qtype]
    dtype = np.dtype(number.dtype)
    bits: NDArray[np.unsignedinteger] = np.ndarray(
        (data.size // size,), dtype, data, offset, (size,)
    )
    exponent = dtype.type(number.exponent)
    result: NDArray[np.bool_] = (bits & exponent) == exponent
    return result
