"""Objects of the CPU kernels: built once, where there is a compiler."""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from orthrus_cpu_kernels import library
from orthrus_cpu_kernels.library import NAMES, Kernels

from tests.conftest import ROOT

KERNELS = ROOT / "kernels/orthrus_cpu_kernels"


@pytest.fixture(scope="session")
def build() -> ModuleType:
    """The build script, which is no part of the package's import."""
    spec = importlib.util.spec_from_file_location("build_kernels", KERNELS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def objects(build: ModuleType) -> dict[str, Kernels]:
    """Name → object, of all that this machine can run; at least `portable`."""
    if build.compiler() is None:
        pytest.skip("no C compiler (cc, gcc or clang): the CPU kernels are not tested")
    library.FOLDER.mkdir(exist_ok=True)
    with (library.FOLDER / ".lock").open("w") as lock:  # of several test processes, one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        build.build(library.FOLDER)
    found = {}
    for name in NAMES:
        path = library.FOLDER / f"{name}.so"
        if path.exists():
            kernels = library.open_object(path)
            assert isinstance(kernels, Kernels) or "lacks" in kernels, kernels
            if isinstance(kernels, Kernels):
                found[name] = kernels
    assert "portable" in found
    return found


@pytest.fixture(scope="session")
def portable(objects: dict[str, Kernels]) -> Kernels:
    """The oracle: one lane after the other."""
    return objects["portable"]


Make = Callable[..., list[str]]


@pytest.fixture(scope="session")
def driver(build: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`driver(compiler, *flags)`: the command of `driver.c`, compiled with the kernels."""
    folder = tmp_path_factory.mktemp("driver")

    @functools.cache
    def make(compiler: str, *flags: str) -> list[str]:
        path = folder / f"driver-{abs(hash((compiler, *flags))):x}"
        common = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
        command = [compiler, *common, "-Wextra", "-Werror", *flags, f"-I{KERNELS / 'src'}"]
        command += ["-x", "c", "-", str(Path(__file__).with_name("driver.c")), "-o", str(path)]
        done = subprocess.run(
            [*command, "-lm", "-lpthread"], input=build.TOGETHER, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr, done.stderr
        return [str(path)]

    return make
