"""Several sequences in one pass: each says and keeps what it would alone, whatever its company."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timeless import Timeless
from toy_model import VOCAB, ToyModel, ToyTokenizer, greedy_continuation

from orthrus_gguf.decode import drive, prefill, run_cycle, run_together
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.engine import Generation, Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Choices, Masks, Segment
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.stats import Statistics
from orthrus_gguf.text.tokenizer import load_tokenizer
from orthrus_gguf.together import Together

GREEDY = SamplingSettings(temperature=0)


@dataclass(frozen=True)
class Member:
    """One conversation of one or two turns: what it asks, when it comes, and how it ends.

    joins: passes before its first turn. leaves: passes of its own after which it is cancelled.
    breaks: length of the text at which its constraint fails.
    """

    plan: str
    prompt: tuple[int, ...]
    sampling: SamplingSettings
    most: int
    joins: int = 0
    leaves: int | None = None
    breaks: int | None = None
    stop: tuple[str, ...] = ()
    turns: int = 1
    batch: int = 512
    top: int = 0

    def policy(self, session: Session) -> Policy:
        if self.plan == "auto":
            return Timeless(0.01, session.model.config.block_size)
        return FixedPolicy(parse(self.plan), session.model.config)

    def constraint(self, tokens: Sequence[int], tree: Tree) -> Masks | None:
        if self.breaks is not None and len(tokens) >= self.breaks:
            raise OrthrusError("the grammar broke")
        return None

    def request(self, session: Session, prompt: tuple[int, ...]) -> Request:
        constraint = None if self.breaks is None else self.constraint
        return Request(
            prompt,
            self.sampling,
            self.policy(session),
            self.most,
            self.stop,
            self.top,
            constraint,
        )


@dataclass
class Outcome:
    """What became of one turn."""

    pieces: list[str]
    output: tuple[int, ...] = ()
    text: str = ""
    reason: str = ""
    error: str = ""
    statistics: Statistics | None = None
    cycles: tuple[tuple[Any, ...], ...] = ()
    logprobs: tuple[Any, ...] = ()
    kept: Any = None


class Conversation:
    """A member on its way: starts its turns, counts its passes, notes what came."""

    def __init__(self, member: Member, session: Session, kept: Callable[[Any], Any]) -> None:
        self.member, self.session, self.kept = member, session, kept
        self.outcomes: list[Outcome] = []
        self.generation: Generation | None = None
        self.passes = 0

    @property
    def over(self) -> bool:
        return self.generation is None and len(self.outcomes) == self.member.turns

    def start(self, together: Together) -> None:
        prompt = self.member.prompt
        if self.outcomes:  # the next turn goes on from what was said
            said = (*prompt, *self.outcomes[-1].output)
            prompt = (*said[: self.session.n_ctx - 5], 7, 9)
        request = self.member.request(self.session, prompt)
        self.generation = self.session.generate(request)
        self.outcomes.append(Outcome([]))
        together.join(self.generation)

    def finish(self) -> None:
        assert self.generation is not None
        result, outcome = self.generation.result, self.outcomes[-1]
        outcome.output, outcome.text = result.output, result.text
        outcome.reason, outcome.error = result.finish_reason, str(self.generation.error or "")
        outcome.logprobs = result.logprobs
        outcome.statistics = result.statistics
        outcome.cycles = tuple(map(shape, result.cycles))
        outcome.kept = self.kept(self.session)
        self.generation = None


def shape(cycle: Cycle) -> tuple[Any, ...]:
    """All of a cycle that does not depend on time and company."""
    passes = [(p.ar_rows, p.diffusion_rows, p.context) for p in cycle.passes]
    return cycle.start, cycle.drafts, cycle.tokens, cycle.source, passes, len(cycle.guesses)


def converse(together: Together, conversations: list[Conversation]) -> int:
    """Run them all, each from its pass on; returns the passes it took."""
    steps = 0
    while not all(c.over for c in conversations):
        for c in conversations:
            if c.generation is None and not c.over and steps >= c.member.joins:
                c.start(together)
        under_way = len(together)
        for generation, piece in together.step():
            (owner,) = [c for c in conversations if c.generation is generation]
            owner.outcomes[-1].pieces.append(piece.text)
        assert len(together) <= under_way
        steps += 1
        for c in conversations:
            if c.generation is None:
                continue
            c.passes += 1
            waiting = c.generation in together
            if waiting and c.passes == c.member.leaves:
                together.leave(c.generation)
                waiting = False
            if not waiting:
                c.finish()
    return steps


def outcomes(
    model: Any,
    members: Sequence[Member],
    session: Callable[[Member], Session],
    kept: Callable[[Session], Any],
) -> list[list[Outcome]]:
    """Of all turns of the members, in one another's company."""
    together = Together(model)
    conversations = [Conversation(member, session(member), kept) for member in members]
    converse(together, conversations)
    assert len(together) == 0
    return [c.outcomes for c in conversations]


