"""A scheduler over the toy model, and listeners that remember."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from toy_model import ToyModel, ToyTokenizer

from orthrus_gguf.drafting.plan import FixedPolicy, Plan
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.engine import Session
from orthrus_gguf.server.events import End, Event, Failed, Job, Progress, Text
from orthrus_gguf.server.scheduler import Scheduler
from orthrus_gguf.server.slots import Pool


class Heard:
    """A listener: `events` as they came; `over` is set by the last one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()
        self.on_event: Callable[[Event], None] = lambda event: None

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self.on_event(event)
        if isinstance(event, End | Failed):
            self.over.set()

    def wait(self) -> Heard:
        assert self.over.wait(30), "nothing came to an end"
        return self

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Text))

    @property
    def end(self) -> End:
        (last,) = [event for event in self.events if isinstance(event, End)]
        assert self.events[-1] is last
        return last

    @property
    def tokens(self) -> tuple[int, ...]:
        return sum((e.tokens for e in self.events if isinstance(e, Text | End)), ())

    @property
    def logprobs(self) -> tuple[Any, ...]:
        return sum((e.logprobs for e in self.events if isinstance(e, Text | End)), ())

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]


def toy_session(model: ToyModel, n_ctx: int = 120) -> Session:
    tokenizer: Any = ToyTokenizer()
    return Session(model, tokenizer, n_ctx)


def toy_scheduler(
    model: ToyModel, *, parallel: int = 2, size: int = 2, n_ctx: int = 120, **settings: Any
) -> Scheduler:
    """Not started yet."""

    def policies(plan: Plan, sequences: Callable[[], int]) -> Policy:
        return FixedPolicy(plan, model.config)

    pool = Pool(lambda: toy_session(model, n_ctx), size)
    return Scheduler(model, pool, policies, parallel=parallel, **settings)


def alone(model: ToyModel, job: Job, n_ctx: int = 120) -> Any:
    """What a job gives on a session of its own, without a scheduler."""
    session = toy_session(model, n_ctx)
    generation = session.generate(job.request(FixedPolicy(job.plan, model.config)))
    for _ in generation:
        pass
    return generation.result
