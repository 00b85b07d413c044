"""A DFlash drafter's network on the model's kernels, buffers and stream: passes, and graphs, as the
model has them.

Its passes have rows of one view: blocks, or committed rows, of which keys and values are made from
what the target's layers read (taps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from orthrus_gguf.model.drafter import DrafterFile, dflash
from orthrus_gguf.model.rope import frequencies
from orthrus_gguf.runtime.cuda.buffers import row_range
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.drafter_weights import (
    DrafterBuffers,
    DrafterPlan,
    DrafterWeights,
    load_drafter,
    new_drafter_buffers,
    plan_beside,
)
from orthrus_gguf.runtime.cuda.graphs import Capture, capture_for
from orthrus_gguf.runtime.cuda.memory_plan import cache_sizes
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.runner import PassRunner
from orthrus_gguf.runtime.cuda.tables import Table
from orthrus_gguf.runtime.protocol import ar_segment

#: Host buffers of taps: one is filled while the copy from the other may be under way.
SLOTS = 2


@dataclass(frozen=True, kw_only=True)
class DrafterRunner(PassRunner):
    """See `PassRunner`. weights are those of the network in `drafter`."""

    drafter: DrafterWeights
    own: DrafterBuffers

    def run(self, table: Table) -> None:
        """A pass: of blocks as the model's, of committed rows keys and values in their caches."""
        if table.shape.ar:
            self.inject(table)
        else:
            super().run(table)

    def inject(self, table: Table) -> None:
        """Keys and values of the rows whose taps `own.joined` holds. The features are not normed as
        the rows of blocks are (`attn_norm`)."""
        launch, b, own, w = self.machine.kernels, self.buffers, self.own, self.drafter
        count = table.shape.rows
        rows = table.rows(b.cos, b.sin)
        self.prepare(table, rows)
        wide = row_range(own.wide, 0, count)
        launch.quantize_rows(own.joined[:count], wide)
        sums = own.sums[:, :count]
        self.product(wide, w.features, sums)
        x = b.x[:count].zero_()
        partials: torch.Tensor | None = sums
        for layout in dict.fromkeys(product.layout for product in w.injected):
            normed = row_range(b.normed[layout], 0, count)
            launch.residual_norm(partials, x, w.features_norm, self.config.rms_eps, normed)
            partials = None  # x holds their sum now
        caches, no_q = self.caches(table), b.q[:count, :0]
        for index, (layer, product) in enumerate(zip(w.network.layers, w.injected, strict=True)):
            found = own.keys_values[:, :count]
            self.product(row_range(b.normed[product.layout], 0, count), product, found)
            launch.finish_qkv(
                found, layer.heads, rows, no_q, caches, index, b.block_keys, b.block_values
            )


class CudaNetwork(CudaModel):
    """See `beside.Network`. One pass of either runs at a time, on the target's stream."""

    def __init__(
        self,
        plan: DrafterPlan,
        weights: DrafterWeights,
        taps: tuple[int, ...],
        target: CudaModel,
        capture: Capture | None,
    ) -> None:
        """Take over what `load` has made."""
        config, theirs = plan.config, target.runner
        machine, types = theirs.machine, theirs.cache_types
        buffers, own = new_drafter_buffers(plan, weights, theirs.buffers, machine.device)
        inv_freq, rope_scale = frequencies(config.rope, config.head_dim)
        runner = DrafterRunner(
            config, machine, weights.network, buffers,
            torch.from_numpy(inv_freq).to(machine.device), rope_scale, theirs.anchor, types,
            drafter=weights, own=own,
        )  # fmt: skip
        row, spare = cache_sizes(config, *types)
        most = len(own.joined)
        memory = replace(target.memory, cache_row=row, spare=spare)
        super().__init__(runner, most, memory, capture, plan.network)
        self.taps, self.beside, self.lock = taps, dflash(config), target.lock
        self._joined, self._slot, self._most = own.joined, 0, most
        self._slots = [machine.host_buffer(4 * own.joined.numel()) for _ in range(SLOTS)]
        self._copied = [machine.new_event() for _ in range(SLOTS)]

    @classmethod
    def load_for(
        cls, file: DrafterFile, target: CudaModel, capture: Capture | None = None
    ) -> CudaNetwork:
        """Load an open drafter beside its target, whose memory plan has counted it. capture: how
        passes become graphs, for tests. Raises OrthrusError for weights that the kernels cannot
        hold."""
        machine = target.machine
        plan = plan_beside(file, target.plan, machine.capability)
        with machine.running():
            weights = load_drafter(file, plan, target.runner.weights, machine.device)
            machine.trim()
            return cls(plan, weights, file.target_layers, target, capture or capture_for(machine))

    def inject(self, cache: CudaCache, tokens: Sequence[int], taps: NDArray[np.float32]) -> None:
        """See `Network.inject`. The rows are made of taps alone."""
        for first in range(0, taps.shape[1], self._most):
            part = taps[:, first : first + self._most]
            rows = part.shape[1]
            with self.lock, self.machine.running():
                self._upload(part)
                self._run(
                    [ar_segment(cache, (0,) * rows, cache.length, wanted=range(0))], draws=True
                )
                cache.commit(range(rows))

    def _upload(self, taps: NDArray[np.float32]) -> None:
        """Enqueue the copy of taps, side by side."""
        self._slot = (self._slot + 1) % SLOTS
        self.machine.wait(self._copied[self._slot])  # two uploads ago: long since copied
        host = self._slots[self._slot].view(torch.float32).view(self._joined.shape)
        rows = taps.shape[1]
        host[:rows] = torch.from_numpy(np.concatenate(list(taps), axis=1))
        self._joined[:rows].copy_(host[:rows], non_blocking=True)
        self.machine.record(self._copied[self._slot])
