"""Logits → tokens on the device: seeded sampling with the noise and filter order of the CPU's.

The token at position p is `argmax(score / temperature + noise(seed, p, token))` over tokens that
survive penalties, bans, a mask, top-k, top-p and min-p (llama.cpp's order). The noise is standard
Gumbel noise made from word `token % 4` of Philox4x32-10 with counter (token // 4, p, 0, 0) and the
seed as key, in double precision, as are the sums for top-p.

Each row has settings of its own, so that requests may share a pass; a row's *mode* says which
kernels decide it, and a `DrawKind` which of them a pass launches at all. What decides one row does
not depend on its company.

Candidates are sorted as 64-bit keys: the score in an order-preserving form, then the token, lower
ids first; equal scores thus have one order, and so does everything after. Up to MAX_TOP_K of them
are extracted by two small kernels; a larger (or no) top-k sorts the vocabulary with torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from orthrus_kernels.sampling import kernels as kernels

MAX_TOP_K = 128
"""Largest top-k that does not sort the whole vocabulary, and most log-probabilities of a row."""

SORTED_ROWS = 8
"""Rows that torch sorts at a time: it needs four times their keys for a moment, which a graph then
holds for good (40 MB for eight rows of 152,000 tokens)."""

EXTRACT_TILE = 4096
SORTED_TILE = 1024
ROW_PROGRAMS = 16
"""Programs that share the penalty window of one row; its cost grows with the window squared."""

UNUSED, GREEDY, EXTRACTED, SORTED = -1, 0, 1, 2
"""Modes of a row: not drawn; largest score; sampled from up to MAX_TOP_K candidates; from more."""

NUMBERS = 6
"""Columns of `Draws.numbers`: temperature, top-p, ln(min-p), and the three penalties."""

RESULT = 5
"""Columns of a row of results before the likeliest tokens: token (-1: logits not finite),
runner-up, both their probabilities, the token's log-probability; numbers as the bits of f32."""


@dataclass(frozen=True)
class DrawKind:
    """What a pass launches to draw its rows.

    greedy, extracted, sorted: modes that occur. penalizes, bans, masked: what changes scores first.
    detail: runner-up and probabilities. top: log-probabilities, of this many likeliest tokens.
    """

    greedy: bool = False
    extracted: bool = False
    sorted: bool = False
    penalizes: bool = False
    bans: bool = False
    masked: bool = False
    detail: bool = False
    top: int = 0

    @property
    def changes(self) -> bool:
        """Whether scores are not the logits themselves."""
        return self.penalizes or self.bans or self.masked

    @property
    def spares_logits(self) -> bool:
        """Whether the two largest logits of each row and their probabilities are all that is asked
        for, so that the head's kernel finds them and no logits are stored.

        Log-probabilities are left out: those of a row would depend, in their last bits, on whether
        its company needs logits.
        """
        return not (self.extracted or self.sorted or self.changes or self.top)

    @property
    def columns(self) -> int:
        """Columns of the results."""
        return RESULT + 2 * self.top


@dataclass(frozen=True)
class Draws:
    """How each row is drawn; tensors of a pass.

    modes, positions: i32 [rows]; the token drawn belongs one past the row's position.
    numbers: f64 [rows, NUMBERS]. integers: i64 [rows, 2], seed (two's complement) and top-k.
    windows: i32; penalties of row i look at windows[window_first[i] : window_stop[i]].
    bans: i32 [any, 2], pairs of row (-1: none) and token. masks: i32 [rows, words], or any shape
        where no row has one: bit v % 32 of word v // 32 allows token v.
    """

    modes: Tensor
    positions: Tensor
    numbers: Tensor
    integers: Tensor
    windows: Tensor
    window_first: Tensor
    window_stop: Tensor
    bans: Tensor
    masks: Tensor


def row_mode(temperature: float, top_k: int, n_vocab: int) -> int:
    """The mode of a row of such settings (llama.cpp's flags)."""
    if temperature <= 0:
        return GREEDY
    return EXTRACTED if kept_tokens(top_k, n_vocab) <= MAX_TOP_K else SORTED


def kept_tokens(top_k: int, n_vocab: int) -> int:
    """Candidates that top-k leaves; 0 or less is off."""
    return top_k if 0 < top_k < n_vocab else n_vocab


