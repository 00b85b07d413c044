"""The text of plans with a drafter's network, beside that of plain decoding: pairs of a prompt and
a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timeless import Timeless
from toy_model import ToyTokenizer

from orthrus_gguf.drafting.draft import NO_DRAFT, Draft
from orthrus_gguf.drafting.drafter import DraftPass
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.engine import Generation, Session
from orthrus_gguf.request import Request, Result
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.together import Together

GREEDY = SamplingSettings(temperature=0)

#: A plan of tests: drafts in every second cycle only, so that passes of one row follow such as
#: accepted drafts.
PAUSING = "pausing"


class Endless(ToyTokenizer):
    """No token ends the text, and none has any."""

    eog: frozenset[int] = frozenset()

    def token_bytes(self, id: int) -> bytes:
        return b""

    def is_special(self, id: int) -> bool:
        return False


ENDLESS: Any = Endless()


class Pausing(FixedPolicy):
    """See `PAUSING`."""

    _drafts = False

    def choose(
        self, drafts: Sequence[Draft], passes: Sequence[DraftPass], room: int, context: int
    ) -> Draft | DraftPass:
        self._drafts = not self._drafts
        return super().choose(drafts, passes, room, context) if self._drafts else NO_DRAFT


def policy_of(model: ModelWithDrafter, plan: str) -> Policy:
    """`auto` sees a machine where rows are cheap, so that it drafts."""
    if plan.startswith("auto"):
        return Timeless(0.01, model.config.block_size, without=parse(plan).also)
    if plan == PAUSING:
        return Pausing(parse("two-pass"), model.config)
    return FixedPolicy(parse(plan), model.config)


def request(
    model: ModelWithDrafter, plan: str, prompt: Sequence[int], seed: int, tokens: int
) -> Request:
    """Greedy for seed 0."""
    sampling = GREEDY if seed == 0 else SamplingSettings(temperature=0.8, seed=seed)
    return Request(tuple(prompt), sampling, policy_of(model, plan), max_tokens=tokens)


def finished(generation: Generation) -> Result:
    """What came of it, once it has run."""
    for _ in generation:
        pass
    return generation.result


def of_network(model: ModelWithDrafter, result: Result) -> int:
    """Accepted drafts of the drafter's network."""
    assert model.config.beside is not None
    name = model.config.beside.name
    return sum(right for source, _, _, right in result.statistics.sources if source.name == name)


def check_pairs(
    model: ModelWithDrafter,
    plans: Sequence[str],
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    tokens: int,
    cuts: Sequence[int] = (512,),
) -> dict[str, int]:
    """Each plan on one session that goes on from pair to pair; accepted drafts of the network, by
    plan. cuts: prompt rows of a pass, by turns."""
    accepted = dict.fromkeys(plans, 0)
    sessions = {plan: Session(model, ENDLESS, 128) for plan in ("ar", *plans)}
    pairs = [(seed, prompt) for seed in seeds for prompt in prompts]
    for turn, (seed, prompt) in enumerate(pairs):
        expected = finished(sessions["ar"].generate(request(model, "ar", prompt, seed, tokens)))
        for i, plan in enumerate(plans):
            sessions[plan].prompt_batch = cuts[(turn + i) % len(cuts)]
            asked = request(model, plan, prompt, seed, tokens)
            found = finished(sessions[plan].generate(asked))
            assert found.output == expected.output, (plan, seed, prompt)
            accepted[plan] += of_network(model, found)
    return accepted


def check_side_by_side(
    model: ModelWithDrafter, plans: Sequence[str], prompts: Sequence[Sequence[int]], tokens: int
) -> list[Result]:
    """All prompts in every pass, each with a plan of its own, one joining after the other."""
    alone = [
        finished(
            Session(model, ENDLESS, 128).generate(request(model, "ar", prompt, i % 3, tokens))
        ).output
        for i, prompt in enumerate(prompts)
    ]
    together, running = Together(model), []
    for i, prompt in enumerate(prompts):
        session = Session(model, ENDLESS, 128)
        running.append(session.generate(request(model, plans[i], prompt, i % 3, tokens)))
        together.join(running[-1])
        together.step()
    while len(together):
        together.step()
    assert [generation.result.output for generation in running] == alone
    return [generation.result for generation in running]
