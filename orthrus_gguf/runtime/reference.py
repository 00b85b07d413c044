"""The reference runtime: torch, float32, every weight dequantized. Slow, plain, the oracle.

AR rows run one at a time, each as a pass of its own. That makes row invariance true by
construction, and it removes every mask: an AR row sees the cache and itself, a diffusion row sees
the cache and its block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.drawing import draw_choices
from orthrus_gguf.runtime.protocol import (
    Checkpoint,
    Choices,
    Logits,
    Segment,
    View,
    check_segments,
    path_to,
)

T = TypeVar("T")


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
    """AR keys and values per layer, float32, each [capacity, n_head_kv, head_dim].

    Of pending rows, the path to the one that ran last lies behind the committed rows, and every row
    is kept besides, so that another path can be put there.
    """

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
        self._parents: tuple[int, ...] = ()  # of the pending rows
        self._rows: list[tuple[Tensor, Tensor]] = []  # k, v of each [n_layers, n_head_kv, head_dim]
        self._path: list[int] = []  # rows at the positions from `length` on

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self.k.shape[1]

    def commit(self, rows: Sequence[int]) -> None:
        """See `Cache.commit`."""
        if not self._parents:
            raise ValueError("no rows are pending")
        check_path(rows, self._parents)
        self._put(list(rows))
        self._length += len(rows)
        self.pend(())

    def checkpoint(self, length: int | None = None) -> Checkpoint:
        """See `Cache.checkpoint`."""
        length = self._length if length is None else length
        if not 0 <= length <= self._length:
            raise ValueError(f"no checkpoint at {length} in a cache of {self._length} rows")
        return Checkpoint(length)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Cache.restore`."""
        self._length = self.checkpoint(checkpoint.length).length
        self.pend(())

    def fit(self, parents: Sequence[int]) -> int:
        """See `Cache.fit`: rows of a tree need no room, only a path of it does."""
        return len(parents)

    def assume(self, rows: int) -> None:
        """See `Cache.assume`."""
        if not 0 <= rows <= self.capacity - self._length:
            raise ValueError(f"no room for {rows} rows behind {self._length} of {self.capacity}")
        self._length += rows
        self.pend(())

    def pend(self, parents: tuple[int, ...]) -> None:
        """Begin an AR segment, whose rows will be added; drop what was pending."""
        self._parents, self._rows, self._path = parents, [], []

    def make_way(self) -> int:
        """Put the ancestors of the next pending row where it sees them; return its position."""
        parent = self._parents[len(self._rows)]
        if parent != (self._path[-1] if self._path else -1):
            self._put(path_to(parent, self._parents))
        return self._length + len(self._path)

    def add_row(self) -> None:
        """Take what has been written at the position of `make_way` as the next pending row."""
        position = self._length + len(self._path)
        self._path.append(len(self._rows))
        self._rows.append((self.k[:, position].clone(), self.v[:, position].clone()))

    def _put(self, path: list[int]) -> None:
        """Let these pending rows lie at the positions from `length` on."""
        for i, row in enumerate(path):
            if self._path[i : i + 1] != [row]:
                self.k[:, self._length + i], self.v[:, self._length + i] = self._rows[row]
        self._path = path