# --- on the toy ---


def half_right(prefix: Sequence[int], rows: int) -> list[int]:
    right = greedy_continuation(prefix, rows)
    good = len(prefix) % (rows + 1)
    return right[:good] + [(t + 1) % VOCAB for t in right[good:]]


def toy_session(model: ToyModel, n_ctx: int = 60) -> Callable[[Member], Session]:
    tokenizer: Any = ToyTokenizer()
    return lambda member: Session(model, tokenizer, n_ctx, prompt_batch=member.batch)


def toy_kept(session: Session) -> tuple[list[int], list[int]]:
    """The rows that the cache holds, and those the session thinks it does."""
    return list(session._cache.tokens), list(session._held)


MEMBERS = st.builds(
    Member,
    plan=st.sampled_from(
        ["ar", "ar+lookup", "two-pass@5", "two-pass@6+tree=10", "fused@5x3+lookup+tail", "auto"]
    ),
    prompt=st.lists(st.integers(0, 25), min_size=1, max_size=12).map(tuple),
    sampling=st.builds(
        SamplingSettings,
        temperature=st.sampled_from([0.0, 0.8, 1.5]),
        repeat_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 2**64 - 1),
    ),
    most=st.sampled_from([-1, 1, 2, 7, 20]),
    joins=st.integers(0, 8),
    leaves=st.sampled_from([None, None, 1, 2, 5]),
    breaks=st.sampled_from([None, None, None, 4, 15]),
    stop=st.sampled_from([(), ("a",), ("bc", "d")]),
    turns=st.sampled_from([1, 2]),
    batch=st.sampled_from([3, 512]),
    top=st.sampled_from([0, 2]),
)


@settings(deadline=None, max_examples=80)
@given(members=st.lists(MEMBERS, min_size=2, max_size=5), sureness=st.sampled_from([1.0, 5.0]))
def test_company_changes_nothing(members: list[Member], sureness: float) -> None:
    """Text and its pieces, statistics and cycles, log-probabilities, errors, rows kept."""
    model = ToyModel(half_right, sureness=sureness)
    together = outcomes(model, members, toy_session(model), toy_kept)
    for member, found in zip(members, together, strict=True):
        (alone,) = outcomes(model, [replace(member, joins=0)], toy_session(model), toy_kept)
        assert found == alone


@settings(deadline=None, max_examples=60)
@given(member=MEMBERS)
def test_together_with_nobody_is_alone(member: Member) -> None:
    """The same as iterating over the generation."""
    member = replace(member, leaves=None, turns=1)
    model = ToyModel(half_right, sureness=3.0)
    ((found,),) = outcomes(model, [member], toy_session(model), toy_kept)
    session = toy_session(model)(member)
    generation = session.generate(member.request(session, member.prompt))
    pieces: list[str] = []
    error = ""
    try:
        pieces.extend(generation)
    except OrthrusError as raised:
        error = str(raised)
    result = generation.result
    assert (found.pieces, found.error) == (pieces, error)
    assert (found.output, found.text, found.reason) == (
        result.output,
        result.text,
        result.finish_reason,
    )
    assert found.logprobs == result.logprobs
    assert found.kept == toy_kept(session)
    assert found.statistics == result.statistics
    assert found.cycles == tuple(map(shape, result.cycles))


def test_every_pass_holds_all_that_are_under_way() -> None:
    """Three of eight tokens each, the third two passes late: ten passes, not twenty-four."""
    widths: list[int] = []

    class Watched(ToyModel):
        def forward(self, segments: Sequence[Segment]) -> list[Choices]:
            widths.append(len({id(segment.cache) for segment in segments}))
            return super().forward(segments)

    model = Watched(logits=lambda prefix: np.eye(VOCAB, dtype=np.float32)[3])
    members = [Member("ar", (1, i), GREEDY, 8, joins=2 * (i == 2)) for i in range(3)]
    outcomes(model, members, toy_session(model), toy_kept)
    assert widths == [2, 2, 3, 3, 3, 3, 3, 3, 1, 1]


