"""gpu_check's logic, in the interpreter; and what it does when checks fail or time runs out."""

from __future__ import annotations

import json
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from orthrus_kernels.tools import gpu_check
from orthrus_kernels.tools.gpu_check import STAGES, Stage
from orthrus_kernels.tools.gpu_check_report import Check, Figure, Item, Machine


def test_every_stage_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--cpu", "--folder", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "gpu_check.json").read_text())
    assert all(check["passed"] for check in data["checks"])
    names = " ".join(item["name"] for item in data["checks"] + data["figures"])
    for text in ("rows bit for bit", "head of", "attention q8_0", "sampling", "moved columns",
                 "packing", "pass, 1 rows", "tuned Q4_K"):  # fmt: skip
        assert text in names
    table = (tmp_path / "gpu_check.md").read_text()
    assert table in capsys.readouterr().out
    assert "no time in this table means anything" in table


def stages(monkeypatch: pytest.MonkeyPatch, *functions: tuple[str, bool, float]) -> None:
    """Replace the stages by functions of a module made here: (name, figures, stop)."""

    def good(machine: Machine) -> Iterator[Item]:
        yield Check("good", True)

    def bad(machine: Machine) -> Iterator[Item]:
        yield Check("bad", False, "by a bit")

    def broken(machine: Machine) -> Iterator[Item]:
        raise ArithmeticError("device lost")
        yield Check("never", True)

    def slow(machine: Machine) -> Iterator[Item]:
        for number in range(1000):
            time.sleep(0.01)
            yield Figure(f"number {number}", number, "ms")

    module = types.ModuleType("orthrus_kernels.tools.made_here")
    for function in (good, bad, broken, slow):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    made = tuple(Stage(name, "made_here", name, stop, figures) for name, figures, stop in functions)
    monkeypatch.setattr(gpu_check, "STAGES", made)


def run(folder: Path, minutes: str = "1") -> tuple[int, dict[str, list[dict[str, str]]]]:
    code = gpu_check.main(["--cpu", "--folder", str(folder), "--minutes", minutes])
    return code, json.loads((folder / "gpu_check.json").read_text())


def test_nothing_is_timed_after_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages(monkeypatch, ("bad", False, 0.5), ("slow", True, 0.9), ("good", False, 1.0))
    code, data = run(tmp_path)
    assert code == 1
    assert [check["name"] for check in data["checks"]] == ["bad", "good"]
    assert data["figures"] == []
    assert "**FAILED**" in (tmp_path / "gpu_check.md").read_text()


def test_an_exception_is_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages(monkeypatch, ("broken", False, 0.5), ("good", False, 1.0))
    code, data = run(tmp_path)
    assert code == 1
    assert data["checks"][0]["detail"] == "ArithmeticError: device lost"
    assert data["checks"][1]["passed"]


def test_time_that_is_up_leaves_what_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stages(monkeypatch, ("good", False, 0.1), ("slow", True, 0.5), ("good", False, 1.0))
    code, data = run(tmp_path, minutes="0.005")
    assert code == 0
    assert 0 < len(data["figures"]) < 100
    assert "cut off" in (tmp_path / "gpu_check.md").read_text()
    assert len(data["checks"]) == 2


def test_an_item_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The alarm comes ten seconds after the time; here it comes at once."""
    stages(monkeypatch, ("good", False, 0.1), ("slow", True, 1.0))
    monkeypatch.setattr(signal, "alarm", lambda seconds: signal.setitimer(
        signal.ITIMER_REAL, 0.1 if seconds else 0))  # fmt: skip
    code, data = run(tmp_path)
    assert code == 0
    assert 0 < len(data["figures"]) < 100
    assert "cut off after 1.0 minutes, in: slow" in (tmp_path / "gpu_check.md").read_text()


def test_stages_end_with_the_time() -> None:
    stops = [stage.stop for stage in STAGES]
    assert stops == sorted(stops)
    assert stops[-1] == 1.0
