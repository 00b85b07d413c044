"""Dual-view decoding of Orthrus models from GGUF files. Start reading at `decode.py`."""

__version__ = "0.1.0"
