"""orthrus-bench: every test asked for is there, in every format, and the figures fit."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from toy_model import ToyModel

from orthrus_gguf.bench.benchmark import BenchmarkSettings, Measurement, run_benchmark
from orthrus_gguf.cli.bench import main
from orthrus_gguf.errors import OrthrusError

FLAGS = ("-t", "1", "-p", "8", "-n", "4", "--rows", "1,3", "-d", "5", "-r", "2")
TESTS = ["pp8", "tg4", "ar 1", "ar 3", "diffusion 1", "diffusion 3"]


@pytest.fixture
def shapes(demo_file: Callable[..., Path]) -> list[tuple[int, ...]]:
    """Of all tensors of the model, counted by the gguf package."""
    return [tuple(map(int, t.shape)) for t in GGUFReader(demo_file("f16")).tensors]


@pytest.fixture
def output(
    demo_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Callable[[str], str]:
    model = str(demo_file("f16"))

    def call(kind: str) -> str:
        capsys.readouterr()
        assert main([model, *FLAGS, "-o", kind]) == 0
        return capsys.readouterr().out

    return call


def test_formats(output: Callable[[str], str], shapes: list[tuple[int, ...]]) -> None:
    report = json.loads(output("json"))
    assert [t["test"] for t in report["tests"]] == TESTS
    assert report["repetitions"] == 2
    assert report["peak_memory_bytes"] > 20e6
    assert {"cpu", "system", "python", "orthrus-gguf", "runtime", "model"} <= set(report)
    for test in report["tests"]:
        rows = int(test["test"].split()[-1].lstrip("ptg"))
        assert test["tokens_per_second"] == pytest.approx(rows / test["ms"] * 1e3)
        is_pass = " " in test["test"]
        assert min(test["avg_ts"], test["stddev_ts"]) > 0
        assert (test["ratio"] is not None) == is_pass
        if test["test"].endswith(" 1"):
            assert test["ratio"] == 1

    table = csv.DictReader(io.StringIO(output("csv")))
    assert [row["test"] for row in table] == TESTS
    lines = output("md").splitlines()
    assert lines[3] == "| model | size | params | backend | threads | test | t/s |"
    speeds = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[5:7]]
    params = sum(math.prod(shape) for shape in shapes)
    size = sum(math.prod(shape) * (4 if len(shape) == 1 else 2) for shape in shapes)
    head = ["Tiny Orthrus Stdlib", f"{size / 2**20:.2f} MiB", f"{params / 1e6:.2f} M", "cpu", "1"]
    assert [row[:5] for row in speeds] == [head] * 2
    assert [row[5] for row in speeds] == ["pp8 @ d5", "tg4 @ d5"]
    for row in speeds:
        assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[6])
    assert [line.split("|")[1].strip() for line in lines[10:]] == TESTS[2:]


def test_figures_of_a_measurement() -> None:
    assert Measurement("tg8", 8, (2.0, 4.0, 1.0)).average == pytest.approx((14 / 3, 3.0550504))
    assert Measurement("tg8", 8, (2.0,)).average == (4, 0)
    m = Measurement("pp10", 10, (0.2, 0.1, 0.4))
    assert (m.median, m.per_second) == (0.2, 50)
    assert m.spread == pytest.approx(0.75)


def test_a_model_without_heads_has_no_diffusion_tests() -> None:
    settings = BenchmarkSettings(4, 0, (2,), depth=0, repetitions=1, batch=8)
    tests = [m.test for m in run_benchmark(ToyModel(heads=False), settings)]
    assert tests == ["pp4", "ar 2"]


def test_the_cache_is_as_deep_as_asked_before_every_test() -> None:
    model, seen = ToyModel(), []
    forward = model.forward

    def spy(segments):  # type: ignore[no-untyped-def]
        seen.append((segments[0].start, len(segments[0])))
        return forward(segments)

    model.forward = spy  # type: ignore[method-assign]
    list(run_benchmark(model, BenchmarkSettings(0, 0, (3,), depth=7, repetitions=2, batch=4)))
    assert seen == [(0, 4), (4, 3)] + [(7, 3)] * 6


def test_tests_beyond_the_context_are_refused() -> None:
    settings = BenchmarkSettings(256, 0, (), depth=0, repetitions=1, batch=8)
    with pytest.raises(OrthrusError, match="need 257 tokens of context, toy has 256"):
        list(run_benchmark(ToyModel(), settings))
