"""The CPU runtime: one ggml graph per pass, weights used where they lie in the mapped file."""

from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.model import GgmlModel

__all__ = ["GgmlCache", "GgmlModel"]
