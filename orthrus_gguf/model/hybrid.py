"""What a hybrid model (`qwen35`) has besides a transformer: gated DeltaNet layers, an MTP block.

A DeltaNet layer keeps no keys and values but a state of fixed size: per value head a matrix, and
the rows that its causal convolution looks back on.
"""

from __future__ import annotations

from functools import partial

import gguf
import numpy as np

from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.fields import Fields, describe
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.records import dataclass

#: Rows that the convolution of every released model spans.
CONV_KERNEL = 4
#: Every such layer is attention, where a file does not say.
ATTENTION_EVERY = 4

MAX_HEADS = 4096
MAX_HEAD_DIM = 1024

_SECTIONS = gguf.Keys.Rope.DIMENSION_SECTIONS
_SSM = gguf.Keys.SSM


@dataclass(frozen=True)
class Hybrid:
    """Shape of the DeltaNet layers, and what else sets a hybrid apart (sizes in elements).

    n_key_heads, n_value_heads: of one DeltaNet layer, all of `head_dim`; in files, value head h
    reads key head h mod n_key_heads. attention_every: layer i is attention where i + 1 is a
    multiple of it. rotary_dim: of an attention head's elements, how many RoPE turns, the first
    ones. sections: pairs that turn by time, height, width and a fourth position; the positions of
    text are equal, so RoPE is the ordinary one. mtp: the file holds a block, behind the layers,
    that predicts one token more.
    """

    n_key_heads: int
    n_value_heads: int
    head_dim: int
    rotary_dim: int
    sections: tuple[int, ...]
    attention_every: int = ATTENTION_EVERY
    mtp: bool = False

    @property
    def channels(self) -> int:
        """What the convolution runs over: queries, keys and values."""
        return (2 * self.n_key_heads + self.n_value_heads) * self.head_dim

    @property
    def inner(self) -> int:
        """All values of a layer."""
        return self.n_value_heads * self.head_dim

    def kinds(self, n_layers: int) -> tuple[LayerKind, ...]:
        """What each layer is."""
        return tuple(
            LayerKind.DELTA_NET if (i + 1) % self.attention_every else LayerKind.ATTENTION
            for i in range(n_layers)
        )

    def state_bytes(self, n_layers: int) -> int:
        """Bytes that a sequence's state takes in single precision, however long the text is."""
        layers = self.kinds(n_layers).count(LayerKind.DELTA_NET)
        return 4 * layers * (self.inner * self.head_dim + (CONV_KERNEL - 1) * self.channels)


def read_hybrid(fields: Fields, arch: str, head_dim: int) -> Hybrid:
    """What a file says, checked. head_dim: of an attention head. Raises OrthrusError."""
    key = partial(keys.model_key, arch=arch)
    kernel = fields.integer(key(_SSM.CONV_KERNEL), 1, MAX_HEADS)
    if kernel != CONV_KERNEL:
        raise fields.error(
            key(_SSM.CONV_KERNEL),
            f"expected {CONV_KERNEL}, found {kernel}",
            "other convolutions are not supported",
        )
    size = fields.integer(key(_SSM.STATE_SIZE), 1, MAX_HEAD_DIM)
    n_key_heads = fields.integer(key(_SSM.GROUP_COUNT), 1, MAX_HEADS)
    n_value_heads = fields.integer(key(_SSM.TIME_STEP_RANK), 1, MAX_HEADS)
    if n_value_heads % n_key_heads:
        raise fields.error(
            key(_SSM.TIME_STEP_RANK),
            f"expected a multiple of the {n_key_heads} key heads, found {n_value_heads}",
        )
    inner = fields.integer(key(_SSM.INNER_SIZE), 1, MAX_HEADS * MAX_HEAD_DIM)
    if inner != n_value_heads * size:
        raise fields.error(
            key(_SSM.INNER_SIZE),
            f"expected {n_value_heads * size}, {n_value_heads} heads of {size}, found {inner}",
        )
    rotary = _rotary_dim(fields, key(gguf.Keys.Rope.DIMENSION_COUNT), head_dim)
    every_key = key(gguf.Keys.LLM.FULL_ATTENTION_INTERVAL)
    return Hybrid(
        n_key_heads=n_key_heads,
        n_value_heads=n_value_heads,
        head_dim=size,
        rotary_dim=rotary,
        sections=_sections(fields, key(_SECTIONS), rotary),
        attention_every=fields.integer(every_key, 1, MAX_HEADS, ATTENTION_EVERY),
        mtp=bool(fields.integer(mtp_key(arch), 0, 1, 0)),
    )


def mtp_key(arch: str) -> str:
    """The key that says how many MTP blocks stand behind the layers, and count as such."""
    return keys.model_key(gguf.Keys.LLM.NEXTN_PREDICT_LAYERS, arch)


def _rotary_dim(fields: Fields, key: str, head_dim: int) -> int:
    found = fields.integer(key, 2, head_dim, head_dim)
    if found % 2:
        raise fields.error(key, f"expected an even number, found {found}")
    return found


def _sections(fields: Fields, key: str, rotary_dim: int) -> tuple[int, ...]:
    """Pairs by what turns them; of text all turn alike, but for pairs that no section covers."""
    value = fields.metadata.get(key)
    if value is None:
        raise fields.error(key, "is missing")
    if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, np.integer):
        raise fields.error(key, f"expected an array of integers, found {describe(value)}")
    sections = value.tolist()
    if not 3 <= len(sections) <= 4 or min(sections) < 0 or any(sections[3:]):
        raise fields.error(key, f"expected three numbers and a 0, found {sections}")
    if sum(sections) != rotary_dim // 2:
        raise fields.error(
            key,
            f"expected {rotary_dim // 2} pairs in all, found {sections}",
            "other kinds of M-RoPE are not supported",
        )
    return tuple(sections)
