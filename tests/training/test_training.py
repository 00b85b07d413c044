"""orthrus-train: its arithmetic is the runtime's, it goes on where it was killed, it says what is
wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_bases import write_base
from orthrus_converters.cli import main as converter
from orthrus_converters.safetensors_file import read_header

from orthrus_gguf.cli.train import main
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import Segment, View
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.training.answers import read_answers
from orthrus_gguf.training.base import base_file
from orthrus_gguf.training.network import Network
from orthrus_gguf.training.output import write_checkpoint, write_sidecar
from orthrus_gguf.training.trainer import Recipe, Trainer
from tests.tiny_model import BASES, BLOCK_SIZE, MASK, N_VOCAB, SCALINGS, write_heads, write_model

ROOT = Path(__file__).resolve().parents[2]

#: A training of the demo model's base that takes seconds.
SMALL = (
    *("--texts", "17", "--answer-tokens", "24", "--prompt-tokens", "8", "--context", "48"),
    *("--batch", "2", "--blocks", "2", "--block-size", "4", "-t", "1", "--mask-token", "4095"),
)


def runtime_block(file: ModelFile, text: Sequence[int], anchor: int) -> Any:
    """Logits of a block on the runtime: the AR view has read what is before the anchor."""
    model = ReferenceModel(file)
    cache = model.new_cache(64)
    before = tuple(text[:anchor])
    model.logits([Segment(cache, View.AR, before, 0, range(0))])
    cache.commit(range(anchor))
    block = (text[anchor], *[MASK] * (BLOCK_SIZE - 1))
    (logits,) = model.logits([Segment(cache, View.DIFFUSION, block, anchor, range(BLOCK_SIZE))])
    return logits


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", BASES)
def test_blocks_are_the_runtimes_diffusion_view(base: str, scaling: str, tmp_path: Path) -> None:
    """Several blocks on padded texts in one batch: each as the runtime sees it."""
    plain = write_model(tmp_path / "base.gguf", base, scaling=scaling, tied=False)
    heads = write_heads(tmp_path / "heads.gguf", base=base, scaling=scaling)
    rng = np.random.default_rng(0)
    texts = rng.integers(0, N_VOCAB - 1, (2, 20))
    anchors = np.array([[1, 7], [4, 19]])
    with ModelFile.open(plain, heads) as file:
        network = Network(file)
        memory, _ = network.read(torch.from_numpy(texts))
        tokens = torch.full((2, 2, BLOCK_SIZE), MASK)
        tokens[:, :, 0] = torch.from_numpy(np.take_along_axis(texts, anchors, 1))
        ours = network.logits(network.draft(tokens, torch.from_numpy(anchors), memory))
        for i, j in np.ndindex(2, 2):
            theirs = runtime_block(file, texts[i].tolist(), int(anchors[i, j]))
            np.testing.assert_allclose(ours[i, j].detach().numpy(), theirs, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3", "qwen2-untied", "llama3"])
def test_a_checkpoints_weights_are_the_runtimes_too(name: str, tmp_path: Path) -> None:
    """From safetensors: converted, trained heads written, and both views compared."""
    path = base_file(str(write_base(tmp_path, name)), tmp_path)
    with ModelFile.open(path) as file:
        heads = {name: head.detach().numpy() for name, head in Network(file).named_heads()}
        mixed = {name: head[::-1].copy() for name, head in heads.items()}  # unlike the AR view's
        write_sidecar(tmp_path / "heads.gguf", file, mixed, BLOCK_SIZE, MASK)
    check_pair(path, tmp_path / "heads.gguf")


def test_a_quantized_bases_rounding_is_used(demo_file: Callable[..., Path]) -> None:
    path = demo_file("q4_k_m", split=True)
    check_pair(path, path.with_name(f"{path.stem}-heads.gguf"))


def check_pair(path: Path, heads: Path) -> None:
    text = np.random.default_rng(1).integers(0, 30, 12).tolist()
    with ModelFile.open(path, heads) as file:
        network = Network(file)
        memory, _ = network.read(torch.tensor([text]))
        tokens = torch.full((1, 1, BLOCK_SIZE), MASK)
        tokens[0, 0, 0] = text[8]
        ours = network.logits(network.draft(tokens, torch.tensor([[8]]), memory))[0, 0]
        theirs = runtime_block(file, text, 8)
    np.testing.assert_allclose(ours.detach().numpy(), theirs, atol=1e-3)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_what_is_written_is_what_was_trained(
    base: str, scaling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sidecar, opened like any, and the checkpoint, added to its base by the converter: the
    same numbers. Neither goes with another base."""
    plain = write_model(tmp_path / "base.gguf", base, scaling=scaling)
    with ModelFile.open(plain) as file:
        network = Network(file)
        heads = {
            name: (head.detach() * 1.25).bfloat16().float().numpy()
            for name, head in network.named_heads()
        }
        write_sidecar(tmp_path / "heads.gguf", file, heads, BLOCK_SIZE, MASK)
        (tmp_path / "out").mkdir()
        write_checkpoint(tmp_path / "out", file, heads, BLOCK_SIZE, MASK)
    convert = [str(tmp_path / "out"), str(tmp_path / "whole.gguf"), "--heads-type", "bf16"]
    assert converter(convert) == 0
    for files in ((plain, tmp_path / "heads.gguf"), (tmp_path / "whole.gguf",)):
        with ModelFile.open(*files) as model:
            assert model.config.block_size == BLOCK_SIZE
            assert model.config.mask_token == MASK
            for name, head in Network(model).named_heads():
                np.testing.assert_array_equal(head.detach().numpy(), heads[name])
    names = read_header(tmp_path / "out" / "model.safetensors")
    assert "model.layers.0.self_attn.o_proj_diff.weight" in names
    tensors = {"output_norm.weight": np.ones(32, np.float32)}
    other = write_model(tmp_path / "other.gguf", base, scaling=scaling, tensors=tensors)
    with pytest.raises(OrthrusError, match="trained on another file"):
        ModelFile.open(other, tmp_path / "heads.gguf")
    plain.unlink()
    capsys.readouterr()
    again = ["--base", str(other), "--heads", *convert]
    for argv, message in ((convert, "which is not there"), (again, "trained on another file")):
        assert converter([*argv, "--overwrite"]) == 1
        assert message in capsys.readouterr().err
    assert converter([*convert, "--type", "q8_0"]) == 1


