"""orthrus-bench predict: a labelled table with its assumptions, and the same as JSON."""

from __future__ import annotations

import json

import pytest

from orthrus_gguf.bench.prediction.cards import CARDS, IDEAL
from orthrus_gguf.bench.prediction.passes import Activations, PredictedCurve
from orthrus_gguf.cli.bench import main
from orthrus_gguf.model.shapes import SHAPES


def test_the_whole_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("**predicted, not measured**")
    table = [line for line in lines if line.startswith("| Qwen3")]
    assert len(table) == 3 * 3 * 3 * 3  # models, cards, types, contexts
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert widths == {13}
    beneath = "\n".join(lines[lines.index("Assumptions (predicted, not measured):") :])
    for word in ("936 GB/s", "990 TFLOPS", "µs per launch", "80% of the bandwidth", "llama.cpp"):
        assert word in beneath


def test_figures_are_the_curves(capsys: pytest.CaptureFixture[str]) -> None:
    shares = ["--memory-share", "1", "--compute-share", "1"]
    picks = ["--models", "qwen3-8b", "--cards", "rtx-3090,h200", "--types", "Q4_K_M"]
    more = ["--contexts", "512", "--block", "16", "--activations", "fp16", "--json"]
    assert main(["predict", *picks, *shares, *more]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["label"] == "predicted, not measured"
    assert report["rows"] == [8, 16, 32, 64]
    assert [line["card"] for line in report["predictions"]] == ["RTX 3090", "H200"]
    line = report["predictions"][0]
    curve = PredictedCurve(CARDS["rtx-3090"], SHAPES["qwen3-8b"], "q4_k_m", Activations.FP16, IDEAL)
    assert line["ar_ms"] == curve.milliseconds(1, 0, 512)
    assert line["ar_tokens_per_second"] == pytest.approx(1e3 / line["ar_ms"])
    assert line["verify_ms"][2] == curve.milliseconds(32, 0, 512)
    both = curve.milliseconds(16, 0, 512) + curve.milliseconds(0, 16, 512)
    assert line["two_pass_ms"] == pytest.approx(both)
    assert line["fused_ms"] == curve.milliseconds(16, 16, 512)
    names = ("weights", "tails", "attention", "recurrence", "small", "launches")
    parts = sum(line[f"{name}_ms"] for name in names)
    assert parts == pytest.approx(line["ar_ms"])


def test_hybrids(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps that a model cannot take are dashes, and those that none can, no columns."""
    picks = ["--cards", "rtx-3090", "--types", "q4_k_m", "--contexts", "512"]
    assert main(["predict", "--models", "qwen3.5-4b,qwen3.5-4b-mtp,qwen3-4b", *picks]) == 0
    out = capsys.readouterr().out
    rows = [line.split("|")[-4:-1] for line in out.splitlines() if line.startswith("| ")]
    assert [cell.strip() for cell in rows[0]] == ["two-pass 32", "fused 32", "MTP 3"]
    absent = [[cell.strip() == "–" for cell in row] for row in rows[1:]]
    assert absent == [[True, True, True], [True, True, False], [False, False, True]]
    assert "DeltaNet layers read and write their state once per pass" in out
    assert main(["predict", "--models", "qwen3.5-4b-mtp", *picks, "--depth", "2"]) == 0
    out = capsys.readouterr().out
    assert "| MTP 2 |" in out
    assert "two-pass" not in out
    assert "An MTP step verifies 3 rows" in out


def test_any_other_card(capsys: pytest.CaptureFixture[str]) -> None:
    """An RTX 4070 by its figures is an RTX 4070."""
    words = "bandwidth=504,tops=233.2,sms=46,l2=36,name=by hand"
    picks = ["--models", "qwen3-8b", "--types", "q4_k_m", "--json"]
    assert main(["predict", "--card", words, "--cards", "rtx-4070", *picks]) == 0
    lines = json.loads(capsys.readouterr().out)["predictions"]
    assert {line["card"] for line in lines} == {"RTX 4070", "by hand"}
    for known, own in zip(lines[:3], lines[3:], strict=True):
        assert own["ar_ms"] == pytest.approx(known["ar_ms"], rel=1e-3)
        assert own["fused_ms"] == pytest.approx(known["fused_ms"], rel=1e-3)
    assert main(["predict", "--card", "bandwidth=900,tops=312,sms=132,sm=90", *picks]) == 0
    assert len(json.loads(capsys.readouterr().out)["predictions"]) == 3, "the usual cards are out"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--card", "bandwidth=9,tops=9"], "argument --card: 'bandwidth=9,tops=9': no sms; expect"),
        (["--card", "bandwith=9,tops=9,sms=9"], "argument --card: 'bandwith=9,tops=9,sms=9': unkn"),
        (["--card", "bandwidth=9,tops=x,sms=9"], "argument --card: 'bandwidth=9,tops=x,sms=9': ex"),
        (["--card", "bandwidth=9,tops=0,sms=9"], "argument --card: 'bandwidth=9,tops=0,sms=9': ex"),
        (
            ["--card", "bandwidth=616,tops=228,sms=68,sm=75"],
            "argument --card: 'bandwidth=616,tops=228,sms=68,sm=75': cards below compute capabili",
        ),
        (
            ["--card", "bandwidth=8000,tops=4500,sms=148,sm=100"],
            "argument --card: 'bandwidth=8000,tops=4500,sms=148,sm=100': on compute capability 10",
        ),
        (["--cards", "voodoo"], "argument --cards: 'voodoo': expected one of rtx-3060, "),
        (["--models", "qwen3-8b,x"], "argument --models: 'x': expected one of "),
        (["--types", "q2_k"], "argument --types: 'q2_k': expected one of q4_k_m"),
        (["--contexts", "512,x"], "argument --contexts: '512,x': expected numbers"),
        (["--contexts", "-1"], "argument --contexts: -1: expected at least 0"),
        (["--depth", "9"], "argument --depth: invalid choice: 9; choose from 1, 2"),
        (["--memory-share", "0"], "argument --memory-share: '0': expected a number above 0"),
        (["--compute-share", "x"], "argument --compute-share: 'x': expected a number above 0"),
        (["model.gguf"], "what is 'model.gguf'?"),
    ],
)
def test_errors_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["predict", *flags])
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith(f"orthrus-bench predict: error: {message}")
    assert err.count("\n") == 1


def test_a_file_called_predict_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predit"]) == 1
    assert (
        capsys.readouterr().err == "orthrus-bench: error: no file predit, did you mean predict?\n"
    )
    assert main(["./predict"]) == 1
    assert capsys.readouterr().err.endswith("error: predict: no such file; check the path\n")
