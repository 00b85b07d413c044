"""A DFlash drafter's network: its passes have rows of one view, blocks or committed rows, of which
keys and values are made from what the target's layers read (taps)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from orthrus_kernels.attention.attention import Sight

from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.drafter import dflash
from orthrus_gguf.runtime.cuda.beside import BesideRunner, CudaBeside
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.tables import Table
from orthrus_gguf.runtime.cuda.weights import Layer
from orthrus_gguf.runtime.protocol import ar_segment


@dataclass(frozen=True, kw_only=True)
class DrafterRunner(BesideRunner):
    """See `BesideRunner`."""

    def sight(self, layer: Layer) -> Sight | None:
        """See `PassRunner.sight`."""
        return self.drafter.sliding[layer.place]

    def run(self, table: Table) -> None:
        """A pass: of blocks as the model's, of committed rows keys and values in their caches,
        whose features are not normed as the rows of blocks are (`attn_norm`)."""
        if not table.shape.ar:
            super().run(table)
            return
        rows = table.rows(self.buffers.cos, self.buffers.sin)
        self.prepare(table, rows)
        self.store(table, rows, self.features(table.shape.rows), *self.drafter.norms)


class CudaNetwork(CudaBeside):
    """See `beside.Network`."""

    runner_type = DrafterRunner

    @property
    def beside(self) -> Beside:
        """See `Network.beside`."""
        return dflash(self.config)

    def inject(self, cache: CudaCache, tokens: Sequence[int], taps: NDArray[np.float32]) -> None:
        """See `Network.inject`. The rows are made of taps alone."""
        for first in range(0, taps.shape[1], self._most):
            part = taps[:, first : first + self._most]
            rows = part.shape[1]
            with self.lock, self.machine.running():
                self._upload(np.concatenate(list(part), axis=1))
                self._run(
                    [ar_segment(cache, (0,) * rows, cache.length, wanted=range(0))], draws=True
                )
                cache.commit(range(rows))
