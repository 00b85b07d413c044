"""Heads on an existing base: its bytes, and every way in which the two may not belong together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from damage import check_refusal
from hf_checkpoint import CONFIG, Weights, random_weights, write_checkpoint, write_json
from imatrix_files import random_importance, write_gguf
from make_file import make_file
from orthrus_converters import graft
from orthrus_converters.cli import main

from orthrus_gguf.model.file import ModelFile

WIDE: dict[str, Any] = {
    **CONFIG,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
}
TYPES = ("bf16", "f16", "q8_0", "q6_k", "q4_k_m", "q4_0", "iq4_xs", "q3_k_m", "q2_k")


def bell(config: dict[str, Any], seed: int = 1) -> Weights:
    """Weights as of a trained model: normally distributed, rounded to bfloat16."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, values in random_weights(config).items():
        bits = rng.normal(0, 0.04, values.shape).astype(np.float32).view(np.uint32)
        found[name] = (bits & 0xFFFF0000).view(np.float32)
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("graft") / "orthrus", WIDE, bell(WIDE))


@pytest.fixture(scope="module")
def base(checkpoint: Path) -> Callable[..., Path]:
    """`base(type, *flags)`: a stock Qwen3 GGUF of the checkpoint's AR weights."""

    def make(type_name: str, *flags: str) -> Path:
        path = checkpoint.parent / f"base-{type_name}{'-imatrix' if flags else ''}.gguf"
        if not path.exists():
            make_file(checkpoint, path, "--split", "--type", type_name, *flags)
        return path

    return make


