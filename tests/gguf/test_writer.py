"""write_files: bytes that the gguf package reads back, and all or nothing."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import writer
from orthrus_gguf.gguf.leftovers import remove_leftovers, temporary_path
from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.gguf.writer import (
    PlannedFile,
    PlannedTensor,
    check_target,
    file_size,
    write_files,
)

KINDS = gguf.GGMLQuantizationType
MATRIX = np.arange(15, dtype=np.float32).reshape(3, 5)  # 60 bytes: padded to 64
BITS = np.arange(64, dtype=np.uint16).reshape(2, 32)
QBLOCKS = np.arange(68, dtype=np.uint8).reshape(2, 34)


def rows(array: NDArray[Any]) -> Callable[[], Iterable[NDArray[Any]]]:
    """The chunks of a tensor: its rows, one by one."""
    return lambda: iter(array)


TENSORS = (
    PlannedTensor("a.weight", (3, 5), KINDS.F32, rows(MATRIX)),
    PlannedTensor("b.weight", (2, 32), KINDS.BF16, rows(BITS)),
    PlannedTensor("c.weight", (2, 32), KINDS.Q8_0, rows(QBLOCKS)),
)


def plan(path: Path, tensors: Sequence[PlannedTensor] = TENSORS, name: str = "x") -> PlannedFile:
    writer = gguf.GGUFWriter(None, "qwen3")
    writer.add_name(name)
    return PlannedFile(path, writer, tensors)


def failing(error: BaseException) -> PlannedTensor:
    """A tensor whose second row cannot be had."""

    def chunks() -> Iterable[NDArray[Any]]:
        yield MATRIX[0]
        raise error

    return PlannedTensor("bad.weight", (3, 5), KINDS.F32, chunks)


def ignore(count: int) -> None:
    """No progress is shown."""


def test_bytes_are_what_gguf_itself_writes(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    counts: list[int] = []
    sizes = write_files([plan(ours)], counts.append)
    writer = gguf.GGUFWriter(theirs, "qwen3")
    writer.add_name("x")
    writer.add_tensor("a.weight", MATRIX)
    writer.add_tensor("b.weight", BITS, raw_dtype=KINDS.BF16)
    writer.add_tensor("c.weight", QBLOCKS, raw_dtype=KINDS.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert ours.read_bytes() == theirs.read_bytes()
    assert sizes == [ours.stat().st_size]
    assert counts == [20] * 3 + [64] * 2 + [34] * 2


def test_our_reader_agrees(tmp_path: Path) -> None:
    write_files([plan(tmp_path / "m.gguf")], ignore)
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert {name: info.shape for name, info in file.tensors.items()} == {
            tensor.name: tensor.shape for tensor in TENSORS
        }
        assert {name: info.n_bytes for name, info in file.tensors.items()} == {
            tensor.name: tensor.n_bytes for tensor in TENSORS
        }
        assert file.data("c.weight").tobytes() == QBLOCKS.tobytes()


def test_nothing_but_the_files_is_left(tmp_path: Path) -> None:
    paths = [tmp_path / "a.gguf", tmp_path / "b.gguf"]
    write_files([plan(path) for path in paths], ignore)
    assert sorted(tmp_path.iterdir()) == paths
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OrthrusError("source"), MemoryError(), ValueError("bug")]
)
def test_failures_of_the_source_leave_nothing(error: BaseException, tmp_path: Path) -> None:
    files = [plan(tmp_path / "a.gguf"), plan(tmp_path / "b.gguf", [failing(error)])]
    with pytest.raises(type(error)) as caught:
        write_files(files, ignore)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_data_is_on_the_disk_before_a_file_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and their folder are synchronized around the renames; otherwise a power cut could
    leave an empty file under the final name."""
    events: list[str] = []
    sync, rename = os.fsync, os.replace

    def record_sync(descriptor: int) -> None:
        events.append("sync")
        sync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    write_files([plan(tmp_path / name) for name in ("a.gguf", "b.gguf")], ignore)
    assert events == ["sync", "sync", "rename", "rename", "sync"]


def test_large_files_reach_the_disk_while_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One synchronization at a time, beside the writing; the last one is for the rest."""
    monkeypatch.setattr(writer, "_SYNC_BYTES", 1)
    running, most, calls = 0, 0, 0
    sync = os.fsync

    def count_sync(descriptor: int) -> None:
        nonlocal running, most, calls
        running, calls = running + 1, calls + 1
        most = max(most, running)
        sync(descriptor)
        running -= 1

    monkeypatch.setattr(os, "fsync", count_sync)
    path = tmp_path / "m.gguf"
    write_files([plan(path)], ignore)
    assert (most, calls > 2) == (1, True)
    monkeypatch.undo()
    write_files([plan(tmp_path / "plain.gguf")], ignore)
    assert path.read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_a_disk_that_fails_while_it_is_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system reports such an error once: it must not get lost in the background."""
    monkeypatch.setattr(writer, "_SYNC_BYTES", 1)
    calls = 0

    def sync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OrthrusError, match="cannot be written: Input/output error"):
        write_files([plan(tmp_path / "m.gguf")], ignore)
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_name(tmp_path: Path) -> None:
    names: list[str] = []

    def look(count: int) -> None:
        names.extend(path.name for path in tmp_path.iterdir())

    write_files([plan(tmp_path / "m.gguf", TENSORS[:1])], look)
    assert set(names) == {f".m.gguf.{os.getpid()}.tmp"}


