"""Kernel tests run in Triton's interpreter, which has to be chosen before triton is imported.

Tests of the compiler start a process of their own, without this variable.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
