"""A frozen base with trainable heads, in torch: the AR view of whole texts, and blocks on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from orthrus_gguf.model.architectures import Pairing
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import WeightFile
from orthrus_gguf.model.hybrid import Hybrid
from orthrus_gguf.model.tensors import DELTA_NET, OUTPUT, OUTPUT_NORM, TOKEN_EMBD, twin_of
from orthrus_gguf.runtime.protocol import View
from orthrus_gguf.runtime.reference import (
    Attention,
    Layer,
    layer_weights,
    rope_frequencies,
    weight,
)
from orthrus_gguf.runtime.reference_hybrid import DeltaNet
from orthrus_gguf.training import delta_net
from orthrus_gguf.training.delta_net import Updates
from orthrus_gguf.training.device import Compiler, as_it_is

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """What blocks see of a text: of the AR view, by layer, keys and values, or what its rows do to
    the state of a DeltaNet.

    Attention: keys (rotated) and values [batch, heads, tokens, head_dim]. Updates: see there.
    """

    layers: tuple[tuple[Tensor, Tensor] | Updates, ...]

    @property
    def n_bytes(self) -> int:
        return sum(
            one.untyped_storage().nbytes() for layer in self.layers for one in _tensors(layer)
        )

    @staticmethod
    def joined(memories: Sequence[Memory], longest: int) -> Memory:
        """Those of several texts as one batch, the shorter ones with zeros behind them."""

        def joined(parts: Sequence[Tensor]) -> Tensor:  # tokens are the third dimension of all
            return torch.cat([F.pad(p, (0, 0, 0, longest - p.shape[2])) for p in parts])

        layers: list[tuple[Tensor, Tensor] | Updates] = []
        for same in zip(*(memory.layers for memory in memories), strict=True):
            parts = [joined(part) for part in zip(*map(_tensors, same), strict=True)]
            layers.append(Updates(*parts) if isinstance(same[0], Updates) else (parts[0], parts[1]))
        return Memory(tuple(layers))


def _tensors(layer: tuple[Tensor, Tensor] | Updates) -> tuple[Tensor, ...]:
    if isinstance(layer, Updates):
        return layer.keys, layer.deltas, layer.decays, layer.rows
    return layer


class Network:
    """The weights of a base, dequantized, and heads that begin as copies of its attention.

    device: of all tensors that come in and go out. dtype: of the matrix products; heads are kept
    in float32. Norms and RoPE run in float32. compiler: of what a layer does with blocks.
    """

    def __init__(
        self,
        file: WeightFile,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        compiler: Compiler = as_it_is,
    ) -> None:
        config = self.config = file.config
        self.dtype, self.device = dtype, device
        self._draft_layer = compiler(self._block_layer)
        self._draft_delta_net = compiler(self._delta_net_layer)
        views = {View.AR: "", **({View.DIFFUSION: "_diff"} if config.has_heads else {})}
        loaded = [layer_weights(file, i, views) for i in range(config.n_layers)]
        start = View.DIFFUSION if config.has_heads else View.AR
        self._layers = [_cast_layer(layer, config, dtype, device) for layer in loaded]
        self.heads = [_trainable(_mixer(layer, start), config, device) for layer in loaded]
        self._embedding = weight(file, TOKEN_EMBD).to(device, dtype)
        self._output_norm = weight(file, OUTPUT_NORM).to(device)
        self._output = self._embedding
        if not config.tied:
            self._output = weight(file, OUTPUT).to(device, dtype)
        inv_freq, self._rope_scale = rope_frequencies(config.rope, config.rotary_dim)
        self._inv_freq = inv_freq.to(device)

    def parameters(self) -> list[Tensor]:
        """The heads, in the order of `named_heads`."""
        return [tensor for _, tensor in self.named_heads()]

    def named_heads(self) -> Iterator[tuple[str, Tensor]]:
        """The heads by the names that they have in a GGUF; of decays, what `stored` takes."""
        for index, head in enumerate(self.heads):
            for name, tensor in _parts(head):
                if isinstance(head, DeltaNet):
                    yield f"blk.{index}.{twin_of(DELTA_NET[name])}", tensor
                    continue
                part, _, bias = name.partition("_bias")
                kind = "weight" if name == part and not bias else "bias"
                yield f"blk.{index}.attn_{part}_diff.{kind}", tensor

    @staticmethod
    def stored(name: str, value: Tensor) -> Tensor:
        """A head as files hold it. Decays, which must stay below zero, are learned as the
        logarithms of their sizes."""
        return -value.exp() if name.endswith(twin_of(DELTA_NET["a"])) else value

    @torch.no_grad()
    def set_heads(self, values: Sequence[Tensor]) -> None:
        """Take over the values of heads, in the order of `named_heads`."""
        for head, value in zip(self.parameters(), values, strict=True):
            head.copy_(value)

    @property
    def head_bytes(self) -> int:
        return sum(head.untyped_storage().nbytes() for head in self.parameters())

    def finish(self) -> None:
        """Wait for what was begun, which a GPU does by itself."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def read(self, tokens: Tensor) -> tuple[Memory, Tensor]:
        """The AR view of texts [batch, tokens]: what blocks see, and the hidden state after the
        last norm [batch, tokens, n_embd]."""
        x = self._embedding[tokens]
        positions = torch.arange(tokens.shape[1], device=self.device)[None].expand_as(tokens)
        cos, sin = self._angles(positions)
        found: list[tuple[Tensor, Tensor] | Updates] = []
        for layer in self._layers:
            own = _mixer(layer, View.AR)
            if isinstance(own, DeltaNet):
                h, hybrid = self._norm(x, layer.attn_norm), self._hybrid
                added, updates = delta_net.read(h, own, hybrid, self.config.rms_eps)
                found.append(updates)
                x = self._mlp(x + added, layer)
                continue
            q, k, v, gate = self._qkv(x, layer, own, cos, sin)
            found.append((k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self._rest(x, mixed, gate, layer, own)
        return Memory(tuple(found)), self._norm(x, self._output_norm)

    def draft(self, tokens: Tensor, anchors: Tensor, memory: Memory) -> Tensor:
        """The hidden state of blocks [batch, blocks, rows] after the last norm
        [batch, blocks, rows, n_embd].

        anchors: position of each block's first row [batch, blocks]; it sees the keys before that,
        and its own block.
        """
        batch, blocks, rows = tokens.shape
        positions = (anchors[:, :, None] + torch.arange(rows, device=self.device)).view(batch, -1)
        cos, sin = self._angles(positions)
        x = self._embedding[tokens.view(batch, -1)]
        mask: Tensor | None = None
        for layer, trained, seen in zip(self._layers, self.heads, memory.layers, strict=True):
            head = _cast(trained, self.device, self.dtype)
            if isinstance(seen, Updates):
                with torch.no_grad():
                    state, before = (part.flatten(0, 1) for part in seen.before(anchors))
                x = self._draft_delta_net(x, layer, head, state, before)
                continue
            keys, values = seen
            if mask is None:
                mask = self._visible(anchors, rows, keys.shape[2])
            x = self._draft_layer(x, layer, head, cos, sin, keys, values, mask)
        return self._norm(x, self._output_norm).view(batch, blocks, rows, -1)

    def _delta_net_layer(
        self, x: Tensor, layer: Layer, head: DeltaNet, state: Tensor, before: Tensor
    ) -> Tensor:
        """As `_block_layer`. state, before: see `delta_net.draft`."""
        h = self._norm(x, layer.attn_norm).view(len(state), -1, x.shape[-1])
        head = replace(head, a=-head.a.exp())
        added = delta_net.draft(h, head, self._hybrid, self.config.rms_eps, state, before)
        return self._mlp(x + added.view(x.shape), layer)

    @property
    def _hybrid(self) -> Hybrid:
        assert self.config.hybrid is not None
        return self.config.hybrid

    def _block_layer(
        self,
        x: Tensor,
        layer: Layer,
        head: Attention,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """A layer's work on blocks [batch, blocks · rows, n_embd]."""
        q, k, v, gate = self._qkv(x, layer, head, cos, sin)
        k = torch.cat([keys.to(k.dtype), k], dim=2)
        v = torch.cat([values.to(v.dtype), v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self._rest(x, mixed, gate, layer, head)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of hidden states [..., n_embd]."""
        return F.linear(hidden.to(self.dtype), self._output).float()

    def _visible(self, anchors: Tensor, rows: int, n_keys: int) -> Tensor:
        """[batch, 1, blocks · rows, n_keys + blocks · rows]."""
        before = torch.arange(n_keys, device=self.device) < anchors[:, :, None]
        before = before.repeat_interleave(rows, dim=1)
        block = torch.arange(anchors.shape[1], device=self.device).repeat_interleave(rows)
        own = block[:, None] == block
        return torch.cat([before, own[None].expand(len(anchors), -1, -1)], dim=2)[:, None]

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions.double()[:, None, :, None] * self._inv_freq
        return (angles.cos() * self._rope_scale).float(), (angles.sin() * self._rope_scale).float()

    def _qkv(
        self, x: Tensor, layer: Layer, w: Attention, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[batch, heads, rows, head_dim] each, q and k normed and rotated, and what heads' outputs
        are gated by, [batch, rows, heads * head_dim], where the architecture has that."""
        h = self._norm(x, layer.attn_norm)

        def heads(matrix: Tensor, bias: Tensor | None) -> Tensor:
            out = F.linear(h, matrix, bias)
            return out.view(*out.shape[:2], -1, self.config.head_dim).transpose(1, 2)

        q, k, v, gate = heads(w.q, w.q_bias), heads(w.k, w.k_bias), heads(w.v, w.v_bias), None
        if self.config.architecture.hybrid:  # per head its query, then its gate
            q, both = q[:, 0::2], q[:, 1::2]
            gate = torch.sigmoid(both.transpose(1, 2).flatten(2))
        q = q if w.q_norm is None else self._norm(q, w.q_norm)
        k = k if w.k_norm is None else self._norm(k, w.k_norm)
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin), v, gate

    def _rest(
        self, x: Tensor, mixed: Tensor, gate: Tensor | None, layer: Layer, w: Attention
    ) -> Tensor:
        """Output projection and MLP of a layer."""
        mixed = mixed.transpose(1, 2).flatten(2)
        mixed = mixed if gate is None else mixed * gate
        return self._mlp(x + F.linear(mixed, w.output), layer)

    def _mlp(self, x: Tensor, layer: Layer) -> Tensor:
        h = self._norm(x, layer.ffn_norm)
        gated = F.silu(F.linear(h, layer.ffn_gate)) * F.linear(h, layer.ffn_up)
        return x + F.linear(gated, layer.ffn_down)

    def _norm(self, x: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(x.float(), scale.shape, scale.float(), self.config.rms_eps).to(self.dtype)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()
        if self.config.architecture.pairing is Pairing.ADJACENT:
            one, two = x[..., 0::2], x[..., 1::2]
            turned = torch.stack([one * cos - two * sin, two * cos + one * sin], -1).flatten(-2)
        else:
            half = self.config.rotary_dim // 2
            one, two, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
            turned = torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1)
        return turned.to(self.dtype)


def _mixer(layer: Layer, view: View) -> Attention | DeltaNet:
    """What mixes the rows of a layer, in a view."""
    return layer.attention[view] if layer.attention else layer.delta_net[view]


def _parts(mixer: Attention | DeltaNet) -> list[tuple[str, Tensor]]:
    found = [(field.name, getattr(mixer, field.name)) for field in fields(mixer)]
    return [(name, tensor) for name, tensor in found if tensor is not None]


def _trainable(
    mixer: Attention | DeltaNet, config: ModelConfig, device: torch.device
) -> Attention | DeltaNet:
    """A copy to learn with. Decays as the logarithms of their sizes."""
    if isinstance(mixer, DeltaNet):
        mixer = replace(mixer, a=(-mixer.a).log())
    else:
        mixer = _with_gates(mixer, config)
    parts = {name: part.clone().to(device) for name, part in _parts(mixer)}
    return type(mixer)(**{name: part.requires_grad_() for name, part in parts.items()})


def _with_gates(attention: Attention, config: ModelConfig) -> Attention:
    """Queries and gates in one matrix, head by head, as files hold them."""
    if attention.gate is None:
        return attention
    halves = [part.view(config.n_head, -1, config.n_embd) for part in (attention.q, attention.gate)]
    return replace(attention, q=torch.cat(halves, dim=1).flatten(0, 1), gate=None)


def _cast(
    mixer: Attention | DeltaNet, device: torch.device, dtype: torch.dtype
) -> Attention | DeltaNet:
    """The numbers of a DeltaNet's state are in float32: the small parts that make them stay so."""
    kept = ("conv", "a", "dt", "norm") if isinstance(mixer, DeltaNet) else ()
    parts = {
        name: part.to(device) if name in kept else part.to(device, dtype)
        for name, part in _parts(mixer)
    }
    return type(mixer)(**parts)


def _cast_layer(
    layer: Layer, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Layer:
    """The frozen side of a layer."""
    own = _mixer(layer, View.AR)
    own = _cast(own if isinstance(own, DeltaNet) else _with_gates(own, config), device, dtype)
    norms = ("attn_norm", "ffn_norm")
    matrices = ("ffn_gate", "ffn_up", "ffn_down")
    return replace(
        layer,
        attention={} if isinstance(own, DeltaNet) else {View.AR: own},
        delta_net={View.AR: own} if isinstance(own, DeltaNet) else {},
        **{name: getattr(layer, name).to(device) for name in norms},
        **{name: getattr(layer, name).to(device, dtype) for name in matrices},
    )
