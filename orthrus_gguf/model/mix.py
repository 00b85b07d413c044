"""Which tensor of a quantized file gets which type: llama-quantize's mixes, rule by rule.

A mix spends more bits where errors hurt most: on the output, on attn_v, on ffn_down, and in the
first and last layers. Source: llama_tensor_get_type_impl in llama.cpp's src/llama-quant.cpp, less
what only concerns other architectures and mixtures of experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import gguf

from orthrus_gguf.model.architectures import LLAMA, QWEN2
from orthrus_gguf.model.config import ModelConfig

_Type = gguf.GGMLQuantizationType
Kind = gguf.GGMLQuantizationType

#: Mixes of 2 bits and less, which keep to types of their own.
_TINY = ("iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq1_s", "iq1_m")

#: Mix → type of the token embedding where the model has an output of its own.
_EMBEDDING = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), _Type.Q2_K),
    **dict.fromkeys(("iq2_s", "iq2_m", "iq3_xxs"), _Type.IQ3_S),
}
_ATTN_OUTPUT = {
    "q2_k": _Type.Q3_K,
    "q3_k_m": _Type.Q4_K,
    "q3_k_l": _Type.Q5_K,
    "iq3_xxs": _Type.IQ3_S,
    "iq3_m": _Type.Q4_K,
    "iq2_s": _Type.IQ3_S,
    "iq2_m": _Type.IQ3_S,
    "iq1_s": _Type.IQ2_XXS,
    "iq1_m": _Type.IQ2_XXS,
}
_ATTN_QK = {"iq3_xs": _Type.IQ3_XXS, "iq3_xxs": _Type.IQ2_S}

#: Mix → type of attn_v where at least four query heads share a KV head (then it is small), and
#: where fewer do. For the mixes that do not look at the layer.
_ATTN_V_SHARED = {
    **dict.fromkeys(("q2_k", "q2_k_s", *_TINY), _Type.Q4_K),
    **dict.fromkeys(("iq3_xxs", "iq3_xs", "iq3_s", "iq3_m"), _Type.Q4_K),
    **dict.fromkeys(("iq4_nl", "iq4_xs", "q3_k_l"), _Type.Q5_K),
}
_ATTN_V = {
    "q2_k": _Type.Q3_K,
    "q3_k_l": _Type.Q5_K,
    "iq3_m": _Type.Q4_K,
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), _Type.Q2_K),
    **dict.fromkeys(("iq2_s", "iq2_m"), _Type.IQ3_S),
}

#: Mix → type of ffn_down in the first eighth of the layers, with or without an imatrix.
_FIRST_FFN_DOWN = {
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq1_s", "iq1_m"), _Type.Q2_K),
    **dict.fromkeys(("iq2_s", "iq2_m"), _Type.IQ3_S),
    "q2_k_s": _Type.Q4_K,
    "iq3_m": _Type.Q4_K,
    "q4_k_s": _Type.Q5_K,
}

#: What rows that do not divide into 256s become, where 32s are possible.
_FALLBACK = {
    **dict.fromkeys((_Type.Q2_K, _Type.Q3_K), _Type.Q4_0),
    _Type.Q4_K: _Type.Q5_0,
    _Type.Q5_K: _Type.Q5_1,
    _Type.Q6_K: _Type.Q8_0,
    **dict.fromkeys(
        (
            _Type.IQ1_S,
            _Type.IQ1_M,
            _Type.IQ2_XXS,
            _Type.IQ2_XS,
            _Type.IQ2_S,
            _Type.IQ3_XXS,
            _Type.IQ3_S,
            _Type.IQ4_XS,
        ),
        _Type.IQ4_NL,
    ),
}


def fitting(kind: Kind, columns: int) -> Kind:
    """`kind`, or what stands in for it where rows of `columns` are no whole number of qblocks."""
    for candidate in (kind, _FALLBACK.get(kind, kind)):
        if columns % gguf.GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return _Type.F16


def counted(part: str) -> str:
    """The part of a layer that rules and counts take `part` for: what holds values is `attn_v`."""
    return "attn_v" if part == "attn_qkv" else part


@dataclass(frozen=True)
class Mix:
    """The rules of one mix for one model.

    name: of the file type, such as `q4_k_m`. default: its usual type. n_layers: as files count
    them, an MTP block included. gqa: query heads per KV head.
    small_v: attn_v is so small beside the rest of the model that it gets Q5_K at least (llama.cpp
    calls such a model 70B).
    """

    name: str
    default: Kind
    n_layers: int
    gqa: int
    tied: bool
    has_imatrix: bool
    small_v: bool

    @classmethod
    def of(cls, config: ModelConfig, name: str, default: Kind, *, has_imatrix: bool) -> Mix:
        """The rules for a model of shape `config`."""
        gqa = config.n_head // config.n_head_kv
        arch = config.architecture
        return cls(
            name=name,
            default=default,
            n_layers=config.n_blocks,
            gqa=gqa,
            tied=config.tied,
            has_imatrix=has_imatrix,
            small_v=config.n_layers == 80 and (arch is QWEN2 or (arch is LLAMA and gqa > 1)),
        )

    def matrix(self, part: str, index: int) -> Kind:
        """The type of a layer's `part` (such as `attn_v`).

        index: how many tensors of this part, as `counted` names it, came before, in the order of
        layers.
        """
        if counted(part) == "attn_v":
            kind = self._attn_v(index)
            small = self.small_v and self.name not in _TINY
            return _Type.Q5_K if small and kind in (_Type.Q3_K, _Type.Q4_K) else kind
        if part == "ffn_down":
            return self._ffn_down(index)
        if part == "attn_output":
            return _ATTN_OUTPUT.get(self.name, self.default)
        if part in ("attn_q", "attn_k"):
            return _ATTN_QK.get(self.name, self.default)
        if part in ("ffn_gate", "ffn_up") and self.name == "iq3_xs":
            inner = self.n_layers // 8 <= index < 7 * self.n_layers // 8
            return _Type.IQ3_XXS if inner else self.default
        return self.default

    def embedding(self, columns: int) -> Kind:
        """The type of token_embd."""
        if self.tied:
            return self.output(columns)
        return _EMBEDDING.get(self.name, self.default)

    def output(self, columns: int) -> Kind:
        """The type of the output matrix, which may be the token embedding."""
        qblock, _ = gguf.GGML_QUANT_SIZES[self.default]
        if columns % qblock or self.default == _Type.Q8_0:
            return _Type.Q8_0
        return _Type.Q5_K if self.name in (*_TINY, "iq3_xxs") else _Type.Q6_K

    def _attn_v(self, index: int) -> Kind:
        if self.name in ("q4_k_m", "q5_k_m"):
            return _Type.Q6_K if self._gets_more_bits(index) else self.default
        if self.name == "q4_k_s":
            return _Type.Q5_K if index < 4 else self.default
        if self.name == "q3_k_m":
            return _Type.Q5_K if index < 2 else _Type.Q4_K
        if self.name == "iq3_xxs" and self.gqa < 4 and not self.has_imatrix:
            return _Type.IQ3_S
        return (_ATTN_V_SHARED if self.gqa >= 4 else _ATTN_V).get(self.name, self.default)

    def _ffn_down(self, index: int) -> Kind:
        first = index < self.n_layers // 8
        if self.name in ("q4_k_m", "q5_k_m"):
            return _Type.Q6_K if self._gets_more_bits(index) else self.default
        if self.name == "q2_k":
            return _Type.Q3_K
        if self.name == "q3_k_m":
            return _Type.Q5_K if index < self.n_layers // 16 else _Type.Q4_K
        if self.name == "q3_k_l":
            return _Type.Q5_K
        if self.name == "iq3_xxs" and not self.has_imatrix:
            return _Type.Q4_K if first else _Type.Q3_K
        if not first:
            return self.default
        if self.name in ("iq4_nl", "iq4_xs") and not self.has_imatrix:
            return _Type.Q5_K
        if self.name in ("q4_0", "q5_0") and self.has_imatrix:
            return _Type.Q4_1 if self.name == "q4_0" else _Type.Q5_1
        return _FIRST_FFN_DOWN.get(self.name, self.default)

    def _gets_more_bits(self, index: int) -> bool:
        eighth = self.n_layers // 8
        return index < eighth or index >= 7 * self.n_layers // 8 or (index - eighth) % 3 == 2