def row_numbers(
    temperature: float,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repeat_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
) -> tuple[float, ...]:
    """A row of `Draws.numbers`. top_p >= 1 and min_p <= 0 are off."""
    log_min_p = math.log(min_p) if min_p > 0 else -math.inf
    return temperature, top_p, log_min_p, repeat_penalty, frequency_penalty, presence_penalty


def signed(seed: int) -> int:
    """A 64-bit seed as an i64."""
    return seed - 2**64 if seed >= 2**63 else seed


@dataclass(frozen=True)
class SampleScratch:
    """Buffers between the kernels, for up to `rows` rows of one vocabulary size.

    extracted: i64 [rows, tiles * MAX_TOP_K]; top: i64 [rows, MAX_TOP_K].
    masses; and of each tile the best score, its token, the runner-up and its token, the sum of
    exp(score - best): f64 or i32 [rows, tiles].
    """

    extracted: Tensor
    top: Tensor
    masses: Tensor
    best: Tensor
    tokens: Tensor
    second: Tensor
    second_tokens: Tensor
    sums: Tensor

    @property
    def tiles(self) -> tuple[Tensor, ...]:
        """What tiles leave, in the order of the kernels' arguments."""
        return self.best, self.tokens, self.second, self.second_tokens, self.sums


def new_sample_scratch(rows: int, n_vocab: int, device: torch.device | str) -> SampleScratch:
    """Uninitialised scratch."""
    extract = triton.cdiv(n_vocab, EXTRACT_TILE)
    tiles = triton.cdiv(n_vocab, SORTED_TILE)

    def plane(dtype: torch.dtype, columns: int = tiles) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device)

    return SampleScratch(
        plane(torch.int64, extract * MAX_TOP_K),
        plane(torch.int64, MAX_TOP_K),
        plane(torch.float64),
        plane(torch.float64),
        plane(torch.int32),
        plane(torch.float64),
        plane(torch.int32),
        plane(torch.float64),
    )


def draw(logits: Tensor, draws: Draws, kind: DrawKind, scratch: SampleScratch, out: Tensor) -> None:
    """Draw the token after each row.

    logits: f32 [rows, vocab], contiguous; changed in place by penalties, bans and masks.
    kind: must cover all that `draws` holds.
    out: i32 [rows, kind.columns], see RESULT; then come the likeliest tokens and their
        log-probabilities, best first. Log-probabilities are those of the logits as they came.
        Columns that `kind` does not ask for stay as they are.
    """
    given = logits.clone() if kind.top and kind.changes else logits
    _adjust(logits, draws, kind)
    rows, n_vocab = logits.shape
    counts = [0, 0, 0]
    if kind.greedy:
        counts[GREEDY] = triton.cdiv(n_vocab, EXTRACT_TILE)
        kernels.best_of_tile[(rows, counts[GREEDY])](
            logits,
            draws.modes,
            *scratch.tiles,
            n_vocab,
            scratch.best.stride(0),
            TILE=EXTRACT_TILE,
            DETAIL=kind.detail,
        )
    if kind.extracted:
        _extract(logits, draws, scratch, 0)
        counts[EXTRACTED] = _choose(scratch.top[:rows], draws, EXTRACTED, kind.detail, scratch)
    if kind.sorted:
        keys = torch.empty(rows, n_vocab, dtype=torch.int64, device=logits.device)
        kernels.pack_keys[(rows, triton.cdiv(n_vocab, 1024))](logits, keys, n_vocab, TILE=1024)
        for some in keys.split(SORTED_ROWS):
            some.copy_(some.sort(dim=1, descending=True).values)
        counts[SORTED] = _choose(keys, draws, SORTED, kind.detail, scratch)
    kernels.settle[(rows,)](
        draws.modes,
        *scratch.tiles,
        out,
        *counts,
        scratch.best.stride(0),
        out.stride(0),
        WIDTH=triton.next_power_of_2(max(counts)),
        DETAIL=kind.detail,
        num_warps=1,
    )
    if kind.top:
        _report(given, draws, kind.top, scratch, out)


def pick(values: Tensor, tokens: Tensor, out: Tensor) -> None:
    """The token of the largest value of each row (the lowest id on a draw, -1 if that is not
    finite), the runner-up, and the probabilities of both.

    values: f32 [3, tiles, rows]; tokens: i32 [2, tiles, rows]: see `matmul.Top2`.
    out: i32 [rows, at least 4], see RESULT.
    """
    _, tiles, rows = values.shape
    kernels.pick[(rows,)](
        values,
        tokens,
        out,
        tiles,
        rows,
        out.stride(0),
        WIDTH=triton.next_power_of_2(tiles),
        num_warps=8,
    )


