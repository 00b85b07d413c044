"""Models on the ggml runtime, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
from synthetic_model import model_shape, uniform, write_model

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.ggml.model import GgmlModel

TYPES = gguf.GGMLQuantizationType


@contextmanager
def loaded(path: Path, **settings: Any) -> Iterator[GgmlModel]:
    """The model of a file, on one thread unless said."""
    with (
        ModelFile.open(path) as file,
        GgmlModel.load(file, **{"threads": 1, **settings}) as model,
    ):
        yield model


def small_file(
    folder: Path, qtype: gguf.GGMLQuantizationType, config: ModelConfig | None = None
) -> Path:
    """A small model with random weights, all of one type."""
    path = folder / f"{qtype.name}.gguf"
    write_model(load_library().api, path, config or model_shape(), uniform(qtype))
    return path
