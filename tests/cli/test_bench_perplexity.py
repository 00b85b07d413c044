"""orthrus-bench perplexity as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orthrus_gguf.cli.bench import main
from orthrus_gguf.model.file import ModelFile

DemoFile = Callable[..., Path]
TEXT = str(Path(__file__))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main(["perplexity", *argv, "-t", "1"])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_words_and_flags_in_any_order(run: Any, demo_file: DemoFile) -> None:
    model, few = str(demo_file("q8_0")), ("-c", "32", "--chunks", "2", "-o", "json")
    first = json.loads(run(model, TEXT, *few)[1])
    assert (first["windows"], first["n_ctx"], first["scored_tokens"]) == (2, 32, 30)
    assert first["perplexity"]["error"] > 0
    for argv in ((model, *few, TEXT), ("-m", model, TEXT, *few), (model, "-f", TEXT, *few)):
        assert json.loads(run(*argv)[1]) == first
    twice = json.loads(run("-m", model, TEXT, TEXT, "-c", "32", "-o", "json")[1])
    once = json.loads(run("-m", model, TEXT, "-c", "32", "-o", "json")[1])
    assert twice["windows"] in (2 * once["windows"], 2 * once["windows"] + 1)
    code, out, _ = run(model, TEXT, "-c", "32", "--chunks", "2")
    value, error = first["perplexity"]["value"], first["perplexity"]["error"]
    assert code == 0
    assert out.splitlines()[-1] == f"PPL = {value:.4f} ± {error:.5f}"


def test_two_files_are_compared(run: Any, demo_file: DemoFile) -> None:
    fine, rough = str(demo_file("f32")), str(demo_file("q4_k_m"))
    flags = (TEXT, "-c", "32", "--chunks", "4")
    found = json.loads(run(rough, *flags, "--kl-base", fine, "-o", "json")[1])
    alone = json.loads(run(rough, *flags, "-o", "json")[1])
    base = json.loads(run(fine, *flags, "-o", "json")[1])
    assert found["perplexity"] == alone["perplexity"]
    assert found["base_perplexity"] == base["perplexity"]
    kl = found["kl"]
    assert 0 < kl["median"] < kl["90 %"] < kl["99 %"] < kl["largest"]
    assert found["differences"][0]["kl"] == kl["largest"]
    assert len(found["differences"]) == 5
    assert 0.5 < found["same_top"]["value"] <= 1
    same = json.loads(run(fine, *flags, "--kl-base", fine, "-o", "json")[1])
    assert (same["kl"]["largest"], same["same_top"]["value"]) == (0, 1)
    out = run(rough, *flags, "--kl-base", fine, "--differences", "2")[1]
    assert f"| KL, mean | {kl['mean']['value']:.6f} ± " in out
    assert out.count("| `…") == 2


def test_windows_beyond_the_training_context(run: Any, demo_file: DemoFile) -> None:
    model, longer = str(demo_file("q8_0")), (TEXT,) * 3
    with ModelFile.open(model) as file:
        trained = file.config.n_ctx_train
    code, out, err = run(model, *longer, "-c", str(trained + 1), "--chunks", "1")
    assert (code, err.count("\n")) == (0, 1)
    assert f"was trained on {trained} tokens of context only" in err
    assert "PPL = " in out


BAD = {
    "no text": (["MODEL"], "no text: name at least one"),
    "no such text": (["MODEL", "missing.txt"], "missing.txt: cannot be read"),
    "not UTF-8": (["MODEL", "BINARY"], "not UTF-8"),
    "too little": (["MODEL", "SHORT"], "windows of 512 need at least 1024"),
    "tiny windows": (["MODEL", TEXT, "-c", "4"], "at least 8 tokens"),
    "no windows": (["MODEL", TEXT, "-c", "32", "--chunks", "0"], "--chunks 0"),
    "no base": (["MODEL", TEXT, "-c", "32", "--kl-base", "missing.gguf"], "missing.gguf"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(run: Any, demo_file: DemoFile, tmp_path: Path, name: str) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "short").write_text("def f(): pass\n")
    words = {
        "MODEL": str(demo_file("q8_0")),
        "BINARY": str(tmp_path / "binary"),
        "SHORT": str(tmp_path / "short"),
    }
    argv, message = BAD[name]
    code, out, err = run(*(words.get(word, word) for word in argv))
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith("orthrus-bench perplexity: error: ")
    assert message in err


def test_one_file_on_two_runtimes(run: Any, demo_file: DemoFile) -> None:
    file = str(demo_file("q4_k_m"))
    flags = (file, TEXT, "-c", "32", "--chunks", "4", "-o", "json", "--kl-base", file)
    same = json.loads(run(*flags)[1])["kl"]
    assert same["largest"] == 0
    for runtime in ("cpu", "ggml"):
        kl = json.loads(run(*flags, "--runtime", runtime, "--kl-runtime", "reference")[1])["kl"]
        assert 0 < kl["mean"]["value"] < 1e-3, "both round activations, the reference does not"
    code, _, err = run(file, TEXT, "--kl-runtime", "cpu")
    assert code == 1
    assert "name the file with --kl-base" in err