def _adjust(logits: Tensor, draws: Draws, kind: DrawKind) -> None:
    """Penalties, bans and masks, in place."""
    rows, n_vocab = logits.shape
    if kind.penalizes:
        kernels.penalize[(rows, ROW_PROGRAMS)](
            logits,
            draws.windows,
            draws.window_first,
            draws.window_stop,
            draws.numbers,
            n_vocab,
            PROGRAMS=ROW_PROGRAMS,
            TILE=64,
            num_warps=4,
            enable_fp_fusion=False,
        )
    if kind.bans:
        pairs = draws.bans.shape[0]
        kernels.ban[(triton.cdiv(pairs, 128),)](logits, draws.bans, pairs, n_vocab, TILE=128)
    if kind.masked:
        words = draws.masks.shape[1]
        grid = (rows, triton.cdiv(n_vocab, 1024))
        kernels.mask[grid](logits, draws.masks, n_vocab, words, TILE=1024)


def _choose(keys: Tensor, draws: Draws, mode: int, detail: bool, scratch: SampleScratch) -> int:
    """Draw the rows of a mode from keys [rows, n] in descending order, n at least top-k; leaves
    what `settle` needs, and returns the number of tiles."""
    rows, n = keys.shape
    tiles = triton.cdiv(n, SORTED_TILE)
    tile = min(SORTED_TILE, triton.next_power_of_2(n))
    sizes = (n, keys.stride(0), scratch.masses.stride(0))
    kernels.mass_of_tile[(rows, tiles)](
        keys,
        draws.modes,
        draws.integers,
        scratch.masses,
        *sizes,
        TILE=tile,
        MODE=mode,
        enable_fp_fusion=False,
    )
    kernels.choose_in_tile[(rows, tiles)](
        keys,
        draws.modes,
        draws.numbers,
        draws.integers,
        scratch.masses,
        draws.positions,
        *scratch.tiles,
        *sizes,
        TILE=tile,
        TILES=triton.next_power_of_2(tiles),
        MODE=mode,
        DETAIL=detail,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return int(tiles)


def _extract(logits: Tensor, draws: Draws, scratch: SampleScratch, count: int) -> None:
    """The largest keys of each row → scratch.top. count: how many, 0: as top-k says."""
    rows, n_vocab = logits.shape
    tiles = triton.cdiv(n_vocab, EXTRACT_TILE)
    extracted = scratch.extracted if tiles > 1 else scratch.top
    kernels.extract[(rows, tiles)](
        logits,
        extracted,
        draws.modes,
        draws.integers,
        n_vocab,
        logits.stride(0),
        extracted.stride(0),
        TILE=min(EXTRACT_TILE, triton.next_power_of_2(n_vocab)),
        KEEP=MAX_TOP_K,
        FROM_KEYS=False,
        COUNT=count,
        num_warps=8,
    )
    if tiles > 1:
        found = tiles * MAX_TOP_K
        kernels.extract[(rows, 1)](
            extracted,
            scratch.top,
            draws.modes,
            draws.integers,
            found,
            extracted.stride(0),
            scratch.top.stride(0),
            TILE=triton.next_power_of_2(found),
            KEEP=MAX_TOP_K,
            FROM_KEYS=True,
            COUNT=count,
            num_warps=8,
        )


def _report(logits: Tensor, draws: Draws, top: int, scratch: SampleScratch, out: Tensor) -> None:
    """Log-probabilities of the rows' tokens and of the likeliest ones."""
    rows, n_vocab = logits.shape
    _extract(logits, draws, scratch, top)
    tiles = triton.cdiv(n_vocab, EXTRACT_TILE)
    stride = scratch.best.stride(0)
    kernels.log_sum_of_tile[(rows, tiles)](
        logits, scratch.best, scratch.sums, n_vocab, stride, TILE=EXTRACT_TILE
    )
    kernels.report[(rows,)](
        logits,
        scratch.best,
        scratch.sums,
        scratch.top,
        out,
        tiles,
        n_vocab,
        stride,
        scratch.top.stride(0),
        out.stride(0),
        WIDTH=triton.next_power_of_2(tiles),
        TOP=top,
        SPAN=triton.next_power_of_2(top),
        num_warps=1,
    )
