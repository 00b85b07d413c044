"""From the pieces of a pass to its tables: which row stands where, and what it sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from orthrus_kernels.attention.attention import NO_EDGE, PROMPT_WINDOW, Run, tile_entries
from orthrus_kernels.elementwise.rows import AR, COLUMNS, DIFFUSION
from orthrus_kernels.recurrence.states import DRAFT

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.draws import WantedRows
from orthrus_gguf.runtime.cuda.passes import padded, power
from orthrus_gguf.runtime.cuda.state import HybridCudaCache
from orthrus_gguf.runtime.cuda.tables import Host, Shape
from orthrus_gguf.runtime.cuda.trees import TreeLayout, tree_layout
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import View
from orthrus_gguf.runtime.recurrent import BACK, RunPlan

_COLUMN = {name: index for index, name in enumerate(COLUMNS)}

#: Sizes of tables start here, so that most passes have the same.
_MOVES, _MORE, _BANS, _SLOTS = 64, 64, 16, 64


@dataclass(frozen=True)
class Placed:
    """A piece in a pass: its first row there, the rows of the segment in the order of the pass, and
    where its sequence stands in the table of caches. plan: what the recurrence of a hybrid does.
    shared: of a block of a hybrid, AR rows of its sequence in the same pass."""

    piece: Piece
    first: int
    order: Sequence[int]
    sequence: int
    tree: TreeLayout | None = None
    plan: RunPlan | None = None
    shared: Placed | None = None

    @property
    def is_block(self) -> bool:
        return self.piece.segment.view is View.DIFFUSION

    def rows(self, wanted: Sequence[int]) -> list[int]:
        """Where rows of the segment are in the pass."""
        if self.tree is None:
            return [self.first + row - self.piece.first for row in wanted]
        place = {row: self.first + i for i, row in enumerate(self.order)}
        return [place[row] for row in wanted]

    @property
    def wanted(self) -> range:
        """Its wanted rows, as rows of the segment."""
        piece = self.piece
        return range(piece.wanted.start + piece.first, piece.wanted.stop + piece.first)


@dataclass(frozen=True)
class Arrangement:
    """One pass. wanted: its wanted rows; None where their logits are asked for."""

    shape: Shape
    windows: tuple[tuple[int, int, int, int], ...]
    placed: tuple[Placed, ...]
    caches: tuple[CudaCache, ...]
    tiles: tuple[tuple[int, ...], ...]
    wanted_rows: tuple[int, ...]
    draws: WantedRows | None

    def fill(self, host: Host, config: ModelConfig) -> None:
        """Write the tables; `host` is as `Table.begin` leaves it."""
        host["entries"][: len(self.caches)] = [cache.entry for cache in self.caches]
        host["tiles"][: len(self.tiles)] = self.tiles
        host["index"][: len(self.wanted_rows)] = self.wanted_rows
        moves = [
            (number, *move) for number, cache in enumerate(self.caches) for move in cache.moves
        ]
        if moves:
            host["moves"][: len(moves)] = moves
        more: list[int] = []
        for placed in self.placed:
            _fill_rows(host["rows"], placed, more)
        host["more"][: len(more)] = more
        if self.shape.slots:
            self._fill_states(host)
        if self.draws is not None:
            self.draws.fill(host, config.n_vocab)

    def _fill_states(self, host: Host) -> None:
        """What the recurrence of a hybrid does."""
        slots: list[int] = []
        places = {False: count(), True: count(self.shape.runs)}
        for number, cache in enumerate(self.caches):
            assert isinstance(cache, HybridCudaCache)
            host["states"][number] = cache.state_entry
        for placed in self.placed:
            if placed.plan is not None:
                entry = _fill_run(host["state_rows"], placed, placed.plan, slots)
                host["runs"][next(places[placed.is_block])] = entry
        host["slots"][: len(slots)] = slots

    def ran(self) -> None:
        """The pass has run: what that means for the states of hybrids."""
        for placed in self.placed:
            if placed.plan is not None and not placed.is_block:
                cache = cast(HybridCudaCache, placed.piece.segment.cache)
                cache.ran(placed.plan, None if placed.tree is None else placed.tree.order)


def arrange(
    pieces: Sequence[Piece], config: ModelConfig, most: int, *, draws: bool, prompt: bool
) -> Arrangement:
    """Where everything goes. most: rows of a pass that is no prompt.

    Raises ValueError for a tree that its cache has no room for.
    """
    caches = cast("tuple[CudaCache, ...]", tuple({id(p.segment.cache): p.segment.cache
                                                  for p in pieces}.values()))  # fmt: skip
    number = {id(cache): index for index, cache in enumerate(caches)}
    ar = sum(piece.count for piece in pieces if piece.segment.view is View.AR)
    blocks = sum(piece.count for piece in pieces) - ar
    sizes = (ar, 0) if prompt else padded(ar, blocks, most)
    placed: list[Placed] = []
    verified: dict[int, Placed] = {}  # AR rows, by sequence
    at = {View.AR: 0, View.DIFFUSION: sizes[0]}
    for piece in pieces:
        view = piece.segment.view
        sequence = number[id(piece.segment.cache)]
        placed.append(_place(piece, at[view], sequence, verified.get(sequence)))
        if view is View.AR:
            verified[sequence] = placed[-1]
        at[view] += piece.count
    placed.sort(key=lambda one: one.first)
    wanted = WantedRows()
    rows: list[int] = []
    for one in placed:
        found = one.rows(one.wanted)
        rows += found
        if draws and found:
            wanted.add(one.piece.segment, one.wanted, found)
    tiles, windows = _tiles(placed, config, sum(sizes), most * (PROMPT_WINDOW if prompt else 1))
    more = sum(len(places) for one in placed if one.tree for places in one.tree.more)
    moves = sum(len(cache.moves) for cache in caches)
    taps = tuple(sorted({tap for piece in pieces for tap in piece.segment.taps})) if draws else ()
    plans = [one.plan for one in placed if one.plan is not None]
    block_runs = sum(one.is_block for one in placed if one.plan is not None)
    slots = sum(len(p.apply) + sum(map(len, p.replays.values())) for p in plans)
    shape = Shape(
        *sizes,
        wanted=len(rows) if prompt else padded(len(rows), 0, most)[0],
        tiles=len(tiles),
        kind=wanted.kind(config.n_vocab) if draws else None,
        more=power(more, _MORE) if more else 1,
        moves=power(moves, _MOVES) if moves else 0,
        windows=power(len(wanted.windows)),
        bans=power(len(wanted.bans), _BANS) if wanted.bans else 1,
        taps=taps,
        runs=padded(len(plans) - block_runs, 0, most)[0],
        block_runs=padded(block_runs, 0, most)[0],
        slots=power(slots, _SLOTS) if plans else 0,
    )
    return Arrangement(
        shape, windows, tuple(placed), caches, tuple(tiles), tuple(rows), wanted if draws else None
    )


def _place(piece: Piece, first: int, sequence: int, shared: Placed | None) -> Placed:
    """shared: AR rows of its sequence in the same pass."""
    segment, cache = piece.segment, cast(CudaCache, piece.segment.cache)
    hybrid = cache if isinstance(cache, HybridCudaCache) else None
    if segment.parents is None:
        order = range(piece.first, piece.first + piece.count)
        if hybrid is None:
            return Placed(piece, first, order, sequence)
        if segment.view is View.AR:
            return Placed(piece, first, order, sequence, plan=hybrid.plan(piece))
        block = hybrid.plan_block(piece, None if shared is None else shared.plan)
        return Placed(piece, first, order, sequence, plan=block, shared=shared)
    tree = tree_layout(segment.parents, segment.start)
    if not cache.holds(tree):
        raise ValueError(
            f"a tree of {len(segment)} rows in {len(tree.branches)} branches needs {tree.columns} "
            "columns, more than the cache has: ask `fit` first"
        )
    plan = hybrid.plan(piece, tree.order) if hybrid else None
    return Placed(piece, first, tree.order, sequence, tree, plan)


def _fill_run(
    rows: NDArray[Any], placed: Placed, plan: RunPlan, slots: list[int]
) -> tuple[int, ...]:
    """Columns of a run's rows, i32 [len(ROW), rows], and its entry (`states.RUN`). slots: receives
    the records that it names."""
    first, count = placed.first, placed.piece.count
    own = rows[:, first : first + count]
    record, back, (replay_first, replay_stop) = own[0], own[1 : 1 + BACK], own[1 + BACK :]
    record[:] = plan.records
    back[:] = np.where(plan.back >= 0, plan.back + first, plan.back).T
    if placed.shared is not None and placed.shared.plan is not None:
        # What the same launch writes to records is read where it comes from.
        for row, written in enumerate(placed.shared.plan.records, placed.shared.first):
            if written >= 0:
                back[back == -1 - written] = row
    begin = len(slots)
    slots += plan.apply
    stop = len(slots)
    replay_first[:] = -1
    for row, records in plan.replays.items():
        replay_first[row] = len(slots)
        slots += records
        replay_stop[row] = len(slots)
    source, target, stamp = cast(HybridCudaCache, placed.piece.segment.cache).run_entry(plan)
    keeps = DRAFT if placed.is_block else int(plan.advance)
    return first, count, placed.sequence, source, target, begin, stop, stamp, keeps


def _fill_rows(rows: NDArray[Any], placed: Placed, more: list[int]) -> None:
    """Columns of a piece's rows, i32 [columns, rows]."""
    piece, segment = placed.piece, placed.piece.segment
    part = slice(placed.first, placed.first + piece.count)
    own = {name: rows[index, part] for name, index in _COLUMN.items()}
    own["sequences"][:] = placed.sequence
    own["tokens"][:] = [segment.tokens[row] for row in placed.order]
    if segment.view is View.DIFFUSION:
        own["views"][:] = DIFFUSION
        own["positions"][:] = np.arange(segment.start, segment.start + piece.count)
        own["visible"][:] = segment.start
        own["block_first"][:], own["block_stop"][:] = part.start, part.stop
        return
    own["views"][:] = AR
    if placed.tree is None:
        own["positions"][:] = own["places"][:] = np.arange(piece.start, piece.start + piece.count)
    else:
        tree = placed.tree
        own["positions"][:] = [tree.start + tree.depths[row] for row in placed.order]
        own["places"][:] = [tree.places[row] for row in placed.order]
        for i, row in enumerate(placed.order):
            own["more_first"][i] = len(more)
            more += tree.more[row]
            own["more_stop"][i] = len(more)
    own["visible"][:] = own["positions"] + 1


