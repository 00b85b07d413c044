"""Find ggml, check its version, test it, and hand out its API.

Looked up in this order: the folder named by ORTHRUS_GGML_DIR, the `lib` folder of an installed
llama-cpp-python (built for this very machine, so often faster), the libggml-python wheel that this
project depends on. A folder named by the user must work; the other two are tried in turn.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml import selftest
from orthrus_gguf.ggml.binding import Ggml

ENVIRONMENT = "ORTHRUS_GGML_DIR"

#: Versions whose function signatures are the ones in binding.py (both ends are tested). Below,
#: functions are missing; above, a changed one could crash the process before the self-test tells.
OLDEST, NEWEST = (0, 20), (0, 26)

_PIP_HINT = "install the one that is tested: pip install 'libggml-python>=0.20.2,<0.21'"


@dataclass(frozen=True)
class Library:
    """A loaded ggml that passed its self-test.

    path: the file that holds the CPU backend.
    """

    api: Ggml
    version: str
    path: Path


class _UnusableError(Exception):
    """Why one candidate cannot be used."""


@functools.cache
def load_library() -> Library:
    """The first usable ggml, loaded once per process. Raises OrthrusError when there is none."""
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        try:
            return open_library(Path(chosen))
        except _UnusableError as reason:
            raise OrthrusError(
                f"{ENVIRONMENT}={chosen}: {reason}; name another folder, "
                f"or unset it and {_PIP_HINT}"
            ) from None
    reasons: list[str] = []
    for folder in _installed_folders():
        opened = _try(folder)
        if isinstance(opened, Library):
            return opened
        reasons.append(f"{folder}: {opened}")
    found = "; ".join(reasons) or "none is installed"
    raise OrthrusError(f"no usable ggml library ({found}); {_PIP_HINT}")


def _try(folder: Path) -> Library | str:
    """The library in `folder`, or why it cannot be used."""
    try:
        return open_library(folder)
    except _UnusableError as reason:
        return str(reason)


def open_library(folder: Path) -> Library:
    """Load and check the ggml in `folder`. Raises _UnusableError, saying what is wrong with it."""
    path = find_cpu_library(folder)
    if path is None:
        raise _UnusableError("holds no libggml-cpu")
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        raise _UnusableError(f"cannot be loaded ({error})") from None
    version = _version(handle)
    try:
        api = Ggml(handle)
    except AttributeError as error:
        raise _UnusableError(f"ggml {version} in {path} lacks a function ({error})") from None
    failure = selftest.failure(api)
    if failure is not None:
        raise _UnusableError(f"ggml {version} in {path} fails its self-test: {failure}")
    return Library(api, version, path)


def find_cpu_library(folder: Path) -> Path | None:
    """The CPU backend in `folder`: the unversioned name if there, else the first versioned one."""
    pattern = "libggml-cpu*.dylib" if sys.platform == "darwin" else "libggml-cpu.so*"
    return min(folder.glob(pattern), key=lambda path: (len(path.name), path.name), default=None)


def _installed_folders() -> list[Path]:
    """Library folders of the installed packages that carry ggml, in lookup order."""
    folders = []
    for package, names in (("llama_cpp", ("lib",)), ("libggml", ("lib64", "lib"))):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or ()) if spec else ():
            folders += [Path(root) / name for name in names if (Path(root) / name).is_dir()]
    return folders


def _version(handle: ctypes.CDLL) -> str:
    """The version string, once it is known to be in range."""
    try:
        function = handle.ggml_version
    except AttributeError:
        raise _UnusableError("is too old to tell its version") from None
    function.restype = ctypes.c_char_p
    text = (function() or b"").decode("ascii", "replace")
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None or not OLDEST <= (int(match[1]), int(match[2])) <= NEWEST:
        low, high = (".".join(map(str, bound)) for bound in (OLDEST, NEWEST))
        raise _UnusableError(f"is ggml {text or 'of unknown version'}, expected {low} to {high}")
    return text
