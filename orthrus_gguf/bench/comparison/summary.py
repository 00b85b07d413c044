"""What the turns of a comparison add up to, per strategy and domain."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import zip_longest
from typing import TypeVar

from orthrus_gguf.bench.comparison.runner import Turn
from orthrus_gguf.drafting.cycle import Pass
from orthrus_gguf.drafting.draft import Source
from orthrus_gguf.drafting.plan import PLAIN
from orthrus_gguf.stats import Statistics

_T = TypeVar("_T")

#: The strategy that all others are compared with.
BASELINE = PLAIN.text


class Activity(Enum):
    """What time is spent on. PLAIN: AR passes of one row. HOST: all that is no pass."""

    PLAIN = "plain passes"
    DRAFT = "draft passes"
    VERIFY = "verify passes"
    FUSED = "fused passes"
    HOST = "host"


def activity(done: Pass) -> Activity:
    """What a pass was for, by its rows."""
    if done.diffusion_rows or done.drafter_rows:
        return Activity.FUSED if done.ar_rows else Activity.DRAFT
    return Activity.VERIFY if done.ar_rows > 1 else Activity.PLAIN


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as plain decoding.

    ratio: seconds of all turns against those of the baseline. lowest, highest: the same ratio of
    single prompts, their rounds taken together. rounds: the ratio of each round, all prompts
    together; it should always be the same, so its scatter tells how quiet the machine was.
    """

    ratio: float
    lowest: float
    highest: float
    rounds: tuple[float, ...]

    @property
    def noise(self) -> float | None:
        """Half the distance between the extremes of the rounds; None after a single one."""
        if len(self.rounds) < 2:
            return None
        return (max(self.rounds) - min(self.rounds)) / 2


@dataclass(frozen=True)
class Summary:
    """A strategy on the prompts of a domain, or on all of them (`domain` None).

    tokens: generated, without the first of each turn, which the prompt's pass gives. seconds: the
    generation of these tokens. shares: of that time, by activity; they add up to 1. speedup: None
    where nothing was generated.
    """

    strategy: str
    domain: str | None
    statistics: Statistics
    tokens: int
    seconds: float
    shares: Mapping[Activity, float]
    speedup: Speedup | None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.tokens else None


def summarize(turns: Sequence[Turn]) -> list[Summary]:
    """Every strategy overall, then per domain; both in the order of their first turn.

    The turns must hold the baseline for every prompt and round.
    """
    strategies = _unique(turn.entry for turn in sorted(turns, key=lambda t: t.entry != BASELINE))
    summaries: list[Summary] = []
    for domain in (None, *_unique(turn.prompt.domain for turn in turns)):
        chosen = [turn for turn in turns if domain in (None, turn.prompt.domain)]
        summaries += [_summary(strategy, domain, chosen) for strategy in strategies]
    return summaries


def _summary(strategy: str, domain: str | None, turns: Sequence[Turn]) -> Summary:
    ours = [turn for turn in turns if turn.entry == strategy]
    seconds = sum(turn.result.timings.generation for turn in ours)
    spent = dict.fromkeys(Activity, 0.0)
    for done in passes(ours):
        spent[activity(done)] += done.seconds
    spent[Activity.HOST] = seconds - sum(spent.values())
    return Summary(
        strategy=strategy,
        domain=domain,
        statistics=add_up([turn.result.statistics for turn in ours]),
        tokens=sum(turn.result.timings.generated_tokens for turn in ours),
        seconds=seconds,
        shares={kind: value / seconds if seconds else 0.0 for kind, value in spent.items()},
        speedup=_speedup(strategy, turns),
    )


def _speedup(strategy: str, turns: Sequence[Turn]) -> Speedup | None:
    counted = [turn for turn in turns if turn.result.timings.generated_tokens]
    if not counted:
        return None

    def ratio(some: Iterable[Turn]) -> float:
        seconds = dict.fromkeys((BASELINE, strategy), 0.0)
        for turn in some:
            if turn.entry in seconds:
                seconds[turn.entry] += turn.result.timings.generation
        return seconds[BASELINE] / seconds[strategy]

    prompts = _unique(turn.prompt.name for turn in counted)
    single = [ratio(t for t in counted if t.prompt.name == name) for name in prompts]
    rounds = [ratio(t for t in counted if t.round == n) for n in _unique(t.round for t in counted)]
    return Speedup(ratio(counted), min(single), max(single), tuple(rounds))


def add_up(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of several generations as if they were one."""
    return Statistics(
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        cached_tokens=sum(part.cached_tokens for part in parts),
        output_tokens=sum(part.output_tokens for part in parts),
        cycles=sum(part.cycles for part in parts),
        forwards=sum(part.forwards for part in parts),
        offered=_column_sums(part.offered for part in parts),
        confirmed=_column_sums(part.confirmed for part in parts),
        sources=_by_source(parts),
    )


def _by_source(parts: Sequence[Statistics]) -> tuple[tuple[Source, int, int, int], ...]:
    found: dict[Source, tuple[int, int, int]] = {}
    for source, cycles, drafted, accepted in (entry for part in parts for entry in part.sources):
        a, b, c = found.get(source, (0, 0, 0))
        found[source] = a + cycles, b + drafted, c + accepted
    return tuple((source, *counts) for source, counts in found.items())


def _column_sums(rows: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip_longest(*rows, fillvalue=0))


@dataclass(frozen=True)
class ObservedCost:
    """All passes of one shape: how many there were, and quartiles of their milliseconds."""

    ar_rows: int
    diffusion_rows: int
    count: int
    quartiles: tuple[float, float, float]
    context: float


def observed_costs(turns: Iterable[Turn]) -> list[ObservedCost]:
    """The model's passes that ran, by shape, in the order of their rows (those of a drafter's own
    network are on no curve of it). context: mean tokens held."""
    groups: dict[tuple[int, int], list[Pass]] = {}
    for done in passes(turns):
        if not done.drafter_rows:
            groups.setdefault((done.ar_rows, done.diffusion_rows), []).append(done)
    return [
        ObservedCost(
            *rows,
            len(group),
            _quartiles([1e3 * done.seconds for done in group]),
            statistics.mean(done.context for done in group),
        )
        for rows, group in sorted(groups.items(), key=lambda item: (sum(item[0]), item[0]))
    ]


def passes(turns: Iterable[Turn]) -> Iterable[Pass]:
    """Every pass of these turns after the prompt's."""
    return (done for turn in turns for cycle in turn.result.cycles for done in cycle.passes)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _unique(values: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(values))
