"""ORTHRUS_CHECK_ROWS=1: every AR row of a pass again, alone, and its bits compared. To debug."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from orthrus_kernels.elementwise.rows import AR, COLUMNS
from orthrus_kernels.recurrence.states import RUN
from torch import Tensor

from orthrus_gguf.runtime.cuda.buffers import row_range
from orthrus_gguf.runtime.cuda.runner import PassRunner
from orthrus_gguf.runtime.cuda.tables import Host, Shape, StagedTable

_VIEWS, _FIRST, _STOP = (COLUMNS.index(name) for name in ("views", "more_first", "more_stop"))


def check_rows(runner: PassRunner, table: StagedTable) -> None:
    """Compare the logits of the AR rows of the pass that has just run. It costs a pass per row.

    Raises AssertionError with the first row whose bits differ. Results stay as they were. Rows of
    long runs, which leave no records of what they do to a state, are passed over.
    """
    count, b, c = table.shape.ar, runner.buffers, runner.config
    if count < 2:
        return
    results, held, states = b.logits.clone(), list(runner.held), list(runner.held_states)
    partials = b.down[:, : table.shape.rows] if c.n_layers else None
    together = _logits(runner, b.x[: table.shape.rows], partials, count).clone()
    try:
        for row in range(count):
            if table.host["rows"][_VIEWS, row] != AR:
                continue
            if table.shape.runs and _run_of(table.host, row)[RUN.index("keeps")]:
                continue
            single, sequence = _alone(runner, table, row)
            runner.held[:] = [held[sequence]]
            runner.held_states[:] = states[sequence : sequence + 1]
            runner.prepare(single, single.rows(b.cos, b.sin))
            x, rest = runner.layers(single, single.rows(b.cos, b.sin))
            alone = _logits(runner, x, rest, 1)[0]
            if not torch.equal(alone.view(torch.int32), together[row].view(torch.int32)):
                difference = float((together[row] - alone).abs().max())
                raise AssertionError(
                    f"row {row} of a pass of {table.shape.rows} rows ({count} AR) has other bits "
                    f"than alone: its logits differ by up to {difference:.3g}"
                )
    finally:
        runner.held[:], runner.held_states[:] = held, states
        b.logits.copy_(results)


def _logits(runner: PassRunner, x: Tensor, partials: Tensor | None, count: int) -> Tensor:
    """Of the first rows (static)."""
    index = torch.arange(count, dtype=torch.int32, device=x.device)
    hidden = row_range(runner.buffers.hidden, 0, count)
    runner.finish(x, partials, index, hidden)
    logits = runner.buffers.logits[:count]
    runner.logits(hidden, logits)
    return logits


def _alone(runner: PassRunner, table: StagedTable, row: int) -> tuple[StagedTable, int]:
    """The tables of a pass of one row of another pass, uploaded; and the row's sequence there."""
    c, tiles = runner.config, table.host["tiles"]
    first, rows = tiles[:, 0], tiles[:, 1]
    (own,) = tiles[(first <= row) & (row < first + rows) & (tiles[:, 2] == 0)]
    hybrid = bool(table.shape.runs)
    shape = Shape(1, 0, 0, tiles=1, kind=None, runs=int(hybrid), slots=table.shape.slots)
    single = StagedTable(shape, c.n_vocab, c.n_embd, ((0, 1, 0, 1),), runner.machine)
    host = single.begin()
    host["rows"][:, 0] = table.host["rows"][:, row]
    host["rows"][_FIRST, 0] = host["rows"][_STOP, 0] = 0
    sequence = int(own[3])
    host["entries"][0] = table.host["entries"][sequence]
    host["tiles"][0] = (0, 1, 0, 0, own[4], own[5])
    host["rows"][COLUMNS.index("sequences"), 0] = 0
    if hybrid:
        host["states"][0] = table.host["states"][sequence]
        _begin(table.host, row, host)
    single.upload()
    return single, sequence


def _run_of(host: Host, row: int) -> NDArray[np.int32]:
    """The entry of the run that a row belongs to."""
    runs = host["runs"]
    (run,) = runs[(runs[:, 0] <= row) & (row < runs[:, 0] + runs[:, 1])]
    found: NDArray[np.int32] = run
    return found


def _begin(given: Host, row: int, host: Host) -> None:
    """Have a run of one row begin where a row of a short run of another pass did: behind the
    committed state, which has what that pass applied, and records."""
    record, *back, replay_first, replay_stop = given["state_rows"]
    run = _run_of(given, row)
    first, behind = row, list[int]()
    while replay_first[first] < 0 and first > run[0]:
        first -= 1
        behind.insert(0, record[first])
    if replay_first[first] >= 0:
        behind = [*given["slots"][replay_first[first] : replay_stop[first]], *behind]
    host["slots"][: len(behind)] = behind
    host["runs"][0] = run
    host["runs"][0, : RUN.index("source")] = 0, 1, 0
    host["runs"][0, [RUN.index("apply_first"), RUN.index("apply_stop")]] = 0
    before = [-1 - record[at] if at >= 0 else at for at in (column[row] for column in back)]
    host["state_rows"][:, 0] = (record[row], *before, 0, len(behind))
