"""The scheduler: one thread that advances all conversations, several in one pass.

Everything that touches the model happens in its thread. Jobs come in and are cancelled from any
other; between two passes they join and leave. What one says does not depend on the others
(`together.Together`), so nothing here can change a text.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from orthrus_gguf.decode import PROMPT_BATCH
from orthrus_gguf.engine import Generation
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.server.counters import Counters
from orthrus_gguf.server.events import BusyError, End, Event, Failed, Job, Progress, Text
from orthrus_gguf.server.slots import Policies, Pool, Slot
from orthrus_gguf.together import Together

T = TypeVar("T")

#: Prompt rows of a pass that answers share: at least, and before anything is known of their cost.
LEAST_ROWS, FIRST_ROWS = 16, 64

#: Weight of the newest pass in what a row of a prompt costs.
NEWEST = 0.3


@dataclass(eq=False)
class _Running:
    """A job under way. told: tokens that its listener knows. held: prompt tokens in the cache."""

    job: Job
    slot: Slot
    told: int = 0
    held: int | None = None


class Scheduler:
    """Runs jobs; start it with `start`, end it with `stop`.

    parallel: conversations in one pass at most. queue: jobs that may wait. stall: seconds that a
    pass may take because of prompts, as far as passes before tell, while others wait for their next
    token. batch: prompt rows of a pass at most.
    """

    def __init__(
        self,
        model: Model,
        pool: Pool,
        policies: Policies,
        *,
        parallel: int = 1,
        queue: int = 64,
        stall: float = 0.25,
        batch: int = PROMPT_BATCH,
    ) -> None:
        self.pool, self.counters = pool, Counters()
        self.parallel = parallel
        self._policies, self._most_waiting = policies, queue
        self._stall, self._batch = stall, batch
        self._together = Together(model)
        self._running: dict[Generation, _Running] = {}
        self._waiting: deque[Job] = deque()
        self._errands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._row_seconds: float | None = None
        self._prompt_rows_done = 0
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Let it wait for a slot. Raises BusyError when too many do."""
        with self._wake:
            if self._stopping:
                raise BusyError("the server is about to end")
            if len(self._waiting) >= self._most_waiting + self.parallel - len(self._running):
                raise BusyError(
                    f"{len(self._waiting)} requests wait already; try again later, or raise"
                    " --queue or -np"
                )
            self._waiting.append(job)
            self._wake.notify()

    def cancel(self, job: Job) -> None:
        """End it where it is; its listener is not called again once the pass under way is over."""
        with self._wake:
            job.cancelled = True
            self._wake.notify()

    def call(self, errand: Callable[[], T]) -> Future[T]:
        """Have something done in the scheduler's thread, between two passes."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(errand())
            except Exception as error:
                future.set_exception(error)

        with self._wake:
            if self._stopping:
                raise BusyError("the server is about to end")
            self._errands.append(run)
            self._wake.notify()
        return future

    def stop(self, *, now: bool = False) -> None:
        """Take nothing new; end when all that waits has been served, or at once."""
        with self._wake:
            self._stopping = True
            if now:
                for job in (*self._waiting, *(r.job for r in self._running.values())):
                    job.cancelled = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Conversations under way."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Jobs that wait for a slot."""
        return len(self._waiting)

    # --- in its own thread ---

    def _run(self) -> None:
        while self._turn():
            pass

    def _turn(self) -> bool:
        """Everything up to the end of one pass; False when there is nothing more to do."""
        with self._wake:
            while not (self._waiting or self._errands or self._running or self._stopping):
                self._wake.wait()
            if not (self._waiting or self._errands or self._running):
                return False
            errands = list(self._errands)
            self._errands.clear()
        for errand in errands:
            errand()
        self._drop_cancelled()
        self._admit()
        self._step()
        return True

    def _drop_cancelled(self) -> None:
        with self._wake:
            for job in [job for job in self._waiting if job.cancelled]:
                self._waiting.remove(job)
        for generation, running in [*self._running.items()]:
            if running.job.cancelled:
                self._leave(generation)

    def _admit(self) -> None:
        """Give slots to those that wait, in their order."""
        for job in [*self._waiting]:
            if len(self._running) >= self.parallel:
                return
            try:
                slot = self.pool.choose(job)
            except Exception as error:
                self._take(job)
                self._report(error)
                self._tell(job, Failed(error))
                continue
            if slot is not None:
                self._take(job)
                self._start(job, slot)

    def _take(self, job: Job) -> None:
        with self._wake:
            self._waiting.remove(job)

    def _start(self, job: Job, slot: Slot) -> None:
        running = _Running(job, slot)
        slot.session.prompt_batch = self._prompt_rows()
        try:
            policy = slot.policy(job.plan, self._policies, lambda: self.running)
            generation = slot.session.generate(
                job.request(policy), on_progress=lambda held: self._progress(generation, held)
            )
            self._running[generation] = running
            self._together.join(generation)
        except Exception as error:
            self._running = {g: r for g, r in self._running.items() if r is not running}
            slot.job = None
            self._report(error)
            self._tell(job, Failed(error))

    def _step(self) -> None:
        """One pass, and what came of it."""
        rows = self._prompt_rows()
        for running in self._running.values():
            running.slot.session.prompt_batch = rows
        self._prompt_rows_done = 0
        before, members = time.perf_counter(), len(self._together)
        try:
            pieces = self._together.step(rows)
        except Exception as error:
            self._fail_all(error)
            return
        if members:
            self.counters.passes += 1
            self.counters.busy += members
        self._learn(time.perf_counter() - before)
        for generation, piece in pieces:
            if (owner := self._running.get(generation)) is not None:
                tokens, logprobs = self._news(generation, owner, piece.tokens)
                text = Text(piece.text, piece.origin, tokens, logprobs, piece.cycles)
                self._tell(owner.job, text)
        for generation in [*self._running]:
            if generation not in self._together:
                self._finish(generation)

    def _prompt_rows(self) -> int:
        """Prompt rows of the next pass. More wait where answers would wait too long for them."""
        if all(generation.in_prompt for generation in self._running):
            return self._batch
        if self._row_seconds is None:
            return min(FIRST_ROWS, self._batch)
        return min(max(int(self._stall / self._row_seconds), LEAST_ROWS), self._batch)

    def _learn(self, seconds: float) -> None:
        if (rows := self._prompt_rows_done) >= LEAST_ROWS:  # fewer cost as much as the weights
            known = self._row_seconds
            new = seconds / rows
            self._row_seconds = new if known is None else known + NEWEST * (new - known)

    def _progress(self, generation: Generation, held: int) -> None:
        running = self._running[generation]
        cached = generation.cached
        self._prompt_rows_done += held - (cached if running.held is None else running.held)
        running.held = held
        self._tell(running.job, Progress(len(running.job.prompt), cached, held))

    def _news(self, generation: Generation, running: _Running, end: int) -> tuple[Any, Any]:
        """Tokens, and their log-probabilities, that the listener does not know yet."""
        start, running.told = running.told, max(end, running.told)
        return tuple(generation.output[start:end]), tuple(generation.logprobs[start:end])

    def _finish(self, generation: Generation) -> None:
        """One that has ended leaves its slot."""
        running = self._running.pop(generation)
        running.slot.job = None
        result = generation.result
        self.counters.answered(result)
        if generation.error is not None:
            self._tell(running.job, Failed(generation.error))
            return
        news = self._news(generation, running, len(result.output))
        self._tell(running.job, End(result, running.slot.id, *news))

    def _leave(self, generation: Generation) -> None:
        """One that is cancelled leaves its slot."""
        self._together.leave(generation)
        running = self._running.pop(generation)
        running.slot.job = None
        self.counters.answered(generation.result)

    def _fail_all(self, error: Exception) -> None:
        """A pass failed: nobody knows for whom."""
        self._report(error)
        for generation, running in [*self._running.items()]:
            self._leave(generation)
            self._tell(running.job, Failed(error))

    @staticmethod
    def _report(error: Exception) -> None:
        """Bugs show where they are; the rest is the client's to know."""
        if not isinstance(error, (OrthrusError, MemoryError)):
            traceback.print_exception(error, file=sys.stderr)

    @staticmethod
    def _tell(job: Job, event: Event) -> None:
        """A listener that has gone (its event loop is closed) is none."""
        if not job.cancelled:
            with suppress(RuntimeError):
                job.listener(event)
