"""The reference runtime: torch, float32, every weight dequantized. Slow, plain, the oracle.

AR rows run one at a time, each as a pass of its own. That makes row invariance true by
construction, and it removes every mask: an AR row sees the cache and itself, a diffusion row sees
the cache and its block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import (
    Logits,
    Segment,
    View,
    ar_segment,
    check_path,
    check_segments,
    path_to,
)


@dataclass(frozen=True)
class Attention:
    """Attention weights of one view of one layer; matrices are [out, in]."""

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    q_norm: Tensor
    k_norm: Tensor


@dataclass(frozen=True)
class Layer:
    """One transformer layer: two views of attention, everything else shared."""

    attn_norm: Tensor
    attention: dict[View, Attention]
    ffn_norm: Tensor
    ffn_gate: Tensor
    ffn_up: Tensor
    ffn_down: Tensor


class ReferenceCache:
    """AR keys and values per layer, float32, each [capacity, n_head_kv, head_dim]."""

    def __init__(self, config: ModelConfig, capacity: int) -> None:
        shape = (config.n_layers, capacity, config.n_head_kv, config.head_dim)
        try:
            # Pages of an untouched allocation cost nothing, so the full size can be reserved.
            self.k, self.v = torch.empty(shape), torch.empty(shape)
        except RuntimeError as error:
            gib = 2 * 4 * math.prod(shape) / 2**30
            raise OrthrusError(
                f"a context of {capacity} tokens needs {gib:.1f} GiB of key/value cache, which"
                " cannot be allocated; choose a smaller one with -c"
            ) from error
        self._length = 0
        #: Rows of a tree that wait for `keep_path`, and their keys and values,
        #: each [n_layers, n_head_kv, head_dim].
        self._parents: tuple[int, ...] = ()
        self._tree: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def truncate(self, length: int) -> None:
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate a cache of {self._length} rows to {length}")
        self._length = length
        self.plant(())

    def append(self, rows: int) -> None:
        """Count `rows` more rows as held; their keys and values have been written."""
        self._length += rows
        self.plant(())

    def fit_tree(self, parents: Sequence[int]) -> int:
        """See `TreeCache.fit_tree`: trees need no room, only `keep_path` does."""
        return len(parents)

    def keep_path(self, rows: Sequence[int]) -> None:
        """See `TreeCache.keep_path`."""
        check_path(rows, self._parents)
        self.write_path(rows)
        self.append(len(rows))

    def plant(self, parents: tuple[int, ...]) -> None:
        """Begin a tree, whose rows will be added; drop what is left of an earlier one."""
        self._parents, self._tree = parents, []

    def add_row(self, position: int) -> None:
        """Remember what has been written at `position` as the tree's next row."""
        self._tree.append((self.k[:, position].clone(), self.v[:, position].clone()))

    def write_path(self, rows: Sequence[int]) -> None:
        """Write rows of the tree to the positions from `length` on."""
        for position, row in enumerate(rows, self._length):
            self.k[:, position], self.v[:, position] = self._tree[row]


