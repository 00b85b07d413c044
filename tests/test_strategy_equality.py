"""The promise of the project: the strategy never changes the text, byte for byte."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.drafting.cycle import Pass
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy, Plan, Strategy
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.engine import Session
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.request import Request, Result
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.tokenizer import load_tokenizer

#: Seeds per prompt, three prompts, beside 12 greedy runs, on each file: every pair of prompt and
#: seed with four plans beside plain decoding (the reference runtime: three seeds). The long test
#: takes 1,350 pairs on either runtime.
SEEDS = 3
LONG_SEEDS = range(100, 175)

#: Runtime and type of the file; and those of the long test.
PAIRS = [
    ("reference", "f32"),
    ("ggml", "f32"),
    ("ggml", "q4_k_m"),
    ("cpu", "f32"),
    ("cpu", "q8_0"),
    ("cpu", "q4_k_m"),
]
LONG_PAIRS = [
    (runtime, kind)
    for runtime in ("ggml", "cpu")
    for kind in ("f32", "q8_0", "q4_k_m", "bf16", "q6_k", "q4_0")
]


class Costs:
    """Costs that change from pass to pass, so that the controller tries everything."""

    drafter = 0.0

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return 1e-3 * (1 + self._rng.choice([0.0, 0.03, 0.3]) * (ar_rows + diffusion_rows))

    def observe(self, done: Pass, times: int = 1) -> None:
        pass


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def session(request: pytest.FixtureRequest, demo_file: Callable[..., Path]) -> Iterator[Session]:
    runtime, kind = request.param
    with open_session(runtime, kind, demo_file) as session:
        yield session


@contextmanager
def open_session(runtime: str, kind: str, demo_file: Callable[..., Path]) -> Iterator[Session]:
    torch.set_num_threads(1)
    settings = RuntimeSettings(RuntimeName(runtime), threads=1)
    with ModelFile.open(demo_file(kind)) as file:
        tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
        model = load_model(file, settings)
        yield Session(model, tokenizer, 256)
        model.close()


def run(
    session: Session, prompt: list[int], sampling: SamplingSettings, plan: Plan | Policy
) -> Result:
    policy = FixedPolicy(plan, session.model.config) if isinstance(plan, Plan) else plan
    generation = session.generate(Request(tuple(prompt), sampling, policy, max_tokens=32))
    text = "".join(generation)
    assert text == generation.result.text
    return generation.result


def plans(session: Session, i: int) -> list[Plan | Policy]:
    """Four plans, every setting of which goes round with `i`."""
    block = session.model.config.block_size
    width, other, lookup = 1 + i % 16, 16 - i % 16, ("lookup",)
    return [
        Plan(Strategy.TWO_PASS, width, also=lookup if i % 5 == 0 else (), cut=0.05 * (i % 4)),
        Plan(Strategy.TWO_PASS, other, tail=i % 2 == 0, tree=(0, 6, 20)[i % 3]),
        Plan(Strategy.FUSED, other, 1 + i % 4, lookup if i % 2 else (), tail=i % 3 == 0),
        Controller(Costs(i), block, without=lookup if i % 2 else ()),
    ]


def assert_same(session: Session, prompt: list[int], sampling: SamplingSettings, i: int) -> int:
    """Plain decoding against the plans of `i`; returns accepted drafts."""
    ar = run(session, prompt, sampling, PLAIN)
    accepted = 0
    for plan in plans(session, i):
        other = run(session, prompt, sampling, plan)
        assert other.text == ar.text, plan
        assert other.output == ar.output, plan
        assert other.finish_reason == ar.finish_reason, plan
        accepted += sum(cycle.accepted for cycle in other.cycles)
    return accepted


def seeded(seed: int) -> SamplingSettings:
    """T = 0.8 with llama.cpp's filters, with and without a penalty."""
    return SamplingSettings(temperature=0.8, seed=seed, repeat_penalty=1.0 if seed % 2 else 1.1)


def test_greedy(session: Session, golden: dict[str, Any]) -> None:
    """Every golden prompt."""
    accepted = [
        assert_same(session, case["prompt_ids"], SamplingSettings(temperature=0), i)
        for i, case in enumerate(golden["cases"])
    ]
    assert min(accepted) > 0, "drafts were used"


def test_sampled(session: Session, golden: dict[str, Any]) -> None:
    accepted = 0
    texts = set()
    seeds = 1 if session.model.description.startswith("reference") else SEEDS  # it is slow
    for number in (1, 6, 10):
        for seed in range(seeds):
            prompt = golden["cases"][number]["prompt_ids"]
            accepted += assert_same(session, prompt, seeded(seed), number + seed)
            texts.add(run(session, prompt, seeded(seed), PLAIN).text)
    assert accepted > 6 * seeds, "sampled drafts are accepted too"
    assert len(texts) > 2 * seeds, "seeds matter"


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "kind"), LONG_PAIRS)
def test_sampled_at_length(
    runtime: str, kind: str, demo_file: Callable[..., Path], golden: dict[str, Any]
) -> None:
    with open_session(runtime, kind, demo_file) as session:
        for number in (0, 4, 8):
            prompt = golden["cases"][number]["prompt_ids"]
            for seed in LONG_SEEDS:
                assert_same(session, prompt, seeded(seed), number + seed)
