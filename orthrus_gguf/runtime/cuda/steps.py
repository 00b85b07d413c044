"""The steps of a cycle on the device: draft, verify, commit. None of them waits for the host.

What varies from cycle to cycle lives in device tensors (`Decoding`): where the anchor stands, the
tokens by position, how many rows of a bucket are in use. So the launches of a step depend on its
bucket and on the kind of sampling only, and can be captured as a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from orthrus_kernels.elementwise.rows import (
    AR,
    DIFFUSION,
    EMITTED,
    LIMIT,
    POSITION,
    SEGMENT_SIZE,
    STATE_SIZE,
    STATUS,
    Rows,
)
from orthrus_kernels.products.dispatch import Use
from orthrus_kernels.products.matmul import Activations
from orthrus_kernels.sampling.accept import new_log
from orthrus_kernels.sampling.sample import SamplingParameters
from torch import Tensor

from orthrus_gguf.runtime.cuda.buffers import pass_rows, some_rows
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.fused_pass import PassRunner, check_rows

#: Most stop tokens that the device can watch for.
STOP_TOKENS = 16

#: No token: fills up the stop tokens.
NONE = -2

#: Columns of a record before its drafts: status, then the log entry of the cycle.
HEADER = 5

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)


def bucket(rows: int) -> int:
    """Rows of the pass that `rows` rows run in: a few sizes, so that few graphs serve all."""
    return next((size for size in _BUCKETS if size >= rows), rows)


@dataclass(frozen=True)
class Decoding:
    """Device tensors of one decoding on one cache; all i32.

    state, log: see `orthrus_kernels.elementwise.rows` and `accept`. The log has a single entry: it is copied
    into the record. ring: required by `accept`, not read. stop: padded with NONE.
    draft_table, verify_table: segment tables [1, SEGMENT_SIZE].
    record: status, position, width, accepted, count, drafts [W], tokens [W + 1]; W = `most`.
    offsets: 0 .. W, what positions are counted with.
    """

    runner: PassRunner
    cache: CudaCache
    most: int
    state: Tensor
    stop: Tensor
    draft_table: Tensor
    verify_table: Tensor
    log: Tensor
    ring: Tensor
    record: Tensor
    offsets: Tensor

    @property
    def history(self) -> Tensor:
        """Tokens by position: committed ones, the anchor, drafts."""
        return self.cache.history

    @property
    def rows(self) -> Rows:
        return self.runner.buffers.rows


def new_decoding(runner: PassRunner, cache: CudaCache) -> Decoding:
    """Tensors for drafts of up to a block."""
    device = runner.machine.device
    most = runner.config.block_size or 1

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=device)

    return Decoding(
        runner,
        cache,
        most,
        state=zeros(STATE_SIZE),
        stop=torch.full((STOP_TOKENS,), NONE, dtype=torch.int32, device=device),
        draft_table=zeros(1, SEGMENT_SIZE),
        verify_table=zeros(1, SEGMENT_SIZE),
        log=new_log(1, device),
        ring=zeros(2 * pass_rows(runner.config)),
        record=zeros(HEADER + 2 * most + 1),
        offsets=torch.arange(most + 1, device=device),
    )


def set_position(d: Decoding, position: int, emitted: int, limit: int) -> None:
    """Put the anchor at `position`, going on; `emitted` of `limit` tokens have been committed."""
    state = torch.zeros(STATE_SIZE, dtype=torch.int32)
    state[POSITION], state[EMITTED], state[LIMIT] = position, emitted, limit
    d.state.copy_(d.runner.machine.upload(state))


def set_stop_tokens(d: Decoding, tokens: Sequence[int]) -> None:
    """Tokens after which nothing is committed."""
    if len(tokens) > STOP_TOKENS:
        raise ValueError(f"{len(tokens)} stop tokens, at most {STOP_TOKENS} can be watched for")
    padded = [*tokens, *[NONE] * (STOP_TOKENS - len(tokens))]
    d.stop.copy_(d.runner.machine.upload(torch.tensor(padded, dtype=torch.int32)))


def set_tables(d: Decoding, block_rows: int, width: int) -> None:
    """The next draft has a block of `block_rows` rows, the next verification `width` drafts."""
    upload = d.runner.machine.upload
    draft = torch.tensor([[DIFFUSION, 0, block_rows, 0, -1]], dtype=torch.int32)
    verify = torch.tensor([[AR, 0, width + 1, 0, -1]], dtype=torch.int32)
    d.draft_table.copy_(upload(draft))
    d.verify_table.copy_(upload(verify))


def draft_step(d: Decoding, sampling: SamplingParameters, size: int) -> None:
    """Run the block of the draft table in `size` rows; its tokens go behind the anchor."""
    rows = some_rows(d.rows, 0, size)
    _plan(d, rows, d.draft_table, d.history)
    hidden = d.runner.run(rows, 0, d.cache)
    tokens = draw(d, sampling, hidden, rows)
    d.runner.machine.kernels.write_drafts(tokens, rows.views, rows.positions, d.history)


def verify_step(d: Decoding, sampling: SamplingParameters, size: int) -> None:
    """Run the anchor and the drafts of the verify table in `size` rows; commit what holds."""
    rows = some_rows(d.rows, 0, size)
    _plan(d, rows, d.verify_table, d.history)
    hidden = d.runner.run(rows, size, d.cache)
    if d.runner.machine.check_rows:
        check_rows(d.runner, rows, size, d.cache)
    commit(d, draw(d, sampling, hidden, rows), d.verify_table)


def draw(d: Decoding, sampling: SamplingParameters, hidden: Activations, rows: Rows) -> Tensor:
    """The token after each row, i32 [rows] (static), -1 where logits are not finite."""
    runner, b = d.runner, d.runner.buffers
    count = rows.views.shape[0]
    out = b.tokens[:count]
    if sampling.greedy and not sampling.penalizes and not sampling.banned.numel():
        (head,) = runner.weights.head.matrices
        tile = runner.machine.tile(head, count, Use.HEAD)
        best = runner.machine.kernels.head_argmax(hidden, head, tile)
        runner.machine.kernels.pick(best.values[:, None], best.tokens[:, None], out)
    else:
        draw_from_logits(d, sampling, hidden, rows)
    return out


def draw_from_logits(
    d: Decoding, sampling: SamplingParameters, hidden: Activations, rows: Rows
) -> tuple[Tensor, Tensor]:
    """The same tokens, and the logits they were drawn from, f32 [rows, n_vocab] (both static)."""
    b = d.runner.buffers
    count = rows.views.shape[0]
    logits, out = b.logits[:count], b.tokens[:count]
    d.runner.logits(hidden, logits)
    d.runner.machine.kernels.sample(logits, rows.positions, d.history, sampling, b.sampling, out)
    return out, logits


def commit(d: Decoding, tokens: Tensor, table: Tensor) -> None:
    """Accept drafts, move the anchor, and write the record of the cycle.

    tokens: i32, those of the AR rows first. table: of the pass; its first segment is the AR one.
    """
    following = d.state[POSITION] + 1 + d.offsets  # before the anchor moves
    drafts = slice(HEADER, HEADER + d.most)
    d.record[drafts] = d.history[following[: d.most]]
    d.runner.machine.kernels.accept(tokens, table, d.history, d.stop, d.state, d.ring, d.log)
    d.record[0] = d.state[STATUS]
    d.record[1:HEADER] = d.log[0]
    d.record[HEADER + d.most :] = d.history[following]


def _plan(d: Decoding, rows: Rows, table: Tensor, alternatives: Tensor) -> None:
    d.runner.plan(rows, d.state, d.history, table, alternatives, d.cache.capacity)