@pytest.fixture
def run_graft(out: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`run_graft(base, heads, *flags)`: like `convert`, but to graft."""

    def run(base: Path, heads: Path, *flags: str) -> SimpleNamespace:
        capsys.readouterr()
        argv = ["--base", str(base), "--heads", str(heads), str(out / "model.gguf"), *flags]
        code = main(argv)
        captured = capsys.readouterr()
        files = sorted(path.name for path in out.iterdir())
        return SimpleNamespace(code=code, stdout=captured.out, stderr=captured.err, files=files)

    return run


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    return {
        tensor.name: (tensor.tensor_type.name, tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def digest(path: Path) -> str:
    """The digest of the base tensors of a file, from its description."""
    found = hashlib.sha256()
    tensors = sorted(gguf.GGUFReader(path).tensors, key=lambda tensor: tensor.name)
    for tensor in tensors:
        if "_diff" not in tensor.name:
            shape = tuple(reversed(tensor.shape.tolist()))
            found.update(f"{tensor.name} {tensor.tensor_type.name} {shape}\n".encode())
            found.update(tensor.data.tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("kind", TYPES)
def test_base_tensors_keep_every_byte(
    kind: str, base: Callable[..., Path], checkpoint: Path, run_graft: Callable[..., Any], out: Path
) -> None:
    run = run_graft(base(kind), checkpoint)
    assert run.code == 0, run.stderr
    before, after = tensors_of(base(kind)), tensors_of(out / "model.gguf")
    assert {name: after[name] for name in before} == before
    hashes = digest(base(kind)), digest(out / "model.gguf")
    assert hashes[0] == hashes[1]
    assert f"{len(before)} base tensors byte for byte: SHA-256 {hashes[0]}" in run.stderr
    assert f"{len(before)} AR tensors agree with those of {checkpoint}" in run.stderr
    with ModelFile.open(out / "model.gguf") as model:
        assert model.config.has_heads
    # The heads are those of a conversion that makes all of it.
    assert main([str(checkpoint), str(out / "whole.gguf"), "--type", kind]) == 0
    assert after == tensors_of(out / "whole.gguf")
    assert list(after) == [t.name for t in gguf.GGUFReader(out / "model.gguf").tensors]


def test_provenance(
    base: Callable[..., Path], checkpoint: Path, run_graft: Callable[..., Any], out: Path
) -> None:
    assert run_graft(base("q4_k_m"), checkpoint).code == 0
    fields = gguf.GGUFReader(out / "model.gguf").fields
    prefix = "orthrus.graft."
    found = {key: field.contents() for key, field in fields.items() if key.startswith(prefix)}
    assert found == {
        f"{prefix}base.name": "Orthrus",
        f"{prefix}base.file": "base-q4_k_m.gguf",
        f"{prefix}base.sha256": digest(base("q4_k_m")),
        f"{prefix}heads.name": "orthrus",
    }
    assert fields["general.file_type"].contents() == 15
    assert fields["orthrus.diffusion.block_size"].contents() == 8
    assert fields["tokenizer.ggml.mask_token_id"].contents() == 261


def test_split_gives_the_base_back(
    base: Callable[..., Path], checkpoint: Path, run_graft: Callable[..., Any], out: Path
) -> None:
    """Not only its tensors: the whole file."""
    assert run_graft(base("q4_k_m"), checkpoint, "--heads-type", "q8_0").code == 0
    assert main([str(out / "model.gguf"), str(out / "again.gguf"), "--split"]) == 0
    assert (out / "again.gguf").read_bytes() == base("q4_k_m").read_bytes()
    # And its heads can be grafted in turn, with where they came from.
    heads = out / "again-heads.gguf"
    (out / "model.gguf").rename(out / "first.gguf")
    run = run_graft(base("q4_k_m"), heads)
    assert run.code == 0, run.stderr
    assert "has no AR weights; only shapes and constants were compared" in run.stderr
    assert tensors_of(out / "model.gguf") == tensors_of(out / "first.gguf")


@pytest.mark.parametrize("heads_type", ["f16", "q8_0", "q2_k"])
def test_heads_types(
    heads_type: str,
    base: Callable[..., Path],
    checkpoint: Path,
    run_graft: Callable[..., Any],
    out: Path,
) -> None:
    assert run_graft(base("q6_k"), checkpoint, "--heads-type", heads_type).code == 0
    kinds = {
        kind
        for name, (kind, _) in tensors_of(out / "model.gguf").items()
        if "_diff" in name and "norm" not in name
    }
    assert kinds == {heads_type.upper()}


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_k_m"])
@pytest.mark.parametrize("base_kind", ["bf16", "q8_0", "q4_k_m", "q2_k"])
def test_heads_of_a_whole_gguf(
    kind: str,
    base_kind: str,
    base: Callable[..., Path],
    checkpoint: Path,
    run_graft: Callable[..., Any],
    out: Path,
    tmp_path: Path,
) -> None:
    """Whatever the two types are, the same model is recognized, and heads keep their type."""
    whole = tmp_path / "whole.gguf"
    assert main([str(checkpoint), str(whole), "--type", kind]) == 0
    run = run_graft(base(base_kind), whole)
    assert run.code == 0, run.stderr
    before, after = tensors_of(whole), tensors_of(out / "model.gguf")
    assert {n: t for n, t in after.items() if "_diff" in n} == {
        n: t for n, t in before.items() if "_diff" in n
    }
    if kind == "q8_0":
        assert run_graft(base(base_kind), whole, "--heads-type", "q4_0", "--overwrite").code == 1
        flags = ("--heads-type", "q4_0", "--overwrite", "--allow-requantize")
        assert run_graft(base(base_kind), whole, *flags).code == 0


def test_bases_made_with_an_imatrix(
    base: Callable[..., Path], checkpoint: Path, run_graft: Callable[..., Any], tmp_path: Path
) -> None:
    """They differ more from the checkpoint, but still by quantization only."""
    shapes = {
        tensor.name: tuple(reversed(tensor.shape.tolist()))
        for tensor in gguf.GGUFReader(base("bf16")).tensors
        if len(tensor.shape) == 2
    }
    write_gguf(tmp_path / "im.gguf", random_importance(shapes))
    for kind in ("q4_k_m", "q3_k_m", "q2_k", "iq4_xs"):
        path = base(kind, "--imatrix", str(tmp_path / "im.gguf"))
        run = run_graft(path, checkpoint, "--overwrite")
        assert run.code == 0, run.stderr


def other_weights(folder: Path, change: Callable[[Weights], object], **config: Any) -> Path:
    """A checkpoint of the same model, with something changed."""
    weights = bell(WIDE)
    change(weights)
    return write_checkpoint(folder, {**WIDE, **config}, weights)


def nothing(weights: Weights) -> None:
    """No change."""


def fine_tune(name: str, size: float) -> Callable[[Weights], None]:
    """Add noise of `size` times the weights' own to one matrix."""

    def change(weights: Weights) -> None:
        noise = np.random.default_rng(9).normal(0, 0.04 * size, weights[name].shape)
        values = (weights[name] + noise).astype(np.float32)
        weights[name] = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)

    return change


Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("kind", TYPES)
def test_another_model_of_the_same_shape(
    kind: str, base: Callable[..., Path], run_graft: Callable[..., Any], tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", WIDE, bell(WIDE, seed=2))
    run = run_graft(base(kind), other)
    check_refusal(run, "these heads do not belong to", "its tensor token_embd.weight")


@pytest.mark.parametrize(
    ("kind", "name", "size"),
    [
        ("bf16", Q, 0.01),
        ("q8_0", Q, 0.02),
        ("q6_k", Q, 0.05),
        ("q4_k_m", Q, 0.2),
        ("q2_k", Q, 0.6),
        ("q2_k", NORM, 0.01),
    ],
)
def test_fine_tunes(
    kind: str,
    name: str,
    size: float,
    base: Callable[..., Path],
    run_graft: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """A change of one tensor, as far as quantization leaves it visible."""
    other = other_weights(tmp_path / "tuned", fine_tune(name, size))
    expected = "blk.1.attn_q.weight" if name == Q else "blk.0.attn_norm.weight"
    check_refusal(run_graft(base(kind), other), f"its tensor {expected}", "quantization explains")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_eps is 1e-05, the base has 1e-06"),
        (
            {"rope_parameters": {"rope_theta": 5e5}},
            "rope freq_base is 500000, the base has 10000",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            "rope factor is 4, the base has 1",
        ),
    ],
)
def test_other_constants(
    config: dict[str, Any],
    expected: str,
    base: Callable[..., Path],
    run_graft: Callable[..., Any],
    tmp_path: Path,
) -> None:
    other = other_weights(tmp_path / "other", nothing, **config)
    check_refusal(run_graft(base("q8_0"), other), "these heads do not belong to", expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_hidden_layers": 3}, "n_layers is 3, the base has 2"),
        ({"vocab_size": 271}, "n_vocab is 271, the base has 270"),
        ({"intermediate_size": 256}, "n_ff is 256, the base has 512"),
        ({"num_key_value_heads": 1}, "n_head_kv is 1, the base has 2"),
    ],
)
def test_other_shapes(
    changes: dict[str, int],
    expected: str,
    base: Callable[..., Path],
    run_graft: Callable[..., Any],
    tmp_path: Path,
) -> None:
    other = write_checkpoint(tmp_path / "other", {**WIDE, **changes})
    check_refusal(run_graft(base("q8_0"), other), expected)


