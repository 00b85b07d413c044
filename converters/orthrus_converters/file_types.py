"""The types that a file can be written in, and which tensor gets which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import gguf

_Type = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class FileType:
    """What `--type` names: the type of the matrices, and its number in `general.file_type`."""

    name: str
    weights: gguf.GGMLQuantizationType
    number: gguf.LlamaFileType


FILE_TYPES = {
    file_type.name: file_type
    for file_type in (
        FileType("f32", _Type.F32, gguf.LlamaFileType.ALL_F32),
        FileType("f16", _Type.F16, gguf.LlamaFileType.MOSTLY_F16),
        FileType("bf16", _Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
        FileType("q8_0", _Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    )
}


def lossless_type(dtypes: Iterable[str]) -> FileType:
    """The smallest type that keeps weights of these safetensors dtypes exactly."""
    kinds = set(dtypes)
    if kinds == {"BF16"}:
        return FILE_TYPES["bf16"]
    return FILE_TYPES["f16" if kinds == {"F16"} else "f32"]


def tensor_type(
    name: str, shape: tuple[int, ...], file_type: FileType
) -> gguf.GGMLQuantizationType:
    """The type of one tensor: norms in F32, matrices in the type of the file.

    Rows that do not divide into qblocks become F16, as llama.cpp's converter does.
    """
    if len(shape) == 1 or "_norm" in name:
        return _Type.F32
    qblock, _ = gguf.GGML_QUANT_SIZES[file_type.weights]
    return _Type.F16 if shape[-1] % qblock else file_type.weights