def losses(folder: Path) -> list[Any]:
    path = folder / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def trained(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a short training of the demo model's base has ended."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([str(checkpoint), str(folder), *SMALL, "--steps", "12"]) == 0
    return folder


def test_a_training_ends_with_heads_and_a_report(trained: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    assert report["decoded"]["same_text"]
    assert report["decoded"]["tokens_per_cycle"] >= 1
    assert [step for step, _ in losses(trained)] == [*range(1, 13)]
    assert np.mean([loss for _, loss in losses(trained)[-3:]]) < losses(trained)[0][1]
    with ModelFile.open(trained / "base.gguf", trained / "heads.gguf") as pair:
        assert pair.config.block_size == 4


def test_killed_and_resumed_it_has_the_same_losses(
    trained: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Killed between checkpoints: what came after the last one is done again, alike."""
    command = [str(checkpoint), str(tmp_path / "out"), *SMALL, "--steps", "12"]
    code = [sys.executable, "-m", "orthrus_gguf.cli.train", *command, "--minutes", "0.0001"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(code, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 240
        while len(losses(tmp_path / "out")) < 4 and process.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    answers = tmp_path / "out" / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-7])  # a line that was being written
    assert main(command) == 0
    assert losses(tmp_path / "out") == losses(trained)


def test_a_full_disk_leaves_the_checkpoint_before(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (trained / "checkpoint.pt").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with ModelFile.open(trained / "base.gguf") as file:
        recipe = Recipe(12, 5e-4, 2, 2, 4, 4095, 0)
        answers = read_answers(trained / "answers.jsonl")
        trainer = Trainer(Network(file), answers, recipe, trained, keep_bytes=0)
        with pytest.raises(OrthrusError, match="the checkpoint before it is whole: make room"):
            trainer.save()
    assert (trained / "checkpoint.pt").read_bytes() == before
    assert not (trained / "checkpoint.tmp").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "13"], "was begun with steps 12, not 13"),
        (["--prompt-tokens", "9"], "holds a training with another prompt_tokens"),
        (["--context", "9"], "expected at least --prompt-tokens + 16"),
        (["--context", "4096"], "was trained on 2048 tokens"),
        (["--mask-token", "5000"], "expected an id below 4096"),
        (["--prompts", "other"], "holds a training with another prompts"),
    ],
)
def test_flags_that_do_not_fit(
    flags: list[str],
    message: str,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = trained / "base.gguf"
    assert main([str(base), str(trained), *SMALL, "--steps", "12", *flags]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("orthrus-train: error: ")
    assert message in last


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9", "is not UTF-8 (byte 3)"),
        ("a.txt", b"", "holds no prompt"),
        ("a.jsonl", b"\n", "holds no prompt"),
        ("a.jsonl", b'{"prompt": "x"}\n{', "line 2: is no JSON"),
        ("a.jsonl", b'{"text": "x"}', "line 1: expected"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "no chat template"),
    ],
)
def test_prompts_that_are_none(
    name: str,
    data: bytes,
    message: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(data)
    base, out = str(trained / "base.gguf"), str(tmp_path / "out")
    assert main([base, out, *SMALL, "--prompts", str(tmp_path / name)]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_prompts_that_are_nowhere(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(trained / "base.gguf")
    assert main([base, str(tmp_path / "out"), *SMALL, "--prompts", str(tmp_path / "none")]) == 1
    assert "no such file or folder" in capsys.readouterr().err


def test_a_base_without_a_mask_token(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All our tokenizers have one: here its name is one that we do not know."""
    monkeypatch.setattr("orthrus_gguf.training.base._MASKS", ("<mask-of-others>",))
    plain = [flag for flag in SMALL if flag not in ("--mask-token", "4095")]
    assert main([str(trained / "base.gguf"), str(tmp_path / "out"), *plain]) == 1
    assert "has no mask token; name the id" in capsys.readouterr().err
