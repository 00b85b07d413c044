"""orthrus-train: it ends with heads and a report, goes on where it was cut off, and says in one
line what is wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_bases import write_base
from hf_checkpoint import write_json
from orthrus_converters.cli import main as converter

from orthrus_gguf.cli import train_report
from orthrus_gguf.cli.train import main
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.text.chat import ChatTemplate
from orthrus_gguf.text.tokenizer import load_tokenizer
from orthrus_gguf.training.answers import read_answers
from orthrus_gguf.training.blocks import Batch, loss_and_hits
from orthrus_gguf.training.network import Network
from orthrus_gguf.training.prompts import KINDS, Invented
from orthrus_gguf.training.trainer import Recipe, Trainer

ROOT = Path(__file__).resolve().parents[2]

#: A training that takes a second.
SMALL = (
    *("--texts", "17", "--answer-tokens", "24", "--prompt-tokens", "8", "--context", "48"),
    *("--batch", "2", "--blocks", "2", "--block-size", "4", "-t", "1", "--steps", "12"),
    *("--device", "cpu", "--dtype", "float32"),
)

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that has no heads."""
    return write_base(tmp_path_factory.mktemp("base"), "qwen3")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a short training has ended. Never write into it."""
    folder = tmp_path_factory.mktemp("trained")
    assert main([str(base), str(folder), *SMALL]) == 0
    return folder


@pytest.fixture
def begun(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(trained, tmp_path / "begun")


def losses(folder: Path) -> list[Any]:
    path = folder / "losses.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def refused(capsys: Captured, *argv: object) -> str:
    """The one line in which a command gives up."""
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("orthrus-train: error: ")
    return last


def test_a_training_ends_with_heads_and_a_report(trained: Path, tmp_path: Path) -> None:
    report = json.loads((trained / "report.json").read_text())
    assert report["decoded"]["same_text"]
    assert report["decoded"]["tokens_per_cycle"] > 1
    assert [step for step, _ in losses(trained)] == [*range(1, 13)]
    assert report["losses"] == [loss for _, loss in losses(trained)]
    assert len(report["gains"]) == 4  # this machine, and three cards
    for gained in report["gains"].values():
        assert set(gained) == {"text", "all", "heads alone"}
        assert min(gained.values()) > 0.5
    picture = (trained / "report.svg").read_text()
    assert picture.startswith("<?xml")
    with ModelFile.open(trained / "base.gguf", trained / "heads.gguf") as pair:
        assert pair.config.block_size == 4
    # The folder is a checkpoint too, which names its base.
    assert converter([str(trained), str(tmp_path / "whole.gguf")]) == 0
    with ModelFile.open(tmp_path / "whole.gguf") as whole:
        assert whole.config.has_heads


def test_what_is_learned_lowers_the_loss(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps on the same blocks."""
    (begun / "checkpoint.pt").unlink()
    with ModelFile.open(begun / "base.gguf") as file:
        network = Network(file)
    recipe = Recipe(steps=3, rate=1e-3, texts=2, blocks=4, rows=4, mask=261, seed=0)
    trainer = Trainer(network, read_answers(begun / "answers.jsonl"), recipe, begun, keep_bytes=0)
    batch = trainer.batch(0)
    monkeypatch.setattr(trainer, "batch", lambda _: batch)
    found = [trainer.advance() for _ in range(3)]
    assert found == sorted(found, reverse=True)
    assert loss_and_hits(network, batch, recipe.decay)[0].item() < found[-1]


