"""Replaying recordings with one strategy after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from orthrus_gguf.auto.calibration import measure
from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.auto.costs import Costs, RunningCosts
from orthrus_gguf.bench.comparison.spelling import AUTO, Spelling, parse
from orthrus_gguf.bench.simulation.recording import Recording, Text
from orthrus_gguf.bench.simulation.replay import ReplayModel, ReplaySampler, VirtualClock
from orthrus_gguf.decode import Cycle, Plan, Policy, Strategy, decode, plan_for
from orthrus_gguf.stats import Statistics, count

#: Blocks of the fused plans that are compared.
BLOCKS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Outcome:
    """One strategy on all texts of one domain.

    strategy: its full spelling. seconds: of generation, by the virtual clock. decided: by the
        controller, not a fixed plan.
    """

    domain: str
    strategy: str
    decided: bool
    statistics: Statistics
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first of each text, which the prompt's pass gives, over their time."""
        return (self.statistics.output_tokens - 1) / self.seconds


def default_strategies(block_size: int, *, lookup: bool) -> list[Spelling]:
    """What is compared unless the caller says otherwise. lookup: whether to look up, too."""
    full = block_size - 1
    widths = sorted({max(block_size // n, 2) - 1 for n in (4, 2, 1)})
    names = [f"two-pass@{width}" for width in widths]
    names += [f"fused@{width}x{blocks}" for width in widths for blocks in BLOCKS]
    drafting = (f"two-pass@{full}", f"fused@{full}x2", f"fused@{full}x4")
    names += [f"{name}+tail" for name in drafting]
    if lookup:
        names += [f"{name}+lookup" for name in ("ar", *drafting)]
        names.append("auto+no-lookup")
    return [parse(name) for name in (*names, "auto")]


class Simulator:
    """One recording on one piece of hardware."""

    def __init__(self, recording: Recording, costs: Costs) -> None:
        self.recording = recording
        self._costs = costs

    def outcomes(self, strategies: Sequence[Spelling]) -> Iterator[Outcome]:
        """Every domain with plain decoding, and with each of `strategies`.

        A controller is new for every domain, and measures costs on the virtual clock first. Raises
        OrthrusError for plans that the recorded blocks are too small for.
        """
        for domain, texts in self.recording.domains().items():
            clock = VirtualClock()
            model = ReplayModel(self._costs, clock, self.recording.block_size)
            named = {name(spelling, model): spelling for spelling in (parse("ar"), *strategies)}
            for text, spelling in named.items():
                policy = self._policy(spelling, model, clock)
                yield run(model, clock, domain, texts, text, policy)

    def _policy(
        self, spelling: Spelling, model: ReplayModel, clock: VirtualClock
    ) -> Plan | Controller:
        if spelling.name != AUTO:
            return plan(spelling, model)
        costs = RunningCosts(measure(model, clock=clock))
        return Controller(costs, self.recording.block_size, lookup=spelling.lookup)


def plan(spelling: Spelling, model: ReplayModel) -> Plan:
    """The fixed plan that is spelt so. Raises OrthrusError if it does not fit the blocks."""
    strategy = Strategy(spelling.name)
    made = plan_for(model, strategy, spelling.width, blocks=spelling.blocks)
    return replace(
        made, lookup=spelling.lookup, tail=spelling.tail, cut=spelling.cut, tree=spelling.tree
    )


def name(spelling: Spelling, model: ReplayModel) -> str:
    """The full spelling."""
    if spelling.name == AUTO:
        return spelling.text
    made = plan(spelling, model)
    return replace(spelling, width=made.width or None, blocks=made.blocks or None).text


def run(
    model: ReplayModel,
    clock: VirtualClock,
    domain: str,
    texts: Sequence[Text],
    strategy: str,
    policy: Plan | Policy,
) -> Outcome:
    """All texts of a domain, one after the other."""
    began = clock.now
    cycles = [cycle for text in texts for cycle in replay(model, clock, text, policy)]
    statistics = count(
        cycles,
        prompt_tokens=sum(len(text.prompt) for text in texts),
        cached_tokens=0,
        output_tokens=1 + sum(len(text.output) - 1 for text in texts),
    )
    return Outcome(domain, strategy, not isinstance(policy, Plan), statistics, clock.now - began)


def replay(
    model: ReplayModel, clock: VirtualClock, text: Text, policy: Plan | Policy
) -> Iterator[Cycle]:
    """The cycles in which `text` is written. Its prompt is in the cache, at no cost."""
    model.text = text
    cache = model.new_cache(len(text.tokens))
    cache.append(len(text.prompt))
    tokens = list(text.tokens[: len(text.prompt) + 1])
    yield from decode(
        model, cache, ReplaySampler(), tokens, policy, len(text.output) - 1, clock=clock
    )
    if tuple(tokens) != text.tokens:
        raise ValueError(f"a replay of {text.domain} left its text")
