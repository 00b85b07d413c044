"""The reference runtime: torch, float32, every weight dequantized. Slow, plain, the oracle.

AR rows run one at a time, each as a pass of its own. That makes row invariance true by
construction, and it removes every mask: an AR row sees the cache and itself, a diffusion row sees
the cache and its block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import LayerKind, Pairing
from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.file import ModelFile, WeightFile
from orthrus_gguf.model.tensors import DELTA_NET, OUTPUT, OUTPUT_NORM, TOKEN_EMBD, in_view
from orthrus_gguf.runtime.attention import check_attention
from orthrus_gguf.runtime.drawing import draw_choices
from orthrus_gguf.runtime.protocol import Choices, Logits, Segment, View, check_segments
from orthrus_gguf.runtime.reference_cache import ReferenceCache
from orthrus_gguf.runtime.reference_hybrid import DeltaNet, HybridCache, delta_row

T = TypeVar("T")


@dataclass(frozen=True)
class Attention:
    """Attention weights of one view of one layer; matrices are [out, in].

    Norms, biases and the gate of the output are None where the architecture has none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    gate: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """One layer: views of attention, or of a DeltaNet instead; everything else is shared.

    place: among the layers of its kind.
    """

    place: int
    attn_norm: Tensor
    attention: dict[View, Attention]
    delta_net: dict[View, DeltaNet]
    ffn_norm: Tensor
    ffn_gate: Tensor
    ffn_up: Tensor
    ffn_down: Tensor


@dataclass(frozen=True)
class Results:
    """What a pass computes of a segment: logits of the wanted rows [wanted, n_vocab], and the taps
    asked for [taps, rows, n_embd]."""

    logits: Tensor
    taps: Tensor