@dataclass(frozen=True)
class Results:
    """What a pass computes of a segment: logits of the wanted rows [wanted, n_vocab], and the taps
    asked for [taps, rows, n_embd]."""

    logits: Tensor
    taps: Tensor


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

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """See `Model.forward`. AR rows run one by one, each diffusion block at once."""
        return self._pass(segments, _choices)

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        """See `Model.logits`."""
        return self._pass(segments, lambda segment, results: results.logits.numpy())

    @torch.inference_mode()
    def _pass(
        self, segments: Sequence[Segment], outcome: Callable[[Segment, Results], T]
    ) -> list[T]:
        """Run the segments; what is pending afterwards is theirs, or nothing if this raises."""
        caches = [_cache_of(segment) for segment in segments]
        for cache in caches:
            cache.pend(())
        check_segments(segments)
        self._check_taps(segments)
        try:
            run = {View.AR: self._causal, View.DIFFUSION: self._block}
            pairs = zip(segments, caches, strict=True)
            return [outcome(one, run[one.view](one, cache)) for one, cache in pairs]
        except BaseException:
            for cache in caches:
                cache.pend(())
            raise

    def _check_taps(self, segments: Sequence[Segment]) -> None:
        last = self.config.n_layers + 1
        for tap in (tap for segment in segments for tap in segment.taps):
            if not 0 <= tap <= last:
                raise ValueError(f"no tap {tap}: this model has 0 to {last}")

    def _causal(self, segment: Segment, cache: ReferenceCache) -> Results:
        """A chain or a tree. Every row finds its ancestors, and nothing else, in the cache."""
        cache.pend(segment.parents or tuple(range(-1, len(segment) - 1)))
        rows = []
        for row, token in enumerate(segment.tokens):
            start, head = cache.make_way(), row in segment.wanted
            rows.append(self._rows(cache, View.AR, [token], start, head, segment.taps))
            cache.add_row()
        return Results(
            torch.cat([row.logits for row in rows]), torch.cat([row.taps for row in rows], dim=1)
        )

    def _block(self, segment: Segment, cache: ReferenceCache) -> Results:
        tokens, head = list(segment.tokens), bool(segment.wanted)
        block = self._rows(cache, View.DIFFUSION, tokens, segment.start, head, segment.taps)
        return Results(block.logits[segment.wanted], block.taps) if head else block

    def _rows(
        self,
        cache: ReferenceCache,
        view: View,
        tokens: list[int],
        start: int,
        head: bool,
        taps: tuple[int, ...],
    ) -> Results:
        """Run rows from `start` on together, seeing the cache before them and one another.

        Logits of all rows with `head`, else of none. AR rows are written into the cache.
        """
        stop = start + len(tokens)
        positions = torch.arange(start, stop)
        x = self.embedding[tokens]
        inputs = [x]
        for index, layer in enumerate(self.layers):
            weights = layer.attention[view]
            q, k, v = self._qkv(self._norm(x, layer.attn_norm), weights, positions)
            if view is View.AR:
                cache.k[index, start:stop], cache.v[index, start:stop] = k, v
            keys = torch.cat([cache.k[index, :start], k])
            values = torch.cat([cache.v[index, :start], v])
            x = x + attend(q, keys, values) @ weights.output.T
            h = self._norm(x, layer.ffn_norm)
            gate = torch.nn.functional.silu(h @ layer.ffn_gate.T)
            x = x + (gate * (h @ layer.ffn_up.T)) @ layer.ffn_down.T
            inputs.append(x)
        inputs.append(self._norm(x, self.output_norm))
        logits = inputs[-1] @ self.output.T if head else x.new_empty(0, self.config.n_vocab)
        return Results(logits, torch.stack(inputs)[list(taps)])

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


def _cache_of(segment: Segment) -> ReferenceCache:
    if not isinstance(segment.cache, ReferenceCache):
        raise TypeError(f"expected a cache of the reference runtime, found {segment.cache}")
    return segment.cache


def check_path(rows: Sequence[int], parents: Sequence[int]) -> None:
    """Raise ValueError unless `rows` are a path of the tree from its root on, or nothing."""
    follows = [parents[row] if 0 <= row < len(parents) else None for row in rows]
    if follows != [-1, *rows][: len(rows)]:
        raise ValueError(f"rows {list(rows)} are no path from the first of {len(parents)} rows")


def _choices(segment: Segment, results: Results) -> Choices:
    """What `Model.forward` says of a segment."""
    rows = draw_choices(segment, results.logits.numpy())
    return Choices(rows, results.taps.numpy() if segment.taps else None)


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
