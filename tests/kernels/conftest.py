"""Triton has no builds for macOS: there is nothing to run the kernels with."""

import importlib.util

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
