"""The command around the conversion: output files, interrupts, full disks, what it prints."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from hf_checkpoint import CONFIG, shapes, write_checkpoint
from orthrus_converters.cli import main

#: Runs the command with `{before}` executed first.
PROGRAM = """
import sys
from orthrus_converters import cli
{before}
sys.exit(cli.main(sys.argv[1:]))
"""

#: Stops after the first piece of data, in the middle of the file.
PAUSE = """
import time, tqdm
def pause(self, count):
    print("writing", flush=True)
    time.sleep(60)
cli.tqdm.update = pause
"""

#: What a shell's `ulimit -f` does: a write beyond the limit fails as on a full disk.
LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""


def start(before: str, *argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(before=before), *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("flags", [(), ("--split",)])
def test_interrupt_in_the_middle(flags: tuple[str, ...], tiny: Path, out: Path) -> None:
    process = start(PAUSE, tiny, out / "model.gguf", *flags)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert [path.suffix for path in out.iterdir()] == [".tmp"] * (1 + len(flags))
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr == "orthrus-convert: interrupted, nothing was written\n"
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_clean_up_too(number: signal.Signals, tiny: Path, out: Path) -> None:
    process = start(PAUSE, tiny, out / "model.gguf", "--type", "q4_0")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert stderr == "orthrus-convert: terminated, nothing was written\n"
    assert list(out.iterdir()) == []


def test_the_next_run_removes_what_a_killed_one_left(
    tiny: Path, out: Path, convert: Callable[..., Any]
) -> None:
    process = start(PAUSE, tiny, out / "model.gguf", "--split")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    running = convert(tiny, "--split")  # beside the other, whose files it leaves alone
    assert running.code == 0
    assert [path.suffix for path in sorted(out.iterdir())] == [".tmp", ".tmp", ".gguf", ".gguf"]
    process.kill()
    process.communicate(timeout=30)
    assert len([path for path in out.iterdir() if path.suffix == ".tmp"]) == 2
    before = {path.name: path.read_bytes() for path in out.glob("*.gguf")}
    run = convert(tiny, "--split", "--overwrite")
    assert run.files == ["model-heads.gguf", "model.gguf"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_dry_run_writes_nothing_and_knows_all_sizes(
    tiny: Path, out: Path, convert: Callable[..., Any]
) -> None:
    flags = ("--split", "--type", "q4_k_m")
    run = convert(tiny, *flags, "--dry-run")
    assert (run.code, run.stderr, run.files) == (0, "", [])
    lines = run.stdout.splitlines()
    assert convert(tiny, *flags).code == 0
    for name in ("model.gguf", "model-heads.gguf"):
        tensors = gguf.GGUFReader(out / name).tensors
        size = (out / name).stat().st_size
        start = lines.index(f"{out / name}: {len(tensors)} tensors, {size:,} bytes") + 1
        for line, tensor in zip(lines[start:], tensors, strict=False):
            shape = " x ".join(map(str, reversed(tensor.shape.tolist())))
            assert line.split("  ")[1].strip() == tensor.name
            assert f" {shape}  " in line
            assert f"-> {tensor.tensor_type.name} " in line
            assert line.endswith(f" {tensor.n_bytes:,} bytes")
    assert f"  plan  {out / 'model.gguf'}" in run.stdout
    assert "note: " in run.stdout  # rows of 64 are no multiple of 256


def test_a_dry_run_finds_the_same_faults(
    tiny: Path, out: Path, convert: Callable[..., Any]
) -> None:
    (out / "model.gguf").write_text("old")
    run = convert(tiny, "--dry-run")
    assert run.code == 1
    assert "exists already" in run.stderr


@pytest.mark.parametrize("limit", [1000, 100_000, 300_000])
@pytest.mark.parametrize("flags", [(), ("--split",)])
def test_full_disk(limit: int, flags: tuple[str, ...], tiny: Path, out: Path) -> None:
    """The limit is reached in the header, in the tensors, and near the end (of the base)."""
    process = start(LIMIT.format(limit=limit), tiny, out / "model.gguf", "--type", "f32", *flags)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert "model.gguf: cannot be written: File too large; free some space" in stderr
    assert list(out.iterdir()) == []


def test_a_failed_run_keeps_the_old_file(tiny: Path, out: Path) -> None:
    (out / "model.gguf").write_text("old")
    process = start(LIMIT.format(limit=1000), tiny, out / "model.gguf", "--overwrite")
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert {path.name: path.read_text() for path in out.iterdir()} == {"model.gguf": "old"}


def test_read_only_folder(
    tiny: Path, out: Path, convert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the refusal is the system's only where it is not root."""
    out.chmod(0o555)
    if os.geteuid() == 0:
        real = os.open

        def deny(path: Any, *args: Any) -> int:
            if Path(path).parent == out:
                raise PermissionError(errno.EACCES, "Permission denied")
            return real(path, *args)

        monkeypatch.setattr(os, "open", deny)
    run = convert(tiny, "--type", "q4_0")
    out.chmod(0o755)
    assert run.code == 1
    assert "model.gguf: cannot be written: Permission denied" in run.stderr
    assert run.files == []


def test_not_enough_space_is_said_before_writing(
    tiny: Path, convert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    total = sum(tensor.n_bytes for tensor in gguf.GGUFReader(_converted(tiny, convert)).tensors)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=total - 1))
    run = convert(tiny, "--overwrite")
    assert run.code == 1
    assert f"needs {total:,} bytes, {total - 1:,} are free" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert run.files == ["model.gguf"]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=total))
    assert convert(tiny, "--overwrite").code == 0


