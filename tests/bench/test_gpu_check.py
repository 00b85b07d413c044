"""`python -m orthrus_gguf.bench.gpu_check --cpu`: its logic, and that it can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from cuda_models import remembered_weights

from orthrus_gguf.bench.gpu_check import main
from orthrus_gguf.runtime.cuda.runner import PassRunner

DemoFile = Callable[..., Path]
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tiny-orthrus-stdlib.json"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(folder: Path, demo: Path, *models: Path) -> int:
    flags = ["--cpu", "--pairs", "3", "--golden", str(GOLDEN), "--folder", str(folder)]
    with remembered_weights():
        return main([*flags, "--demo", str(demo), *map(str, models)])


def test_all_holds_and_nothing_is_called_measured(tmp_path: Path, demo_file: DemoFile) -> None:
    assert run(tmp_path, demo_file("f16"), demo_file("q8_0")) == 0
    table = (tmp_path / "runtime_check.md").read_text()
    assert table.count("| ok |") == 14
    rows = [line for line in table.splitlines() if line.startswith("| Tiny Orthrus Stdlib")]
    assert any("tree of 8 rows" in row for row in rows)
    assert any("four sequences of one row" in row for row in rows)
    assert any("draft pass of 16 rows" in row for row in rows)
    assert all("| – |" in row and "not measured" in row for row in rows)
    assert json.loads((tmp_path / "runtime_check.json").read_text())["figures"] == []


def test_a_failed_check_stops_the_figures(
    tmp_path: Path,
    demo_file: DemoFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    product = PassRunner.product

    def leaky(self: Any, x: Any, weights: Any, out: Any) -> None:
        product(self, x, weights, out)
        out *= 1 + 1e-4 * out.shape[1]

    monkeypatch.setattr(PassRunner, "product", leaky)
    assert run(tmp_path, demo_file("f16"), demo_file("q8_0")) == 1
    table = (tmp_path / "runtime_check.md").read_text()
    assert "rows bit for bit, f16 cache | **FAILED** | | row 0 (by 1)" in table
    assert "Tiny" not in table
    assert "a check failed, so nothing was timed" in capsys.readouterr().err
