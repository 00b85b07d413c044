"""The decode loop on a toy model: same tokens as plain AR, whatever the drafter does."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timeless import StraightCosts
from toy_model import BLOCK, MASK, VOCAB, ToyModel, ar_logits, greedy_continuation, one_hot

from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.decode import decode, drive, prefill, run_cycle
from orthrus_gguf.drafting.block import BLOCK as FROM_BLOCK
from orthrus_gguf.drafting.carried_blocks import LAST, NEXT
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.lookup import LOOKUP
from orthrus_gguf.drafting.plan import FixedPolicy, Plan, Strategy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.protocol import Logits, Masks, Segment, View
from orthrus_gguf.sampling import LogProbs, Sampler, SamplingSettings

GREEDY = SamplingSettings(temperature=0)


def wrong(prefix: Sequence[int], rows: int) -> list[int]:
    return [(t + 1) % VOCAB for t in greedy_continuation(prefix, rows)]


def half_right(prefix: Sequence[int], rows: int) -> list[int]:
    right = greedy_continuation(prefix, rows)
    good = len(prefix) % (rows + 1)
    return right[:good] + [(t + 1) % VOCAB for t in right[good:]]


def noise(prefix: Sequence[int], rows: int) -> list[int]:
    return random.Random(len(prefix)).choices(range(VOCAB), k=rows)


def masks(prefix: Sequence[int], rows: int) -> list[int]:
    return [MASK] * rows


def ends(prefix: Sequence[int], rows: int) -> list[int]:
    return [VOCAB - 2] * rows


DRAFTERS = {
    "right": greedy_continuation,
    "wrong": wrong,
    "half": half_right,
    "noise": noise,
    "masks": masks,
    "ends": ends,
}


def any_policy(
    name: str, width: int, blocks: int, tail: bool, lookup: bool, tree: int = 0
) -> Policy:
    """A plan of the strategy, or a controller to which rows are cheap (auto) or dear (dear)."""
    if name in ("auto", "dear"):
        costs = StraightCosts(0.01 if name == "auto" else 0.6)
        return Controller(costs, BLOCK, without=() if lookup else ("lookup",))
    strategy, also = Strategy(name), ("lookup",) if lookup else ()
    plan = Plan(strategy, also=also)
    if strategy is not Strategy.AR:
        plan = Plan(strategy, width, None, also, tail, cut=0.1 * (width % 3))
    if strategy is Strategy.TWO_PASS:
        plan = replace(plan, tree=tree)
    if strategy is Strategy.FUSED:
        plan = replace(plan, blocks=blocks)
    return fixed(plan)


def fixed(plan: Plan | str) -> FixedPolicy:
    return FixedPolicy(parse(plan) if isinstance(plan, str) else plan, ToyModel().config)


def run(
    model: ToyModel,
    prompt: list[int],
    sampling: SamplingSettings,
    policy: Policy | str,
    n: int,
    batch: int = 512,
) -> tuple[list[int], list[Cycle]]:
    """Tokens generated after the prompt, and the cycles."""
    sequence = model.sequence(prompt, sampling)
    drive(model, prefill(sequence, batch=batch))
    cycles = []
    for cycle in decode(
        model, sequence, fixed(policy) if isinstance(policy, str) else policy, n - 1
    ):
        cycles.append(cycle)
        # The cache holds all committed tokens but the anchor, after each cycle.
        assert sequence.cache.tokens == sequence.tokens[:-1]  # type: ignore[attr-defined]
    return sequence.tokens[len(prompt) :], cycles


def drawn(sampling: SamplingSettings, tokens: Sequence[int], mask: Masks | None = None) -> int:
    """What AR decoding puts behind `tokens`."""
    choice = Sampler(sampling).draw(ar_logits(tokens), tokens, allowed=mask)
    assert choice is not None
    return choice.token


def expected(prompt: list[int], sampling: SamplingSettings, n: int) -> list[int]:
    """AR decoding, spelled out."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(drawn(sampling, tokens))
    return tokens[len(prompt) :]


SAMPLING = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_k=st.sampled_from([0, 5]),
    repeat_penalty=st.sampled_from([1.0, 1.3]),
    repeat_last_n=st.sampled_from([-1, 4, 64]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
)


