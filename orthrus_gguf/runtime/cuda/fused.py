"""Fused steps: verification and the next draft in one pass, on guesses made on the device.

Blocks ride in the verify pass, each on a guess at its outcome (`drafts.Guess`):
A, "exactly j drafts are accepted", anchored at the last accepted draft, so that its row 0 names the
correction; and B, which guesses the next anchor itself. Which guesses are carried follows from the
draft's own probabilities. When one comes true, its block is the next draft; when none does, the
next pass verifies nothing but the anchor, and carries guess A of "none accepted", which cannot
fail. So the launches are always the same, and no step waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from orthrus_kernels.elementwise.rows import AR, DIFFUSION, POSITION, SEGMENT_SIZE, UNUSED
from orthrus_kernels.sampling.sample import SamplingParameters
from torch import Tensor

from orthrus_gguf.drafting.policy import WORTH_OF_LAST
from orthrus_gguf.runtime.cuda.buffers import some_rows
from orthrus_gguf.runtime.cuda.fused_pass import check_rows
from orthrus_gguf.runtime.cuda.steps import Decoding, bucket, commit, draw_from_logits


@dataclass(frozen=True)
class Carried:
    """The draft that the next fused step verifies, [W + 1] each: one token more than it verifies.

    valid: i32 [1], 0 when no guess came true. tokens, seconds: i32, first and second choices.
    sure, second_sure: f32, the drafter's probabilities of them.
    """

    valid: Tensor
    tokens: Tensor
    sure: Tensor
    seconds: Tensor
    second_sure: Tensor


@dataclass(frozen=True)
class Shape:
    """A fused step: drafts verified, blocks carried, rows of each."""

    width: int
    blocks: int
    block_rows: int

    @property
    def ar_rows(self) -> int:
        return bucket(self.width + 1)

    @property
    def rows(self) -> int:
        return self.ar_rows + self.blocks * self.block_rows


def fused_shape(width: int, blocks: int, block_size: int, pass_rows: int) -> Shape | None:
    """The step that fits into a pass; None if not even one block does."""
    block_rows = min(width + 2, block_size)
    fitting = min(blocks, (pass_rows - bucket(width + 1)) // block_rows)
    return Shape(width, fitting, block_rows) if fitting > 0 else None


def new_carried(d: Decoding) -> Carried:
    """Nothing carried yet."""
    device, size = d.state.device, d.most + 1
    tokens, seconds = (torch.zeros(size, dtype=torch.int32, device=device) for _ in range(2))
    sure, second_sure = (torch.zeros(size, device=device) for _ in range(2))
    valid = torch.zeros(1, dtype=torch.int32, device=device)
    return Carried(valid, tokens, sure, seconds, second_sure)


def carried_draft_step(
    d: Decoding, carried: Carried, sampling: SamplingParameters, shape: Shape
) -> None:
    """An ordinary draft pass (the block of the draft table), as the first thing that is carried."""
    rows = some_rows(d.rows, 0, shape.block_rows)
    d.runner.plan(rows, d.state, d.history, d.draft_table, d.history, d.cache.capacity)
    hidden = d.runner.run(rows, 0, d.cache)
    tokens, logits = draw_from_logits(d, sampling, hidden, rows)
    first = d.offsets[:1]  # 0
    stop = first + shape.block_rows
    _carry(d, carried, shape, tokens, logits, first, stop, torch.ones_like(carried.valid))


def fused_step(d: Decoding, carried: Carried, sampling: SamplingParameters, shape: Shape) -> None:
    """Verify what is carried, with blocks on guesses; commit; carry the block that came true."""
    table, alternatives, accepted, is_next = _guess(carried, shape)
    rows = some_rows(d.rows, 0, shape.rows)
    d.runner.plan(rows, d.state, d.history, table, alternatives, d.cache.capacity)
    start = d.state[POSITION : POSITION + 1].clone()
    hidden = d.runner.run(rows, shape.ar_rows, d.cache)
    if d.runner.machine.check_rows:
        check_rows(d.runner, rows, shape.ar_rows, d.cache)
    tokens, logits = draw_from_logits(d, sampling, hidden, rows)
    commit(d, tokens[: shape.ar_rows], table)

    position = d.state[POSITION : POSITION + 1]
    moved = position - start  # accepted + 1, or less at the end of the text
    anchor = d.history[position.long()]
    known = table[1:, 0] == DIFFUSION
    holds = known & (accepted + 1 == moved) & (~is_next | (alternatives == anchor))
    score = holds.int() * (1 + is_next.int())  # B before A
    # All [1]: a 0-dimensional index would make the host wait for it.
    best = score.max(0, keepdim=True)
    skipped = 1 - is_next[best.indices].long()  # row 0 of a block on guess A named the anchor
    first = shape.ar_rows + best.indices * shape.block_rows
    valid = (best.values > 0).int()
    stop = first + shape.block_rows
    _carry(d, carried, shape, tokens, logits, first + skipped, stop, valid)


def _guess(carried: Carried, shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segment table i32 [1 + blocks, SEGMENT_SIZE]; per block: the token that guess B anchors it
    at (i32), the drafts that it supposes accepted (i64), and whether it is a guess B.
    """
    width, device = shape.width, carried.sure.device
    accept = carried.sure[:width].sqrt()  # `policy.prior_acceptance`
    one = torch.ones(1, device=device)
    ends = torch.cat([one, accept.cumprod(0)]) * torch.cat([1 - accept, one])
    following = carried.second_sure[:width] / (1 - carried.sure[:width]).clamp_min(1e-6)
    following = torch.cat([following.clamp_max(1.0), carried.sure[width : width + 1]])
    worth = torch.cat([ends * WORTH_OF_LAST, ends * following])
    # Guess A of "none accepted": the last resort, and a repetition of the draft while it is valid.
    last_resort = torch.arange(worth.numel(), device=device) == 0
    valid = carried.valid > 0
    worth = torch.where(valid, worth.masked_fill(last_resort, 0.0), last_resort.float())
    top = worth.topk(min(shape.blocks, worth.numel()))
    accepted = top.indices % (width + 1)
    is_next = top.indices > width
    guesses = torch.cat([carried.seconds[:width], carried.tokens[width : width + 1]])
    alternatives = guesses[accepted].clamp_min(0)

    count = top.indices.numel()
    table = torch.zeros(1 + count, SEGMENT_SIZE, dtype=torch.int32, device=device)
    block = torch.arange(count, device=device)
    table[0, 0] = AR
    table[0, 2:3] = 1 + width * valid
    table[0, 4] = -1
    table[1:, 0] = torch.where(top.values > 0, DIFFUSION, UNUSED)
    table[1:, 1] = shape.ar_rows + block * shape.block_rows
    table[1:, 2] = shape.block_rows
    table[1:, 3] = accepted + is_next
    table[1:, 4] = torch.where(is_next, block, -1)
    return table, alternatives, accepted, is_next


