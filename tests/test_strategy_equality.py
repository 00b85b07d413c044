"""The promise of the project: the strategy never changes the text, byte for byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orthrus_gguf.decode import Plan, Strategy
from orthrus_gguf.engine import Request, Result, Session
from orthrus_gguf.model_file import ModelFile
from orthrus_gguf.runtime import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.tokenizer import load_tokenizer

AR = Plan(Strategy.AR, 0)

#: Seeds per prompt. With 12 greedy runs and 3 prompts, on three files: 216 and 108 pairs of prompt
#: and seed, each at two widths. The reference runtime is slow.
SEEDS = {"cpu": 20, "reference": 8}


@pytest.fixture(scope="module", params=["reference", "cpu"])
def runtime(request: pytest.FixtureRequest) -> str:
    torch.set_num_threads(1)
    return str(request.param)


@pytest.fixture(scope="module", params=["f32", "bf16", "q8_0"])
def session(
    request: pytest.FixtureRequest, runtime: str, demo_file: Callable[..., Path]
) -> Iterator[Session]:
    settings = RuntimeSettings(RuntimeName(runtime), threads=1)
    with ModelFile.open(demo_file(request.param)) as file:
        tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
        model = load_model(file, settings)
        yield Session(model, tokenizer, 256)
        model.close()


def run(session: Session, prompt: list[int], sampling: SamplingSettings, plan: Plan) -> Result:
    generation = session.generate(Request(tuple(prompt), sampling, plan, max_tokens=32))
    text = "".join(generation)
    assert text == generation.result.text
    return generation.result


def assert_same(session: Session, prompt: list[int], sampling: SamplingSettings, i: int) -> int:
    """AR against two widths, rotating through 1..16 with `i`; returns accepted drafts."""
    ar = run(session, prompt, sampling, AR)
    accepted = 0
    for width in (1 + i % 16, 16 - i % 16):
        two_pass = run(session, prompt, sampling, Plan(Strategy.TWO_PASS, width))
        assert two_pass.text == ar.text
        assert two_pass.output == ar.output
        assert two_pass.finish_reason == ar.finish_reason
        accepted += sum(cycle.accepted for cycle in two_pass.cycles)
    return accepted


def test_greedy(session: Session, golden: dict[str, Any]) -> None:
    """Every golden prompt."""
    accepted = [
        assert_same(session, case["prompt_ids"], SamplingSettings(temperature=0), i)
        for i, case in enumerate(golden["cases"])
    ]
    assert min(accepted) > 0, "drafts were used"


def test_sampled(session: Session, runtime: str, golden: dict[str, Any]) -> None:
    """Three prompts at T = 0.8, with llama.cpp's filters, with and without a penalty."""
    seeds = SEEDS[runtime]
    accepted = 0
    texts = set()
    for number in (1, 6, 10):
        for seed in range(seeds):
            sampling = SamplingSettings(
                temperature=0.8, seed=seed, repeat_penalty=1.0 if seed % 2 else 1.1
            )
            prompt = golden["cases"][number]["prompt_ids"]
            accepted += assert_same(session, prompt, sampling, number + seed)
            texts.add(run(session, prompt, sampling, AR).text)
    assert accepted > 3 * seeds, "sampled drafts are accepted too"
    assert len(texts) > 2 * seeds, "seeds matter"