def test_a_checkpoint_of_heads_only(
    base: Callable[..., Path], run_graft: Callable[..., Any], tmp_path: Path
) -> None:
    weights = {name: values for name, values in bell(WIDE).items() if "_diff" in name}
    folder = write_checkpoint(tmp_path / "heads", WIDE, weights)
    run = run_graft(base("q8_0"), folder)
    assert run.code == 0, run.stderr
    assert "has no AR weights; only shapes and constants were compared" in run.stderr
    weights.popitem()
    folder = write_checkpoint(tmp_path / "fewer", WIDE, weights)
    run = run_graft(base("q8_0"), folder, "--overwrite")
    assert run.code == 1
    assert "is missing" in run.stderr


def test_a_base_that_stores_its_tied_output(run_graft: Callable[..., Any], tmp_path: Path) -> None:
    """Some conversions write output.weight though it is the embedding."""
    tied = {**WIDE, "tie_word_embeddings": True}
    weights = bell(tied)
    folder = write_checkpoint(tmp_path / "tied", tied, weights)
    for copy in (weights["model.embed_tokens.weight"], bell(tied, 2)["model.embed_tokens.weight"]):
        stored = {**weights, "lm_head.weight": copy}
        untied = write_checkpoint(tmp_path / "untied", WIDE, stored)
        base = tmp_path / "base.gguf"
        argv = [str(untied), str(base), "--split", "--type", "q8_0", "--overwrite"]
        assert main(argv) == 0
        run = run_graft(base, folder, "--overwrite")
        if copy is weights["model.embed_tokens.weight"]:
            assert run.code == 0, run.stderr
        else:
            assert "its tensor output.weight" in run.stderr


