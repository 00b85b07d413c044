"""What networks beside a model share: its kernels and its stream, with buffers of their own; their
passes become graphs as the model's do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from orthrus_kernels.elementwise.rows import Rows
from torch import Tensor

from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.model.rope import frequencies
from orthrus_gguf.runtime.cuda.buffers import row_range
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

#: Host buffers of what the host gives: one is filled while the copy from the other may be under
#: way.
SLOTS = 2

N = TypeVar("N", bound="CudaBeside")


@dataclass(frozen=True, kw_only=True)
class BesideRunner(PassRunner):
    """See `PassRunner`. weights are those of the network in `drafter`."""

    drafter: DrafterWeights
    own: DrafterBuffers

    def features(self, count: int) -> Tensor:
        """Partials [split, count, n_embd] of the product with what `own.joined` holds."""
        own = self.own
        wide, sums = row_range(own.wide, 0, count), own.sums[:, :count]
        self.machine.kernels.quantize_rows(own.joined[:count], wide)
        self.product(wide, self.drafter.features, sums)
        return sums

    def store(self, table: Table, rows: Rows, features: Tensor, norm: Tensor) -> None:
        """Keys and values of rows in their caches. norm: of the features."""
        launch, b, w = self.machine.kernels, self.buffers, self.drafter
        count = table.shape.rows
        x = b.x[:count].zero_()
        partials: Tensor | None = features
        for layout in dict.fromkeys(product.layout for product in w.injected):
            normed = row_range(b.normed[layout], 0, count)
            launch.residual_norm(partials, x, norm, self.config.rms_eps, normed)
            partials = None  # x holds their sum now
        caches, no_q = self.caches(table), b.q[:count, :0]
        for index, (layer, product) in enumerate(zip(w.network.layers, w.injected, strict=True)):
            found = self.own.keys_values[:, :count]
            self.product(row_range(b.normed[product.layout], 0, count), product, found)
            launch.finish_qkv(
                found, layer.heads, rows, no_q, caches, index, b.block_keys, b.block_values
            )


class CudaBeside(CudaModel):
    """A network beside a model. One pass of either runs at a time, on the model's stream.

    taps: layers of the model that it reads.
    """

    runner_type: ClassVar[type[BesideRunner]]

    def __init__(
        self,
        plan: DrafterPlan,
        weights: DrafterWeights,
        taps: tuple[int, ...],
        target: CudaModel,
        capture: Capture | None,
    ) -> None:
        """Take over what `load_for` has made."""
        config, theirs = plan.config, target.runner
        # Rows of drafts are checked by the model, and what is stored of others has no logits.
        machine, types = replace(theirs.machine, check_rows=False), theirs.cache_types
        buffers, own = new_drafter_buffers(plan, weights, theirs.buffers, machine.device)
        inv_freq, rope_scale = frequencies(config.rope, config.rotary_dim)
        runner = self.runner_type(
            config, machine, weights.network, buffers,
            torch.from_numpy(inv_freq).to(machine.device), rope_scale, theirs.anchor, types,
            drafter=weights, own=own,
        )  # fmt: skip
        row, spare = cache_sizes(config, *types)
        memory = replace(target.memory, cache_row=row, spare=spare)
        self._most, self._given, self._slot = len(own.given), own.given, 0
        super().__init__(runner, self._most, memory, capture, plan.network)
        self.taps, self.lock = taps, target.lock
        self._drawn = replace(config, n_vocab=plan.ids)
        self._slots = [machine.host_buffer(4 * own.given.numel()) for _ in range(SLOTS)]
        self._copied = [machine.new_event() for _ in range(SLOTS)]

    @classmethod
    def load_for(
        cls: type[N],
        file: DrafterFile | MtpFile,
        target: CudaModel,
        capture: Capture | None = None,
    ) -> N:
        """Load an open drafter beside its target, whose memory plan has counted it. capture: how
        passes become graphs, for tests. Raises OrthrusError for weights that the kernels cannot
        hold."""
        machine = target.machine
        plan = plan_beside(file, target.plan, machine.capability)
        with machine.running():
            weights = load_drafter(file, plan, target.runner.weights, machine.device)
            machine.trim()
            return cls(plan, weights, file.taps, target, capture or capture_for(machine))

    def _upload(self, given: NDArray[np.float32]) -> None:
        """Enqueue the copy of what the host gives, [rows, columns]."""
        self._slot = (self._slot + 1) % SLOTS
        self.machine.wait(self._copied[self._slot])  # two uploads ago: long since copied
        host = self._slots[self._slot].view(torch.float32).view(self._given.shape)
        rows = len(given)
        host[:rows] = torch.from_numpy(given)
        self._given[:rows].copy_(host[:rows], non_blocking=True)
        self.machine.record(self._copied[self._slot])
