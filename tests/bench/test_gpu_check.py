"""Checks and figures of the runtime, on stand-ins: that they hold, and that they can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from cuda_models import remembered_weights
from orthrus_kernels.tools.gpu_check_report import Check

from orthrus_gguf.bench.gpu_checks import SMALL, checks
from orthrus_gguf.bench.gpu_figures import figures
from orthrus_gguf.bench.gpu_stage import GOLDEN
from orthrus_gguf.runtime.cuda.runner import PassRunner

DemoFile = Callable[..., Path]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def check(demo: Path, *kinds: str) -> list[Check]:
    with remembered_weights():
        return list(checks(demo, json.loads(GOLDEN.read_text()), "cpu", SMALL, kinds))


def test_all_holds(demo_file: DemoFile) -> None:
    found = check(demo_file("f16"), "f16", "q4_0")
    assert len(found) == 2 + 2 * 4
    assert [one for one in found if not one.passed] == []


def test_figures_of_every_kind_of_pass(demo_file: DemoFile) -> None:
    with remembered_weights():
        names = " ".join(figure.name for figure in figures(demo_file("q8_0"), "cpu", None))
    for words in ("AR generation", "dense", "tree of 8 rows", "four sequences of one row",
                  "draft pass of 16 rows", "peak memory"):  # fmt: skip
        assert words in names


def test_a_leak_between_rows_is_found(demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch) -> None:
    product = PassRunner.product

    def leaky(self: Any, x: Any, weights: Any, out: Any) -> None:
        product(self, x, weights, out)
        out *= 1 + 1e-4 * out.shape[1]

    monkeypatch.setattr(PassRunner, "product", leaky)
    found = {one.name: one for one in check(demo_file("f16"), "f16")}
    rows = found["rows bit for bit, f16 cache"]
    assert not rows.passed
    assert rows.detail.startswith("row 0 (by 1)")