class ReferenceModel:
    """An Orthrus (or plain Qwen3) model in float32 on the CPU."""

    def __init__(self, file: ModelFile) -> None:
        self.config = file.config
        self.embedding = _weight(file, "token_embd")
        self.layers = [_layer(file, i) for i in range(file.config.n_layers)]
        self.output_norm = _weight(file, "output_norm")
        self.output = self.embedding if file.config.tied else _weight(file, "output")
        self.inv_freq, self.rope_scale = rope_frequencies(file.config.rope, file.config.head_dim)

    @property
    def description(self) -> str:
        return f"reference (torch {torch.__version__}, float32, {torch.get_num_threads()} threads)"

    def close(self) -> None:
        """Nothing to free by hand: torch owns the memory."""

    def new_cache(self, capacity: int) -> ReferenceCache:
        return ReferenceCache(self.config, capacity)

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment], cache: ReferenceCache) -> list[Logits]:
        """See `Model.forward`. AR rows first, one by one; then each diffusion block at once."""
        check_segments(segments, cache)
        cache.plant(())
        results = []
        for segment in segments:
            if segment.view is View.AR:
                rows = self._chain if segment.parents is None else self._tree
                logits = rows(segment, cache)
                wanted = torch.cat([row for row in logits if row is not None] or [self._no_logits])
            else:
                block = self._rows(segment, 0, len(segment), cache, head=bool(segment.wanted))
                wanted = self._no_logits if block is None else block[segment.wanted]
            results.append(wanted.numpy())
        return results

    def _chain(self, segment: Segment, cache: ReferenceCache) -> list[Tensor | None]:
        """Logits [1, n_vocab] of each row, None where they are not wanted."""
        logits = [
            self._rows(segment, i, 1, cache, head=i in segment.wanted) for i in range(len(segment))
        ]
        cache.append(len(segment))
        return logits

    def _tree(self, segment: Segment, cache: ReferenceCache) -> list[Tensor | None]:
        """The same for a tree. A row finds its ancestors in the cache, as a chain's row would."""
        assert segment.parents is not None
        cache.plant(segment.parents)
        logits = []
        for row in range(len(segment)):
            path = path_to(row, segment.parents)
            cache.write_path(path[:-1])
            alone = ar_segment([segment.tokens[row]], segment.start + len(path) - 1)
            logits.append(self._rows(alone, 0, 1, cache, head=row in segment.wanted))
            cache.add_row(alone.start)
        return logits

    @property
    def _no_logits(self) -> Tensor:
        return torch.empty(0, self.config.n_vocab)

    def _rows(
        self, segment: Segment, first: int, count: int, cache: ReferenceCache, *, head: bool
    ) -> Tensor | None:
        """Run `count` rows from `first` together, seeing the cache before them and one another.

        Returns logits [count, n_vocab] when `head`. AR rows are written into the cache.
        """
        start = segment.start + first if segment.view is View.AR else segment.start
        positions = torch.arange(start, start + count)
        x = self.embedding[list(segment.tokens[first : first + count])]
        for index, layer in enumerate(self.layers):
            weights = layer.attention[segment.view]
            q, k, v = self._qkv(self._norm(x, layer.attn_norm), weights, positions)
            if segment.view is View.AR:
                cache.k[index, start : start + count] = k
                cache.v[index, start : start + count] = v
            keys = torch.cat([cache.k[index, :start], k])
            values = torch.cat([cache.v[index, :start], v])
            x = x + attend(q, keys, values) @ weights.output.T
            h = self._norm(x, layer.ffn_norm)
            gate = torch.nn.functional.silu(h @ layer.ffn_gate.T)
            x = x + (gate * (h @ layer.ffn_up.T)) @ layer.ffn_down.T
        return self._norm(x, self.output_norm) @ self.output.T if head else None

    def _qkv(self, h: Tensor, w: Attention, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated q [rows, n_head, head_dim]; k and v [rows, n_head_kv, head_dim]."""
        c = self.config
        q = (h @ w.q.T).view(-1, c.n_head, c.head_dim)
        k = (h @ w.k.T).view(-1, c.n_head_kv, c.head_dim)
        v = (h @ w.v.T).view(-1, c.n_head_kv, c.head_dim)
        q, k = self._norm(q, w.q_norm), self._norm(k, w.k_norm)
        return self._rotate(q, positions), self._rotate(k, positions), v

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, self.config.rms_eps)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """NeoX rotary embedding of x [rows, heads, head_dim]: pairs are (i, i + head_dim / 2)."""
        angles = positions.double()[:, None] * self.inv_freq
        cos = (angles.cos() * self.rope_scale).float()[:, None]
        sin = (angles.sin() * self.rope_scale).float()[:, None]
        low, high = x.chunk(2, dim=-1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Every query sees every key: q [rows, n_head, d], k/v [n, n_head_kv, d] → [rows, n_head·d]."""
    group = q.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(group, dim=1)
    values = values.repeat_interleave(group, dim=1)
    scores = torch.einsum("rhd,nhd->hrn", q, keys) / math.sqrt(q.shape[2])
    mixed = torch.einsum("hrn,nhd->rhd", scores.softmax(-1), values)
    return mixed.reshape(q.shape[0], -1)


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair (float64, [head_dim/2]), and the factor on cos and sin.

    With YaRN, frequencies that turn fewer than `beta_slow` times over the original context are
    divided by `factor`, those above `beta_fast` are kept, and the ones between are blended
    (Peng et al., arXiv 2309.00071, as implemented in llama.cpp and transformers).
    """
    half = head_dim // 2
    pairs = torch.arange(half, dtype=torch.float64)
    extrapolated = rope.freq_base ** (-pairs / half)
    if rope.ext_factor == 0:
        return extrapolated / rope.factor, rope.attn_factor

    def pair_that_turns(times: float) -> float:
        turns = rope.original_context / (times * 2 * math.pi)
        return half * math.log(turns) / math.log(rope.freq_base)

    low = max(math.floor(pair_that_turns(rope.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(rope.beta_slow)), head_dim - 1)
    kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    kept = kept * rope.ext_factor
    blended = extrapolated / rope.factor * (1 - kept) + extrapolated * kept
    return blended, rope.attn_factor * (1 + 0.1 * math.log(rope.factor))


def _layer(file: ModelFile, index: int) -> Layer:
    prefix = f"blk.{index}."
    attention = {View.AR: _attention(file, prefix, "")}
    if file.config.has_heads:
        attention[View.DIFFUSION] = _attention(file, prefix, "_diff")
    names = ("attn_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
    return Layer(attention=attention, **{name: _weight(file, prefix + name) for name in names})


def _attention(file: ModelFile, prefix: str, suffix: str) -> Attention:
    names = ("q", "k", "v", "output", "q_norm", "k_norm")
    return Attention(*(_weight(file, f"{prefix}attn_{name}{suffix}") for name in names))


def _weight(file: ModelFile, name: str) -> Tensor:
    """One tensor in float32, in numpy's (row-major) shape."""
    info = file.tensors[name + ".weight"]
    rows = math.prod(info.shape[:-1])
    values = dequantize(file.data(info.name).reshape(rows, -1), info.type)
    return torch.from_numpy(np.array(values, dtype=np.float32).reshape(info.shape))
