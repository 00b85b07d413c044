"""A DFlash drafter's network on the reference runtime: torch, float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.tensors import FEATURES, FEATURES_NORM, OUTPUT_NORM
from orthrus_gguf.runtime.protocol import View
from orthrus_gguf.runtime.reference import (
    Layer,
    ReferenceModel,
    layer_weights,
    rope_frequencies,
    weight,
)
from orthrus_gguf.runtime.reference_cache import ReferenceCache


class ReferenceNetwork(ReferenceModel):
    """See `beside.Network`. A model that knows blocks only, with embedding and head of another."""

    def __init__(self, file: DrafterFile, target: ReferenceModel) -> None:
        self.config, self.taps, self.beside = file.config, file.target_layers, file.beside
        self._window = file.window
        self.embedding, self.output = target.embedding, target.output
        self.layers = [
            layer_weights(file, i, {View.DIFFUSION: ""}) for i in range(file.config.n_layers)
        ]
        self.output_norm = weight(file, OUTPUT_NORM)
        self.features, self.features_norm = weight(file, FEATURES), weight(file, FEATURES_NORM)
        self.inv_freq, self.rope_scale = rope_frequencies(file.config.rope, file.config.rotary_dim)

    @torch.inference_mode()
    def inject(
        self, cache: ReferenceCache, tokens: Sequence[int], taps: NDArray[np.float32]
    ) -> None:
        """See `Network.inject`."""
        start, rows = cache.length, taps.shape[1]
        joined = torch.from_numpy(np.concatenate(list(taps), axis=1))
        features = self._norm(joined @ self.features.T, self.features_norm)
        for index, layer in enumerate(self.layers):
            # Not normed as the rows of blocks are; q is of no use.
            _, k, v = self._qkv(
                features, layer.attention[View.DIFFUSION], torch.arange(start, start + rows)
            )
            cache.k[index, start : start + rows], cache.v[index, start : start + rows] = k, v
        cache.assume(rows)

    def _hidden(self, layer: Layer, start: int, rows: int) -> Tensor | None:
        """See `ReferenceModel._hidden`."""
        window = self._window
        if window is None or not window.layers[layer.place]:
            return None
        back = torch.arange(start, start + rows)[:, None] - torch.arange(start + rows)
        return (back >= window.size) | ((back < 0) if window.causal else False)
