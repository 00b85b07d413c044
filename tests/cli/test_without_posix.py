"""What Windows lacks is missed nowhere: commands run without the modules and functions of POSIX.

This is not a test on Windows; it shows only that nothing asks for what is not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PRELUDE = """
import ctypes, mmap, os, signal, sys
for name in ("fcntl", "resource", "termios", "tty", "pwd", "grp", "readline"):
    sys.modules[name] = None
class Memory:  # what kernel32 does with it
    @staticmethod
    def GlobalMemoryStatusEx(status):
        status._obj.total = 8 << 30
known = ctypes.CDLL
ctypes.CDLL = lambda name, *a, **k: Memory if name == "kernel32" else known(name, *a, **k)
for module, names in (
    (os, ("sysconf", "sched_getaffinity", "O_NOFOLLOW", "O_NONBLOCK", "getuid", "geteuid")),
    (mmap, ("MAP_PRIVATE", "MAP_ANONYMOUS", "MADV_HUGEPAGE", "MADV_WILLNEED")),
    (signal, ("SIGHUP", "pthread_sigmask", "SIGUSR1", "SIGALRM", "setitimer")),
):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
from orthrus_gguf.entry import start
command = sys.argv.pop(1)
start(command)
"""


def run(command: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE, command, *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.mark.parametrize("runtime", ["cpu", "ggml"])
def test_text_is_the_same(runtime: str, demo_file: Callable[..., Path]) -> None:
    words = [demo_file("q8_0"), "-p", "import ", "-n", "12", "--temp", "0", "--runtime", runtime]
    without = run("run", *words)
    assert without.returncode == 0, without.stderr
    command = [sys.executable, "-m", "orthrus_gguf", "run", *map(str, words)]
    usual = subprocess.run(command, capture_output=True, text=True, check=True)
    assert without.stdout == usual.stdout != ""


def test_files_are_written_and_leftovers_removed(checkpoint: Path, tmp_path: Path) -> None:
    left = tmp_path / ".new.gguf.999999.tmp"
    left.write_bytes(b"left")
    done = run("convert", checkpoint, tmp_path / "new.gguf")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["new.gguf"]
    shown = run("inspect", tmp_path / "new.gguf")
    assert shown.returncode == 0, shown.stderr
