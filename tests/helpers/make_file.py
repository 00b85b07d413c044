"""Files that tests start from, made by the converter."""

from __future__ import annotations

import contextlib
import io

from orthrus_converters.cli import main


def make_file(*argv: object) -> None:
    """Run the converter. What it prints is not among what a test captures of its own commands,
    whichever test happens to be the first that needs the file; if it fails, the error shows it."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(word) for word in argv])
    if code != 0:
        raise RuntimeError(f"the converter ended with {code}: {said.getvalue()}")
