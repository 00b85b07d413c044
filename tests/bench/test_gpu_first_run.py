"""The first run on a GPU, on stand-ins: whatever its stages do, there is a table at the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from orthrus_gguf.bench.gpu_first_run import MOST, STAGES, Outcome, Stage, summary, within
from orthrus_gguf.bench.gpu_processes import ROOT, Files, Made, Runner


def test_stages_that_raise_hang_and_print_garbage(tmp_path: Path) -> None:
    """The others run; what the broken ones had found is in the table. (All stages to their end:
    `test_every_stage`.)"""
    words = ["--cpu", "--folder", str(tmp_path)]
    words += ["--stages", "environment,profile,overlap", "--limits", "environment=20"]
    words += ["--inject", "environment=hang,profile=garbage,overlap=raise"]
    done = subprocess.run(
        [sys.executable, "-m", "orthrus_gguf.bench.gpu_first_run", *words],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    table = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert done.stdout.endswith("\n" + table)
    assert len(table) < MOST
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines() if "|" in line}
    assert "| ok |" in rows["profile"], rows["profile"]
    assert "| cut off after 20 s |" in rows["environment"]
    assert "| died |" in rows["overlap"]
    assert "RuntimeError: CUDA error: an illegal memory access was encountered" in rows["overlap"]
    assert "| 1 of 1 |" in rows["overlap"], "what it had found"
    assert "gaps between kernels" in table
    assert "\x00" in (tmp_path / "profile.log").read_text(encoding="utf-8", errors="replace")
    items = (tmp_path / "overlap.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in items] == ["check"]
    assert not (tmp_path / "hybrid.gguf").exists(), "no stage that runs needs it"


def test_files_are_made_one_after_another(tmp_path: Path) -> None:
    """A stage waits for its own; why one could not be made is said."""
    made = [
        Made(name, tmp_path / f"{name}.gguf", ("--synthetic", shape), "q8_0")
        for name, shape in (("wrong", "qwen3-9000b"), ("right", "qwen3.5-tiny-mtp"))
    ]
    files = Files(Runner(tmp_path, cpu=True), [], made)
    try:
        lacks = files.lacks("wrong", 100)
        assert lacks is not None
        assert lacks[0] == "no model"
        assert "--synthetic qwen3-9000b: expected one of" in lacks[1]
        early = files.lacks("right", 0)
        assert early is not None
        assert early[0] == "too late"
        assert files.lacks("right", 100) is None
        assert made[1].path.exists()
    finally:
        files.close()


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
    assert STAGES[-1].name == "hybrid", "the first one to be dropped"
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