def test_passes_tell_how_much_company_they_had() -> None:
    model = ToyModel()
    sequences = [model.sequence([1, 2, i], GREEDY) for i in range(3)]
    policies = [FixedPolicy(parse(p), model.config) for p in ("ar", "two-pass@4", "ar")]
    drafters = [p.drafters(s) for p, s in zip(policies, sequences, strict=True)]
    for sequence in sequences:
        drive(model, prefill(sequence))
    steps = [
        run_cycle(sequence, policy, made, 9)
        for sequence, policy, made in zip(sequences, policies, drafters, strict=True)
    ]
    wanted = [next(step) for step in steps]
    costs = [done.cost for done in run_together(model, wanted)]
    assert [(c.ar_rows, c.diffusion_rows, c.company) for c in costs] == [
        (1, 0, 6),
        (0, 5, 2),
        (1, 0, 6),
    ]
    assert [c.context for c in costs] == [3, 3, 3]
    assert len({c.seconds for c in costs}) == 1


def test_what_was_said_before_an_error_is_not_lost() -> None:
    """The error comes while the next pass is being prepared, after a cycle's text."""
    model = ToyModel(logits=lambda prefix: np.eye(VOCAB, dtype=np.float32)[len(prefix)])
    member = Member("ar", (1, 2), GREEDY, 9, breaks=5)
    other = Member("two-pass@3", (1, 2), GREEDY, 9)
    (broken,), (fine,) = outcomes(model, [member, other], toy_session(model), toy_kept)
    assert broken.pieces == ["c", "d", "e"]
    assert broken.error == "the grammar broke"
    assert fine.text == "cdefghijk"
    assert (fine.error, fine.reason) == ("", "length")


def test_a_pass_that_fails_can_be_run_again() -> None:
    """Nobody loses anything by it."""

    class Failing(ToyModel):
        fails = 0

        def forward(self, segments: Sequence[Segment]) -> list[Choices]:
            if self.fails:
                self.fails -= 1
                raise KeyboardInterrupt
            return super().forward(segments)

    texts = []
    for fails in (0, 3):
        model = Failing(half_right)
        together, tokenizer = Together(model), ToyTokenizer()
        generations = []
        for plan in ("ar", "fused@4x2"):
            made: Any = Session(model, tokenizer, 60)  # type: ignore[arg-type]
            member = Member(plan, (1, 2, 3), GREEDY, 12)
            generations.append(made.generate(member.request(made, member.prompt)))
            together.join(generations[-1])
        together.step()
        model.fails = fails
        while len(together):
            with suppress(KeyboardInterrupt):
                together.step()
            assert model.fails == 0 or len(together) == 2
        assert model.fails == 0
        texts.append([generation.result.output for generation in generations])
    assert texts[0] == texts[1]
    assert len(texts[0][0]) == 12


def test_a_session_has_one_generation_at_a_time() -> None:
    model = ToyModel()
    session = toy_session(model)(Member("ar", (1,), GREEDY, 5))
    member = Member("ar", (1, 2), GREEDY, 5)
    first, second = (session.generate(member.request(session, (1, 2))) for _ in range(2))
    together = Together(model)
    together.join(first)
    with pytest.raises(ValueError, match="another generation under way"):
        together.join(second)
    while len(together):
        together.step()
    together.join(second)
    while len(together):
        together.step()
    assert first.result.output == second.result.output


def test_prompts_take_turns_within_a_bound_and_answers_take_part_in_every_pass() -> None:
    """One answers; two prompts of 12 tokens come in pieces of 3, of which 4 rows are too few for
    both: they take turns."""
    rows: list[list[int]] = []
    alone: list[int] = []

    class Watched(ToyModel):
        def forward(self, segments: Sequence[Segment]) -> list[Choices]:
            rows.append([s.tokens[0] for s in segments if len(s) > 1])
            alone.append(len([s for s in segments if len(s) == 1]))
            return super().forward(segments)

    model = Watched(logits=lambda prefix: np.eye(VOCAB, dtype=np.float32)[3])
    together = Together(model)
    generations = []
    for first, prompt in enumerate([(1,), (2,) * 12, (3,) * 12]):
        member = Member("ar", prompt, GREEDY, 30, batch=3)
        session = toy_session(model)(member)
        generations.append(session.generate(member.request(session, prompt)))
        together.join(generations[-1])
        if not first:
            together.step()
    while any(generation.in_prompt for generation in generations):
        together.step(prompt_rows=3)
    assert rows == [[], *[[2], [3]] * 4]
    assert alone == [1] * 8 + [2]  # the first prompt has ended by then
    assert not generations[0].in_prompt


