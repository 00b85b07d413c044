"""Kernel tests run in Triton's interpreter, which has to be chosen before triton is imported.

Tests of the compiler start a process of their own, without this variable.
"""

import importlib.util
import os

os.environ["TRITON_INTERPRET"] = "1"

# Triton has no builds for macOS: there is nothing to run the kernels with.
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
