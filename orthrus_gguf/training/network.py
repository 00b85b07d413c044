"""A frozen base with trainable heads, in torch: the AR view of whole texts, and blocks on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from orthrus_gguf.model.architectures import Pairing
from orthrus_gguf.model.file import WeightFile
from orthrus_gguf.model.tensors import OUTPUT, OUTPUT_NORM, TOKEN_EMBD
from orthrus_gguf.runtime.protocol import View
from orthrus_gguf.runtime.reference import (
    Attention,
    Layer,
    layer_weights,
    rope_frequencies,
    weight,
)
from orthrus_gguf.training.device import Compiler, as_it_is

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Memory:
    """What blocks see of a text: keys and values of the AR view.

    keys, values: [layers, batch, heads, tokens, head_dim], keys rotated.
    """

    keys: Tensor
    values: Tensor


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
        views = {View.AR: "", **({View.DIFFUSION: "_diff"} if config.has_heads else {})}
        loaded = [layer_weights(file, i, views) for i in range(config.n_layers)]
        start = View.DIFFUSION if config.has_heads else View.AR
        self.heads = [_trainable(layer.attention[start], device) for layer in loaded]
        self._layers = [_cast_layer(layer, dtype, device) for layer in loaded]
        self._embedding = weight(file, TOKEN_EMBD).to(device, dtype)
        self._output_norm = weight(file, OUTPUT_NORM).to(device)
        self._output = self._embedding
        if not config.tied:
            self._output = weight(file, OUTPUT).to(device, dtype)
        inv_freq, self._rope_scale = rope_frequencies(config.rope, config.head_dim)
        self._inv_freq = inv_freq.to(device)

    def parameters(self) -> list[Tensor]:
        """The heads, in the order of `named_heads`."""
        return [tensor for _, tensor in self.named_heads()]

    def named_heads(self) -> Iterator[tuple[str, Tensor]]:
        """The heads by the names that they have in a GGUF."""
        for index, head in enumerate(self.heads):
            for name, tensor in _parts(head):
                part, _, bias = name.partition("_bias")
                kind = "weight" if name == part and not bias else "bias"
                yield f"blk.{index}.attn_{part}_diff.{kind}", tensor

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
        keys, values = [], []
        for layer in self._layers:
            q, k, v = self._qkv(x, layer, layer.attention[View.AR], cos, sin)
            keys.append(k)
            values.append(v)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = self._rest(x, mixed, layer, layer.attention[View.AR])
        return Memory(torch.stack(keys), torch.stack(values)), self._norm(x, self._output_norm)

    def draft(self, tokens: Tensor, anchors: Tensor, memory: Memory) -> Tensor:
        """The hidden state of blocks [batch, blocks, rows] after the last norm
        [batch, blocks, rows, n_embd].

        anchors: position of each block's first row [batch, blocks]; it sees the keys before that,
        and its own block.
        """
        batch, blocks, rows = tokens.shape
        positions = (anchors[:, :, None] + torch.arange(rows, device=self.device)).view(batch, -1)
        cos, sin = self._angles(positions)
        mask = self._visible(anchors, rows, memory.keys.shape[3])
        x = self._embedding[tokens.view(batch, -1)]
        for index, layer in enumerate(self._layers):
            head = _cast(self.heads[index], self.device, self.dtype)
            keys, values = memory.keys[index], memory.values[index]
            x = self._draft_layer(x, layer, head, cos, sin, keys, values, mask)
        return self._norm(x, self._output_norm).view(batch, blocks, rows, -1)

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
        q, k, v = self._qkv(x, layer, head, cos, sin)
        k = torch.cat([keys.to(k.dtype), k], dim=2)
        v = torch.cat([values.to(v.dtype), v], dim=2)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self._rest(x, mixed, layer, head)

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[batch, heads, rows, head_dim] each, q and k normed and rotated."""
        h = self._norm(x, layer.attn_norm)

        def heads(matrix: Tensor, bias: Tensor | None) -> Tensor:
            out = F.linear(h, matrix, bias)
            return out.view(*out.shape[:2], -1, self.config.head_dim).transpose(1, 2)

        q, k, v = heads(w.q, w.q_bias), heads(w.k, w.k_bias), heads(w.v, w.v_bias)
        q = q if w.q_norm is None else self._norm(q, w.q_norm)
        k = k if w.k_norm is None else self._norm(k, w.k_norm)
        return self._rotate(q, cos, sin), self._rotate(k, cos, sin), v

    def _rest(self, x: Tensor, mixed: Tensor, layer: Layer, w: Attention) -> Tensor:
        """Output projection and MLP of a layer."""
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), w.output)
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
            one, two = x.chunk(2, dim=-1)
            turned = torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)
        return turned.to(self.dtype)


def _parts(attention: Attention) -> list[tuple[str, Tensor]]:
    found = [(field.name, getattr(attention, field.name)) for field in fields(Attention)]
    return [(name, tensor) for name, tensor in found if tensor is not None]


def _trainable(attention: Attention, device: torch.device) -> Attention:
    parts = {name: part.clone().to(device) for name, part in _parts(attention)}
    return Attention(**{name: part.requires_grad_() for name, part in parts.items()})


def _cast(attention: Attention, device: torch.device, dtype: torch.dtype) -> Attention:
    return Attention(**{name: part.to(device, dtype) for name, part in _parts(attention)})


def _cast_layer(layer: Layer, dtype: torch.dtype, device: torch.device) -> Layer:
    """The frozen side of a layer."""
    norms = ("attn_norm", "ffn_norm")
    matrices = ("ffn_gate", "ffn_up", "ffn_down")
    return replace(
        layer,
        attention={View.AR: _cast(layer.attention[View.AR], device, dtype)},
        **{name: getattr(layer, name).to(device) for name in norms},
        **{name: getattr(layer, name).to(device, dtype) for name in matrices},
    )
