"""orthrus-run's strategies: the same text from all of them, and what the flags refuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orthrus_gguf.cli.run import main

Run = Callable[..., tuple[int, str, str]]
PROMPT = ("-p", "def read(self, size=-1):", "-n", "60", "--temp", "0")


@pytest.fixture(scope="module")
def model(demo_file: Callable[..., Path]) -> str:
    return str(demo_file("f32"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([*argv, "-t", "1"])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


FLAGS = [
    ["--strategy", "two-pass"],
    ["--draft-width", "3"],
    ["--strategy", "two-pass", "--draft-cut", "0.2", "--draft-tail", "--lookup"],
    ["--strategy", "two-pass", "--draft-tree", "20"],
    ["--draft-width", "4", "--draft-tree", "9", "--lookup"],
    ["--strategy", "fused"],
    ["--strategy", "fused", "--draft-width", "5", "--draft-blocks", "2", "--draft-tail"],
    ["--strategy", "ar", "--lookup"],
    ["--strategy", "auto"],
    ["--no-lookup"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_the_strategy_does_not_change_the_text(run: Run, model: str, flags: list[str]) -> None:
    plain = run(model, *PROMPT, "--strategy", "ar")
    other = run(model, *PROMPT, *flags)
    assert plain[0] == other[0] == 0
    assert other[1] == plain[1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--strategy", "fused"], ("fused", 15, 3)),
        (["--strategy", "fused", "--draft-blocks", "2"], ("fused", 15, 2)),
        (["--draft-width", "3"], ("two-pass", 3, 0)),
        (["--strategy", "ar"], ("ar", 0, 0)),
    ],
    ids=str,
)
def test_json_tells_the_plan(
    run: Run, model: str, flags: list[str], expected: tuple[str, int, int]
) -> None:
    settings = json.loads(run(model, *PROMPT, "--json", *flags)[1])["settings"]
    assert (settings["strategy"], settings["draft_width"], settings["draft_blocks"]) == expected


def test_auto_is_the_default_and_remembers_what_it_measured(
    run: Run, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, out, err = run(model, *PROMPT, "--json")
    report: dict[str, Any] = json.loads(out)
    assert report["settings"]["strategy"] == "auto"
    assert "measuring what passes cost on this machine (once)" in err
    (path,) = (tmp_path / "orthrus-gguf").iterdir()
    written = path.stat().st_mtime_ns
    path.write_text("{")
    _, _, err = run(model, *PROMPT)
    assert err.count("ignored, measuring again") == 1
    assert path.stat().st_mtime_ns > written
    _, _, err = run(model, *PROMPT)
    assert "ignored" not in err
    assert "measuring" not in err


def test_explain_tells_what_was_decided(run: Run, model: str) -> None:
    _, _, err = run(model, *PROMPT, "--explain")
    assert "what was decided, expected and achieved (tokens per second):" in err
    assert sum(int(n) for n in re.findall(r"(\d+) tokens in +\d+ cycles", err)) == 59
    _, _, err = run(model, *PROMPT, "--explain", "--strategy", "ar")
    assert "nothing was decided while decoding: ar, as the flags say" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--strategy", "auto", "--draft-width", "3"], "--draft-width: --strategy auto has no use"),
        (["--strategy", "ar", "--draft-tail"], "--draft-tail: --strategy ar has no use for it"),
        (["--strategy", "two-pass", "--draft-blocks", "2"], "--draft-blocks: --strategy two-pass"),
        (["--strategy", "auto", "--draft-tree", "9"], "--draft-tree: --strategy auto has no use"),
        (["--strategy", "fused", "--draft-tree", "9"], "--draft-tree: --strategy fused has no use"),
        (["--draft-width", "3", "--draft-tree", "0"], "0: expected at least 1"),
        (["--strategy", "fused", "--draft-cut", "1.5"], "--draft-cut 1.5: expected a probability"),
        (["--strategy", "fused", "--draft-width", "17"], "--draft-width 17: must lie in 1..16"),
    ],
    ids=str,
)
def test_flags_that_make_no_sense(run: Run, model: str, flags: list[str], message: str) -> None:
    code, out, err = run(model, *PROMPT, *flags)
    assert (code, out) == (1, "")
    assert message in err
    assert len([line for line in err.splitlines() if "no chat template" not in line]) == 1