def test_interrupted_it_saves_and_goes_on_alike(
    trained: Path, base: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice: by a signal amid a step, which is ended first, and with steps behind the last
    checkpoint, as after a kill."""
    batch = Trainer.batch

    def interrupted(self: Trainer, step: int) -> Batch:
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, step)

    monkeypatch.setattr(train_report, "gains", lambda *_: {})
    monkeypatch.setattr(train_report, "tell", lambda *_: None)
    command = [str(base), str(tmp_path / "out"), *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "batch", interrupted)
        assert main(command) == 130
    assert "saved at step 5; the same command goes on from there" in capsys.readouterr().err
    assert main([*command, "--finish"]) == 0
    with ModelFile.open(tmp_path / "out" / "base.gguf", tmp_path / "out" / "heads.gguf") as pair:
        assert pair.config.has_heads
    assert len(losses(tmp_path / "out")) == 5
    with (tmp_path / "out" / "losses.jsonl").open("a") as file:
        file.write("[6, 1.0]\n[7, 2.0]\n")
    answers = tmp_path / "out" / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-7])  # a line that was being written
    assert main(command) == 0
    assert "going on from step 5 of 12" in capsys.readouterr().err
    assert losses(tmp_path / "out") == losses(trained)
    for name in ("heads.gguf", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()


def test_blocks_where_auto_asks_for_them_go_on_alike(begun: Path, tmp_path: Path) -> None:
    """Where cycles go on depends on the steps before, and a checkpoint holds it."""
    answers = read_answers(begun / "answers.jsonl")
    recipe = Recipe(steps=6, rate=1e-3, texts=8, blocks=4, rows=4, mask=261, seed=0, for_auto=True)

    def losses_of(name: str, *parts: int) -> list[float]:
        (tmp_path / name).mkdir()
        found = []
        for steps in parts:
            with ModelFile.open(begun / "base.gguf") as file:
                network = Network(file)
            trainer = Trainer(network, answers, recipe, tmp_path / name, keep_bytes=1 << 20)
            found += [trainer.advance() for _ in range(steps)]
            trainer.save()
        return found

    assert losses_of("whole", 6) == losses_of("parts", 4, 2)


@pytest.mark.slow
def test_killed_and_resumed_it_has_the_same_losses(
    trained: Path, base: Path, tmp_path: Path
) -> None:
    command = [str(base), str(tmp_path / "out"), *SMALL]
    code = [sys.executable, "-m", "orthrus_gguf.cli.train", *command, "--minutes", "0.0001"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(code, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 240
        while len(losses(tmp_path / "out")) < 4 and process.poll() is None:
            assert time.monotonic() < ends
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert main(command) == 0
    assert losses(tmp_path / "out") == losses(trained)


@contextmanager
def full_disk(n_bytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_checkpoint_before(
    base: Path, begun: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (begun / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(Trainer, "run", lambda self, *_: self.save())
    with full_disk(len(before) // 2):
        line = refused(capsys, base, begun, *SMALL)
    assert "checkpoint.pt: cannot be written" in line
    assert "the checkpoint before it is whole: make room" in line
    assert (begun / "checkpoint.pt").read_bytes() == before
    assert not (begun / "checkpoint.tmp").exists()


def test_a_full_disk_leaves_the_answers_before(base: Path, begun: Path, capsys: Captured) -> None:
    (begun / "checkpoint.pt").unlink()
    before = (begun / "answers.jsonl").read_bytes()
    with full_disk(len(before)):
        line = refused(capsys, base, begun, *SMALL, "--texts", "24")
    assert f"{begun}: cannot be written to: " in line
    assert "what is there is kept: make room" in line
    assert (begun / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "13"], "was begun with steps 12, not 13"),
        (["--prompt-tokens", "9"], "holds a training with another prompt_tokens"),
        (["--context", "9"], "expected at least --prompt-tokens + 16"),
        (["--context", "4096"], "was trained on 128 tokens"),
        (["--mask-token", "5000"], "expected an id below 270"),
        (["--prompts", "other"], "holds a training with another prompts"),
        (["--decay", "0.5"], "was begun with decay 0.85, not 0.5"),
        (["--for-auto"], "was begun with for_auto False, not True"),
        (["--dtype", "bfloat16"], "was begun with dtype float32, not bfloat16"),
        (["--device", "cuda"], "--device cuda: no NVIDIA GPU was found"),
    ],
)
def test_flags_that_do_not_fit(
    flags: list[str], message: str, trained: Path, capsys: Captured
) -> None:
    assert message in refused(capsys, trained / "base.gguf", trained, *SMALL, *flags)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("training.json", b'{"base": "other"}', "holds a training with another base"),
        ("training.json", b"{", "training.json: is damaged"),
        ("answers.jsonl", b"[1, 2]\n", "answers.jsonl, line 1: is damaged"),
        ("checkpoint.pt", b"x", "is no checkpoint of ours, or damaged"),
        ("losses.jsonl", b"[1]\n", "losses.jsonl: is damaged"),
    ],
)
def test_folders_that_are_damaged_or_of_another_training(
    name: str, data: bytes, message: str, begun: Path, capsys: Captured
) -> None:
    (begun / name).write_bytes(data)
    assert message in refused(capsys, begun / "base.gguf", begun, *SMALL)
    assert (begun / name).read_bytes() == data


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
    name: str, data: bytes, message: str, trained: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / name).write_bytes(data)
    flags = ("--prompts", tmp_path / name)
    assert message in refused(capsys, trained / "base.gguf", tmp_path / "out", *SMALL, *flags)


def test_prompts_that_are_nowhere(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    flags = ("--prompts", tmp_path / "none")
    line = refused(capsys, trained / "base.gguf", tmp_path / "out", *SMALL, *flags)
    assert "no such file or folder" in line


def test_finishing_what_was_not_begun(begun: Path, capsys: Captured) -> None:
    (begun / "checkpoint.pt").unlink()
    line = refused(capsys, begun / "base.gguf", begun, *SMALL, "--finish")
    assert "there is no checkpoint yet" in line


def test_too_few_texts(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    flags = ("--texts", "1")
    line = refused(capsys, trained / "base.gguf", tmp_path / "out", *SMALL, *flags)
    assert "0 texts to train on and 1 held out" in line


def test_a_base_without_a_mask_token(base: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = (folder / "tokenizer.json").read_text().replace("<|mask|>", "<|other|>")
    (folder / "tokenizer.json").write_text(tokenizer)
    assert "has no mask token; name the id" in refused(capsys, folder, tmp_path / "out", *SMALL)


def test_a_base_that_has_heads(trained: Path, tmp_path: Path, capsys: Captured) -> None:
    whole = tmp_path / "whole.gguf"
    assert converter([str(trained), str(whole)]) == 0
    assert "holds heads already" in refused(capsys, whole, tmp_path / "out", *SMALL)


def test_invented_prompts_are_of_every_kind(base: Path, tmp_path: Path) -> None:
    """They begin as their kind does, and go on as the base said, within the user's turn."""
    folder = shutil.copytree(base, tmp_path / "chat")
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    write_json(
        folder / "tokenizer_config.json", {"eos_token": "<|end|>", "chat_template": template}
    )
    assert converter([str(folder), str(tmp_path / "chat.gguf")]) == 0
    with ModelFile.open(tmp_path / "chat.gguf") as file:
        n_vocab = file.config.n_vocab
        tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=n_vocab)
        invented = Invented(tokenizer, ChatTemplate.from_metadata(file.metadata, tokenizer))
    seen = set()
    for seed in range(60):
        begun = invented.beginning(np.random.default_rng(seed))
        assert tokenizer.decode(begun.tokens) == f"[{begun.words}"
        assert begun.words in KINDS[begun.kind]
        said = tuple(tokenizer.encode(" two cats and a dog?", special=False))
        prompt = invented.prompt(begun, said)
        assert prompt is not None
        words = f"{begun.words} two cats and a dog?".strip()
        assert (prompt.domain, tokenizer.decode(prompt.tokens)) == (begun.kind, f"[{words}]")
        seen.add(begun.kind)
    assert seen == set(KINDS)
    assert invented.prompt(begun, ()) is None
