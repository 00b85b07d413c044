"""Replaying recordings with one strategy after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orthrus_gguf.auto.calibration import measure
from orthrus_gguf.auto.choice import policy_for
from orthrus_gguf.auto.costs import Costs, RunningCosts
from orthrus_gguf.bench.simulation.bandit import Bandit, arms
from orthrus_gguf.bench.simulation.recording import Recording, Text
from orthrus_gguf.bench.simulation.replay import (
    Replayed,
    ReplayModel,
    ReplayNetwork,
    ReplayWithDrafter,
    VirtualClock,
)
from orthrus_gguf.decode import decode
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import PLAIN, Plan, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.sampling import Sampler, SamplingSettings
from orthrus_gguf.stats import Statistics, count

#: Blocks of the fused plans that are compared.
BLOCKS = (1, 2, 3, 4)

#: Draft tokens of the tree that is compared.
TREE = 16

#: The name of the control (`bandit.py`).
CONTROL = "bandit"

GREEDY = SamplingSettings(temperature=0)


@dataclass(frozen=True)
class Outcome:
    """One strategy on all texts of one domain.

    strategy: its full spelling. seconds: of generation, by the virtual clock. decided: while
        decoding, by the controller or the control, not by a fixed plan.
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


def default_strategies(
    block_size: int | None, beside: Beside | None = None, *, lookup: bool
) -> list[Plan]:
    """What is compared unless the caller says otherwise. block_size, beside: see `Recording`.
    lookup: whether to look up, too."""
    names, drafting = [], ["ar"]
    network = None if beside is None else beside.block
    named = "" if beside is None or block_size is None else f"+{beside.name}"
    for size, also in ((block_size, ""), (network, named)):
        if size is None:
            continue
        names += [f"two-pass@{width}{also}" for width in _widths(size)]
        names.append(f"two-pass@{size - 1}{also}+tree={TREE}")
        drafting.append(f"two-pass@{size - 1}{also}")
    if block_size is not None:
        names += [f"fused@{width}x{blocks}" for width in _widths(block_size) for blocks in BLOCKS]
        drafting += [f"fused@{block_size - 1}x{blocks}" for blocks in (2, 4)]
        names += [f"{name}+tail" for name in drafting[1:]]
        names += [] if beside is None else [f"auto+no-{beside.name}"]
    if lookup:
        names += [*(f"{name}+lookup" for name in drafting), "auto+no-lookup"]
    return [parse(name) for name in (*names, "auto")]


def _widths(block_size: int) -> list[int]:
    return sorted({max(block_size // n, 2) - 1 for n in (4, 2, 1)})


def runs(strategies: Sequence[Plan]) -> int:
    """Outcomes per domain: plain decoding, each strategy, and the control beside controllers."""
    return 1 + len(strategies) + any(plan.strategy is None for plan in strategies)


class Simulator:
    """One recording on one piece of hardware."""

    def __init__(self, recording: Recording, costs: Costs) -> None:
        self.recording = recording
        self._costs = costs

    def outcomes(self, strategies: Sequence[Plan]) -> Iterator[Outcome]:
        """Every domain with plain decoding, with each of `strategies`, and with the control if a
        controller is among them.

        A controller is new for every domain, and measures costs on the virtual clock first. Raises
        OrthrusError for plans that the recorded blocks are too small for.
        """
        for domain, texts in self.recording.domains().items():
            clock = VirtualClock()
            model = self._model(clock)
            plans = {plan.fitted(model.config).text: plan for plan in (PLAIN, *strategies)}
            for name, plan in plans.items():
                policy = self._policy(plan, model, clock)
                yield run(model, clock, domain, texts, name, policy, plan.strategy is None)
            if any(plan.strategy is None for plan in strategies):
                bandit = Bandit(arms(model.config), model.config)
                yield run(model, clock, domain, texts, CONTROL, bandit, True)

    def _model(self, clock: VirtualClock) -> Replayed:
        model = ReplayModel(self._costs, clock, self.recording.block_size)
        if (beside := self.recording.beside) is None:
            return model
        return ReplayWithDrafter(model, ReplayNetwork(model, self._costs, clock, beside))

    def _policy(self, plan: Plan, model: Replayed, clock: VirtualClock) -> Policy:
        return policy_for(plan, model.config, lambda: RunningCosts(measure(model, clock=clock)))


def run(
    model: Replayed,
    clock: VirtualClock,
    domain: str,
    texts: Sequence[Text],
    strategy: str,
    policy: Policy,
    decided: bool = False,
) -> Outcome:
    """All texts of a domain, one after the other. strategy, decided: see `Outcome`."""
    began = clock.now
    cycles = [cycle for text in texts for cycle in replay(model, clock, text, policy)]
    statistics = count(
        cycles,
        prompt_tokens=sum(len(text.prompt) for text in texts),
        cached_tokens=0,
        output_tokens=1 + sum(len(text.output) - 1 for text in texts),
    )
    return Outcome(domain, strategy, decided, statistics, clock.now - began)


def replay(model: Replayed, clock: VirtualClock, text: Text, policy: Policy) -> Iterator[Cycle]:
    """The cycles in which `text` is written. Its prompt is in the cache, at no cost."""
    model.text = text
    cache = model.new_cache(len(text.tokens))
    cache.assume(len(text.prompt))
    tokens = list(text.tokens[: len(text.prompt) + 1])
    sequence = TokenSequence(model.config, cache, Sampler(GREEDY), tokens)
    if isinstance(model, ReplayWithDrafter):
        sequence.draft_cache = model.new_draft_cache(len(text.tokens))
        sequence.draft_cache.assume(len(text.prompt))
    yield from decode(model, sequence, policy, len(text.output) - 1, clock=clock)
    if tuple(sequence.tokens) != text.tokens:
        raise ValueError(f"a replay of {text.domain} left its text")
