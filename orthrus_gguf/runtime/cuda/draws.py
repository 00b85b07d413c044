"""How the wanted rows of a pass are drawn: settings in tables, results as choices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from orthrus_kernels.sampling.sample import (
    EXTRACTED,
    GREEDY,
    MAX_TOP_K,
    RESULT,
    SORTED,
    DrawKind,
    kept_tokens,
    row_mode,
    row_numbers,
    signed,
)

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.cuda.tables import Host
from orthrus_gguf.runtime.protocol import Draw, Segment, View, depths, path_to
from orthrus_gguf.sampling import Choice, LogProbs, SamplingSettings


@dataclass
class WantedRows:
    """The wanted rows of a pass, in order. Each of the lists has an element per row, but `windows`
    (tokens that penalties look at) and `bans` (pairs of row and token).

    rows: of the pass. positions: of the rows themselves. spans: parts of `windows`.
    """

    rows: list[int] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    bans: list[tuple[int, int]] = field(default_factory=list)
    masks: dict[int, NDArray[np.uint32]] = field(default_factory=dict)

    def add(self, segment: Segment, wanted: Sequence[int], rows: Sequence[int]) -> None:
        """wanted: rows of a segment. rows: where they are in the pass."""
        draw = segment.draw
        if draw is None:
            raise ValueError("rows are wanted of a segment that does not say how to draw them")
        if draw.top > MAX_TOP_K:
            raise OrthrusError(
                f"{draw.top} log-probabilities per token: the cuda runtime reports at most "
                f"{MAX_TOP_K}; ask for fewer"
            )
        first = len(self.rows)
        self.rows += rows
        self.draws += [draw] * len(rows)
        self.positions += _positions(segment, wanted)
        self.spans += self._windows_of(segment, draw, wanted)
        for number, row in enumerate(wanted, first):
            self.bans += [(number, token) for token in draw.sampler.settings.banned]
            if draw.allowed is not None:
                self.masks[number] = draw.allowed[row - segment.wanted.start]

    def kind(self, n_vocab: int) -> DrawKind:
        """What they need."""
        modes = {settings_row(draw.sampler.settings, n_vocab)[0] for draw in self.draws}
        return DrawKind(
            greedy=GREEDY in modes,
            extracted=EXTRACTED in modes,
            sorted=SORTED in modes,
            penalizes=bool(self.windows),
            bans=bool(self.bans),
            masked=bool(self.masks),
            detail=any(draw.detail for draw in self.draws),
            top=max((draw.top for draw in self.draws), default=0),
        )

    def fill(self, host: Host, n_vocab: int) -> None:
        """Write all of it into the tables of a pass. n_vocab: tokens that its logits are of."""
        count = len(self.rows)
        for number, draw in enumerate(self.draws):
            settings = settings_row(draw.sampler.settings, n_vocab)
            host["modes"][number], host["numbers"][number], host["integers"][number] = settings
        host["positions"][:count] = self.positions
        if self.windows:
            host["windows"][: len(self.windows)] = self.windows
            spans = np.array(self.spans, np.int32)
            host["window_first"][:count], host["window_stop"][:count] = spans.T
        bans = [(number, token) for number, token in self.bans if token < n_vocab]
        if bans:
            host["bans"][: len(bans)] = bans
        for number, mask in self.masks.items():
            host["masks"][number] = mask.view(np.int32)

    def _windows_of(
        self, segment: Segment, draw: Draw, wanted: Sequence[int]
    ) -> Iterator[tuple[int, int]]:
        """Parts of `windows` that hold the ends of the rows' prefixes, which are added to it.

        A block's rows look at the tokens up to its anchor only: what the rows before them draw is
        not known yet. That costs acceptance, and nothing else.
        """
        last = draw.sampler.looks_back
        if not last:
            return iter([(0, 0)] * len(wanted))
        tail = _tail(draw, segment.start, last)
        lines: dict[tuple[int, ...], Sequence[int]]
        if segment.view is View.DIFFUSION:
            lines = {(): wanted}
        elif segment.parents is None:
            lines = {tuple(range(1, max(wanted, default=0) + 1)): wanted}
        else:
            lines = {tuple(path_to(row, segment.parents)[1:]): [row] for row in wanted}
        spans = []
        for path, rows in lines.items():
            first = len(self.windows)
            self.windows += [*tail, *(segment.tokens[row] for row in path)]
            for row in rows:
                after = 0
                if segment.view is View.AR:
                    after = row if segment.parents is None else len(path)
                stop = len(tail) + after
                spans.append((first + max(0, stop - last if last > 0 else 0), first + stop))
        return iter(spans)


@lru_cache(maxsize=256)
def settings_row(
    settings: SamplingSettings, n_vocab: int
) -> tuple[int, tuple[float, ...], tuple[int, int]]:
    """Mode, numbers and integers of rows drawn with these settings."""
    s = settings
    return (
        row_mode(s.temperature, s.top_k, n_vocab),
        row_numbers(
            s.temperature, s.top_p, s.min_p, s.repeat_penalty, s.frequency_penalty,
            s.presence_penalty,
        ),
        (signed(s.seed), kept_tokens(s.top_k, n_vocab)),
    )  # fmt: skip


def choices(found: NDArray[np.int32], draw: Draw, top: int) -> tuple[Choice | None, ...]:
    """The choices of rows of results that were drawn alike. top: that the pass reported."""
    return tuple(_choice(row, row.view(np.float32), draw, top) for row in found)


def _choice(
    row: NDArray[np.int32], numbers: NDArray[np.float32], draw: Draw, top: int
) -> Choice | None:
    token = int(row[0])
    if token < 0:
        return None
    logprobs = None
    if draw.top:
        stop = RESULT + draw.top
        logs = numbers[RESULT + top : stop + top].tolist()
        likeliest = tuple(zip(row[RESULT:stop].tolist(), logs, strict=True))
        logprobs = LogProbs(float(numbers[RESULT - 1]), likeliest)
    if not draw.detail:
        return Choice(token, logprobs=logprobs)
    return Choice(token, float(numbers[2]), int(row[1]), float(numbers[3]), logprobs)


def _positions(segment: Segment, rows: Sequence[int]) -> list[int]:
    if segment.parents is None:
        return [segment.start + row for row in rows]
    depth = depths(segment.parents)
    return [segment.start + depth[row] for row in rows]


def _tail(draw: Draw, start: int, last: int) -> list[int]:
    """The last tokens of the prefix of a segment's first row (`last` of them, -1: all)."""
    known = start + 1 - len(draw.ahead)
    first = 0 if last < 0 else max(0, start + 1 - last)
    tail = [*draw.history[min(first, known) : known], *draw.ahead]
    return tail if last < 0 else tail[max(0, len(tail) - last) :]
