"""What is asked for, and what came of it."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.sequence import Constraint
from orthrus_gguf.records import dataclass
from orthrus_gguf.sampling import LogProbs, SamplingSettings
from orthrus_gguf.stats import Statistics, Timings

if TYPE_CHECKING:
    from orthrus_gguf.prefill.compression import Selection


@dataclass(frozen=True)
class Request:
    """What to generate: a prompt and every setting that the text depends on, and the policy.

    max_tokens: limit on output tokens; negative means until the context is full.
    stop: texts that end the answer, which is cut before them; one that spells a control token ends
        it where that token is drawn.
    top: log-probabilities to report per token, of this many likeliest ones; 0: none at all.
    constraint: what may be drawn where (see `sequence.Constraint`).
    places: of the prompt, where others are likely to part from it (`text.partings`).
    selection: how the prompt was shortened, if it was; results say so.
    """

    prompt: tuple[int, ...]
    sampling: SamplingSettings
    policy: Policy
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    top: int = 0
    constraint: Constraint | None = None
    places: tuple[int, ...] = ()
    selection: Selection | None = None


class Origin(Enum):
    """How a token came about.

    PLAIN: from the AR view alone. DRAFTED: an accepted draft. CORRECTED: the AR view's token in
    place of a refused draft.
    """

    PLAIN = "plain"
    DRAFTED = "drafted"
    CORRECTED = "corrected"


def origins(cycle: Cycle) -> list[Origin]:
    """Origin of each token that a cycle committed."""
    refused = cycle.accepted < len(cycle.drafts)
    own = Origin.CORRECTED if refused else Origin.PLAIN
    return [Origin.DRAFTED] * cycle.accepted + [own]


@dataclass(frozen=True)
class Result:
    """A finished generation.

    output: generated ids, the end-of-text id included when there was one (or that of the control
        token that a stop string spells).
    finish_reason: "stop" (end-of-text id or stop string), "length" (token limit or end of the
        context) or "cancelled".
    logprobs: per output token, where they were asked for.
    stop_string: the stop string that ended it, if one did.
    selection: how the prompt was shortened, if it was.
    """

    output: tuple[int, ...]
    text: str
    finish_reason: str
    cycles: tuple[Cycle, ...]
    statistics: Statistics
    timings: Timings
    logprobs: tuple[LogProbs, ...] = ()
    stop_string: str | None = None
    selection: Selection | None = None


class Piece(NamedTuple):
    """Text, how the token came about that released it, and how many tokens and cycles there were by
    then."""

    text: str
    origin: Origin
    tokens: int
    cycles: int
