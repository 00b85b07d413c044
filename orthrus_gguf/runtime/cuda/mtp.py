"""An MTP block: a pass of one layer, whose input is made of two; a whole chain is one launch.

Each step of a chain takes the token that the one before drew, and what it gave, from where they lie
on the device: the host waits once, for the drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from orthrus_kernels.elementwise.rows import Rows
from torch import Tensor
from torch.nn.functional import rms_norm

from orthrus_gguf.runtime.cuda.arrange import Arrangement, arrange
from orthrus_gguf.runtime.cuda.beside import BesideRunner, CudaBeside
from orthrus_gguf.runtime.cuda.buffers import row_range
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.draws import choices
from orthrus_gguf.runtime.cuda.tables import StagedTable, Table
from orthrus_gguf.runtime.mtp import Chain
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import Segment, ar_segment


@dataclass(frozen=True, kw_only=True)
class BlockRunner(BesideRunner):
    """See `BesideRunner`."""

    def run(self, table: Table) -> None:
        """A pass of committed rows: keys and values in their caches."""
        rows = table.rows(self.buffers.cos, self.buffers.sin)
        self.prepare(table, rows)
        (layer,) = self.weights.layers
        self.store(table, rows, self.features_of(rows), layer.attn_norm)

    def draft(self, table: StagedTable) -> None:
        """A pass of chains: choices of all rows, step by step."""
        own, before = self.own, None
        for step in table.steps:
            rows = step.rows(self.buffers.cos, self.buffers.sin)
            if before is not None:
                # -1 where nothing could be drawn: what follows is nobody's.
                torch.clamp(before.drawn[:, 0], min=0, out=rows.tokens)
            given = self.step(step, rows)
            if step is not table.steps[-1]:
                own.given[: step.shape.rows].copy_(self._normed(given, self.weights.output_norm))
            before = step

    def step(self, table: Table, rows: Rows) -> Tensor:
        """Draw one row of each chain; what it gives, before the final norm, f32 [rows, n_embd]."""
        b, eps, count = self.buffers, self.config.rms_eps, table.shape.rows
        self.prepare(table, rows)
        features = self.features_of(rows)
        x = b.x[:count].zero_()
        (layer,) = self.weights.layers
        sums = self._mlp(layer, self._attend(table, rows, layer, 0, x, features), x)
        hidden = row_range(b.hidden, 0, count)
        self.machine.kernels.residual_norm(sums, x, self.weights.output_norm, eps, hidden)
        self.draw(table, hidden)
        return x

    def features_of(self, rows: Rows) -> Tensor:
        """What the layer's rows are made of, as partials; `own.given` holds what the rows before
        them gave."""
        count, width = len(rows.tokens), self.config.n_embd
        w, joined, x = self.weights.embedding, self.own.joined[:count], self.buffers.x[:count]
        self.machine.kernels.embed(w.table, w.type_name, rows.tokens, self.buffers.codebook, x)
        halves = joined[:, :width], joined[:, width:]
        parts = x, self.own.given[:count]
        for half, part, norm in zip(halves, parts, self.drafter.norms, strict=True):
            half.copy_(self._normed(part, norm))
        return self.features(count)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight.shape, weight, self.config.rms_eps)


class CudaBlock(CudaBeside):
    """See `mtp.Block`."""

    runner_type = BlockRunner

    def new_rows(self, capacity: int) -> CudaCache:
        """See `mtp.Block.new_rows`."""
        return self.new_cache(capacity)

    def learn(self, rows: CudaCache, tokens: Sequence[int], hidden: NDArray[np.float32]) -> None:
        """See `mtp.Block.learn`."""
        for first in range(0, len(tokens), self._most):
            some = tokens[first : first + self._most]
            with self.lock, self.machine.running():
                self._upload(hidden[first : first + self._most])
                self._run([ar_segment(rows, some, rows.length, wanted=range(0))], draws=True)
                rows.commit(range(len(some)))

    def draft(self, chains: Sequence[Chain]) -> None:
        """See `mtp.Block.draft`."""
        longest_first = sorted(chains, key=lambda chain: -chain.length)
        for first in range(0, len(chains), self._most):
            self._draft(longest_first[first : first + self._most])

    def _draft(self, chains: Sequence[Chain]) -> None:
        """Chains of one pass. Row i of each step belongs to chain i; the shorter ones end first."""
        runner = self.runner
        assert isinstance(runner, BlockRunner)
        with self.lock, self.machine.running():
            steps = [self._step(chains, step) for step in range(chains[0].length)]
            self._check([placed.piece.segment for placed in steps[0].placed])
            shape = replace(
                steps[0].shape,
                windows=max(step.shape.windows for step in steps),
                bans=max(step.shape.bans for step in steps),
                steps=len(steps),
            )
            table = self._table(replace(steps[0], shape=shape), keep=True)
            table.begin()
            for arranged, host in zip(steps, table.hosts, strict=True):
                arranged.fill(host, self._drawn)
            self._upload(np.stack([chain.hidden for chain in chains]))
            table.upload()
            with runner.holding(steps[0].caches):
                self.graphs.run(shape, partial(runner.draft, table))
            top = 0 if shape.kind is None else shape.kind.top
            found = table.download().reshape(len(steps), -1, shape.columns)
            for number, chain in enumerate(chains):
                chain.take(choices(found[: chain.length, number], chain.draw, top))

    def _step(self, chains: Sequence[Chain], step: int) -> Arrangement:
        """Where the rows of a step stand, as of a pass of their own. Penalties look at the text up
        to the anchor only: what the steps before draw is not known yet, which costs acceptance."""
        pieces = [
            Piece(number, _row(chain, step), 0, 1)
            for number, chain in enumerate(chains)
            if step < chain.length
        ]
        return arrange(pieces, self._drawn, self._most, draws=True, prompt=False)


def _row(chain: Chain, step: int) -> Segment:
    """A row of a chain, as a segment."""
    return ar_segment(chain.rows, [chain.token], chain.start + step, draw=chain.draw)
