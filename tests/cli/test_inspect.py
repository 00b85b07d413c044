"""orthrus-inspect as a user meets it: what it prints, where, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from orthrus_gguf.cli.inspect import main
from tests.gguf.builder import STRING, build, entry, string
from tests.gguf.builder import tensor as tensor_entry
from tests.tiny_model import MASK, REMOVE, write_gguf, write_heads, write_model

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process, 100 columns wide; returns exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "100")

    def call(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(part) for part in argv])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny.gguf")


def test_a_model(run: Run, model: Path) -> None:
    code, out, err = run(model, "-c", "77", "-ctk", "f32")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[0].startswith(f"{model}: ")
    assert "alignment 32, 22 keys, 36 tensors" in lines[0]
    assert "general.architecture orthrus" in lines
    tokens = next(line for line in lines if line.startswith("tokenizer.ggml.tokens"))
    assert tokens.startswith("tokenizer.ggml.tokens 40 strings: 'token0', 'token1'")
    assert "orthrus.attention.layer_norm_rms_epsilon 1e-06" in lines
    assert "F32 36 38,432 150.1 KiB 32.000 100.0 %" in lines
    assert "each of 0–1 17 18,560 72.5 KiB 32.000 17 F32" in lines
    assert "outside 2 1,312 5.1 KiB 32.000 2 F32" in lines
    needs = lines[lines.index("memory on cpu, f32/f16 cache: 375.0 KiB per 1,000 tokens") + 2 :]
    assert [line.split()[0] for line in needs if line.endswith("iB")] == ["77", "128"]
    assert "attention 4 heads of 16 on 2, no biases, norms of q and k" in lines
    assert max(map(len, out.splitlines()[1:])) <= 100


def test_json_says_the_same(run: Run, model: Path) -> None:
    code, out, err = run(model, "--json")
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    reader = gguf.GGUFReader(model)
    assert {one["name"]: one["bytes"] for one in report["tensors"]} == {
        one.name: int(one.n_bytes) for one in reader.tensors
    }
    assert {one["name"]: one["offset"] for one in report["tensors"]} == {
        one.name: int(one.data_offset) for one in reader.tensors
    }
    metadata = report["files"][0]["metadata"]
    assert metadata["tokenizer.ggml.mask_token_id"] == MASK
    assert metadata["tokenizer.ggml.tokens"]["length"] == 40
    assert report["files"][0]["bytes"] == model.stat().st_size
    assert report["base"]["bytes"] + report["heads"]["bytes"] == report["total"]["bytes"]
    assert report["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 2
    assert [need["context"] for need in report["memory"]] == [128]
    assert report["problem"] is None


def test_base_and_heads(run: Run, tmp_path: Path, model: Path) -> None:
    """Together they need what the whole model needs."""
    base, heads = write_model(tmp_path / "b.gguf", "qwen3"), write_heads(tmp_path / "h.gguf")
    together = json.loads(run(base, "--heads", heads, "--json")[1])
    whole = json.loads(run(model, "--json")[1])
    for part in ("total", "base", "heads", "by_type", "by_layer", "memory"):
        assert together[part] == whole[part]
    assert [file["path"] for file in together["files"]] == [str(base), str(heads)]
    code, out, _ = run(base, "--heads", heads)
    assert code == 0
    assert f"{base}: " in out
    assert f"{heads}: " in out


def test_heads_of_another_model_are_an_error(run: Run, tmp_path: Path) -> None:
    base = write_model(tmp_path / "b.gguf", "qwen3")
    heads = write_heads(
        tmp_path / "h.gguf", metadata={"orthrus.rope.freq_base": np.float32(5000.0)}
    )
    code, out, err = run(base, "--heads", heads)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "do not belong to" in err


def test_heads_alone(run: Run, tmp_path: Path) -> None:
    code, out, err = run(write_heads(tmp_path / "h.gguf"))
    assert (code, err) == (0, "")
    assert "memory: not for this file: holds only diffusion heads; open their base model" in out
    assert [line.split()[0] for line in out.split("sizes\n")[1].splitlines()[:3]] == [
        "part",
        "heads",
        "total",
    ]


def test_an_imatrix(run: Run, tmp_path: Path) -> None:
    keys = {
        "general.type": "imatrix",
        "imatrix.datasets": ["wiki.txt"],
        "general.architecture": REMOVE,
    }
    tensors = {
        "blk.0.attn_q.weight.in_sum2": np.ones((1, 8), np.float32),
        "blk.0.attn_q.weight.counts": np.ones((1, 1), np.float32),
    }
    code, out, err = run(write_gguf(tmp_path / "i.gguf", "", keys, tensors))
    assert (code, err) == (0, "")
    assert "1 strings: 'wiki.txt'" in out
    assert "2 F32" in out
    assert "memory: not for this file: metadata key general.architecture: is missing" in out


def test_another_architecture(run: Run, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "l.gguf", "llama", {"llama.block_count": np.uint32(1)}, {})
    code, out, err = run(path)
    assert (code, err) == (0, "")
    assert "llama.block_count" in out
    assert "memory: not for this file: " in out
    assert "tensor token_embd.weight is missing; the file holds no whole model" in out
    path = write_gguf(tmp_path / "g.gguf", "gemma", {"gemma.block_count": np.uint32(1)}, {})
    code, out, err = run(path)
    assert (code, err) == (0, "")
    assert "gemma.block_count" in out
    assert "memory: not for this file: metadata key general.architecture: expected 'orthrus'" in out
    assert "models of other architectures are not supported" in out


@pytest.mark.parametrize(
    ("base", "scaling", "expected"),
    [
        (
            "qwen3",
            "yarn",
            [
                "base qwen3, 2 layers of 32, MLP 64, 40 tokens",
                "attention 4 heads of 16 on 2, no biases, norms of q and k",
                "RoPE halves, base 1e+06, YaRN by 4",
                "output tied to the embedding",
            ],
        ),
        (
            "qwen2",
            "linear",
            [
                "base qwen2, 2 layers of 32, MLP 64, 40 tokens",
                "attention 4 heads of 16 on 2, biases of q, k and v, no norms of q and k",
                "RoPE halves, base 1e+06, linear by 4",
                "output tied to the embedding",
            ],
        ),
        (
            "llama",
            "llama3",
            [
                "base llama, 2 layers of 32, MLP 64, 40 tokens",
                "attention 4 heads of 16 on 2, no biases, no norms of q and k",
                "RoPE adjacent pairs, base 1e+06, frequency factors",
                "output tied to the embedding",
            ],
        ),
    ],
)
def test_architectures(
    run: Run, tmp_path: Path, base: str, scaling: str, expected: list[str]
) -> None:
    """Of a base alone, with its heads beside it, and of both in one file; biases are counted."""
    alone = write_model(tmp_path / "b.gguf", base, scaling=scaling)
    heads = write_heads(tmp_path / "h.gguf", base=base, scaling=scaling)
    whole = write_model(tmp_path / "w.gguf", base=base, scaling=scaling)
    with_heads = "heads for this architecture, blocks of 8, mask 39"
    for argv, last in (
        ([alone], "heads none"),
        ([alone, "--heads", heads], with_heads),
        ([whole], with_heads),
    ):
        code, out, err = run(*argv)
        assert (code, err) == (0, "")
        lines = [" ".join(line.split()) for line in out.splitlines()]
        first = lines.index("model") + 2
        assert lines[first : first + 5] == [*expected, last]
        report = json.loads(run(*argv, "--json")[1])
        assert report["model"]["architecture"] == base
        assert report["model"]["qkv_biases"] == (base == "qwen2")
        assert report["model"]["rope"]["freq_factors"] == (scaling == "llama3")
        twins = {"qwen3": 6, "qwen2": 7, "llama": 4}[base]
        assert report["heads"]["tensors"] == (0 if argv == [alone] else 2 * twins)
        assert report["memory"][0]["total"] > report["total"]["bytes"]
    _, out, _ = run(heads)
    assert f"holds only diffusion heads; open their base model ({base})" in out
    assert json.loads(run(heads, "--json")[1])["model"] is None


def test_tensors_of_biases(run: Run, tmp_path: Path) -> None:
    _, out, _ = run(write_model(tmp_path / "w.gguf", base="qwen2"), "--tensors")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "blk.1.attn_q.bias 64 256 B F32" in lines
    assert "blk.0.attn_v_diff.bias 32 128 B F32" in lines


def test_all_tensors(run: Run, model: Path) -> None:
    _, out, _ = run(model, "--tensors")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "blk.1.attn_k_diff.weight 32 x 32 4.0 KiB F32" in lines
    assert sum(line.startswith("blk.") for line in lines) == 34


def test_a_hostile_file_cannot_write_to_the_terminal(run: Run, tmp_path: Path) -> None:
    evil = "\x1b]0;title\x07\x9b2J\u202e"
    path = tmp_path / "evil.gguf"
    path.write_bytes(
        build(
            [
                entry("general.architecture", STRING, string(evil)),
                entry(evil, STRING, string("a\nb\r" + evil)),
            ],
            [tensor_entry("blk.0." + evil[:20], [8])],
            b"\xff" * 32,
        )
    )
    other = write_gguf(tmp_path / "x.gguf", "llama", {evil: "x"}, {})
    for argv in ([path], [path, "--tensors"], ["--verify", path], ["--diff", path, other]):
        _, out, err = run(*argv)
        assert (out + err).replace("\n", "").isprintable()


def test_narrow_terminals(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    _, out, _ = run(model)
    keys = out.partition("\n\n")[0].splitlines()[1:]
    assert max(map(len, keys)) <= 72


def test_verify(run: Run, model: Path) -> None:
    code, out, err = run("--verify", model)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "36 tensors, 150.1 KiB read: no damage found"
    report = json.loads(run("--verify", model, "--json")[1])
    for one in report["tensors"]:
        assert f"  {one['sha256']}  {one['name']}\n" in out
    assert f"  {report['base']}  base\n" in out
    assert f"  {report['heads']}  heads\n" in out


def test_verify_names_each_damaged_tensor(run: Run, tmp_path: Path) -> None:
    bad = np.ones((64, 32), np.float32)
    bad[3, 1], bad[9, 2] = np.nan, np.inf
    names = ("blk.0.attn_q.weight", "blk.1.attn_q_diff.weight")
    path = write_model(tmp_path / "bad.gguf", tensors=dict.fromkeys(names, bad))
    code, out, err = run("--verify", path)
    assert code == 1
    assert out.endswith("2 damaged\n")
    assert err.splitlines() == [
        f"orthrus-inspect: error: tensor {name}: 2 values are NaN or infinite, the first at 97"
        for name in names
    ]
    code, out, _ = run("--verify", path, "--json")
    assert code == 1
    assert [one["bad"] for one in json.loads(out)["tensors"] if one["bad"]] == [2, 2]


def test_diff(run: Run, tmp_path: Path, model: Path) -> None:
    code, out, err = run("--diff", model, model)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "keys: 22 the same, 0 different, 0 only in the first, 0 only in the second",
        "tensors: 36 the same, 0 different, 0 only in the first, 0 only in the second",
    ]
    name = "blk.1.attn_v.weight"
    other = write_model(
        tmp_path / "other.gguf",
        metadata={"general.name": "Other", "extra": "x"},
        tensors={name: np.zeros((32, 32), np.float32), "output_norm.weight": REMOVE},
    )
    code, out, err = run("--diff", model, other)
    assert (code, err) == (1, "")
    lines = out.splitlines()
    assert lines[:2] == ["> key extra", "! key general.name: 'Tiny' and 'Other'"]
    assert lines[2] == "< tensor output_norm.weight"
    assert lines[3].startswith(f"! tensor {name}: ")
    assert lines[3].endswith("of 4096 bytes differ, the first at 0")
    code, out, _ = run("--diff", model, other, "--json")
    report: dict[str, Any] = json.loads(out)
    assert (code, report["equal"]) == (1, False)
    assert report["metadata"]["only_second"] == ["extra"]
    assert list(report["tensors"]["different"]) == [name]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a file: orthrus-inspect FILE.gguf"),
        (["missing.gguf"], "missing.gguf: no such file"),
        (["{model}", "--heads", "missing.gguf"], "missing.gguf: no such file"),
        (["{model}", "-ctk", "q8_0"], "-ctk q8_0: needs a head size"),
        (["{model}", "-ctv", "int3"], "-ctv int3: expected one of"),
        (["{model}", "-c", "0"], "expected at least 1"),
        (["--diff", "{model}"], "expected 2 arguments"),
        (["--diff", "{model}", "missing.gguf"], "missing.gguf: no such file"),
        (["{model}", "--diff", "{model}", "{model}"], "--diff compares the two files after it"),
        (["--verify", "--diff", "{model}", "{model}"], "not allowed with"),
    ],
)
def test_errors_are_one_line(run: Run, model: Path, argv: list[str], message: str) -> None:
    code, out, err = run(*(part.format(model=model) for part in argv))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("orthrus-inspect: error: ")
    assert message in err


def test_a_damaged_header_is_one_line(run: Run, model: Path) -> None:
    content = model.read_bytes()
    for size in (1, 30, 500, len(content) - 1):
        model.write_bytes(content[:size])
        for argv in (["--verify", model], [model], ["--diff", model, model]):
            code, out, err = run(*argv)
            assert (code, out, err.count("\n")) == (1, "", 1)


def test_without_torch_and_on_an_ascii_terminal(model: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['triton'] = None;"
        "from orthrus_gguf.cli.inspect import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"each of 0\\u20131" in done.stdout


def test_split_model_as_the_converter_writes_it(run: Run, demo_file: Callable[..., Path]) -> None:
    """Base and heads of a split model have the digests of the whole one."""
    base, whole = demo_file("q8_0", split=True), demo_file("q8_0")
    heads = base.with_name(f"{base.stem}-heads.gguf")
    one = json.loads(run("--verify", whole, "--json")[1])
    two = json.loads(run("--verify", base, "--heads", heads, "--json")[1])
    assert (one["base"], one["heads"]) == (two["base"], two["heads"])
