"""An MTP block on the native kernels: a pass of one layer, whose input is made of two."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from orthrus_cpu_kernels import library as k
from orthrus_cpu_kernels.library import LANES, Kernels, Matrix, Step

from orthrus_gguf.model.file import WeightFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.model.tensors import (
    MTP_EMBD,
    MTP_EMBD_NORM,
    MTP_HIDDEN_NORM,
    MTP_OUTPUT,
    MTP_PROJECTION,
)
from orthrus_gguf.runtime.cache_layout import BATCH_ROWS
from orthrus_gguf.runtime.cpu.beside import CpuBeside
from orthrus_gguf.runtime.cpu.cache import CpuCache
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.cpu.pool import Pool
from orthrus_gguf.runtime.cpu.steps import Builder, Shape
from orthrus_gguf.runtime.cpu.weights import Floats, Weights, vector
from orthrus_gguf.runtime.mtp import Chain, Entry, run_stepwise
from orthrus_gguf.runtime.protocol import Logits, View


class BlockWeights(Weights):
    """A block's weights; embedding and output are the target's, unless it has its own."""

    def __init__(self, file: WeightFile, kernels: Kernels, pool: Pool, target: Weights) -> None:
        self._target = target
        super().__init__(file, kernels, pool)

    def _arrange(self, file: WeightFile) -> None:
        own = self._matrices.get
        self.token_embd = own(f"blk.0.{MTP_EMBD}", self._target.token_embd)
        self.output = own(f"blk.0.{MTP_OUTPUT}", self._target.output)
        self.projection = self._matrices[f"blk.0.{MTP_PROJECTION}"]
        self.norms = [vector(file, f"blk.0.{name}") for name in (MTP_EMBD_NORM, MTP_HIDDEN_NORM)]
        self._arrange_layers(file, {View.AR: ""})


class CpuBlock(CpuBeside):
    """See `mtp.Block`."""

    def __init__(self, file: MtpFile, target: CpuModel) -> None:
        """Raises OrthrusError when memory does not suffice."""
        weights = BlockWeights(file, target._kernels, target._pool, target._weights)
        super().__init__(file.config, weights, target)
        self._block_weights, width = weights, file.config.n_embd
        self._ids = file.ids
        whole = weights.output
        weights.output = Matrix(whole.type, whole.k, file.ids, -(-file.ids // LANES), whole.data)
        form = self._kernels.form(weights.projection.type)
        assert form is not None
        self._form = form
        self._before = np.zeros((BATCH_ROWS, width), np.float32)
        self._joined, self._quantized = self._room_for(2 * width, form)
        self._tap = file.config.n_layers + 1
        self._steps: dict[tuple[int, bool], ctypes.Array[Step]] = {}

    def new_rows(self, capacity: int) -> CpuCache:
        """See `mtp.Block.new_rows`."""
        self._check_open()
        return CpuCache(self._layout, capacity, self._block_rows)

    def learn(self, rows: CpuCache, tokens: Sequence[int], hidden: Floats) -> None:
        """See `mtp.Block.learn`. At most BATCH_ROWS rows."""
        count = len(tokens)
        with self._lock:
            self._check_open()
            self._put(0, 0, rows, rows.length, count)
            self._run_block(tokens, hidden, drafts=False)
            rows.hold(count)
            rows.commit(range(count))

    def draft(self, chains: Sequence[Chain]) -> None:
        """See `mtp.Block.draft`."""
        run_stepwise(self._step, chains)

    def _step(self, entries: Sequence[Entry]) -> tuple[Floats, Logits]:
        found = [
            self._some(entries[first : first + BATCH_ROWS])
            for first in range(0, len(entries), BATCH_ROWS)
        ]
        hidden, logits = zip(*found, strict=True)
        return np.concatenate(hidden), np.concatenate(logits)

    def _some(self, entries: Sequence[Entry]) -> tuple[Floats, Logits]:
        b, count = self._buffers, len(entries)
        with self._lock:
            self._check_open()
            for i, entry in enumerate(entries):
                self._put(i, i, entry.rows, entry.position, 1)
                b.group[i] = i, 1
            hidden = np.stack([entry.hidden for entry in entries])
            self._run_block([entry.token for entry in entries], hidden, drafts=True)
            given = b.tap(self._tap)[:count, : self.config.n_embd].copy()
            logits = np.full((count, self.config.n_vocab), -np.inf, np.float32)
            logits[:, : self._ids] = b.logits[:count, : self._ids]
            return given, logits

    def _run_block(self, tokens: Sequence[int], hidden: Floats, *, drafts: bool) -> None:
        """Run rows of which the kernels know where they lie."""
        count = len(tokens)
        self._buffers.row["token"][:count], self._before[:count] = tokens, hidden
        steps = self._steps.get((count, drafts))
        if steps is None:
            steps = self._steps[count, drafts] = self._made(count, drafts=drafts)
        self._pool.run(steps)

    def _made(self, rows: int, *, drafts: bool) -> ctypes.Array[Step]:
        """Steps from tokens, and what the rows before gave, to what they give and say; or, unless
        they are drafts, to their keys and values."""
        b, weights, width = self._buffers, self._block_weights, self.config.n_embd
        shape = Shape(rows, 0, rows, rows, (self._tap,)) if drafts else Shape(rows, 0, 0, 1)
        builder = Builder(self._kernels, self.config, weights, b, shape)
        builder.embed()
        common: dict[str, Any] = {"width": width, "epsilon": self.config.rms_eps}
        halves = self._joined[:, :width], self._joined[:, width:]
        for x, y, norm in zip((b.x, self._before), halves, weights.norms, strict=True):
            builder.add(k.NORM, rows, x=x, y=y, weight=norm.ctypes.data, **common)
        q, projection = self._quantized.ctypes.data, weights.projection
        builder.add(k.QUANTIZE, rows, x=self._joined, q=q, form=self._form, width=2 * width)
        builder.products({self._form: q}, [(projection, None)], 0, rows, b.x)
        return builder.through()
