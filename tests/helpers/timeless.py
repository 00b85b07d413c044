"""A controller that decides by a table of costs alone, so that what it does can be compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.drafting.cycle import Cycle, Pass


class StraightCosts:
    """Seconds of passes as a straight line; what was observed is ignored."""

    drafter = 0.0

    def __init__(self, per_row: float) -> None:
        """per_row: of every row but the first, in single-row passes (of a millisecond)."""
        self.per_row = per_row

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return 1e-3 * (1 + self.per_row * (ar_rows + diffusion_rows - 1))

    def observe(self, done: Pass, times: int = 1) -> None:
        pass


class Timeless(Controller):
    """Is told that every cycle took what the table says, without company and without a host."""

    def __init__(
        self, per_row: float, block_size: int | None, *, without: Iterable[str] = ()
    ) -> None:
        self._table = StraightCosts(per_row)
        super().__init__(self._table, block_size, without=without)

    def observe(self, cycle: Cycle) -> None:
        passes = tuple(
            replace(p, seconds=self._table.seconds(p.ar_rows, p.diffusion_rows, 0), company=0)
            for p in cycle.passes
        )
        super().observe(replace(cycle, passes=passes, seconds=sum(p.seconds for p in passes)))