@settings(deadline=None, max_examples=300)
@given(
    drafter=st.sampled_from(sorted(DRAFTERS)),
    sureness=st.sampled_from([0.0, 3.0, 99.0]),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    strategy=st.sampled_from(["ar", "two-pass", "fused", "auto", "dear"]),
    width=st.integers(1, BLOCK),
    blocks=st.integers(1, 6),
    tail=st.booleans(),
    lookup=st.booleans(),
    n=st.integers(1, 40),
    batch=st.integers(1, 25),
    sampling=SAMPLING,
)
def test_tokens_do_not_depend_on_how_they_are_found(
    drafter: str,
    sureness: float,
    prompt: list[int],
    strategy: str,
    width: int,
    blocks: int,
    tail: bool,
    lookup: bool,
    n: int,
    batch: int,
    sampling: SamplingSettings,
) -> None:
    policy = any_policy(strategy, width, blocks, tail, lookup)
    model = ToyModel(DRAFTERS[drafter], sureness=sureness)
    output, cycles = run(model, prompt, sampling, policy, n, batch)
    assert output == expected(prompt, sampling, n)
    assert [t for c in cycles for t in c.tokens] == output[1:]
    for cycle in cycles:
        assert len(cycle.tokens) == cycle.accepted + 1
        assert cycle.tokens[: cycle.accepted] == cycle.drafts[: cycle.accepted]


@pytest.mark.parametrize("width", [1, 3, BLOCK])
def test_a_right_drafter_gets_every_draft_accepted(width: int) -> None:
    model = ToyModel(greedy_continuation)
    n = 1 + 5 * (width + 1)
    _, cycles = run(model, [1, 2, 3], GREEDY, f"two-pass@{width}", n)
    assert [c.accepted for c in cycles] == [width] * 5
    assert model.forwards == 1 + 2 * 5


def test_a_wrong_drafter_costs_passes_but_not_tokens() -> None:
    model = ToyModel(wrong)
    output, cycles = run(model, [1], GREEDY, "two-pass@4", 10)
    assert output == expected([1], GREEDY, 10)
    assert [c.accepted for c in cycles] == [0] * 9


def test_a_broken_drafter_costs_no_tokens() -> None:
    class Broken(ToyModel):
        def _segment(self, segment: Segment) -> Logits:
            logits = super()._segment(segment)
            if segment.view is View.DIFFUSION:
                logits[1:] = np.nan
            return logits

    output, cycles = run(Broken(), [1], GREEDY, "two-pass@4", 12)
    assert output == expected([1], GREEDY, 12)
    assert [len(c.drafts) for c in cycles] == [1] * 5 + [0]


def test_a_fused_pass_saves_the_draft_pass_of_the_next_cycle() -> None:
    """A right drafter's continuation is the next anchor, so one block (guess B) always serves."""
    model = ToyModel(greedy_continuation)
    width, cycles_wanted = 3, 6
    n = 1 + cycles_wanted * (width + 1)
    output, cycles = run(model, [1, 2], GREEDY, f"fused@{width}x1", n)
    assert output == expected([1, 2], GREEDY, n)
    assert [c.accepted for c in cycles] == [width] * cycles_wanted
    assert [len(c.passes) for c in cycles] == [2, *[1] * (cycles_wanted - 1)]
    assert [c.source for c in cycles] == [FROM_BLOCK, *[NEXT] * (cycles_wanted - 1)]


def test_a_wrong_guess_costs_a_draft_pass_and_nothing_else() -> None:
    model = ToyModel(wrong)
    output, cycles = run(model, [1], GREEDY, "fused@4x2", 10)
    assert output == expected([1], GREEDY, 10)
    assert all(len(c.passes) == 2 for c in cycles[:-1])


def test_guess_a_drafts_beyond_the_correction() -> None:
    """The drafter errs at one position only; the block at the last accepted draft goes on."""
    wrong_at = 6

    def errs_once(prefix: Sequence[int], rows: int) -> list[int]:
        right = greedy_continuation(prefix, rows)
        return [(t + 1) % VOCAB if len(prefix) + i == wrong_at else t for i, t in enumerate(right)]

    plan = "fused@5x8"
    output, cycles = run(ToyModel(errs_once, sureness=3.0), [1, 2], GREEDY, plan, 20)
    assert output == expected([1, 2], GREEDY, 20)
    after = next(i for i, c in enumerate(cycles) if c.start + c.accepted + 1 == wrong_at) + 1
    assert cycles[after].source is LAST
    assert len(cycles[after].passes) == 1
    assert cycles[after].accepted == 5


