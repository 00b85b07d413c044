"""Sessions on the CUDA runtime (stand-ins): alone and side by side, by every kind of policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from cuda_models import FakeGraphs, stand_in

from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.drafting.cycle import Pass
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.engine import Generation, Session
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.request import Request, Result
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.tokenizer import load_tokenizer
from orthrus_gguf.together import Together

PLANS = [
    "two-pass@5",
    "fused@5x2",
    "ar+lookup",
    "two-pass@5+tail",
    "fused@5x2+cut=0.1",
    "two-pass@6+tree=10",
]


class CheapRows:
    """Passes of 10 s, longer than they take here, whose rows cost next to nothing, as on a GPU."""

    drafter = 0.0

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return 10 * (1 + 0.01 * (ar_rows + diffusion_rows))

    def observe(self, done: Pass, times: int = 1) -> None:
        pass


@pytest.fixture(scope="module")
def make_session(demo_file: Callable[..., Path]) -> Iterator[Callable[[], Session]]:
    torch.set_num_threads(1)
    path = demo_file("f16")
    with ModelFile.open(path) as file, stand_in(path, capture=FakeGraphs()) as model:
        tokenizer = load_tokenizer(file.metadata, path=path, n_vocab=file.config.n_vocab)
        yield lambda: Session(model, tokenizer, 128)


@pytest.fixture(scope="module")
def session(make_session: Callable[[], Session]) -> Session:
    return make_session()


def request(
    session: Session, prompt: list[int], seed: int | None, plan: str, most: int = 24
) -> Request:
    policy: Policy
    if plan == "auto":
        policy = Controller(CheapRows(), session.model.config.block_size)
    else:
        policy = FixedPolicy(parse(plan), session.model.config)
    sampling = SamplingSettings(temperature=0 if seed is None else 0.8, seed=seed or 0)
    return Request(tuple(prompt), sampling, policy, max_tokens=most)


def run(session: Session, asked: Request) -> Result:
    generation = session.generate(asked)
    assert "".join(generation) == generation.result.text
    return generation.result


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("plan", [*PLANS, "auto"])
def test_the_text_is_that_of_plain_decoding(
    session: Session, golden: dict[str, Any], plan: str, seed: int | None
) -> None:
    for case in golden["cases"][1:3]:
        ar = run(session, request(session, case["prompt_ids"], seed, "ar"))
        other = run(session, request(session, case["prompt_ids"], seed, plan))
        assert (other.text, other.output) == (ar.text, ar.output)


def test_the_controller_drafts(session: Session, golden: dict[str, Any]) -> None:
    cycles = [
        cycle
        for case in golden["cases"][:3]
        for cycle in run(session, request(session, case["prompt_ids"], None, "auto")).cycles
    ]
    assert sum(cycle.accepted for cycle in cycles) > 20


def test_every_strategy_leaves_the_same_rows_behind(
    session: Session, golden: dict[str, Any]
) -> None:
    """Prompts of many rows are not row-invariant here, so they must be cut at the same places."""
    lengths = set()
    for plan in ("ar", "two-pass@7", "fused@7x2"):
        run(session, request(session, golden["cases"][4]["prompt_ids"], None, plan))
        lengths.add(session._cache.length)
    assert len(lengths) == 1


def test_conversations_side_by_side(
    make_session: Callable[[], Session], session: Session, golden: dict[str, Any]
) -> None:
    """One pass serves them all: each says what it says alone, by its own plan and sampling, whoever
    joins or leaves."""
    cases = golden["cases"]
    asked = [
        (cases[number]["prompt_ids"], seed, plan, most)
        for number, (seed, plan, most) in enumerate(
            [(None, "two-pass@6", 20), (5, "fused@5x2", 30), (None, "two-pass@6+tree=10", 12),
             (7, "ar", 25), (None, "ar+lookup", 16)]
        )
    ]  # fmt: skip
    alone = [run(session, request(session, *one)) for one in asked]
    sessions = [make_session() for _ in asked]
    generations: list[Generation] = [
        own.generate(request(own, *one)) for own, one in zip(sessions, asked, strict=True)
    ]
    together = Together(session.model)
    waiting = list(generations)
    texts: dict[int, str] = {}
    while waiting or len(together):
        if waiting:
            together.join(waiting.pop(0))
        for generation, piece in together.step():
            texts[id(generation)] = texts.get(id(generation), "") + piece.text
    for generation, expected in zip(generations, alone, strict=True):
        assert generation.error is None
        found = generation.result
        assert (found.text, found.output) == (expected.text, expected.output)
        assert texts[id(generation)] == expected.text
        assert [cycle.drafts for cycle in found.cycles] == [c.drafts for c in expected.cycles]
        assert [cycle.accepted for cycle in found.cycles] == [c.accepted for c in expected.cycles]
