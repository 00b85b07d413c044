"""The demo drafter beside the demo model, on any runtime, for tests."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from make_file import make_file

from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model

FOLDER = Path(__file__).resolve().parents[2] / "models" / "tiny-dflash-stdlib"


@functools.cache
def drafter_file(type_name: str = "f32") -> Path:
    """The demo drafter as a GGUF, without tokens."""
    path = Path(mkdtemp()) / f"drafter-{type_name}.gguf"
    make_file(FOLDER, path, "--type", type_name)
    return path


@contextmanager
def stand_in_pair(
    target: Path, drafter: Path, *, capture: Any = None, **settings: Any
) -> Iterator[ModelWithDrafter]:
    """The same on the CUDA runtime, its kernels replaced by their plain references. capture: how
    passes of either become graphs."""
    from cuda_models import remembered_weights

    from orthrus_gguf.runtime.cuda.drafter import CudaNetwork
    from orthrus_gguf.runtime.cuda.model import CudaModel

    with ExitStack() as stack:
        stack.enter_context(remembered_weights())
        file = stack.enter_context(ModelFile.open(target))
        beside = stack.enter_context(DrafterFile.open(drafter, file.config, file.metadata))
        options = {"device": "cpu", "capture": capture, **settings}
        model = CudaModel.load(file, drafter=beside, **options)
        network = CudaNetwork.load_for(beside, model, capture)
        yield stack.enter_context(closing(ModelWithDrafter(model, network)))


@contextmanager
def loaded_pair(
    target: Path, drafter: Path, runtime: RuntimeName, **settings: Any
) -> Iterator[ModelWithDrafter]:
    """A model with a drafter beside it, on one thread."""
    with ExitStack() as stack:
        file = stack.enter_context(ModelFile.open(target))
        beside = stack.enter_context(DrafterFile.open(drafter, file.config, file.metadata))
        asked = RuntimeSettings(runtime, threads=1, **settings)
        model = stack.enter_context(closing(load_model(file, asked, drafter=beside)))
        assert isinstance(model, ModelWithDrafter)
        yield model