def test_the_rows_of_a_prompt_s_pass_may_change_on_the_way() -> None:
    model = ToyModel()
    member = Member("ar", (1,) * 20, GREEDY, 1, batch=3)
    session = toy_session(model)(member)
    seen: list[int] = []

    def progress(held: int) -> None:
        seen.append(held)
        session.prompt_batch = 7

    for _ in session.generate(member.request(session, member.prompt), on_progress=progress):
        pass
    assert seen == [3, 10, 17, 20]


# --- on models ---


@contextmanager
def opened(demo_file: Callable[..., Path], runtime: str) -> Iterator[tuple[Any, Any]]:
    torch.set_num_threads(1)
    settings = RuntimeSettings(RuntimeName(runtime), threads=1)
    with ModelFile.open(demo_file("f32")) as file:
        tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
        with closing(load_model(file, settings)) as model:
            yield model, tokenizer


def seeded(seed: int, **more: Any) -> SamplingSettings:
    return SamplingSettings(temperature=0.9, seed=seed, **more)


@pytest.mark.parametrize(
    "runtime", [pytest.param("reference", marks=pytest.mark.slow), "ggml", "cpu"]
)
def test_company_changes_nothing_on_models(
    runtime: str, demo_file: Callable[..., Path], golden: dict[str, Any]
) -> None:
    """Plans of all kinds, seeds and greedy, prompts in pieces; joining, ending and cancelled at
    different passes. And what each goes on to say, in a second turn, from the rows it kept."""
    prompts = [tuple(case["prompt_ids"]) for case in golden["cases"]]
    groups = [
        [
            Member("ar", prompts[1], GREEDY, 20, turns=2),
            Member("two-pass@7+tree=12", prompts[2], seeded(1), 24, joins=1, turns=2),
            Member("fused@5x3+lookup+tail", prompts[3], seeded(2, repeat_penalty=1.2), 24, joins=3),
            Member("auto", prompts[4], seeded(3), 16, joins=5),
        ],
        [
            Member("fused@15x4", prompts[5], GREEDY, 30, leaves=6),
            Member("two-pass@15", prompts[1], GREEDY, 24, joins=2, batch=7, top=2),
            Member(
                "two-pass@6+tree=20", prompts[5], GREEDY, 12, joins=4, breaks=len(prompts[5]) + 5
            ),
        ],
        [
            Member("ar+lookup", prompts[6], seeded(5), 16, turns=2),
            Member("fused@5x2+tail", prompts[6], seeded(5), 16, turns=2),
        ],
    ]
    with opened(demo_file, runtime) as (model, tokenizer):

        def session(member: Member) -> Session:
            return Session(model, tokenizer, 256, prompt_batch=member.batch)

        def kept(session: Session) -> tuple[int, list[int]]:
            return session._cache.length, list(session._held)

        for members in groups:
            together = outcomes(model, members, session, kept)
            for member, found in zip(members, together, strict=True):
                (alone,) = outcomes(model, [replace(member, joins=0)], session, kept)
                assert found == alone, member
        drafted = [outcome.statistics for outcome in (*together[0], *together[1])]
        assert any(s is not None and s.sources for s in drafted)


@pytest.mark.parametrize("runtime", ["reference", "ggml", "cpu"])
def test_rows_can_move_to_another_session(
    runtime: str, demo_file: Callable[..., Path], golden: dict[str, Any]
) -> None:
    """What a session goes on to say from rows of another one is what it says from its own."""
    prompt = tuple(golden["cases"][5]["prompt_ids"])
    member = Member("two-pass@7", prompt, seeded(3), 24)
    with opened(demo_file, runtime) as (model, tokenizer):
        first, second, alone = (Session(model, tokenizer, 200) for _ in range(3))
        for session in (first, alone):
            for _ in session.generate(member.request(session, prompt)):
                pass
        shared = len(prompt) - 5
        assert second.portable
        second.put(first.take(prompt[:shared]))
        assert list(second.held) == list(prompt[:shared])
        results = []
        for session in (second, alone):
            turn = (*prompt, 7, 9)
            generation = session.generate(member.request(session, turn))
            assert len(list(generation)) > 0
            results.append(generation.result)
        assert results[0].output == results[1].output
        assert results[0].statistics.cached_tokens == shared
        # Rows of another length, and more than there are.
        with pytest.raises(ValueError, match="rows"):
            second.put(first.take(first.held[:64])._replace(tokens=prompt[:32]))
        with pytest.raises(ValueError, match="rows"):
            first.take((0,) * (first.rows + 1))
        assert second.rows == len(second.held)
