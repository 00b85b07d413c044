"""An MTP block on the reference runtime: torch, float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.model.tensors import (
    MTP_EMBD,
    MTP_EMBD_NORM,
    MTP_HIDDEN_NORM,
    MTP_OUTPUT,
    MTP_PROJECTION,
    OUTPUT_NORM,
)
from orthrus_gguf.runtime.mtp import Chain, Entry, run_stepwise
from orthrus_gguf.runtime.protocol import Logits, View
from orthrus_gguf.runtime.reference import ReferenceModel, layer_weights, rope_frequencies, weight
from orthrus_gguf.runtime.reference_cache import ReferenceCache

Floats = NDArray[np.float32]


class ReferenceBlock(ReferenceModel):
    """See `mtp.Block`. A model of one layer, whose input is made of two."""

    def __init__(self, file: MtpFile, target: ReferenceModel) -> None:
        def own(name: str) -> Tensor:
            return weight(file, f"blk.0.{name}")

        def own_or(name: str, shared: Tensor) -> Tensor:
            return own(name) if f"blk.0.{name}" in file.tensors else shared

        self.config, self._ids = file.config, file.ids
        self.embedding = own_or(MTP_EMBD, target.embedding)
        self.output = own_or(MTP_OUTPUT, target.output)
        self.layers = [layer_weights(file, 0, {View.AR: ""})]
        self.output_norm, self.projection = weight(file, OUTPUT_NORM), own(MTP_PROJECTION)
        self.embd_norm, self.hidden_norm = own(MTP_EMBD_NORM), own(MTP_HIDDEN_NORM)
        self.inv_freq, self.rope_scale = rope_frequencies(file.config.rope, file.config.rotary_dim)

    def new_rows(self, capacity: int) -> ReferenceCache:
        """See `mtp.Block.new_rows`."""
        return ReferenceCache(self.config, capacity)

    @torch.inference_mode()
    def learn(self, rows: ReferenceCache, tokens: Sequence[int], hidden: Floats) -> None:
        """See `mtp.Block.learn`. There is one layer: keys and values need no attention."""
        (layer,) = self.layers
        start, stop = rows.length, rows.length + len(tokens)
        h = self._norm(self._joined(tokens, hidden), layer.attn_norm)
        _, k, v = self._qkv(h, layer.attention[View.AR], torch.arange(start, stop))
        rows.k[0, start:stop], rows.v[0, start:stop] = k, v
        rows.assume(len(tokens))

    def draft(self, chains: Sequence[Chain]) -> None:
        """See `mtp.Block.draft`."""
        run_stepwise(self._step, chains)

    @torch.inference_mode()
    def _step(self, entries: Sequence[Entry]) -> tuple[Floats, Logits]:
        given = torch.cat([self._given(entry) for entry in entries])
        logits = given @ self.output.T
        logits[:, self._ids :] = -torch.inf
        return given.numpy(), logits.numpy()

    def _given(self, entry: Entry) -> Tensor:
        """What one row gives, [1, n_embd]."""
        x = self._joined([entry.token], entry.hidden[None])
        return self._norm(
            self._layer(x, self.layers[0], entry.rows, View.AR, entry.position), self.output_norm
        )

    def _joined(self, tokens: Sequence[int], hidden: Floats) -> Tensor:
        """What the layer's rows are made of, [rows, n_embd]."""
        embedded = self._norm(self.embedding[list(tokens)], self.embd_norm)
        before = self._norm(torch.from_numpy(np.asarray(hidden)), self.hidden_norm)
        return torch.cat([embedded, before], dim=1) @ self.projection.T
