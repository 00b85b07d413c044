"""Stepper: cycles enqueued from device state, read back from pinned memory a step behind."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from orthrus_kernels.elementwise.rows import BAD_LOGITS, STOPPED
from orthrus_kernels.sampling.sample import SamplingParameters, sampling_parameters
from torch import Tensor

from orthrus_gguf.drafting.policy import FUSED_BLOCKS, Plan, Strategy
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.cuda import steps
from orthrus_gguf.runtime.cuda.buffers import pass_rows
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.fused import (
    carried_draft_step,
    fused_shape,
    fused_step,
    new_carried,
)
from orthrus_gguf.runtime.cuda.graphs import Graphs
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.sampling import SamplingSettings

#: Cycles that may be under way: one that the host waits for, one running ahead, one to spare.
SLOTS = 3


@dataclass(frozen=True)
class Committed:
    """One cycle as the device ran it; the fields of `policy.Cycle`.

    stopped: whether its last token is a stop token. passes: (AR rows, diffusion rows) of each pass.
    """

    start: int
    drafts: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]
    stopped: bool
    passes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Launched:
    """A cycle under way: the most tokens it may commit, its passes, where its record goes."""

    most: int
    passes: tuple[tuple[int, int], ...]
    slot: Tensor
    event: torch.cuda.Event | None


class Stepper:
    """Decodes on one cache. Use: `begin`, then `launch` and `collect` in any order that keeps at
    most SLOTS cycles under way, then `rewind`.

    `launch` returns at once; consecutive launches need no result of one another, because anchor,
    length and drafts live on the device.
    """

    def __init__(self, model: CudaModel, cache: CudaCache) -> None:
        self._model, self._cache = model, cache
        with model.lock, model.machine.running():
            self._decoding = steps.new_decoding(model.runner, cache)
            self._carried = new_carried(self._decoding)
            pinned = model.machine.is_cuda
            size = self._decoding.record.numel()
            self._slots = [
                torch.empty(size, dtype=torch.int32, pin_memory=pinned) for _ in range(SLOTS)
            ]
        self.graphs = Graphs(model.machine)
        self._sampling: dict[Hashable, SamplingParameters] = {}
        self._kind: Hashable = None
        self._launched: deque[_Launched] = deque()
        self._count = 0
        self._first = self._limit = self._position = 0
        self._carrying = False
        self._tables: tuple[int, int] | None = None

    @property
    def in_flight(self) -> int:
        """Cycles launched and not yet collected."""
        return len(self._launched)

    @property
    def position(self) -> int:
        """Position of the anchor after the last cycle collected."""
        return self._position

    @property
    def reach(self) -> int:
        """The furthest position where the anchor may stand once all cycles under way have ended."""
        return self._position + sum(cycle.most for cycle in self._launched)

    def begin(
        self,
        tokens: Sequence[int],
        settings: SamplingSettings,
        limit: int,
        stop_tokens: Sequence[int] = (),
    ) -> None:
        """Start after `tokens`, whose last one is the anchor; the cache holds all before it.

        limit: tokens that may be committed. stop_tokens: nothing is committed after one of these.
        Raises ValueError where tokens and cache do not belong together.
        """
        if len(tokens) - 1 != self._cache.length:
            raise ValueError(
                f"{len(tokens)} tokens on a cache of {self._cache.length} rows: it must hold all "
                "but the last"
            )
        d, model = self._decoding, self._model
        with model.lock, model.machine.running():
            self._launched.clear()
            history = torch.tensor(tokens, dtype=torch.int32)
            d.history[: len(tokens)].copy_(model.machine.upload(history))
            steps.set_stop_tokens(d, stop_tokens)
            self._select(settings)
            self._first = self._position = len(tokens) - 1
            # Tokens whose rows would not fit are beyond reach: the anchor itself needs a row.
            self._limit = min(limit, self._cache.capacity - self._position)
            steps.set_position(d, self._position, 0, self._limit)
            self._carrying = False

    def launch(self, plan: Plan) -> None:
        """Enqueue one cycle, without waiting. It is narrowed where the context ends.

        Raises ValueError when too many cycles are under way, or no row is sure to fit.
        """
        if len(self._launched) == SLOTS:
            raise ValueError(f"{SLOTS} cycles are under way: collect one first")
        reach = self.reach
        room = self._cache.capacity - 1 - reach
        if room < 0:
            raise ValueError(
                f"the anchor may stand at {reach} by now, and the context ends at "
                f"{self._cache.capacity}: collect first"
            )
        width = 0 if plan.strategy is Strategy.AR else min(plan.width, room)
        model = self._model
        with model.lock, model.machine.running():
            passes = self._enqueue(plan, width)
            slot = self._slots[self._count % SLOTS]
            self._count += 1
            slot.copy_(self._decoding.record, non_blocking=True)
            event = None
            if model.machine.is_cuda:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
            self._launched.append(_Launched(width + 1, passes, slot, event))

    def collect(self) -> Committed:
        """Wait for the oldest cycle under way. Raises OrthrusError for logits not finite."""
        if not self._launched:
            raise ValueError("no cycle is under way")
        cycle = self._launched.popleft()
        if cycle.event is not None:
            cycle.event.synchronize()
        status, start, width, accepted, count, *rest = cycle.slot.tolist()
        if status == BAD_LOGITS:
            raise OrthrusError(
                f"the model's logits at position {start + count + 1} are not finite: the weights"
                " are damaged or overflow; convert the model again, or try another quantization"
            )
        most = self._decoding.most
        tokens = tuple(rest[most : most + count])
        self._position = start + count
        self._cache.append(self._position - self._cache.length)
        return Committed(
            start,
            tuple(rest[:width]),
            min(accepted, count),
            tokens,
            status == STOPPED,
            cycle.passes,
        )

    def rewind(self, length: int) -> None:
        """Drop cycles under way, and what was committed after position `length`, the new anchor's.

        The cache keeps its rows before that. Decoding may go on from there.
        """
        if not self._first <= length <= self._position:
            raise ValueError(
                f"cannot rewind to {length}: decoding went from {self._first} to {self._position}"
            )
        model = self._model
        self._launched.clear()
        self._carrying = False
        self._position = length
        self._cache.truncate(length)
        with model.lock, model.machine.running():
            # Behind whatever is still running: the stream keeps the order.
            steps.set_position(self._decoding, length, length - self._first, self._limit)

    def _select(self, settings: SamplingSettings) -> None:
        """Put the request's settings into the tensors that graphs of their kind read."""
        wanted = sampling_parameters(
            self._model.config.n_vocab,
            self._model.machine.device,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repeat_penalty=settings.repeat_penalty,
            repeat_last_n=settings.repeat_last_n,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            seed=settings.seed,
            banned=settings.banned,
        )
        self._kind = (wanted.greedy, wanted.penalizes, wanted.top_k, wanted.banned.numel())
        kept = self._sampling.setdefault(self._kind, wanted)
        if kept is not wanted:
            kept.numbers.copy_(wanted.numbers)
            kept.integers.copy_(wanted.integers)
            kept.banned.copy_(wanted.banned)

    def _enqueue(self, plan: Plan, width: int) -> tuple[tuple[int, int], ...]:
        """Enqueue the launches of a cycle; rows of its passes."""
        d, sampling = self._decoding, self._sampling[self._kind]
        block_size = self._model.config.block_size or 1
        if width and plan.strategy is Strategy.FUSED:
            rows = pass_rows(self._model.config)
            shape = fused_shape(width, plan.blocks or FUSED_BLOCKS, block_size, rows)
            if shape is not None:
                first: tuple[tuple[int, int], ...] = ()
                if not self._carrying:
                    self._set_tables(shape.block_rows, width)
                    first = ((0, shape.block_rows),)
                    step = partial(carried_draft_step, d, self._carried, sampling, shape)
                    self.graphs.run(("carried draft", shape, self._kind), step)
                step = partial(fused_step, d, self._carried, sampling, shape)
                self.graphs.run(("fused", shape, self._kind), step)
                self._carrying = True
                return (*first, (width + 1, shape.blocks * shape.block_rows))
        self._carrying = False
        block = min(width + 1, block_size) if width else 0
        self._set_tables(block, width)
        sizes = steps.bucket(block) if block else 0, steps.bucket(width + 1)

        def two_pass() -> None:
            if sizes[0]:
                steps.draft_step(d, sampling, sizes[0])
            steps.verify_step(d, sampling, sizes[1])

        self.graphs.run(("two-pass" if block else "ar", sizes, self._kind), two_pass)
        return ((0, block), (width + 1, 0)) if block else ((1, 0),)

    def _set_tables(self, block_rows: int, width: int) -> None:
        if self._tables != (block_rows, width):
            steps.set_tables(self._decoding, block_rows, width)
            self._tables = block_rows, width


def stepper_of(model: CudaModel, cache: CudaCache) -> Stepper:
    """The cache's stepper, which keeps its graphs from one request to the next.

    It refers to its cache weakly, so that dropping the cache frees its memory at once.
    """
    if cache.stepper is None:
        cache.stepper = Stepper(model, weakref.proxy(cache))
    return cache.stepper
