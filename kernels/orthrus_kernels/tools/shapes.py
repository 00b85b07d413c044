"""Shapes and weight types that are timed and tuned: those of the models that people run."""

from __future__ import annotations

from dataclasses import dataclass

from orthrus_kernels.tools.gpu_check_matmul import MAIN_TYPES


@dataclass(frozen=True)
class Model:
    """The matrices that one pass reads: name -> (rows, k, times)."""

    name: str
    matrices: dict[str, tuple[int, int, int]]


def qwen3(name: str, layers: int, width: int, heads: int, hidden: int) -> Model:
    """A Qwen3 of head size 128 and 8 KV heads."""
    return Model(
        name,
        {
            "qkv": ((heads + 16) * 128, width, layers),
            "o": (width, heads * 128, layers),
            "gate+up": (2 * hidden, width, layers),
            "down": (width, hidden, layers),
            "head": (151936, width, 1),
        },
    )


MODELS = (
    qwen3("1.7B", 28, 2048, 16, 6144),
    qwen3("4B", 36, 2560, 32, 9728),
    qwen3("8B", 36, 4096, 32, 12288),
)

TIMED_TYPES = MAIN_TYPES
