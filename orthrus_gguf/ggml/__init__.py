"""ggml from Python: find and check the library, call it, quantize with it."""