def test_wrong_kinds(
    base: Callable[..., Path],
    checkpoint: Path,
    run_graft: Callable[..., Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = tmp_path / "whole.gguf"
    assert main([str(checkpoint), str(whole)]) == 0
    heads = base("q8_0").with_name("base-q8_0-heads.gguf")
    plain = {name: values for name, values in bell(WIDE).items() if "_diff" not in name}
    folder = write_checkpoint(tmp_path / "plain", WIDE, plain)
    for pair, expected in (
        ((whole, checkpoint), "holds diffusion heads already"),
        ((heads, checkpoint), "holds only diffusion heads"),
        ((checkpoint, checkpoint), "--base takes a GGUF file"),
        ((tmp_path / "no.gguf", checkpoint), "no.gguf: no such file"),
        ((base("q8_0"), base("q8_0")), "holds no diffusion heads; name an Orthrus model"),
        ((base("q8_0"), folder), "holds no diffusion heads"),
        ((base("q8_0"), tmp_path / "no.gguf"), "no.gguf: no such file"),
        ((base("q8_0"), tmp_path / "nothing"), "nothing: no such folder"),
    ):
        check_refusal(run_graft(*pair), expected)


def test_base_of_an_unknown_type(
    checkpoint: Path, run_graft: Callable[..., Any], tmp_path: Path, base: Callable[..., Path]
) -> None:
    data = bytearray(base("q8_0").read_bytes())
    field = gguf.GGUFReader(base("q8_0")).fields["general.file_type"]
    start = field.offset + sum(int(part.nbytes) for part in field.parts) - 4
    data[start : start + 4] = (1024).to_bytes(4, "little")
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(data)
    check_refusal(run_graft(odd, checkpoint), "its general.file_type", "--heads-type TYPE")
    assert run_graft(odd, checkpoint, "--heads-type", "q8_0").code == 0


def test_a_base_that_changes_meanwhile(
    checkpoint: Path,
    run_graft: Callable[..., Any],
    tmp_path: Path,
    base: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The digest was taken before the copy: the copy is read back and compared."""
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(base("q8_0").read_bytes())
    real = graft.digest_of

    def flip(*args: Any) -> str:
        found = real(*args)
        monkeypatch.setattr(graft, "digest_of", real)
        data = bytearray(copy.read_bytes())
        data[-1000] ^= 1
        copy.write_bytes(data)
        return found

    monkeypatch.setattr(graft, "digest_of", flip)
    check_refusal(run_graft(copy, checkpoint), "the base tensors differ from those of")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--base", "b.gguf", "o.gguf"], "--base needs --heads"),
        (["m", "--base", "b.gguf", "--heads", "h", "o.gguf"], "leave out m"),
        (["m", "--heads", "h", "o.gguf"], "--heads goes with --base"),
        (["m", "o.gguf", "--pure"], "--pure needs --type"),
        (["--heads", "h", "o.gguf"], "expected MODEL and OUT.gguf"),
        (["o.gguf"], "expected MODEL and OUT.gguf"),
        (["--base", "b", "--heads", "h", "o.gguf", "--type", "q8_0"], "only --heads-type goes"),
        (["--base", "b", "--heads", "h", "o.gguf", "--split"], "only --heads-type goes"),
        (["--merge", "o.gguf"], "expected MODEL and OUT.gguf"),
        (["--merge", "--base", "b", "--heads", "h", "o.gguf"], "only --heads goes with it"),
    ],
)
def test_flags_that_do_not_go_together(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert expected in captured.err


def test_heads_with_another_block_size_say_so(
    base: Callable[..., Path], run_graft: Callable[..., Any], tmp_path: Path, out: Path
) -> None:
    other = other_weights(tmp_path / "other", nothing)
    write_json(other / "config.json", {**WIDE, "block_size": 16})
    assert run_graft(base("q8_0"), other).code == 0
    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["orthrus.diffusion.block_size"].contents() == 16
