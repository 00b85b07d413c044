"""Runtimes: implementations of the `Model` protocol of `orthrus_gguf.segments`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import Enum

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model_file import ModelFile
from orthrus_gguf.segments import Model


class RuntimeName(Enum):
    """Values of `--runtime`. AUTO takes the fastest one that this machine has."""

    AUTO = "auto"
    CPU = "cpu"
    REFERENCE = "reference"


@dataclass(frozen=True)
class RuntimeSettings:
    """How to run a model; None means the runtime's own default.

    threads: CPU threads. cache_type_k, cache_type_v: number format of the key/value cache.
    """

    name: RuntimeName = RuntimeName.AUTO
    threads: int | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None


def load_model(file: ModelFile, settings: RuntimeSettings) -> Model:
    """Load `file` on the runtime that `settings` name. Imports only what that runtime needs.

    Raises OrthrusError when the runtime is not installed, cannot take a setting, or cannot run
    the model.
    """
    if settings.name is RuntimeName.REFERENCE:
        return _load_reference(file, settings)
    from orthrus_gguf.runtime.ggml.model import GgmlModel

    return GgmlModel.load(
        file,
        threads=settings.threads,
        cache_type_k=settings.cache_type_k or "f16",
        cache_type_v=settings.cache_type_v or "f16",
    )


def _load_reference(file: ModelFile, settings: RuntimeSettings) -> Model:
    if importlib.util.find_spec("torch") is None:
        raise OrthrusError(
            "--runtime reference needs PyTorch: pip install 'orthrus-gguf[reference]'"
        )
    for flag, value in (("-ctk", settings.cache_type_k), ("-ctv", settings.cache_type_v)):
        if value not in (None, "f32"):
            raise OrthrusError(f"{flag} {value}: the reference runtime keeps its cache in f32 only")
    import torch

    from orthrus_gguf.runtime.reference import ReferenceModel

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    return ReferenceModel(file)
