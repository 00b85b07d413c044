"""Dual-view decoding of Orthrus models from GGUF files. Start reading at `decode.py`."""

from orthrus_gguf import lean as _lean

__version__ = "0.1.0"

_lean.install()  # before any module here imports the package
