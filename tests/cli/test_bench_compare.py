"""orthrus-bench compare: figures that fit together, one text for all, errors of one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orthrus_gguf.cli.bench import main
from orthrus_gguf.cli.run import main as run_main
from orthrus_gguf.runtime.load import load_model
from orthrus_gguf.runtime.protocol import Choices, View
from orthrus_gguf.sampling import Choice

PROMPTS = {"code": ["def read(self, size=-1):\n", "class Queue:\n"], "chat": ["import os\n"]}
TASK = ("-t", "1", "-n", "12")


@pytest.fixture(autouse=True)
def _no_remembered_costs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(PROMPTS))
    return str(path)


@pytest.fixture
def model(demo_file: Callable[..., Path]) -> str:
    return str(demo_file("f16"))


def test_everything(
    model: str, prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strategies = ("--strategies", "two-pass,fused+tail+lookup,auto", "--widths", "3,7")
    folder = tmp_path / "deep" / "plots"
    flags = (*TASK, "--prompts", prompts, *strategies, "-r", "2", "--plots", str(folder))
    assert main(["compare", model, *flags, "-o", "both"]) == 0
    captured = capsys.readouterr()
    *tables, line = captured.out.splitlines()
    report: dict[str, Any] = json.loads(line)

    names = ["ar", "two-pass@3", "two-pass@7", "fused@3x3+lookup+tail", "fused@7x3+lookup+tail"]
    names.append("auto")
    assert [s["strategy"] for s in report["summaries"]] == names * 3
    assert [t["strategy"] for t in report["turns"][:12]] == [*names, *names[1:], names[0]]
    assert len(report["turns"]) == 2 * 3 * len(names)
    for turn in report["turns"]:
        # The first token comes with the prompt, the others from cycles.
        assert turn["generated_tokens"] == 11
        assert sum(turn["accepted"]) + len(turn["accepted"]) == 11
        assert all(a <= w for a, w in zip(turn["accepted"], turn["widths"], strict=True))
    for summary in report["summaries"]:
        ours = [
            turn
            for turn in report["turns"]
            if turn["strategy"] == summary["strategy"]
            and summary["domain"] in (None, turn["domain"])
        ]
        rate = sum(t["generated_tokens"] for t in ours) / sum(t["seconds"] for t in ours)
        assert summary["tokens_per_second"] == pytest.approx(rate)
        assert sum(summary["shares"].values()) == pytest.approx(1)
        assert min(summary["shares"].values()) >= 0
        assert len(summary["speedup"]["rounds"]) == 2
    accepted = {s["strategy"]: s["stats"]["accepted"] for s in report["summaries"][: len(names)]}
    assert accepted["ar"] == 0
    assert min(accepted[name] for name in names[1:5]) > 0, "drafts were used"

    for name in names:
        assert sum(row.startswith(f"| {name} |") for row in tables) >= 4
    assert {path.name for path in folder.iterdir()} == {
        *("acceptance.png", "costs.png", "speed.png", "widths.png"),
    }
    assert captured.err.count("wrote ") == 4


def test_figures_are_those_of_orthrus_run(
    model: str, prompts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same prompt by the other command takes the same cycles; seeded, to have the seed too."""
    more = ("--temp", "0.7", "--seed", "5")
    flags = (*TASK, f"--prompts={prompts}", "--domains", "code", *more)
    assert main([model, *flags, "--strategies", "two-pass@5", "-o", "json"]) == 0
    turns = json.loads(capsys.readouterr().out)["turns"]
    two_pass = next(t for t in turns if (t["strategy"], t["prompt"]) == ("two-pass@5", "code 1"))
    text = PROMPTS["code"][0]
    common = ("-t", "1", "-n", "12", "-p", text, *more, "--json", "--draft-width", "5")
    assert run_main([model, *common]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert two_pass["accepted"] == expected["accepted"]
    assert two_pass["prompt_tokens"] == len(expected["prompt_ids"])


def test_default_strategies(model: str, prompts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", model, *TASK, "--prompts", prompts, "--domains", "chat"]) == 0
    out = capsys.readouterr().out
    assert "1 prompts" not in out
    rows = [row.split(" | ")[0] for row in out.split("\n\n")[2].splitlines()[2:]]
    assert rows == ["| ar", "| two-pass@15", "| fused@15x3", "| auto"]
    assert "{" not in out


def test_texts_that_differ_are_one_line_and_exit_code_1(
    model: str,
    prompts: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*args: Any, **settings: Any) -> Any:
        """A runtime that is wrong in passes of several AR rows, behind the prompt."""
        loaded: Any = load_model(*args, **settings)
        forward = loaded.forward

        def wrong(segments: Any) -> Any:
            first, *others = forward(segments)
            segment = segments[0]
            if segment.view is View.AR and segment.start and len(segment) > 1:
                first = Choices((Choice(0),) * len(first))
            return [first, *others]

        loaded.forward = wrong
        return loaded

    monkeypatch.setattr("orthrus_gguf.cli.bench_compare.load_model", broken)
    assert main(["compare", model, *TASK, "--prompts", prompts, "--strategies", "two-pass"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(
        "orthrus-bench compare: error: prompt 'code 1': two-pass@15 and ar differ from output token"
    )
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-n", "1"], "argument -n/--n-gen: 1: expected at least 2"),
        (["--widths", "3,x"], "argument --widths: '3,x': expected numbers like 3,7,15"),
        (["--widths", "0"], "argument --widths: 0: expected at least 1"),
        (["-o", "csv"], "argument -o/--output: invalid choice: 'csv'"),
        (["--rows", "3"], "unknown option --rows"),
        (["--strategies", "tree"], "strategy 'tree': expected NAME[@WIDTH[xBLOCKS]][+OPTION…]"),
        (["--strategies", "fused@99"], "strategy 'fused@99': the width must lie in 1..16"),
        (["--strategies", "auto", "--widths", "3"], "--widths: every strategy named has its width"),
        (["--domains", "verse"], "--domains verse: builtin has prompts for code, prose, list,"),
        (["--prompts", "no.json"], "--prompts no.json: cannot be read (No such file"),
        (["--temp", "nan"], "--temp: expected a number, found nan"),
        (["--plots", "{file}"], "--plots {file}: cannot be made a folder (File exists)"),
        (["--plots", "{file}/x"], "--plots {file}/x: cannot be made a folder (Not a directory)"),
    ],
)
def test_errors_are_one_line(
    flags: list[str],
    message: str,
    model: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [flag.replace("{file}", model) for flag in flags]
    try:
        code = main(["compare", model, "-t", "1", *flags])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 1
    captured = capsys.readouterr()
    expected = message.replace("{file}", model)
    assert captured.err.startswith(f"orthrus-bench compare: error: {expected}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_prompts_longer_than_the_context(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps({"code": ["a = 1", "b = 2\n" * 600]}))
    assert main([model, "--prompts", str(path)]) == 1
    err = capsys.readouterr().err
    assert "error: --prompts: prompt 'code 2' has" in err
    assert err.endswith("the context of Tiny Orthrus Stdlib 2048; shorten it\n")


def test_help_spells_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert "STRATEGY[@WIDTH[xBLOCKS]][+OPTION…]" in out
    assert "+cut=0.1" in out
    assert "--top-k" not in out