def test_a_wrong_number_of_bytes_is_a_bug(tmp_path: Path) -> None:
    short = PlannedTensor("a.weight", (3, 5), KINDS.F32, rows(MATRIX[:2]))
    with pytest.raises(ValueError, match=r"a\.weight: 40 bytes for 60"):
        write_files([plan(tmp_path / "m.gguf", [short])], ignore)
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_not_unicode(tmp_path: Path) -> None:
    with pytest.raises(OrthrusError, match=r"m\.gguf: the text .*ud800.* is not valid Unicode"):
        write_files([plan(tmp_path / "m.gguf", name="name \ud800")], ignore)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing_call", [1, 2])
def test_a_rename_that_fails_takes_back_the_others(
    failing_call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing_call:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OrthrusError, match="cannot be written: Input/output error"):
        write_files([plan(tmp_path / name) for name in ("a.gguf", "b.gguf")], ignore)
    assert len(calls) == failing_call
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with pytest.raises(OrthrusError, match=r"m\.gguf: exists already"):
        write_files([plan(path)], lambda count: path.write_text("theirs"))
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_overwriting_waits_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write_files([plan(path, [failing(KeyboardInterrupt())])], ignore, overwrite=True)
    assert path.read_text() == "old"
    write_files([plan(path)], ignore, overwrite=True)
    assert path.read_bytes()[:4] == b"GGUF"


def test_the_temporary_file_of_another_process_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".m.gguf.{os.getpid()}.tmp"
    victim = tmp_path / "victim"
    victim.write_text("precious")
    other.symlink_to(victim)
    with pytest.raises(OrthrusError, match="left by an earlier run or in use by another"):
        write_files([plan(tmp_path / "m.gguf")], ignore)
    assert victim.read_text() == "precious"
    assert other.is_symlink()


def dead_process() -> int:
    """The number of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("number", [dead_process, os.getpid], ids=["another", "of our number"])
def test_leftovers_of_dead_processes_are_removed(number: Callable[[], int], tmp_path: Path) -> None:
    left = temporary_path(tmp_path / "m.gguf", number())
    left.write_bytes(b"half")
    write_files([plan(tmp_path / "m.gguf")], ignore)
    assert list(tmp_path.iterdir()) == [tmp_path / "m.gguf"]


def test_what_is_no_leftover_stays(tmp_path: Path) -> None:
    """Of a living process, of another file, of other programs, links, and folders."""
    dead = dead_process()
    names = [
        f".m.gguf.{os.getppid()}.tmp",
        f".other.gguf.{dead}.tmp",
        f".m.gguf.{dead}.tmp.bak",
        ".m.gguf.x.tmp",
        f"m.gguf.{dead}.tmp",
        f".mXgguf.{dead}.tmp",
        f".m.gguf.{10**30}.tmp",
    ]
    for name in names:
        (tmp_path / name).write_text("theirs")
    (tmp_path / "victim").write_text("precious")
    temporary_path(tmp_path / "m.gguf", dead).symlink_to(tmp_path / "victim")
    before = sorted(tmp_path.iterdir())
    write_files([plan(tmp_path / "m.gguf")], ignore)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "m.gguf"])


def test_a_locked_leftover_stays(tmp_path: Path) -> None:
    """As a writer in another container holds it, whose process number means nothing here."""
    left = temporary_path(tmp_path / "m.gguf", dead_process())
    with left.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_leftovers(tmp_path / "m.gguf")
        assert left.exists()
    remove_leftovers(tmp_path / "m.gguf")
    assert not left.exists()


def test_our_own_temporary_file_is_locked(tmp_path: Path) -> None:
    def look(count: int) -> None:
        remove_leftovers(tmp_path / "m.gguf")
        temporary = temporary_path(tmp_path / "m.gguf", os.getpid())
        with temporary.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    write_files([plan(tmp_path / "m.gguf")], look)
    with (tmp_path / "m.gguf").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_verification_comes_before_the_name(tmp_path: Path) -> None:
    def verify(paths: Sequence[Path]) -> None:
        assert not (tmp_path / "m.gguf").exists()
        with GGUFFile.open(paths[0]) as file:  # complete
            assert file.data("c.weight").tobytes() == QBLOCKS.tobytes()
        if reject:
            raise OrthrusError("no good")

    reject = False
    write_files([plan(tmp_path / "m.gguf")], ignore, verify=verify)
    (tmp_path / "m.gguf").unlink()
    reject = True
    with pytest.raises(OrthrusError, match="no good"):
        write_files([plan(tmp_path / "m.gguf")], ignore, verify=verify)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alignment", [32, 256])
def test_sizes_are_known_before_writing(alignment: int, tmp_path: Path) -> None:
    def aligned() -> PlannedFile:
        file = plan(tmp_path / "m.gguf")
        file.metadata.add_custom_alignment(alignment)
        return file

    size = file_size(aligned())
    assert list(tmp_path.iterdir()) == []
    assert write_files([aligned()], ignore) == [size]
    assert (tmp_path / "m.gguf").stat().st_size == size


def test_space_is_checked_before_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 + 128 + 96 bytes with padding, in each of two files."""
    files = [plan(tmp_path / name, [*TENSORS]) for name in ("a.gguf", "b.gguf")]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=2 * 288 - 1))
    with pytest.raises(OrthrusError, match="needs 576 bytes, 575 are free"):
        write_files(files, lambda count: pytest.fail("has written data"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*args: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(
        OrthrusError, match=r"cannot be written: Permission denied; check the folder"
    ):
        write_files([plan(tmp_path / "m.gguf")], ignore)
    assert list(tmp_path.iterdir()) == []


def test_targets(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, expected in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "file", "there is no folder"),
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path / "file", "exists already"),
    ):
        with pytest.raises(OrthrusError, match=expected):
            check_target(path, overwrite=False)
    check_target(tmp_path / "file", overwrite=True)
    check_target(tmp_path / "new", overwrite=False)