def _tiles(
    placed: Sequence[Placed], config: ModelConfig, rows: int, most: int
) -> tuple[list[tuple[int, ...]], tuple[tuple[int, int, int, int], ...]]:
    """Tiles of attention, and its launches: windows of up to `most` rows."""
    runs: list[Run] = []
    for one in placed:
        if one.tree is not None:
            first = one.first
            for branch in one.tree.branches:
                runs.append(Run(first, len(branch.rows), one.sequence, branch.edge, branch.shift))
                first += len(branch.rows)
            continue
        last = runs[-1] if runs else None
        stop = one.first + one.piece.count
        if last is not None and last.sequence == one.sequence and last.edge == NO_EDGE:
            # Rows of one sequence share tiles, whatever unused rows lie between them.
            runs[-1] = Run(last.first, stop - last.first, one.sequence)
        else:
            runs.append(Run(one.first, one.piece.count, one.sequence))
    group = config.n_head // config.n_head_kv
    tiles: list[tuple[int, ...]] = []
    windows = []
    for start in range(0, rows, most):
        stop, before = min(start + most, rows), len(tiles)
        here = [
            Run(max(r.first, start) - start, min(r.first + r.rows, stop) - max(r.first, start),
                r.sequence, r.edge, r.shift)
            for r in runs if r.first < stop and r.first + r.rows > start
        ]  # fmt: skip
        tiles += tile_entries(here, group, config.head_dim)
        if rows <= most:  # the launches of a graph
            tiles += [(0, 0, 0, 0, NO_EDGE, 0)] * (padded(len(tiles), 0, 1 << 30)[0] - len(tiles))
        windows.append((start, stop - start, before, len(tiles) - before))
    return tiles, tuple(windows)


def check_tokens(tokens: Sequence[int], n_vocab: int) -> None:
    """Raise OrthrusError unless all of them are in the vocabulary."""
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= n_vocab:
        raise OrthrusError(
            f"token {low if low < 0 else high} is outside the vocabulary of {n_vocab}; the "
            "tokenizer does not belong to this model"
        )
