"""A DFlash drafter's network on the native kernels: their products, attention and cache."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from orthrus_cpu_kernels import library as k
from orthrus_cpu_kernels.library import Kernels, Step

from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import WeightFile
from orthrus_gguf.model.tensors import FEATURES, FEATURES_NORM
from orthrus_gguf.model.window import Window
from orthrus_gguf.runtime.cpu.beside import CpuBeside
from orthrus_gguf.runtime.cpu.cache import CpuCache
from orthrus_gguf.runtime.cpu.model import CpuModel, Filled
from orthrus_gguf.runtime.cpu.pool import Pool
from orthrus_gguf.runtime.cpu.steps import Builder, Shape
from orthrus_gguf.runtime.cpu.weights import Layer, Weights, vector
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import View
from orthrus_gguf.runtime.sequences import OneSequence


class DraftWeights(Weights):
    """A network's weights: attention for blocks only; embedding and output are the target's.

    features: one vector per row, of what the target's layers read; features_norm: of it.
    """

    def __init__(self, file: WeightFile, kernels: Kernels, pool: Pool, target: Weights) -> None:
        self._target = target
        super().__init__(file, kernels, pool)

    def _arrange(self, file: WeightFile) -> None:
        self.token_embd, self.output = self._target.token_embd, self._target.output
        self.features = self._matrices[FEATURES]
        self.features_norm = vector(file, FEATURES_NORM)
        self._arrange_layers(file, {View.DIFFUSION: ""})


@dataclass(kw_only=True)
class DraftBuilder(Builder):
    """See `Builder`. near: as `Buffers.row`, of layers with a sliding window."""

    window: Window | None
    near: NDArray[np.void]

    def sight(self, layer: Layer) -> NDArray[np.void]:
        sliding = self.window is not None and self.window.layers[layer.place]
        return self.near if sliding else self.buffers.row


class CpuNetwork(CpuBeside):
    """See `beside.Network`."""

    def __init__(self, file: DrafterFile, target: CpuModel) -> None:
        """Raises OrthrusError when memory does not suffice."""
        config, kernels = file.config, target._kernels
        weights = DraftWeights(file, kernels, target._pool, target._weights)
        super().__init__(config, weights, target)
        self.taps, self.beside, self._draft_weights = file.target_layers, file.beside, weights
        self._window, self._near = file.window, np.zeros_like(self._buffers.row)
        wide = weights.features
        form = kernels.form(wide.type)
        assert form is not None
        self._joined, self._quantized = self._room_for(wide.k, form)
        # Those that cycles need are there from the start: the first draft is to be no dearer.
        rows = range(1, (config.block_size or 0) + 1)
        self._injections = {count: self._injection(count) for count in rows}

    def inject(self, cache: CpuCache, tokens: Sequence[int], taps: NDArray[np.float32]) -> None:
        """See `Network.inject`. At most BATCH_ROWS rows."""
        with self._lock:
            self._check_open()
            rows = taps.shape[1]
            self._joined[:rows] = np.concatenate(list(taps), axis=1)
            self._put(0, 0, cache, cache.length, rows)
            if rows not in self._injections:
                self._injections[rows] = self._injection(rows)
            self._pool.run(self._injections[rows])
            cache.hold(rows)
            cache.commit(range(rows))

    def _builder(self, shape: Shape) -> Builder:
        return DraftBuilder(
            self._kernels, self.config, self._draft_weights, self._buffers, shape,
            window=self._window, near=self._near,
        )  # fmt: skip

    def _fill(self, pieces: Sequence[Piece], sequences: dict[int, OneSequence[CpuCache]]) -> Filled:
        filled = super()._fill(pieces, sequences)
        if self._window is not None:
            rows = filled.shape.rows
            near = self._near[:rows]
            near[...] = self._buffers.row[:rows]
            # Rows of a block see what came before it, and then itself.
            position = near["sees"] + near["key"] - near["from"]
            near["since"] = np.maximum(position + 1 - self._window.size, 0)
            if self._window.causal:
                near["to"] = near["key"] + 1
        return filled

    def _injection(self, rows: int) -> ctypes.Array[Step]:
        """Steps from joined taps to keys and values in every layer's cache. The features are not
        normed as the rows of blocks are (`attn_norm`)."""
        b, c, weights = self._buffers, self.config, self._draft_weights
        builder = self._builder(Shape(0, rows, 0, 0))
        form = self._kernels.form(weights.features.type)
        assert form is not None
        q = self._quantized.ctypes.data
        builder.add(k.QUANTIZE, rows, x=self._joined, q=q, form=form, width=weights.features.k)
        builder.products({form: q}, [(weights.features, None)], 0, rows, b.x)
        layers = [layer.attention[View.DIFFUSION] for layer in weights.layers]
        readers = [matrix for a in layers for matrix in (a.k, a.v)]
        forms = builder.norm(b.x, rows, weights.features_norm, readers)
        keys = b.qkv[:, c.n_head * c.head_dim :]
        for index, a in enumerate(layers):
            builder.products(forms, [(a.k, None), (a.v, None)], 0, rows, keys)
            builder.heads(a, index, 0, rows)  # q, which is of no use, too
        return k.steps_array(builder.steps)
