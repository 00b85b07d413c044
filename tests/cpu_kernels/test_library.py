"""Which object is loaded, and which is refused; how objects are built."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from orthrus_cpu_kernels import library
from orthrus_cpu_kernels.library import Kernels, NoKernelsError

from tests.cpu_kernels.conftest import KERNELS


def test_the_fastest_is_loaded(
    objects: dict[str, Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(library.ISA, raising=False)
    assert library.load() is next(iter(objects.values()))
    assert list(objects)[-1] == "portable"
    for name, kernels in objects.items():
        monkeypatch.setenv(library.ISA, name)
        assert library.load() is kernels
    assert len({kernels.isa for kernels in objects.values()}) == len(objects)


def test_forms_of_unknown_types(portable: Kernels) -> None:
    assert [portable.form(number) for number in (4, 5, 9, 15, 16, 29, 39, -1, 1000)] == [None] * 9


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in place of the objects'."""
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.delenv(library.ISA, raising=False)
    return tmp_path


def small_object(build: ModuleType, folder: Path, sizes: str, usable: int) -> None:
    """An object with nothing but what is asked first."""
    source = folder / "small.c"
    source.write_text(
        f"void orthrus_sizes(int s[10]) {{ int all[10] = {{{sizes}}}; for (int i = 0; i < 10; i++)"
        f" s[i] = all[i]; }} int orthrus_usable(void) {{ return {usable}; }}"
    )
    command = [build.compiler(), "-shared", "-fPIC", str(source), "-o", str(folder / "avx2.so")]
    subprocess.run(command, check=True)


def test_an_object_of_another_version_is_refused(
    build: ModuleType, objects: dict[str, Kernels], folder: Path
) -> None:
    """One that was left by an older build: structs of other sizes would be read as nonsense."""
    for i in range(len(library.SIZES)):
        sizes = [size + 8 * (number == i) for number, size in enumerate(library.SIZES)]
        small_object(build, folder, ", ".join(map(str, sizes)), 1)
        (folder / "avx2.so").rename(folder / f"{i}.so")
        found = library.open_object(folder / f"{i}.so")
        assert found == "it is of another version; build it anew"


def test_a_machine_without_the_instructions(
    build: ModuleType, objects: dict[str, Kernels], folder: Path
) -> None:
    small_object(build, folder, ", ".join(map(str, library.SIZES)), 0)
    with pytest.raises(NoKernelsError, match=r"avx2: this machine lacks its instructions$"):
        library.load()
    shutil.copy(objects["portable"].path, folder)
    assert library.load().isa == "portable C"


def test_nothing_is_built_without_a_compiler(
    build: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CC", raising=False)
    assert build.build(folder / "objects") == []
    assert not (folder / "objects").exists()
    with pytest.raises(NoKernelsError, match="were not built, for want of a C compiler"):
        library.load()
    done = subprocess.run(
        [sys.executable, str(KERNELS / "build.py")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "no C compiler: install one (cc, gcc or clang)\n")


def test_a_compiler_that_fails_leaves_nothing(
    build: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    cc = folder / "cc"
    cc.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    cc.chmod(0o755)
    monkeypatch.setenv("CC", str(cc))
    assert build.build(folder / "objects", ["portable"]) == []
    assert "portable: not compiled: no such flag" in capsys.readouterr().err
    assert not any((folder / "objects").iterdir())


def test_what_is_up_to_date_is_not_built_again(
    build: ModuleType, objects: dict[str, Kernels], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiles")

    monkeypatch.setattr(subprocess, "run", refuse)
    assert {path.stem for path in build.build(library.FOLDER)} >= set(objects)