def test_lookup_drafts_text_that_repeats() -> None:
    """Logits that only look at the last token repeat with a period; lookups then need no heads."""
    model = ToyModel(heads=False, logits=lambda prefix: one_hot((prefix[-1] + 1) % 5))
    output, cycles = run(model, [0], GREEDY, "ar+lookup", 60)
    assert output == [(1 + i) % 5 for i in range(60)]
    assert cycles[-1].source is LOOKUP
    assert model.forwards < 15


def test_drafts_never_reach_beyond_the_limit() -> None:
    _, cycles = run(ToyModel(), [5], GREEDY, f"two-pass@{BLOCK}", 7)
    assert [(c.start, len(c.drafts)) for c in cycles] == [(1, 5)]


def test_sampled_drafts_use_the_noise_of_their_positions() -> None:
    """A drafter with the AR view's own logits is never refused, at any temperature."""

    class SameLogits(ToyModel):
        def _segment(self, segment: Segment) -> Logits:
            if segment.view is View.AR:
                return super()._segment(segment)
            held = segment.cache.tokens  # type: ignore[attr-defined]
            prefix, rows = [*held[: segment.start], segment.tokens[0]], []
            for _ in segment.tokens:
                rows.append(ar_logits(prefix))
                prefix.append(drawn(hot, prefix))
            return np.stack(rows)[list(segment.wanted)]

    hot = SamplingSettings(temperature=1.2, top_k=0, top_p=1, min_p=0, seed=11)
    _, cycles = run(SameLogits(), [1, 2], hot, "two-pass@6", 29)
    assert [c.accepted for c in cycles] == [6] * 4


# --- choices: what may be drawn, and what is said of it ---


def masked(tokens: Sequence[int]) -> Masks:
    """One bit per token: v in bit v % 32 of word v // 32."""
    words = np.zeros(VOCAB // 32, np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def thirds(prefix: Sequence[int]) -> Masks:
    """Every third token, and which third depends on all tokens before: no row's mask is another's
    unless their paths agree."""
    return masked([t for t in range(VOCAB) if (t + sum(prefix)) % 3 == 0])


def alternating(prefix: Sequence[int]) -> Masks:
    """Even after odd, odd after even."""
    return masked(range(1 - prefix[-1] % 2, VOCAB, 2))


def now_and_then(prefix: Sequence[int]) -> Masks:
    """One token at every fourth position, else anything."""
    return masked([7] if len(prefix) % 4 == 0 else range(VOCAB))


GRAMMARS = {f.__name__: f for f in (thirds, alternating, now_and_then)}


def constraint(
    grammar: Callable[[Sequence[int]], Masks],
) -> Callable[[Sequence[int], Tree], Masks]:
    """The mask of every row of a tree, by the tokens on the way to it."""

    def masks_of(tokens: Sequence[int], tree: Tree) -> Masks:
        parents = range(len(tree.tokens)) if tree.parents is None else tree.parents
        paths = [list(tokens)]
        for token, parent in zip(tree.tokens, parents, strict=True):
            paths.append([*paths[parent], token])
        return np.stack([grammar(path) for path in paths])

    return masks_of


@settings(deadline=None, max_examples=200)
@given(
    grammar=st.sampled_from(sorted(GRAMMARS)),
    drafter=st.sampled_from(["right", "half", "noise"]),
    sureness=st.sampled_from([0.5, 3.0, 99.0]),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    strategy=st.sampled_from(["ar", "two-pass", "fused", "auto"]),
    width=st.integers(1, BLOCK),
    tree=st.sampled_from([0, 3, 12]),
    lookup=st.booleans(),
    n=st.integers(1, 30),
    sampling=SAMPLING,
)
def test_constrained_text_does_not_depend_on_drafts(
    grammar: str,
    drafter: str,
    sureness: float,
    prompt: list[int],
    strategy: str,
    width: int,
    tree: int,
    lookup: bool,
    n: int,
    sampling: SamplingSettings,
) -> None:
    """Drafts know nothing of what is allowed; log-probabilities are those of the raw logits."""
    allowed = GRAMMARS[grammar]
    model = ToyModel(DRAFTERS[drafter], sureness=sureness)
    sequence = model.sequence(prompt, sampling)
    sequence.constraint, sequence.top = constraint(allowed), 3
    said = [drive(model, prefill(sequence)).logprobs]
    said += choices_of(model, sequence, any_policy(strategy, width, 2, True, lookup, tree), n - 1)
    tokens = list(prompt)
    for found in said:
        token = drawn(sampling, tokens, allowed(tokens))
        assert_logprobs(found, tokens, token)
        tokens.append(token)
    assert sequence.tokens == tokens
    assert len(tokens) == len(prompt) + n


def choices_of(
    model: ToyModel, sequence: TokenSequence, policy: Policy, most: int
) -> list[LogProbs | None]:
    """Decode `most` tokens; what was said of each."""
    drafters, found = policy.drafters(sequence), []
    end = len(sequence.tokens) + most
    while (left := end - len(sequence.tokens)) > 0:
        _, choices = drive(model, run_cycle(sequence, policy, drafters, left))
        found += [choice.logprobs for choice in choices]
    return found


def assert_logprobs(found: LogProbs | None, tokens: Sequence[int], token: int) -> None:
    """Softmax of the raw logits, before penalties, masks, filters and temperature."""
    assert found is not None
    logits = ar_logits(tokens).astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum())
    best = sorted(range(VOCAB), key=lambda v: -logits[v])[:3]
    assert [v for v, _ in found.top] == best
    assert [p for _, p in found.top] == pytest.approx(logs[best].tolist(), abs=1e-6)
    assert found.chosen == pytest.approx(logs[token], abs=1e-6)


