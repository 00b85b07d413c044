"""The types that a file can be written in, by the names that llama.cpp gives them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import gguf

_Type = gguf.GGMLQuantizationType
_Number = gguf.LlamaFileType


@dataclass(frozen=True)
class FileType:
    """What `--type` names.

    weights: the default type of the matrices; `Mix` has the exceptions.
    number: in `general.file_type`.
    """

    name: str
    weights: gguf.GGMLQuantizationType
    number: gguf.LlamaFileType


#: From the largest to the smallest.
FILE_TYPES = {
    file_type.name: file_type
    for file_type in (
        FileType("f32", _Type.F32, _Number.ALL_F32),
        FileType("f16", _Type.F16, _Number.MOSTLY_F16),
        FileType("bf16", _Type.BF16, _Number.MOSTLY_BF16),
        FileType("q8_0", _Type.Q8_0, _Number.MOSTLY_Q8_0),
        FileType("q6_k", _Type.Q6_K, _Number.MOSTLY_Q6_K),
        FileType("q5_1", _Type.Q5_1, _Number.MOSTLY_Q5_1),
        FileType("q5_k_m", _Type.Q5_K, _Number.MOSTLY_Q5_K_M),
        FileType("q5_k_s", _Type.Q5_K, _Number.MOSTLY_Q5_K_S),
        FileType("q5_0", _Type.Q5_0, _Number.MOSTLY_Q5_0),
        FileType("q4_1", _Type.Q4_1, _Number.MOSTLY_Q4_1),
        FileType("q4_k_m", _Type.Q4_K, _Number.MOSTLY_Q4_K_M),
        FileType("q4_k_s", _Type.Q4_K, _Number.MOSTLY_Q4_K_S),
        FileType("q4_0", _Type.Q4_0, _Number.MOSTLY_Q4_0),
        FileType("iq4_nl", _Type.IQ4_NL, _Number.MOSTLY_IQ4_NL),
        FileType("iq4_xs", _Type.IQ4_XS, _Number.MOSTLY_IQ4_XS),
        FileType("q3_k_l", _Type.Q3_K, _Number.MOSTLY_Q3_K_L),
        FileType("q3_k_m", _Type.Q3_K, _Number.MOSTLY_Q3_K_M),
        FileType("q3_k_s", _Type.Q3_K, _Number.MOSTLY_Q3_K_S),
        FileType("iq3_m", _Type.IQ3_S, _Number.MOSTLY_IQ3_M),
        FileType("iq3_s", _Type.IQ3_S, _Number.MOSTLY_IQ3_S),
        FileType("iq3_xs", _Type.IQ3_S, _Number.MOSTLY_IQ3_XS),
        FileType("iq3_xxs", _Type.IQ3_XXS, _Number.MOSTLY_IQ3_XXS),
        FileType("q2_k", _Type.Q2_K, _Number.MOSTLY_Q2_K),
        FileType("q2_k_s", _Type.Q2_K, _Number.MOSTLY_Q2_K_S),
        FileType("iq2_m", _Type.IQ2_S, _Number.MOSTLY_IQ2_M),
        FileType("iq2_s", _Type.IQ2_XS, _Number.MOSTLY_IQ2_S),
        FileType("iq2_xs", _Type.IQ2_XS, _Number.MOSTLY_IQ2_XS),
        FileType("iq2_xxs", _Type.IQ2_XXS, _Number.MOSTLY_IQ2_XXS),
        FileType("iq1_m", _Type.IQ1_M, _Number.MOSTLY_IQ1_M),
        FileType("iq1_s", _Type.IQ1_S, _Number.MOSTLY_IQ1_S),
    )
}

#: Short for the usual one of a family, as in llama-quantize.
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

#: What `--heads-type`, `--tensor-type` … name: the type of one tensor.
TENSOR_TYPES = {
    file_type.weights.name.lower(): file_type.weights for file_type in FILE_TYPES.values()
}


def find_file_type(name: str) -> FileType | None:
    """The file type called `name`, in any case; None if there is none."""
    lower = name.lower()
    return FILE_TYPES.get(ALIASES.get(lower, lower))


def uniform_file_type(kind: gguf.GGMLQuantizationType) -> FileType:
    """The file type of a file whose matrices are all of type `kind`: the plainest that there is."""
    return [file_type for file_type in FILE_TYPES.values() if file_type.weights == kind][-1]


def lossless_type(dtypes: Iterable[str]) -> FileType:
    """The smallest type that keeps weights of these safetensors dtypes exactly."""
    kinds = set(dtypes)
    if kinds == {"BF16"}:
        return FILE_TYPES["bf16"]
    return FILE_TYPES["f16" if kinds == {"F16"} else "f32"]