class ReferenceModel:
    """A model, with or without Orthrus heads, in float32 on the CPU."""

    def __init__(self, file: ModelFile) -> None:
        self.config = file.config
        views = {View.AR: "", **({View.DIFFUSION: "_diff"} if file.config.has_heads else {})}
        self.embedding = weight(file, TOKEN_EMBD)
        self.layers = [layer_weights(file, i, views) for i in range(file.config.n_layers)]
        self.output_norm = weight(file, OUTPUT_NORM)
        self.output = self.embedding if file.config.tied else weight(file, OUTPUT)
        self.inv_freq, self.rope_scale = rope_frequencies(file.config.rope, file.config.rotary_dim)

    @property
    def description(self) -> str:
        return f"reference (torch {torch.__version__}, float32, {torch.get_num_threads()} threads)"

    def close(self) -> None:
        """Nothing to free by hand: torch owns the memory."""

    def new_cache(self, capacity: int) -> ReferenceCache:
        kind = ReferenceCache if self.config.hybrid is None else HybridCache
        return kind(self.config, capacity)

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """See `Model.forward`. AR rows run one by one, each diffusion block at once."""
        return self._pass(segments, _choices)

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        """See `Model.logits`."""
        return self._pass(segments, lambda segment, results: results.logits.numpy())

    @torch.inference_mode()
    def attention(self, segment: Segment, layers: Sequence[int]) -> NDArray[np.float32]:
        """See `Attentive.attention`."""
        cache = _cache_of(segment)
        cache.pend(())
        check_attention(segment, layers, self.config)
        self._check(segment)
        cache.pend(tuple(range(-1, len(segment) - 1)))
        told = np.zeros((len(segment.wanted), segment.stop), np.float32)
        for row, token in enumerate(segment.tokens):
            start, x = cache.make_way(), self.embedding[[token]]
            for index, layer in enumerate(self.layers[: max(layers) + 1]):
                if index in layers and row in segment.wanted:
                    line = told[row - segment.wanted.start, : start + 1]
                    np.maximum(line, self._weights(x, layer, cache, start).numpy(), out=line)
                x = self._layer(x, layer, cache, View.AR, start)
            cache.add_row()
        return told

    def _weights(self, x: Tensor, layer: Layer, cache: ReferenceCache, start: int) -> Tensor:
        """The largest weight that a head gives to each key [start + 1]; x: a row at a layer."""
        h = self._norm(x, layer.attn_norm)
        q, k, _ = self._qkv(h, layer.attention[View.AR], torch.arange(start, start + 1))
        keys = torch.cat([cache.k[layer.place, :start], k])
        return attention_weights(q, keys)[:, 0].amax(0)

    @torch.inference_mode()
    def _pass(
        self, segments: Sequence[Segment], outcome: Callable[[Segment, Results], T]
    ) -> list[T]:
        """Run the segments; what is pending afterwards is theirs, or nothing if this raises."""
        caches = [_cache_of(segment) for segment in segments]
        for cache in caches:
            cache.pend(())
        check_segments(segments)
        for segment in segments:
            self._check(segment)
        try:
            run = {View.AR: self._causal, View.DIFFUSION: self._block}
            pairs = zip(segments, caches, strict=True)
            return [outcome(one, run[one.view](one, cache)) for one, cache in pairs]
        except BaseException:
            for cache in caches:
                cache.pend(())
            raise

    def _check(self, segment: Segment) -> None:
        """What this model has: tokens, taps, heads."""
        config, last = self.config, self.config.n_layers + 1
        for token in segment.tokens:
            if not 0 <= token < config.n_vocab:
                raise OrthrusError(
                    f"token {token} is outside the vocabulary of {config.n_vocab}; the tokenizer "
                    "does not belong to this model"
                )
        for tap in segment.taps:
            if not 0 <= tap <= last:
                raise ValueError(f"no tap {tap}: this model has 0 to {last}")
        if segment.view is View.DIFFUSION and not config.has_heads:
            raise OrthrusError(f"{config.name} has no diffusion heads; use --strategy ar")

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
        with cache.aside(segment.start):
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
        x = self.embedding[tokens]
        inputs = [x]
        for layer in self.layers:
            x = self._layer(x, layer, cache, view, start)
            inputs.append(x)
        inputs.append(self._norm(x, self.output_norm))
        logits = inputs[-1] @ self.output.T if head else x.new_empty(0, self.config.n_vocab)
        return Results(logits, torch.stack(inputs)[list(taps)])

    def _layer(
        self, x: Tensor, layer: Layer, cache: ReferenceCache, view: View, start: int
    ) -> Tensor:
        """The residual stream behind a layer, [rows, n_embd] as before it."""
        h = self._norm(x, layer.attn_norm)
        if layer.attention:
            x = x + self._attention(h, layer, cache, view, start)
        else:
            x = x + self._delta_net(h, layer.delta_net[view], layer.place, cache, view)
        h = self._norm(x, layer.ffn_norm)
        gate = torch.nn.functional.silu(h @ layer.ffn_gate.T)
        return x + (gate * (h @ layer.ffn_up.T)) @ layer.ffn_down.T

    def _attention(
        self, h: Tensor, layer: Layer, cache: ReferenceCache, view: View, start: int
    ) -> Tensor:
        """What attention adds to the rows whose normed inputs are h [rows, n_embd]."""
        weights, place, stop = layer.attention[view], layer.place, start + len(h)
        q, k, v = self._qkv(h, weights, torch.arange(start, stop))
        if view is View.AR:
            cache.k[place, start:stop], cache.v[place, start:stop] = k, v
        keys = torch.cat([cache.k[place, :start], k])
        values = torch.cat([cache.v[place, :start], v])
        mixed = attend(q, keys, values, self._hidden(layer, start, len(h)))
        if weights.gate is not None:
            mixed = mixed * torch.sigmoid(h @ weights.gate.T)
        return mixed @ weights.output.T

    def _hidden(self, layer: Layer, start: int, rows: int) -> Tensor | None:
        """Which of the keys 0 .. start + rows - 1 each row from `start` on does not see, [rows,
        keys]; None if it sees all."""
        return None

    def _delta_net(
        self, h: Tensor, w: DeltaNet, place: int, cache: ReferenceCache, view: View
    ) -> Tensor:
        """What a DeltaNet adds to one AR row, or to the rows of a block, each of which sees those
        before it."""
        assert isinstance(cache, HybridCache)
        assert self.config.hybrid is not None
        eps, added = self.config.rms_eps, []
        for row in h:
            found, update = delta_row(row[None], w, self.config.hybrid, cache.state, place, eps)
            if view is View.AR:
                cache.add_update(update)
            added.append(found)
        return torch.cat(added)

    def _qkv(self, h: Tensor, w: Attention, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normed and rotated q [rows, n_head, head_dim]; k and v [rows, n_head_kv, head_dim]."""

        def heads(matrix: Tensor, bias: Tensor | None) -> Tensor:
            out = h @ matrix.T
            return (out if bias is None else out + bias).view(len(h), -1, self.config.head_dim)

        q, k, v = heads(w.q, w.q_bias), heads(w.k, w.k_bias), heads(w.v, w.v_bias)
        if w.q_norm is not None:
            q = self._norm(q, w.q_norm)
        if w.k_norm is not None:
            k = self._norm(k, w.k_norm)
        return self._rotate(q, positions), self._rotate(k, positions), v

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, weight.shape, weight, self.config.rms_eps)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of x [rows, heads, head_dim], in the architecture's pairs; elements
        behind `rotary_dim` stay."""
        angles = positions.double()[:, None] * self.inv_freq
        cos = (angles.cos() * self.rope_scale).float()[:, None]
        sin = (angles.sin() * self.rope_scale).float()[:, None]
        if self.config.architecture.pairing is Pairing.ADJACENT:
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        half = self.config.rotary_dim // 2
        low, high, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def _cache_of(segment: Segment) -> ReferenceCache:
    if not isinstance(segment.cache, ReferenceCache):
        raise TypeError(f"expected a cache of the reference runtime, found {segment.cache}")
    return segment.cache


def _choices(segment: Segment, results: Results) -> Choices:
    """What `Model.forward` says of a segment."""
    rows = draw_choices(segment, results.logits.numpy())
    return Choices(rows, results.taps.numpy() if segment.taps else None)


def attend(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None = None) -> Tensor:
    """What queries find: q [rows, n_head, d], k/v [n, n_head_kv, d] → [rows, n_head·d].

    hidden: keys that a row does not see, [rows, n]; None if it sees all.
    """
    values = values.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    mixed = torch.einsum("hrn,nhd->rhd", attention_weights(q, keys, hidden), values)
    return mixed.reshape(q.shape[0], -1)


def attention_weights(q: Tensor, keys: Tensor, hidden: Tensor | None = None) -> Tensor:
    """What every query gives to every key: [n_head, rows, n]; 1 per head and row."""
    keys = keys.repeat_interleave(q.shape[1] // keys.shape[1], dim=1)
    scores = torch.einsum("rhd,nhd->hrn", q, keys) / math.sqrt(q.shape[2])
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return scores.softmax(-1)


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair (float64, [head_dim/2]), and the factor on cos and sin.

    Linear scaling divides all frequencies by `factor`. With YaRN, those that turn fewer than
    `beta_slow` times over the original context are divided, those above `beta_fast` are kept, and
    the ones between are blended (Peng et al., arXiv 2309.00071, as implemented in llama.cpp and
    transformers). Frequency factors divide the frequencies before either.
    """
    half = head_dim // 2
    pairs = torch.arange(half, dtype=torch.float64)
    extrapolated = rope.freq_base ** (-pairs / half)
    if rope.freq_factors is not None:
        extrapolated = extrapolated / torch.tensor(rope.freq_factors, dtype=torch.float64)
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


def layer_weights(file: WeightFile, index: int, views: Mapping[View, str]) -> Layer:
    """A layer. views: each with the suffix of its tensors."""
    prefix, config = f"blk.{index}.", file.config
    kinds = config.layer_kinds
    is_attention = kinds[index] is LayerKind.ATTENTION
    attention: dict[View, Attention] = {}
    delta_net: dict[View, DeltaNet] = {}
    for view, suffix in views.items():
        if is_attention:
            attention[view] = _attention(file, prefix, suffix)
        else:
            delta_net[view] = _delta_net(file, prefix, suffix)
    names = ("attn_norm", "ffn_gate", "ffn_up", "ffn_down")
    return Layer(
        place=kinds[:index].count(kinds[index]),
        attention=attention,
        delta_net=delta_net,
        ffn_norm=weight(file, f"{prefix}{config.architecture.mlp_norm}.weight"),
        **{name: weight(file, f"{prefix}{name}.weight") for name in names},
    )


def _attention(file: WeightFile, prefix: str, suffix: str) -> Attention:
    def part(name: str, kind: str = "weight") -> Tensor:
        return weight(file, f"{prefix}attn_{name}{suffix}.{kind}")

    config, arch = file.config, file.config.architecture
    q, gate = part("q"), None
    if arch.hybrid:  # per head its query, then its gate
        heads = q.view(config.n_head, 2, config.head_dim, config.n_embd)
        q, gate = heads.transpose(0, 1).reshape(2, -1, config.n_embd)
    norms = {f"{name}_norm": part(f"{name}_norm") for name in "qk" if arch.qk_norms}
    biases = {f"{name}_bias": part(name, "bias") for name in "qkv" if arch.qkv_biases}
    return Attention(q, part("k"), part("v"), part("output"), **norms, **biases, gate=gate)


def _delta_net(file: WeightFile, prefix: str, suffix: str) -> DeltaNet:
    names = {part: prefix + in_view(name, suffix) for part, name in DELTA_NET.items()}
    return DeltaNet(**{part: weight(file, name) for part, name in names.items()})


def weight(file: WeightFile, name: str) -> Tensor:
    """One tensor in float32, in numpy's (row-major) shape."""
    info = file.tensors[name]
    rows = math.prod(info.shape[:-1])
    values = dequantize(file.data(name).reshape(rows, -1), info.type)
    return torch.from_numpy(np.array(values, dtype=np.float32).reshape(info.shape))
