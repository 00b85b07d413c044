"""Passes as graphs: captured once per shape, replayed for anything of that shape.

Stand-ins and a graph that runs again what it recorded, so that whatever a step remembers of its own
pass would show as a wrong result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from cuda_models import FakeGraphs, filled, generate, stand_in

from orthrus_gguf.runtime.cuda import model as model_module
from orthrus_gguf.runtime.cuda.device import Machine
from orthrus_gguf.runtime.cuda.graphs import Graphs, capture_for
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import Draw, Segment, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

MASK = 4095
GREEDY = Sampler(SamplingSettings(temperature=0))
TREE = (-1, 0, 0, 1, 2, 2)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def graphs() -> FakeGraphs:
    return FakeGraphs()


@pytest.fixture
def model(demo_file: Callable[..., Path], graphs: FakeGraphs) -> Iterator[CudaModel]:
    with stand_in(demo_file("f16"), capture=graphs) as model:
        yield model


def kinds(model: CudaModel, seed: int) -> dict[str, list[Segment]]:
    """A pass of every kind, on caches of its own; other numbers for another seed."""
    rng = np.random.default_rng(seed)

    def ids(count: int) -> list[int]:
        return [int(token) for token in rng.integers(0, 4000, count)]

    def caches(count: int) -> list[tuple[Any, list[int]]]:
        texts = [ids(3 + seed + number) for number in range(count)]
        return [(filled(model, text[:-1], 64 + 16 * seed), text) for text in texts]

    def chain(cache: Any, text: list[int], more: list[int], draw: Draw) -> Segment:
        return ar_segment(cache, [text[-1], *more], len(text) - 1, draw=draw)

    (a, one), (b, two), (c, three) = caches(3)
    sampled = Sampler(SamplingSettings(seed=seed, temperature=0.7 + 0.1 * seed))
    start = len(one) - 1
    block = Draw(GREEDY, one, detail=True)
    blocks = [
        diffusion_segment(a, one[-1], MASK, 5, start + i, draw=replace(block, ahead=(7,) * i))
        for i in range(2)
    ]
    return {
        "one AR row": [chain(a, one, [], Draw(GREEDY, one))],
        "AR rows": [chain(a, one, ids(4), Draw(GREEDY, one))],
        "sampled AR rows": [chain(a, one, ids(4), Draw(sampled, one))],
        "penalties": [
            chain(a, one, ids(2), Draw(Sampler(SamplingSettings(repeat_penalty=1.2)), one))
        ],
        "log-probabilities": [chain(a, one, ids(2), Draw(GREEDY, one, top=4))],
        "a mask": [
            chain(a, one, ids(1), Draw(GREEDY, one, allowed=np.full((2, 128), 77, np.uint32)))
        ],
        "a draft": [blocks[0]],
        "verification and blocks": [chain(a, one, ids(3), Draw(GREEDY, one)), *blocks],
        "a tree": [ar_segment(b, ids(6), len(two) - 1, parents=TREE, draw=Draw(GREEDY, two))],
        "several sequences": [
            chain(a, one, ids(2), Draw(GREEDY, one)),
            chain(c, three, ids(1), Draw(sampled, three)),
            ar_segment(b, ids(6), len(two) - 1, parents=TREE, draw=Draw(GREEDY, two)),
            blocks[0],
        ],
        "taps": [replace(chain(a, one, ids(4), Draw(GREEDY, one)), taps=(0, 3, 4, 5))],
    }


def told(model: CudaModel, segments: list[Segment]) -> list[Any]:
    found: list[Any] = []
    for choices in model.forward(segments):
        found.append([c and (c.token, c.second, repr(c.probability), c.logprobs) for c in choices])
        found.append(None if choices.taps is None else choices.taps.tobytes())
    return found


def test_every_kind_of_pass_is_captured_once(
    demo_file: Callable[..., Path], model: CudaModel, graphs: FakeGraphs
) -> None:
    """First plainly, then captured, then replayed with other caches, tokens and settings; and the
    results are those of passes without graphs."""
    names = list(kinds(model, 0))
    captured = model.graphs.captured
    assert captured <= 1, "the prompts have been made once each"
    with stand_in(demo_file("f16")) as plain:
        for seed in range(4):
            ours, theirs = kinds(model, seed), kinds(plain, seed)
            recorded = graphs.recorded
            for name in names:
                assert told(model, ours[name]) == told(plain, theirs[name]), (name, seed)
            if seed == 1:
                assert graphs.recorded - recorded == len(names), "one graph a kind"
            if seed > 1:
                assert graphs.recorded == recorded, "no kind needs a second one"
    assert graphs.replays >= 3 * len(names)


@pytest.mark.parametrize("plan", ["ar", "two-pass@7", "fused@7x2", "two-pass@8+tree=9"])
def test_whole_texts_through_graphs(
    demo_file: Callable[..., Path],
    model: CudaModel,
    graphs: FakeGraphs,
    golden: dict[str, Any],
    plan: str,
) -> None:
    """The second generation captures what the first has seen; the third, on yet another cache,
    runs through graphs alone."""
    case = golden["cases"][1]
    prompt, n = case["prompt_ids"], 40
    recorded = []
    for _ in range(3):
        output, cycles = generate(model, prompt, GREEDY.settings, plan, n)
        assert output == case["output_ids"][:n]
        assert sum(cycle.accepted for cycle in cycles) > 0 or plan == "ar"
        recorded.append(graphs.recorded)
    assert recorded[1] == recorded[2]
    assert recorded[2] <= (3 if plan == "ar" else 16)
    assert graphs.replays > 20


def test_the_shapes_of_longest_ago_are_dropped(
    model: CudaModel, graphs: FakeGraphs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "SHAPES", 2)
    expected: dict[int, list[int]] = {}
    for turn in range(4):
        for rows in (1, 2, 4):
            cache = model.new_cache(16)
            (choices,) = model.forward([ar_segment(cache, range(rows), 0, draw=Draw(GREEDY, [0]))])
            tokens = [choice.token for choice in choices if choice is not None]
            assert expected.setdefault(rows, tokens) == tokens, turn
    assert len(model._tables) == 2
    assert graphs.recorded == 0, "none is seen twice in a row before it is dropped"
    assert model.graphs.captured == 0


def test_the_end_of_a_model_frees_graphs_and_tables(
    demo_file: Callable[..., Path], graphs: FakeGraphs
) -> None:
    with stand_in(demo_file("f16"), capture=graphs) as model:
        for _ in range(3):
            filled(model, [1, 2], 8)
        assert model.graphs.captured == 1
    assert model.graphs.captured == 0
    assert not model._tables


# --- the graphs themselves ---


def test_an_interrupted_first_run_is_no_first_run() -> None:
    """Else the next one would capture what has not been compiled."""
    captured: list[str] = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        captured.append("captured")
        return step

    graphs = Graphs(capture)
    runs: list[int] = []

    def step() -> None:
        runs.append(len(runs))
        if len(runs) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        graphs.run("key", step)
    graphs.run("key", step)
    assert not captured
    graphs.run("key", step)
    assert captured == ["captured"]
    assert len(runs) == 3
    graphs.drop("key")
    graphs.run("key", step)
    assert captured == ["captured"], "a dropped key begins anew"


def test_what_cannot_be_captured_runs_plainly(caplog: pytest.LogCaptureFixture) -> None:
    class CompilationError(Exception):
        """As triton's: no RuntimeError."""

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        raise CompilationError("at 12:3:\nno such thing")

    graphs, runs = Graphs(capture), []
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            graphs.run("key", lambda: runs.append(1))
    assert len(runs) == 4
    assert (graphs.captured, graphs.failed) == (0, 1)
    (record,) = caplog.records
    assert "no CUDA graph for key, it runs launch by launch: at 12:3:" in record.message


def test_nothing_is_captured_on_the_cpu(model: CudaModel) -> None:
    machine: Machine = model.machine
    assert capture_for(machine) is None
