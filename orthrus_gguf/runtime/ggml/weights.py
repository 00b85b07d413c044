"""The model's weights as ggml tensors, over the mapped file itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml import selftest
from orthrus_gguf.ggml.library import Library
from orthrus_gguf.ggml.tensors import ALIGNMENT, Tensors, aligned_bytes
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import View

_F32 = gguf.GGMLQuantizationType.F32

_MULTIPLIABLE = """
F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS
IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S TQ1_0 TQ2_0 MXFP4
"""

#: Weight types that ggml's CPU backend multiplies and looks rows up in, by name, because the older
#: gguf packages do not know them all. Q8_1 and Q8_K are only ever the other operand.
MULTIPLIABLE = frozenset(_MULTIPLIABLE.split())

_PROJECTIONS = ("q", "k", "v", "output")

#: Rows of one matrix of each type that are tried for row invariance when a model is loaded.
SAMPLE_ROWS = 24


@dataclass(frozen=True)
class AttentionWeights:
    """One view's attention of one layer; every field is a ggml tensor, or None where the
    architecture has none."""

    q: int
    k: int
    v: int
    output: int
    q_norm: int | None
    k_norm: int | None
    q_bias: int | None
    k_bias: int | None
    v_bias: int | None


@dataclass(frozen=True)
class LayerWeights:
    """One layer; every field but `attention` is a ggml tensor, shared by both views."""

    attention: dict[View, AttentionWeights]
    attn_norm: int
    ffn_norm: int
    ffn_gate: int
    ffn_up: int
    ffn_down: int


class Weights:
    """All weights of a model, used where the file's mapping holds them.

    types: of the matrices. freq_factors: what RoPE's frequencies are divided by, F32
    [head_dim / 2], or None. copied_bytes: what had to be copied: vectors that are not F32, which
    ggml could not calculate with, and tensors at addresses that ggml refuses (files may be aligned
    to less than 32 bytes).
    """

    def __init__(self, library: Library, file: ModelFile) -> None:
        """Raises OrthrusError for a weight type that cannot be used."""
        self._api = library.api
        self._file = file
        self._memory: list[NDArray[np.uint8]] = []  # keeps mapping and copies alive
        self.copied_bytes = 0
        self.types = _checked_types(library, file)
        self._tensors = Tensors(library.api, len(file.tensors) + 1)
        try:
            config = file.config
            self.token_embd = self._place("token_embd")
            self.output_norm = self._place("output_norm")
            self.output = self.token_embd if config.tied else self._place("output")
            self.freq_factors = self._freq_factors()
            self.layers = [self._layer(f"blk.{index}.") for index in range(config.n_layers)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the tensors and let go of the mapping."""
        self._tensors.close()
        self._memory.clear()

    def _layer(self, prefix: str) -> LayerWeights:
        attention = {View.AR: self._attention(prefix, "")}
        if self._file.config.has_heads:
            attention[View.DIFFUSION] = self._attention(prefix, "_diff")
        names = ("attn_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
        return LayerWeights(attention, *(self._place(prefix + name) for name in names))

    def _attention(self, prefix: str, suffix: str) -> AttentionWeights:
        def place(name: str, part: str = "weight", *, there: bool = True) -> int | None:
            return self._place(f"{prefix}attn_{name}{suffix}", part) if there else None

        arch = self._file.config.architecture
        matrices = (self._place(f"{prefix}attn_{name}{suffix}") for name in _PROJECTIONS)
        norms = (place(name, there=arch.qk_norms) for name in ("q_norm", "k_norm"))
        biases = (place(name, "bias", there=arch.qkv_biases) for name in ("q", "k", "v"))
        return AttentionWeights(*matrices, *norms, *biases)

    def _freq_factors(self) -> int | None:
        """The config's, wherever they come from."""
        factors = self._file.config.rope.freq_factors
        if factors is None:
            return None
        data = aligned_bytes(4 * len(factors))
        data.view(np.float32)[:] = factors
        self._memory.append(data)
        return self._tensors.place(int(_F32), (len(factors),), data.ctypes.data)

    def _place(self, name: str, part: str = "weight") -> int:
        info = self._file.tensors[f"{name}.{part}"]
        data, qtype = self._file.data(info.name), info.type
        if len(info.shape) == 1 and qtype is not _F32:
            data, qtype = quants.dequantize(data, qtype).astype(np.float32).view(np.uint8), _F32
            self.copied_bytes += data.nbytes
        expected = math.prod(info.shape[:-1]) * self._api.row_size(int(qtype), info.shape[-1])
        if data.nbytes != expected:
            raise OrthrusError(
                f"{self._file.paths[0]}: tensor {info.name}: {data.nbytes} bytes, but ggml expects "
                f"{expected} for {qtype.name} {info.shape}; the file and ggml disagree on this type"
            )
        if data.ctypes.data % ALIGNMENT:
            copy = aligned_bytes(data.nbytes)
            copy[:] = data
            data = copy
            self.copied_bytes += data.nbytes
        self._memory.append(data)
        return self._tensors.place(int(qtype), info.shape, data.ctypes.data)


def _checked_types(library: Library, file: ModelFile) -> frozenset[gguf.GGMLQuantizationType]:
    """The types of the matrices, all of them known and safe to use."""
    samples = {}
    for info in file.tensors.values():
        if len(info.shape) == 1:
            continue
        if info.type.name not in MULTIPLIABLE:
            raise OrthrusError(
                f"{file.paths[0]}: tensor {info.name}: type {info.type.name} cannot be used on the "
                "CPU; requantize the model, for instance to Q8_0 or Q4_K_M"
            )
        samples[info.type] = info
    for qtype, info in samples.items():
        rows, columns = info.shape
        some = file.data(info.name).reshape(rows, -1)[:SAMPLE_ROWS]
        if selftest.depends_on_company(library.api, some, qtype, columns):
            raise OrthrusError(
                f"ggml {library.version} in {library.path}: products of a row with {qtype.name} "
                "depend on the rows beside it, so drafts could change the text; use another ggml"
            )
    return frozenset(samples)
