"""The first run on a GPU, on stand-ins: whatever its stages do, there is a table at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from orthrus_gguf.bench.gpu_first_run import MOST, ROOT, STAGES, Outcome, Stage, summary, within


def test_stages_that_raise_hang_and_print_garbage(tmp_path: Path) -> None:
    """The others run; what the broken ones had found is in the table."""
    words = ["--cpu", "--folder", str(tmp_path)]
    words += ["--stages", "environment,generation,contexts,profile,tiles,sanitizer"]
    words += ["--inject", "contexts=hang,profile=garbage,tiles=raise", "--limits", "contexts=25"]
    done = subprocess.run(
        [sys.executable, "-m", "orthrus_gguf.bench.gpu_first_run", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    table = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert done.stdout.endswith("\n" + table)
    assert len(table) < MOST
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if "|" in line}
    for name in ("environment", "generation", "profile", "sanitizer"):
        assert "| ok |" in rows[name], rows[name]
    assert "| cut off after 25 s |" in rows["contexts"]
    assert "| died |" in rows["tiles"]
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in rows["tiles"]
    for figure in ("AR generation", "gaps between kernels", "tuned Q4_K"):
        assert figure in table
    assert "\x00" in (tmp_path / "profile.log").read_text(encoding="utf-8", errors="replace")
    items = (tmp_path / "generation.jsonl").read_text().splitlines()
    assert all(json.loads(line)["kind"] in ("check", "figure") for line in items)


@pytest.mark.slow
def test_every_stage(tmp_path: Path) -> None:
    """All of them, of which one hangs and one raises."""
    words = ["--cpu", "--folder", str(tmp_path), "--inject", "contexts=hang,tiles=raise"]
    words += [
        "--limits",
        ",".join(f"{s.name}={25 if s.name == 'contexts' else 1200}" for s in STAGES),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "orthrus_gguf.bench.gpu_first_run", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    rows = {line.split(" | ")[0].strip("| "): line for line in done.stdout.splitlines()}
    for stage in STAGES:
        ends = {"contexts": "cut off after 25 s", "tiles": "died"}.get(stage.name, "ok")
        assert f"| {ends} |" in rows[stage.name], rows[stage.name]


def test_a_budget_drops_the_last_stages() -> None:
    assert within(STAGES, None) == list(STAGES)
    kept = within(STAGES, 600)
    assert kept == list(STAGES[: len(kept)])
    assert [stage.name for stage in kept][-1] == "checks"
    assert sum(stage.seconds for stage in kept) <= 600
    assert within(STAGES, 10) == []


def test_nothing_is_lost_when_there_is_no_time(tmp_path: Path) -> None:
    words = ["--cpu", "--budget", "1", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "orthrus_gguf.bench.gpu_first_run", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.count("| dropped |") == len(STAGES)


def test_the_summary_is_short_whatever_there_is() -> None:
    figures = [{"name": f"figure {n}", "value": n, "unit": "ms"} for n in range(3000)]
    failed = {"name": "rows", "passed": False, "detail": "x" * 5000}
    outcome = Outcome(Stage("environment", 1), "FAILED", 1.0, [failed, *figures])
    text = summary([outcome], 1.0)
    assert len(text) < MOST
    assert "**environment FAILED** rows: xxx" in text
    assert "more figures are in the .jsonl files" in text
