"""Trees of drafts: how they grow, how they are walked, and that they never change the text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import BLOCK, VOCAB, ToyModel, ar_logits

from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.block import BLOCK as FROM_BLOCK
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft
from orthrus_gguf.drafting.lookup import LOOKUP
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy, Plan, Strategy, parse
from orthrus_gguf.drafting.tree import Tree, best_first
from orthrus_gguf.engine import Session
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.request import Origin, Request, Result, origins
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import (
    Logits,
    Segment,
    View,
    ar_segment,
    check_segments,
    depths,
    diffusion_segment,
    path_to,
)
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.tokenizer import load_tokenizer

GREEDY = SamplingSettings(temperature=0)

#: Tokens 5 6, 5 16, 15 6 behind the anchor, and 7 behind 5 6.
FORKED = Tree((5, 15, 6, 16, 6, 7), (0, 0, 1, 1, 2, 3))


# --- segments ---


def test_depths_and_paths() -> None:
    parents = (-1, 0, 1, 0, 3, 3)
    assert depths(parents) == [0, 1, 2, 1, 2, 2]
    assert [path_to(row, parents) for row in (0, 2, 5)] == [[0], [0, 1, 2], [0, 3, 5]]
    cache = ToyModel().new_cache(100)
    assert ar_segment(cache, range(6), 10, parents=parents).stop == 13
    assert ar_segment(cache, range(6), 10).stop == 16


@pytest.mark.parametrize(
    "parents", [(0, 0, 1), (-1, 0), (-1, 1, 0), (-1, -1, 0), (-1, 0, 3), (-1, 0, -2)]
)
def test_what_is_no_tree(parents: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="not a tree of 3 AR rows"):
        ar_segment(ToyModel().new_cache(9), range(3), 0, parents=parents)


def test_a_block_is_no_tree() -> None:
    with pytest.raises(ValueError, match="not a tree"):
        Segment(ToyModel().new_cache(9), View.DIFFUSION, (1, 2), 0, range(2), (-1, 0))


def test_no_block_of_their_sequence_rides_beside_trees() -> None:
    """Blocks of other sequences may."""
    cache, other = ToyModel().new_cache(100), ToyModel().new_cache(100)
    cache.assume(4)
    tree = ar_segment(cache, range(3), 4, parents=(-1, 0, 0))
    check_segments([tree])
    check_segments([tree, diffusion_segment(other, 1, 2, 3, 0)])
    with pytest.raises(ValueError, match="shares its pass with no diffusion block"):
        check_segments([tree, diffusion_segment(cache, 1, 2, 3, 4)])
    full = ToyModel().new_cache(6)
    full.assume(4)
    check_segments([ar_segment(full, range(3), 4, parents=(-1, 0, 0))])
    with pytest.raises(ValueError, match="room for 6"):
        check_segments([ar_segment(full, range(3), 4)])


# --- how they grow ---


def grown(draft: Draft, accept: Sequence[float], nodes: int) -> Tree:
    """The best tree of a draft, as the drafter sees its second choices."""
    return draft.tree(best_first(accept, draft.second_shares(len(accept)), nodes), nodes)


def test_a_tree_by_hand() -> None:
    """0.6 and half of the other 0.4 first; then 0.5 with 0.3 of the other half."""
    draft = Draft(FROM_BLOCK, (5, 6), (0.36, 0.25), ((15, 0.32), (16, 0.225)))
    # 5: 0.6, 5 6: 0.3, 15: 0.2, 15 6: 0.1, 5 16: 0.6 * 0.5 * 0.3 = 0.09, 15 16: 0.03
    tree = grown(draft, [0.6, 0.5], 99)
    assert tree == Tree((5, 6, 15, 6, 16, 16), (0, 1, 0, 3, 1, 3))
    branches = best_first([0.6, 0.5], draft.second_shares(2), 99)
    assert branches.probabilities == pytest.approx((0.6, 0.3, 0.2, 0.1, 0.09, 0.03))
    for count in range(7):
        assert grown(draft, [0.6, 0.5], count) == draft.tree(branches, count) == tree.first(count)
    assert grown(draft, [0.6, 0.5], 2) == Tree((5, 6)), "a chain, as long as it has no branch"
    assert grown(draft, [0.6], 9) == Tree((5, 15), (0, 0)), "no deeper than it may be"
    assert grown(draft, [], 9) == Tree(())


def test_what_stands_behind_second_choices_may_be_worth_less() -> None:
    """Half as much: 15 6 is 0.2 * 0.25, and 15 16 is 0.2 * 0.75 * 0.3; the rest is as ever."""
    branches = best_first([0.6, 0.5], [0.5, 0.3], 99, behind=0.5)
    assert branches.probabilities == pytest.approx((0.6, 0.3, 0.2, 0.09, 0.05, 0.045))
    assert branches.parents == (0, 1, 0, 1, 3, 3)
    assert branches.seconds == (False, False, True, True, False, True)


def test_what_is_unlikely_is_left_out() -> None:
    """Nothing at or below `least`, and so nothing behind it."""
    branches = best_first([0.6, 0.5], [0.5, 0.3], 99, 0.1)
    assert branches.probabilities == pytest.approx((0.6, 0.3, 0.2))
    assert best_first([0.6, 0.5], [0.5, 0.3], 99, 0.6).probabilities == ()
    assert best_first([0.05, 0.9], [0.0, 0.0], 99, 0.1).probabilities == ()


def test_sure_drafts_and_drafts_of_one_choice_are_chains() -> None:
    sure = Draft(FROM_BLOCK, (5, 6), (1.0, 1.0), ((15, 0.0), (16, 0.0)))
    found = Draft(LOOKUP, (5, 6), (0.5, 0.5))
    for draft in (sure, found):
        assert grown(draft, draft.confidence, 9) == Tree((5, 6))


probability = st.floats(0.01, 0.99)


@given(st.lists(st.tuples(probability, probability), max_size=5), st.integers(1, 80))
def test_trees_hold_the_likeliest_paths(shares: list[tuple[float, float]], nodes: int) -> None:
    """Against the list of all paths."""
    accept = [first for first, _ in shares]
    draft = Draft(
        FROM_BLOCK,
        tuple(range(len(shares))),
        tuple(accept),
        tuple((10 + i, (1 - first) * second) for i, (first, second) in enumerate(shares)),
    )
    chances: dict[tuple[int, ...], float] = {}
    for depth in range(1, len(shares) + 1):
        for choices in itertools.product((0, 1), repeat=depth):
            chance = 1.0
            for i, second in enumerate(choices):
                chance *= (1 - accept[i]) * shares[i][1] if second else accept[i]
            chances[tuple(i + 10 * second for i, second in enumerate(choices))] = chance
    tree = grown(draft, accept, nodes)
    parents = (-1, *(tree.parents or range(len(tree.tokens))))
    paths = [
        tuple(tree.tokens[i - 1] for i in path_to(row, parents)[1:])
        for row in range(1, len(parents))
    ]
    assert len(set(paths)) == len(paths) == min(nodes, len(chances))
    best = sorted(chances.values(), reverse=True)[: len(paths)]
    assert [chances[path] for path in paths] == pytest.approx(best)


def test_walking() -> None:
    assert FORKED.path([5, 6, 7, 8]) == [0, 1, 3, 6]
    assert FORKED.path([15, 16]) == [0, 2]
    assert FORKED.path([9]) == [0]
    assert FORKED.likeliest([0]) == (5, 6, 7)
    assert FORKED.likeliest([0, 2]) == (15, 6)
    assert FORKED.likeliest([0, 1, 4]) == (5, 16)
    chain = Tree((5, 6, 7))
    assert chain.path([5, 6, 8]) == [0, 1, 2]
    assert chain.likeliest([0]) == (5, 6, 7)


# --- the decode loop ---

#: Given the prefix and a row of the block: the drafter's scores of its tokens, the rest is far off.
Scores = Callable[[list[int]], dict[int, float]]


def right(prefix: list[int]) -> int:
    return int(ar_logits(prefix).argmax())


def second_is_right(prefix: list[int]) -> dict[int, float]:
    """The first choice never is."""
    token = right(prefix)
    return {(token + 1) % VOCAB: 1.0, token: 0.5}


def sometimes(prefix: list[int]) -> dict[int, float]:
    token, rng = right(prefix), random.Random(len(prefix))
    scores = {token: rng.uniform(0, 2), (token + 1) % VOCAB: rng.uniform(0, 2)}
    return scores if rng.random() < 0.8 else dict.fromkeys(rng.sample(range(VOCAB), 3), 1.0)


def never(prefix: list[int]) -> dict[int, float]:
    token = right(prefix)
    return {(token + 1) % VOCAB: 1.0, (token + 2) % VOCAB: 1.0}


def sure(prefix: list[int]) -> dict[int, float]:
    return {right(prefix): 99.0}


def broken(prefix: list[int]) -> dict[int, float]:
    return {1: np.nan} if len(prefix) % 3 == 0 else sometimes(prefix)


DRAFTERS: dict[str, Scores] = {
    f.__name__: f for f in (second_is_right, sometimes, never, sure, broken)
}


class Doubtful(ToyModel):
    """Drafts by scores, each row as if those before it had been right."""

    def __init__(self, scores: Scores, room: int = 1000) -> None:
        super().__init__()
        self.scores, self.room = scores, room

    def new_cache(self, capacity: int) -> Any:
        cache = super().new_cache(capacity)
        cache.tree_room = self.room
        return cache

    def _segment(self, segment: Segment) -> Logits:
        if segment.view is View.AR:
            return super()._segment(segment)
        held = segment.cache.tokens  # type: ignore[attr-defined]
        prefix, rows = [*held[: segment.start], segment.tokens[0]], []
        for _ in segment.tokens:
            row = np.full(VOCAB, -9, np.float32)
            for token, score in self.scores(prefix).items():
                row[token] = score
            rows.append(row)
            prefix.append(right(prefix))
        return np.stack(rows)[list(segment.wanted)]


def run(
    model: ToyModel, prompt: list[int], sampling: SamplingSettings, plan: Plan | str, n: int
) -> tuple[list[int], list[Cycle]]:
    """Tokens after the prompt, and the cycles."""
    policy = FixedPolicy(parse(plan) if isinstance(plan, str) else plan, model.config)
    sequence = model.sequence(prompt, sampling)
    drive(model, prefill(sequence))
    cycles = []
    for cycle in decode(model, sequence, policy, n - 1):
        cycles.append(cycle)
        held = sequence.cache.tokens  # type: ignore[attr-defined]
        assert held == sequence.tokens[:-1], "the committed path, nothing else"
    return sequence.tokens[len(prompt) :], cycles


@settings(deadline=None, max_examples=150)
@given(
    drafter=st.sampled_from(sorted(DRAFTERS)),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
    plan=st.builds(
        Plan,
        st.just(Strategy.TWO_PASS),
        width=st.integers(1, BLOCK),
        tail=st.booleans(),
        also=st.sampled_from([(), ("lookup",)]),
        cut=st.sampled_from([0.0, 0.2]),
        tree=st.integers(1, 24),
    ),
    n=st.integers(1, 30),
    room=st.sampled_from([1, 2, 5, 1000]),
    sampling=st.builds(
        SamplingSettings,
        temperature=st.sampled_from([0.0, 0.7, 1.5]),
        top_k=st.sampled_from([0, 1, 5]),
        repeat_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 2**64 - 1),
    ),
)
def test_trees_do_not_change_the_text(
    drafter: str, prompt: list[int], plan: Plan, n: int, room: int, sampling: SamplingSettings
) -> None:
    output, cycles = run(Doubtful(DRAFTERS[drafter], room), prompt, sampling, plan, n)
    assert output == run(ToyModel(), prompt, sampling, PLAIN, n)[0]
    assert [t for c in cycles for t in c.tokens] == output[1:]
    assert plan.width is not None
    for cycle in cycles:
        assert len(cycle.tokens) == cycle.accepted + 1
        assert cycle.tokens[: cycle.accepted] == cycle.drafts[: cycle.accepted]
        assert len(cycle.drafts) <= plan.width
        assert len(cycle.drafts) <= cycle.passes[-1].ar_rows - 1 <= plan.tree


def test_a_second_choice_that_is_always_right_is_accepted() -> None:
    """The chain gets nothing. A full tree of two choices at three positions has 14 nodes."""
    _, chain = run(Doubtful(second_is_right), [1], GREEDY, "two-pass@3", 21)
    assert {c.accepted for c in chain} == {0}
    plan = "two-pass@3+tree=14"
    _, cycles = run(Doubtful(second_is_right), [1], GREEDY, plan, 21)
    assert [c.accepted for c in cycles] == [3] * 5
    assert [c.passes[-1].ar_rows for c in cycles] == [15] * 5
    assert origins(cycles[0]) == [Origin.DRAFTED] * 3 + [Origin.PLAIN]


def test_the_drafts_of_a_cycle_are_the_branch_that_was_taken() -> None:
    """Six of the 14 nodes: the right path, of second choices, leads out of the tree half-way."""
    plan = "two-pass@3+tree=6"
    _, (cycle, *_) = run(Doubtful(second_is_right), [1], GREEDY, plan, 21)
    assert cycle.accepted == 1
    assert len(cycle.drafts) > 1
    assert cycle.drafts[0] == cycle.tokens[0] == cycle.draft.second[0][0]
    assert cycle.drafts[1:] == cycle.draft.tokens[1 : len(cycle.drafts)]
    assert origins(cycle) == [Origin.DRAFTED, Origin.CORRECTED]


def test_first_choices_are_counted_as_agreed_whether_the_tree_held_them_or_not() -> None:
    """A tree of second choices alone: what the AR view says of the first is known all the same."""
    draft = Draft(FROM_BLOCK, (5, 6), (0.1, 0.9), ((15, 0.8), (16, 0.0)))
    assert Cycle(0, (15, 6), 0, (5,), draft).agreed == 1
    assert Cycle(0, (15, 6), 0, (9,), draft).agreed == 0
    assert Cycle(0, (15, 6), 2, (15, 6, 1), draft).agreed == 0
    chain = Draft(FROM_BLOCK, (5, 6, 7), (0.9,) * 3)
    assert [Cycle(0, (5, 6), n, t, chain).agreed for n, t in ((0, (1,)), (1, (5, 1)))] == [0, 1]
    assert Cycle(0, (5, 6), 2, (5, 6, 7), chain).agreed == 2, "no more than were verified"


# --- models ---


@contextmanager
def opened(demo_file: Callable[..., Path], runtime: RuntimeName, n_ctx: int) -> Iterator[Session]:
    torch.set_num_threads(1)
    with ModelFile.open(demo_file("bf16")) as file:
        tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
        with closing(load_model(file, RuntimeSettings(runtime, threads=1))) as model:
            yield Session(model, tokenizer, n_ctx)


def generated(
    session: Session, prompt: Sequence[int], sampling: SamplingSettings, plan: Plan, n: int
) -> Result:
    policy = FixedPolicy(plan, session.model.config)
    generation = session.generate(Request(tuple(prompt), sampling, policy, max_tokens=n))
    for _ in generation:
        pass
    return generation.result


def assert_same_text(
    session: Session, cases: Sequence[dict[str, Any]], trees: Sequence[int], n: int
) -> None:
    """Greedy and seeded in turn."""
    for number, case in enumerate(cases):
        sampling = GREEDY if number % 2 else SamplingSettings(seed=number, repeat_penalty=1.1)
        prompt = case["prompt_ids"]
        plain = generated(session, prompt, sampling, PLAIN, n)
        for tree in trees:
            plan = Plan(Strategy.TWO_PASS, 4 + number, tail=number % 3 == 0, tree=tree)
            assert generated(session, prompt, sampling, plan, n).output == plain.output


@pytest.mark.parametrize("runtime", [RuntimeName.GGML, RuntimeName.CPU])
def test_the_text_on_the_cpu(
    runtime: RuntimeName, demo_file: Callable[..., Path], golden: dict[str, Any]
) -> None:
    with opened(demo_file, runtime, 1024) as session:
        assert_same_text(session, golden["cases"], [5, 16, 32], 32)


def test_the_text_of_the_reference(demo_file: Callable[..., Path], golden: dict[str, Any]) -> None:
    with opened(demo_file, RuntimeName.REFERENCE, 1024) as session:
        assert_same_text(session, golden["cases"][2:5], [12], 12)


def test_a_small_context_cuts_trees_not_text(
    demo_file: Callable[..., Path], golden: dict[str, Any]
) -> None:
    """Up to the last token that fits a context of 80."""
    prompt = golden["cases"][3]["prompt_ids"][:20]
    with opened(demo_file, RuntimeName.CPU, 80) as session:
        plain = generated(session, prompt, GREEDY, PLAIN, -1)
        tree = generated(session, prompt, GREEDY, Plan(Strategy.TWO_PASS, 15, tree=32), -1)
    assert len(prompt) + len(plain.output) == 80
    assert tree.output == plain.output
    assert max(cycle.passes[-1].ar_rows for cycle in tree.cycles) < 33, "all had to be cut"


@pytest.mark.parametrize(("runtime", "trees"), [(RuntimeName.GGML, 69), (RuntimeName.CPU, 70)])
def test_acceptance_on_the_demo_model(
    runtime: RuntimeName, trees: int, demo_file: Callable[..., Path], golden: dict[str, Any]
) -> None:
    """Cycles for 4 x 48 tokens: a tree accepts more than a chain of as many rows, by so much.
    (Drafts differ a little between runtimes, in arithmetic.)"""
    cycles = {0: 0, 16: 0}
    with opened(demo_file, runtime, 1024) as session:
        for case in golden["cases"][1:5]:
            for tree in cycles:
                plan = Plan(Strategy.TWO_PASS, 15, tree=tree)
                result = generated(session, case["prompt_ids"], GREEDY, plan, 48)
                cycles[tree] += result.statistics.cycles
    assert cycles == {0: 83, 16: trees}