def test_drafts_that_a_grammar_allows_are_accepted() -> None:
    """Of a drafter that knows it, all; of one that does not, a share."""

    def knowing(prefix: Sequence[int], rows: int) -> list[int]:
        tokens = list(prefix)
        for _ in range(rows):
            tokens.append(drawn(GREEDY, tokens, thirds(tokens)))
        return tokens[len(prefix) :]

    accepted = []
    for drafter in (knowing, greedy_continuation):
        model = ToyModel(drafter)
        sequence = model.sequence([1, 2], GREEDY)
        sequence.constraint = constraint(thirds)
        drive(model, prefill(sequence))
        cycles = list(decode(model, sequence, fixed("two-pass@4"), 40))
        accepted.append([c.accepted for c in cycles])
    assert accepted[0] == [4] * 8
    assert max(accepted[1]) < 4


def test_where_nothing_is_allowed_decoding_ends_in_one_line() -> None:
    model = ToyModel()
    sequence = model.sequence([1, 2], GREEDY)
    sequence.constraint = constraint(lambda prefix: masked([5] if len(prefix) < 4 else []))
    drive(model, prefill(sequence))
    with pytest.raises(OrthrusError, match="position 4") as raised:
        list(decode(model, sequence, fixed("two-pass@4"), 9))
    assert "constraint" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_logits_that_are_not_finite_end_decoding_in_one_line() -> None:
    """On every way there is to a position: after the prompt, plainly, behind drafts."""

    def breaks(prefix: Sequence[int]) -> Logits:
        return np.full(VOCAB, np.nan, np.float32) if len(prefix) == 6 else ar_logits(prefix)

    for plan in ("ar", "two-pass@5", "fused@5x2", "two-pass@5+tree=9"):
        for prompt in ([1, 2], [1, 2, 3, 4, 5, 6]):
            model = ToyModel(logits=breaks)
            with pytest.raises(OrthrusError, match="logits at position 6 are not finite"):
                run(model, prompt, GREEDY, plan, 12)


def test_a_prompt_that_is_held_already_is_an_error() -> None:
    model = ToyModel()
    sequence = model.sequence([1, 2], GREEDY)
    sequence.cache.assume(2)
    with pytest.raises(ValueError, match="already holds the whole prompt"):
        drive(model, prefill(sequence))
