"""What a request asks of the scheduler, and what it hears from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from orthrus_gguf.drafting.plan import Plan
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.sequence import Constraint
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.prefill.compression import Selection
from orthrus_gguf.request import Origin, Request, Result
from orthrus_gguf.sampling import LogProbs, SamplingSettings


@dataclass(frozen=True)
class Progress:
    """Of a prompt: its tokens, those that were cached, and those that are held by now."""

    total: int
    cached: int
    held: int


@dataclass(frozen=True)
class Text:
    """Text that came, with the tokens since the last event; logprobs: of each, if asked for.
    cycles: of the answer so far."""

    text: str
    origin: Origin
    tokens: tuple[int, ...]
    logprobs: tuple[LogProbs, ...]
    cycles: int


@dataclass(frozen=True)
class End:
    """It has ended: tokens and logprobs as in `Text`, those that came without text."""

    result: Result
    slot: int
    tokens: tuple[int, ...]
    logprobs: tuple[LogProbs, ...]


@dataclass(frozen=True)
class Failed:
    """It has ended by an error."""

    error: Exception


Event = Progress | Text | End | Failed


class BusyError(OrthrusError):
    """The queue is full."""


@dataclass(eq=False)
class Job:
    """One answer to be generated. See `engine.Request` for most fields.

    plan: how to draft. listener: is called with every event, in the scheduler's thread; End or
    Failed comes last, and nothing after `Scheduler.cancel`. slot: that must serve it; None: any.
    reuse: whether rows that are held may serve it. selection: how the prompt was shortened.
    """

    prompt: tuple[int, ...]
    sampling: SamplingSettings
    plan: Plan
    listener: Callable[[Event], None]
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    top: int = 0
    constraint: Constraint | None = None
    slot: int | None = None
    reuse: bool = True
    places: tuple[int, ...] = ()
    cancelled: bool = False
    selection: Selection | None = None

    def request(self, policy: Policy) -> Request:
        """What the engine gets."""
        return Request(
            self.prompt,
            self.sampling,
            policy,
            self.max_tokens,
            self.stop,
            self.top,
            self.constraint,
            self.places,
            self.selection,
        )
