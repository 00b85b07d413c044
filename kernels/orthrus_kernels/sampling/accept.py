"""Commit on the device: how many drafts hold, which tokens follow, where the next pass starts.

Nothing here waits for the host. It reads the ring of committed tokens a step behind.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG_COLUMNS = 4
"""Per cycle in the log: position of its anchor, drafts verified and accepted, tokens committed."""


def accept(
    ar_tokens: Tensor,
    segments: Tensor,
    history: Tensor,
    stop_tokens: Tensor,
    state: Tensor,
    ring: Tensor,
    log: Tensor,
) -> None:
    """Commit the longest prefix of drafts that the AR view confirms, and its token after them.

    ar_tokens: i32 [rows], drawn from the logits of the AR rows, -1 where those were not finite.
    segments: the pass's segment table (`rows.py`), whose first row is the AR segment: its rows are
        the anchor and the drafts, which lie in `history` from the anchor's position on.
    stop_tokens: i32, possibly empty: nothing is committed after one of these.
    state: see `rows.py`. At the limit, or once stopped, a cycle commits nothing and moves nothing.
    ring: i32 [size]: committed token number n goes to n % size; log: i32 [size, 4] likewise, by
        cycle. The tokens are also written to `history`, over drafts that failed.
    """
    _accept[(1,)](
        ar_tokens,
        segments,
        history,
        stop_tokens,
        state,
        ring,
        log,
        stop_tokens.numel(),
        ring.numel(),
        log.shape[0],
        WIDTH=triton.next_power_of_2(ar_tokens.numel()),
        num_warps=1,
    )


def write_drafts(
    tokens: Tensor, views: Tensor, positions: Tensor, history: Tensor, shift: int = 1
) -> None:
    """Put the tokens drawn by diffusion rows into `history`, `shift` positions past their rows.

    tokens, views, positions: i32 [rows]. For passes with one block: several would collide. A row
    without finite logits leaves token 0: a bad draft costs time, never text.
    """
    rows = tokens.numel()
    _write_drafts[(1,)](
        tokens, views, positions, history, rows, history.numel(), shift,
        WIDTH=triton.next_power_of_2(rows), num_warps=1,
    )  # fmt: skip


def new_log(cycles: int, device: torch.device | str) -> Tensor:
    """An empty log of the last `cycles` cycles."""
    return torch.zeros(cycles, LOG_COLUMNS, dtype=torch.int32, device=device)


@triton.jit
def _accept(
    ar_tokens,
    segments,
    history,
    stop_tokens,
    state,
    ring,
    log,
    n_stop,
    ring_size,
    log_size,
    WIDTH: tl.constexpr,
):
    position = tl.load(state)
    emitted = tl.load(state + 1)
    limit = tl.load(state + 2)
    status = tl.load(state + 3)
    cycles = tl.load(state + 4)
    width = tl.load(segments + 2) - 1
    i = tl.arange(0, WIDTH)
    token = tl.load(ar_tokens + i, mask=i <= width, other=-1)
    draft = tl.load(history + position + 1 + i, mask=i < width, other=-2)
    accepted = tl.min(tl.where((token != draft) & (i < width), i, width), 0)

    count = tl.minimum(accepted + 1, tl.maximum(limit - emitted, 0))
    count = tl.where(status == 0, count, 0)
    bad = tl.min(tl.where((token < 0) & (i < count), i, count), 0)
    status = tl.where(bad < count, 2, status)
    count = bad
    stops = tl.zeros((WIDTH,), tl.int32)
    for s in range(n_stop):
        stops = stops | (token == tl.load(stop_tokens + s)).to(tl.int32)
    last = tl.min(tl.where((stops > 0) & (i < count), i, count), 0)
    status = tl.where(last < count, 1, status)
    count = tl.minimum(count, last + 1)

    tl.debug_barrier()  # all reads of the history come before its writes
    committed = i < count
    tl.store(history + position + 1 + i, token, mask=committed)
    tl.store(ring + (emitted + i) % ring_size, token, mask=committed)
    at_log = log + (cycles % log_size) * 4
    tl.store(at_log, position)
    tl.store(at_log + 1, width)
    tl.store(at_log + 2, accepted)
    tl.store(at_log + 3, count)
    tl.store(state, position + count)
    tl.store(state + 1, emitted + count)
    tl.store(state + 3, status)
    tl.store(state + 4, cycles + 1)


@triton.jit
def _write_drafts(tokens, views, positions, history, rows, size, shift, WIDTH: tl.constexpr):
    i = tl.arange(0, WIDTH)
    view = tl.load(views + i, mask=i < rows, other=-1)
    token = tl.load(tokens + i, mask=i < rows, other=0)
    at = tl.load(positions + i, mask=i < rows, other=0) + shift
    mine = (view == 1) & (at < size)
    tl.store(history + at, tl.maximum(token, 0), mask=mine)