def _carry(
    d: Decoding,
    carried: Carried,
    shape: Shape,
    tokens: Tensor,
    logits: Tensor,
    first: Tensor,
    stop: Tensor,
    valid: Tensor,
) -> None:
    """Make the rows first .. stop-1 (i64 [1] each) of a block the next draft, and write it behind
    the anchor.

    logits: f32 [rows, n_vocab] of all rows of the pass. A draft that is one row short (guess A in a
    block of full size) has no opinion on what follows it.
    """
    count = shape.width + 1
    index = first + d.offsets[:count]
    usable = index < stop
    index = torch.minimum(index, stop - 1)
    some = logits[index]
    drawn = tokens[index].long().clamp_min(0)
    top = some.topk(2, dim=1)
    total = some.logsumexp(1)
    sure = (some.gather(1, drawn[:, None])[:, 0] - total).exp()
    is_top = top.indices[:, 0] == drawn
    seconds = torch.where(is_top, top.indices[:, 1], top.indices[:, 0])
    second_sure = (torch.where(is_top, top.values[:, 1], top.values[:, 0]) - total).exp()
    carried.valid.copy_(valid)
    carried.tokens[:count] = drawn.int()
    carried.seconds[:count] = seconds.int()
    carried.sure[:count] = torch.where(usable, sure, 0.0).nan_to_num(0.0)
    carried.second_sure[:count] = torch.where(usable, second_sure, 0.0).nan_to_num(0.0)
    if shape.width:
        at = d.state[POSITION] + 1 + d.offsets[: shape.width]
        kept = torch.where(valid > 0, drawn[: shape.width].int(), d.history[at])
        d.history.index_copy_(0, at, kept)
