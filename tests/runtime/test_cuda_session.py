"""Sessions on the CUDA runtime (stand-ins): they decode on the device where the plan allows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from cuda_models import stand_in

import orthrus_gguf.engine
from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.decode import decode
from orthrus_gguf.drafting.policy import Pass, Plan, Policy, Strategy
from orthrus_gguf.engine import Request, Result, Session
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.tokenizer import load_tokenizer

AR = Plan(Strategy.AR, 0)
ON_DEVICE = [Plan(Strategy.TWO_PASS, 5), Plan(Strategy.FUSED, 5, 2), "auto"]
ON_HOST = [
    Plan(Strategy.AR, 0, lookup=True),
    Plan(Strategy.TWO_PASS, 5, tail=True),
    Plan(Strategy.FUSED, 5, 2, cut=0.1),
]


class CheapRows:
    """Passes of 10 s, longer than they take here, whose rows cost next to nothing, as on a GPU."""

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return 10 * (1 + 0.01 * (ar_rows + diffusion_rows))

    def observe(self, done: Pass) -> None:
        pass


@pytest.fixture(scope="module")
def session(demo_file: Callable[..., Path]) -> Iterator[Session]:
    torch.set_num_threads(1)
    path = demo_file("f16")
    with ModelFile.open(path) as file, stand_in(path) as model:
        tokenizer = load_tokenizer(file.metadata, path=path, n_vocab=file.config.n_vocab)
        yield Session(model, tokenizer, 128)


@pytest.fixture
def host_cycles(monkeypatch: pytest.MonkeyPatch) -> list[Plan | Policy]:
    """Plans that were decoded from the host."""
    plans: list[Plan | Policy] = []
    real = decode

    def counting(*args: Any) -> Any:
        plans.append(args[4])
        return real(*args)

    monkeypatch.setattr(orthrus_gguf.engine, "decode", counting)
    return plans


def run(session: Session, prompt: list[int], seed: int | None, plan: Plan | Policy) -> Result:
    sampling = SamplingSettings(temperature=0 if seed is None else 0.8, seed=seed or 0)
    generation = session.generate(Request(tuple(prompt), sampling, plan, max_tokens=24))
    assert "".join(generation) == generation.result.text
    return generation.result


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("plan", [*ON_DEVICE, *ON_HOST], ids=str)
def test_the_text_is_that_of_plain_decoding(
    session: Session,
    golden: dict[str, Any],
    host_cycles: list[Plan | Policy],
    plan: Plan | str,
    seed: int | None,
) -> None:
    block = session.model.config.block_size
    chosen: Plan | Policy = plan if isinstance(plan, Plan) else Controller(CheapRows(), block)
    for case in golden["cases"][1:3]:
        ar = run(session, case["prompt_ids"], seed, AR)
        other = run(session, case["prompt_ids"], seed, chosen)
        assert (other.text, other.output) == (ar.text, ar.output)
    assert sum(cycle.accepted for cycle in other.cycles) > 0 or not isinstance(plan, Plan)
    assert bool(host_cycles) == (plan in ON_HOST)


def test_the_controller_drafts_on_the_device(session: Session, golden: dict[str, Any]) -> None:
    controller = Controller(CheapRows(), session.model.config.block_size)
    cycles = [
        cycle
        for case in golden["cases"][:3]
        for cycle in run(session, case["prompt_ids"], None, controller).cycles
    ]
    assert sum(cycle.accepted for cycle in cycles) > 20
    assert any(phase.outlook.plan.strategy is not Strategy.AR for phase in controller.phases)


def test_every_strategy_leaves_the_same_rows_behind(
    session: Session, golden: dict[str, Any]
) -> None:
    """Prompts of many rows are not row-invariant here, so they must be cut at the same places."""
    lengths = set()
    for plan in (AR, Plan(Strategy.TWO_PASS, 7), Plan(Strategy.FUSED, 7, 2)):
        run(session, golden["cases"][4]["prompt_ids"], None, plan)
        lengths.add(session._cache.length)
    assert len(lengths) == 1