def _converted(folder: Path, convert: Callable[..., Any]) -> Path:
    run = convert(folder)
    assert run.code == 0
    return Path(run.stdout.strip())


def test_existing_output(tiny: Path, out: Path, convert: Callable[..., Any]) -> None:
    (out / "model-heads.gguf").write_text("precious")
    run = convert(tiny, "--split")
    assert run.code == 1
    assert "model-heads.gguf: exists already; choose another name or pass --overwrite" in run.stderr
    assert run.files == ["model-heads.gguf"]
    assert (out / "model-heads.gguf").read_text() == "precious"
    assert convert(tiny, "--split", "--overwrite").code == 0
    assert (out / "model-heads.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_output_that_is_an_input(
    name: str, tiny: Path, out: Path, convert: Callable[..., Any]
) -> None:
    """Also through a link, and also with --overwrite."""
    before = (tiny / name).read_bytes()
    for make in (Path.symlink_to, Path.hardlink_to):
        make(out / "model.gguf", tiny / name)
        run = convert(tiny, "--overwrite")
        assert run.code == 1
        assert "model.gguf: is an input of this conversion; choose another name" in run.stderr
        assert (tiny / name).read_bytes() == before
        (out / "model.gguf").unlink()


def test_output_that_cannot_be(
    tiny: Path, out: Path, convert: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny), str(out)]) == 1
    assert "is a folder; name the file to write" in capsys.readouterr().err
    assert main([str(tiny), str(out / "no" / "m.gguf")]) == 1
    assert "create it first" in capsys.readouterr().err
    assert list(out.iterdir()) == []


def test_output_beside_the_checkpoint(tiny: Path, convert: Callable[..., Any]) -> None:
    """As people are used to: the GGUF in the model's folder, made again later."""
    path = tiny / "model.gguf"
    assert main([str(tiny), str(path)]) == 0
    assert main([str(tiny), str(path), "--overwrite"]) == 0


def test_what_is_printed(tmp_path: Path, out: Path, convert: Callable[..., Any]) -> None:
    run = convert(write_checkpoint(tmp_path / "m"), "--split", "--type", "q8_0")
    assert run.code == 0
    assert run.stdout == f"{out / 'model.gguf'}\n{out / 'model-heads.gguf'}\n"
    assert run.files == ["model-heads.gguf", "model.gguf"]
    # Matrices: 2 of 270 * 64, per layer 24,576 of attention in each view and 18,432 of MLP.
    # Norms: 64, and per layer 2 of 64 and 4 of 32.
    heads = 2 * (24_576 * 34 // 32 + 2 * 32 * 4)
    base = (2 * 270 * 64 + 2 * (24_576 + 18_432)) * 34 // 32 + 4 * (64 + 2 * (2 * 64 + 2 * 32))
    sizes = [(out / name).stat().st_size / 1000 for name in ("model.gguf", "model-heads.gguf")]
    assert run.stderr.splitlines() == [
        "  Q8_0    24 tensors     180 kB",
        "   F32    13 tensors     2.3 kB",
        f" heads  {heads / 1000:.3g} kB on top of a base of {base / 1000:.3g} kB (+40.6%)",
        f" wrote  {out / 'model.gguf'}  {sizes[0]:.3g} kB",
        f" wrote  {out / 'model-heads.gguf'}  {sizes[1]:.3g} kB",
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("orthrus-gguf ")


def test_module_is_the_command(tiny: Path, out: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "orthrus_converters", str(tiny), str(out / "m.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"{out / 'm.gguf'}\n"
    assert (out / "m.gguf").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_memory_does_not_grow_with_the_model(tmp_path: Path, out: Path) -> None:
    """A matrix of 67 MB, which is 134 MB as float32, in much less than that."""
    size = {"vocab_size": 131_072, "hidden_size": 256, "tie_word_embeddings": True}
    config = {**CONFIG, **size}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes(config).items()}
    folder = write_checkpoint(tmp_path / "big", config, weights)
    program = (
        "import resource, sys; from orthrus_converters.cli import main;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "code = main(sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(out / "m.gguf"), "--type", "q8_0"],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, code = map(int, result.stdout.splitlines()[-1].split())
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    assert code == 0
    assert grown * unit < 64e6


def test_a_bare_type_is_told_its_flag(tiny: Path, out: Path, convert: Callable[..., Any]) -> None:
    """As llama-quantize takes it."""
    run = convert(tiny, "q4_k_m")
    assert (run.code, run.files) == (1, [])
    assert "q4_k_m: a type goes with its flag: --type q4_k_m" in run.stderr
    assert "did you mean q4_k_m?" in convert(tiny, "--type", "q4_km").stderr
    assert "what is more? One MODEL and one OUT.gguf" in convert(tiny, "more").stderr


def test_type_flags_need_a_tensor(checkpoint: Path, convert: Callable[..., Any]) -> None:
    """The demo's embedding is tied: it is the output matrix too, unless it has its own flag."""
    assert convert(checkpoint, "--output-tensor-type", "q8_0", "--dry-run").code == 0
    flags = ("--output-tensor-type", "q8_0", "--token-embedding-type", "q8_0")
    run = convert(checkpoint, *flags)
    assert (run.code, run.files) == (1, [])
    assert "--output-tensor-type q8_0: without an output matrix of its own" in run.stderr
