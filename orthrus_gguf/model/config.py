"""ModelConfig: everything the runtimes need to know about a model, read once from metadata."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import gguf
import numpy as np

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.fields import Fields, describe
from orthrus_gguf.gguf.reader import Value
from orthrus_gguf.model.architectures import (
    ARCHITECTURES,
    DFLASH,
    QWEN3,
    RELATIVES,
    Architecture,
    LayerKind,
)
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.hybrid import Hybrid, mtp_key, read_hybrid
from orthrus_gguf.records import dataclass

# Sanity limits, far above any model and far below what could exhaust memory by itself.
MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_HEAD_DIM = 1024
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 24
MAX_CONTEXT = 1 << 30
BLOCK_SIZES = (2, 1024)

#: Keys of features that are not supported, and the values that leave them unused.
NEUTRAL = {
    gguf.Keys.Attention.SLIDING_WINDOW: (0,),
    gguf.Keys.Attention.CAUSAL: (True,),
    gguf.Keys.LLM.EXPERT_COUNT: (0,),
}

#: What llama.cpp's converter writes about YaRN and llama.cpp reads for a few architectures only,
#: none of them ours. It means Hugging Face's settings, which ggml's are not: `yarn_attn_factor` is
#: the final magnitude, say, that ggml computes by itself.
YARN_UNREAD = (
    gguf.Keys.Rope.SCALING_YARN_EXT_FACTOR,
    gguf.Keys.Rope.SCALING_YARN_ATTN_FACTOR,
    gguf.Keys.Rope.SCALING_YARN_BETA_FAST,
    gguf.Keys.Rope.SCALING_YARN_BETA_SLOW,
)

#: An older name of `rope.scaling.factor`, for linear scaling only.
SCALE_LINEAR = "{arch}.rope.scale_linear"


@dataclass(frozen=True)
class Rope:
    """Rotary embedding; the architecture says which elements are a pair (`Pairing`).

    `factor` divides all frequencies where the context is scaled linearly, some of them with YaRN;
    without scaling it is 1. `ext_factor` is 0 without YaRN and 1 with it; this, the betas and
    `attn_factor`, which comes before YaRN's own magnitude correction, are `ggml_rope_ext`'s
    arguments. `freq_factors` divide the frequency of each pair, as llama3 scaling has it
    (`rope_freqs.weight`).
    """

    freq_base: float
    factor: float = 1.0
    original_context: int = 0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    freq_factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one model, with or without Orthrus heads (sizes in elements).

    beside: the network of a drafter beside it; None without.
    hybrid: of a model whose layers are of two kinds; None if all are attention.
    """

    name: str
    n_layers: int
    n_ctx_train: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    rms_eps: float
    rope: Rope
    tied: bool
    block_size: int | None
    mask_token: int | None
    architecture: Architecture = QWEN3
    beside: Beside | None = None
    hybrid: Hybrid | None = None

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What each layer is. The MTP block of a hybrid is none of them."""
        if self.hybrid is None:
            return (LayerKind.ATTENTION,) * self.n_layers
        return self.hybrid.kinds(self.n_layers)

    @property
    def n_blocks(self) -> int:
        """Layers as files count them: with the MTP block behind them."""
        return self.n_layers + (self.hybrid is not None and self.hybrid.mtp)

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that RoPE turns: the first ones."""
        return self.head_dim if self.hybrid is None else self.hybrid.rotary_dim

    @property
    def has_heads(self) -> bool:
        """True when the diffusion view can be used."""
        return self.block_size is not None and self.mask_token is not None

    @classmethod
    def from_metadata(
        cls,
        metadata: Mapping[str, Value],
        *,
        path: Path,
        n_vocab: int,
        tied: bool,
        has_heads: bool,
        layers: Architecture | None = None,
    ) -> ModelConfig:
        """The config of a file, with every value checked.

        path: the file, for error messages and as a stand-in for a missing name.
        n_vocab: rows of `token_embd.weight`. tied: no `output.weight`.
        has_heads: whether the block size and the mask token are required, or left out.
        layers: what they have, where the file is no model and the caller has looked at what else it
            says (`drafter.py`).
        Raises OrthrusError for a key that is missing, of the wrong type, out of range, or that
        contradicts another.
        """
        fields = Fields(metadata, path)
        if layers is None:
            arch, record = architecture(fields)
            _check_neutral(fields, arch)
        else:
            arch, record = layers.name, layers
        _check_vocabulary(fields, n_vocab)
        llm, attention = gguf.Keys.LLM, gguf.Keys.Attention
        key = partial(keys.model_key, arch=arch)
        n_blocks = fields.integer(key(llm.BLOCK_COUNT), 1, MAX_LAYERS)
        n_ctx_train = fields.integer(key(llm.CONTEXT_LENGTH), 1, MAX_CONTEXT)
        n_embd = fields.integer(key(llm.EMBEDDING_LENGTH), 1, MAX_WIDTH)
        n_head = fields.uniform_integer(key(attention.HEAD_COUNT), 1, MAX_HEADS)
        n_head_kv = fields.uniform_integer(key(attention.HEAD_COUNT_KV), 1, n_head, n_head)
        if n_head % n_head_kv:
            raise fields.error(
                key(attention.HEAD_COUNT_KV),
                f"expected a divisor of the {n_head} heads, found {n_head_kv}",
            )
        head_dim = _head_dim(fields, arch, n_embd // n_head, record)
        hybrid = read_hybrid(fields, arch, head_dim) if record.hybrid else None
        n_layers = n_blocks - (hybrid is not None and hybrid.mtp)
        if not n_layers:
            raise fields.error(mtp_key(arch), "leaves no layers before the MTP block")
        block_size = mask_token = None
        if has_heads:
            _check_diffusion_keys(fields)
            block_size = fields.integer(keys.BLOCK_SIZE, *BLOCK_SIZES)
            mask_token = fields.integer(keys.MASK_TOKEN_ID, 0, n_vocab - 1)
        return cls(
            name=fields.text(gguf.Keys.General.NAME, "") or path.stem,
            n_layers=n_layers,
            n_ctx_train=n_ctx_train,
            n_embd=n_embd,
            n_ff=fields.uniform_integer(key(llm.FEED_FORWARD_LENGTH), 1, MAX_WIDTH),
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_vocab=n_vocab,
            rms_eps=fields.positive(key(attention.LAYERNORM_RMS_EPS)),
            rope=_rope(fields, arch, record, n_ctx_train),
            tied=tied,
            block_size=block_size,
            mask_token=mask_token,
            architecture=record,
            hybrid=hybrid,
        )


def ignored_keys(metadata: Mapping[str, Value], path: Path) -> list[str]:
    """A line about keys of the file that look as if they changed the model, if there are any."""
    arch = str(metadata.get(gguf.Keys.General.ARCHITECTURE))
    names = [key for t in YARN_UNREAD if (key := keys.model_key(t, arch)) in metadata]
    return [f"{path}: ignored, as llama.cpp does: {', '.join(names)}"] if names else []


def architecture(fields: Fields) -> tuple[str, Architecture]:
    """The prefix of the file's keys, and what its layers have.

    Files with heads are `orthrus`; they say which architecture their base has, unless it is qwen3.
    """
    key = gguf.Keys.General.ARCHITECTURE
    prefix = fields.text(key)
    known = ", ".join(map(repr, ARCHITECTURES))
    if prefix in ARCHITECTURES:
        return prefix, ARCHITECTURES[prefix]
    if prefix in RELATIVES:
        raise OrthrusError(
            f"{fields.path}: is {prefix}, {RELATIVES[prefix]}: not supported; use a dense"
            " Qwen3.5 or 3.6 (qwen35)"
        )
    if prefix == DFLASH.name:
        raise OrthrusError(
            f"{fields.path}: is a drafter ({prefix}), which drafts for another model; open that"
            f" model, with --drafter {fields.path}"
        )
    if prefix != keys.ARCH_ORTHRUS:
        raise fields.error(
            key,
            f"expected {keys.ARCH_ORTHRUS!r} or one of {known}, found {describe(prefix)}",
            "models of other architectures are not supported",
        )
    key = keys.BASE_ARCHITECTURE
    base = fields.text(key, QWEN3.name)
    if base not in ARCHITECTURES:
        raise fields.error(
            key,
            f"expected one of {known}, found {describe(base)}",
            "heads for bases of other architectures are not supported",
        )
    return prefix, ARCHITECTURES[base]


def _check_neutral(fields: Fields, arch: str) -> None:
    """Refuse settings that this runtime does not implement rather than ignore them."""
    for template, harmless in NEUTRAL.items():
        key = keys.model_key(template, arch)
        if key not in fields.metadata:
            continue
        value = fields.metadata[key]
        if not isinstance(value, (int, float)) or value not in harmless:
            raise fields.error(
                key, f"{describe(value)} is not supported", "models that use it cannot run here"
            )


def _check_diffusion_keys(fields: Fields) -> None:
    for key in (keys.BLOCK_SIZE, keys.MASK_TOKEN_ID):
        if key not in fields.metadata:
            raise fields.error(
                key,
                "is missing, but the file holds diffusion heads, which are unusable without it",
            )


def _head_dim(fields: Fields, arch: str, default: int, record: Architecture) -> int:
    """Elements per head. Keys and values must agree on it, and the rotated part of all but
    hybrids."""
    key_length = keys.model_key(gguf.Keys.Attention.KEY_LENGTH, arch)
    head_dim = fields.integer(key_length, 2, MAX_HEAD_DIM, default)
    if head_dim % 2:
        raise fields.error(key_length, f"expected an even number, found {head_dim}")
    rotated = () if record.hybrid else (gguf.Keys.Rope.DIMENSION_COUNT,)
    for template in (gguf.Keys.Attention.VALUE_LENGTH, *rotated):
        key = keys.model_key(template, arch)
        other = fields.integer(key, 0, MAX_WIDTH, head_dim)
        if other != head_dim:
            raise fields.error(key, f"expected {head_dim} as in {key_length}, found {other}")
    return head_dim


def _rope(fields: Fields, arch: str, record: Architecture, n_ctx_train: int) -> Rope:
    """RoPE settings, but for the frequency factors, which are a tensor."""
    rope = gguf.Keys.Rope
    key = partial(keys.model_key, arch=arch)
    freq_base = fields.positive(key(rope.FREQ_BASE), record.freq_base)
    scaling = fields.text(key(rope.SCALING_TYPE), "linear")  # llama.cpp's default
    factor_key = key(rope.SCALING_FACTOR)
    if factor_key not in fields.metadata and key(SCALE_LINEAR) in fields.metadata:
        factor_key = key(SCALE_LINEAR)
    factor = fields.number(factor_key, 1.0) or 1.0  # in llama.cpp, 0 means unset
    attn_factor = fields.positive(key(rope.SCALING_ATTN_FACTOR), 1.0)
    if scaling not in ("none", "linear", "yarn"):
        raise fields.error(
            key(rope.SCALING_TYPE),
            f"expected 'yarn', 'linear' or 'none', found {describe(scaling)}",
            "this RoPE scaling is not supported",
        )
    if scaling != "none" and factor < 1.0:
        raise fields.error(factor_key, f"expected at least 1, found {factor}")
    if scaling != "yarn":
        factor = factor if scaling == "linear" else 1.0
        return Rope(freq_base, factor=factor, attn_factor=attn_factor)
    if freq_base <= 1.0:
        raise fields.error(
            key(rope.FREQ_BASE), f"expected a number above 1 with YaRN, found {freq_base}"
        )
    original_context = fields.integer(key(rope.SCALING_ORIG_CTX_LEN), 1, MAX_CONTEXT, n_ctx_train)
    return Rope(
        freq_base,
        factor=factor,
        original_context=original_context,
        ext_factor=1.0,
        attn_factor=attn_factor,
    )


def _check_vocabulary(fields: Fields, n_vocab: int) -> None:
    """The tokenizer's arrays (where there is a tokenizer) must fit the embedding."""
    if not 1 <= n_vocab <= MAX_VOCAB:
        raise OrthrusError(
            f"{fields.path}: expected a vocabulary of 1 to {MAX_VOCAB} tokens, found {n_vocab} "
            "rows in token_embd.weight; convert the model again"
        )
    tokenizer = gguf.Keys.Tokenizer
    tokens = fields.metadata.get(tokenizer.LIST)
    if tokens is not None:
        if not isinstance(tokens, list):
            raise fields.error(
                tokenizer.LIST, f"expected an array of strings, found {describe(tokens)}"
            )
        if len(tokens) != n_vocab:
            raise fields.error(
                tokenizer.LIST,
                f"expected {n_vocab} tokens as in token_embd.weight, found {len(tokens)}",
            )
    merges = fields.metadata.get(tokenizer.MERGES)
    if merges is not None and not isinstance(merges, list):
        raise fields.error(
            tokenizer.MERGES, f"expected an array of strings, found {describe(merges)}"
        )
    for key, kind, word in (
        (tokenizer.TOKEN_TYPE, np.integer, "integers"),
        (tokenizer.SCORES, np.floating, "floats"),
    ):
        array = fields.metadata.get(key)
        if array is None:
            continue
        if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, kind):
            raise fields.error(key, f"expected an array of {word}, found {describe(array)}")
        if array.size != n_vocab:
            raise fields.error(key, f"expected {n_vocab} elements, found {array.size}")
