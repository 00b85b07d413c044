"""Runtimes: implementations of the `Model` protocol of `orthrus_gguf.runtime.protocol`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum

from orthrus_cpu_kernels.library import Kernels, NoKernelsError, load

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.beside import ModelWithDrafter, Network
from orthrus_gguf.runtime.cpu.weights import why_not
from orthrus_gguf.runtime.cuda.presence import (
    INSTALL,
    extra_installed,
    gpu_visible,
    why_unusable,
)
from orthrus_gguf.runtime.limits import thread_counts, usable_threads
from orthrus_gguf.runtime.mtp import MtpNetwork
from orthrus_gguf.runtime.protocol import Model

#: Called with the bytes read so far and in all.
Progress = Callable[[int, int], None]


class RuntimeName(Enum):
    """Values of `--runtime`. AUTO takes the fastest one that this machine has."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"
    GGML = "ggml"
    REFERENCE = "reference"


#: Those that run MTP blocks.
MTP_RUNTIMES = (RuntimeName.REFERENCE, RuntimeName.CPU, RuntimeName.CUDA)


@dataclass(frozen=True)
class RuntimeSettings:
    """How to run a model; None means the runtime's own default.

    threads: CPU threads. cache_type_k, cache_type_v: number format of the key/value cache.
    device: of the cuda runtime, `cuda` or `cuda:N`. context: tokens of the cache that will be asked
    for, so that a runtime can tell before loading whether it fits.
    """

    name: RuntimeName = RuntimeName.AUTO
    threads: int | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    device: str | None = None
    context: int | None = None


def load_model(
    file: ModelFile,
    settings: RuntimeSettings,
    *,
    drafter: DrafterFile | MtpFile | None = None,
    on_progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Model:
    """Load `file` on the runtime that `settings` name. Imports only what that runtime needs.

    drafter: to run beside it; the model is then a `ModelWithDrafter`.

    on_progress: called while weights are read, by runtimes that copy them.
    say: receives one line when AUTO leaves a GPU unused, and how far the compiling of kernels is;
    default: stderr.
    Raises OrthrusError when the runtime is not installed, cannot take a setting, or cannot run
    the model.
    """
    settings = resolve(settings, say or _to_stderr, file.config)
    _check_kinds(file, settings.name, drafter)
    if settings.device is not None and settings.name is not RuntimeName.CUDA:
        raise OrthrusError(
            f"--device {settings.device}: only --runtime cuda has devices, not "
            f"{settings.name.value}"
        )
    if settings.name is RuntimeName.REFERENCE:
        return _load_reference(file, settings, drafter)
    if settings.name is RuntimeName.CPU:
        return _load_cpu(file, settings, say or _to_stderr, drafter)
    if settings.name is RuntimeName.CUDA:
        return _load_cuda(file, settings, on_progress, say or _to_stderr, drafter)
    if drafter is not None:
        raise OrthrusError(
            "--drafter: --runtime ggml has none; use --runtime auto, which takes one that has"
        )
    return _load_ggml(file, settings)


def resolve(
    settings: RuntimeSettings, say: Callable[[str], None], config: ModelConfig | None = None
) -> RuntimeSettings:
    """The settings with AUTO replaced: cuda where a GPU can be used or a device is named, else cpu.

    config: of the model that will run; on a GPU only if the kernels take its heads. A GPU that
    stays unused is worth a line to `say`; machines without one hear nothing.
    """
    if settings.name is not RuntimeName.AUTO:
        return settings
    if settings.device is not None:
        return replace(settings, name=RuntimeName.CUDA)
    if not gpu_visible():
        return replace(settings, name=RuntimeName.CPU)
    if not extra_installed():
        say(
            "this machine has an NVIDIA GPU, but the packages to use it are missing: "
            f"{INSTALL} (running on the CPU)"
        )
        return replace(settings, name=RuntimeName.CPU)
    reason = why_unusable()
    if reason is not None:
        say(f"running on the CPU, since the GPU cannot be used: {reason}")
        return replace(settings, name=RuntimeName.CPU)
    if config is not None:
        from orthrus_gguf.runtime.cuda.cache import check_head_size

        try:
            check_head_size(config)
        except OrthrusError as error:
            say(f"running on the CPU: {str(error).partition(';')[0]}")
            return replace(settings, name=RuntimeName.CPU)
    return replace(settings, name=RuntimeName.CUDA)


def fitting_context(
    file: ModelFile,
    settings: RuntimeSettings,
    wanted: int,
    say: Callable[[str], None],
    drafter: DrafterFile | MtpFile | None = None,
) -> int:
    """How many of the `wanted` tokens of context fit where the model will run: all of them, but on
    a GPU; `say` hears of it if fewer do. settings: resolved. drafter: beside the model. Raises
    OrthrusError like `load_model`.
    """
    if settings.name is not RuntimeName.CUDA or why_unusable(settings.device) is not None:
        return wanted
    _check_kinds(file, settings.name, drafter)
    from orthrus_gguf.runtime.cuda.fit import fitting_context

    types = (settings.cache_type_k or "f16", settings.cache_type_v or "f16")
    return fitting_context(file, settings.device, types, wanted, say, drafter=drafter)


def _check_kinds(file: ModelFile, name: RuntimeName, drafter: DrafterFile | MtpFile | None) -> None:
    """Raise OrthrusError for layers or drafters that a runtime does not know."""
    if isinstance(drafter, MtpFile) and name not in MTP_RUNTIMES:
        raise OrthrusError(
            f"{drafter.paths[0]}: MTP blocks do not run on --runtime {name.value} yet; use"
            " --runtime cpu, or --no-mtp"
        )
    if file.config.hybrid is not None and name is RuntimeName.GGML:
        raise OrthrusError(
            f"{file.paths[0]}: models of architecture {file.config.architecture.name} do not run on"
            f" --runtime {name.value} yet; use --runtime cpu"
        )


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def kernels_for(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> Kernels | str:
    """The native kernels that `--runtime cpu` takes for a model; in words why it takes ggml."""
    try:
        kernels = load()
    except NoKernelsError as error:
        return str(error)
    return why_not(config, tensors, kernels) or kernels


def _load_cpu(
    file: ModelFile,
    settings: RuntimeSettings,
    say: Callable[[str], None],
    drafter: DrafterFile | MtpFile | None,
) -> Model:
    """The native kernels, or ggml in their place, with a line that says why; it runs no drafter."""
    kernels = kernels_for(file.config, file.tensors)
    if drafter is not None and not isinstance(kernels, str):
        kernels = kernels_for(drafter.config, drafter.tensors)
    if isinstance(kernels, str):
        if file.config.hybrid is not None:
            raise OrthrusError(
                f"{file.paths[0]}: models of architecture {file.config.architecture.name} need the"
                f" native kernels, which cannot run it: {kernels}; or use --runtime reference"
            )
        if drafter is not None:
            raise OrthrusError(
                f"--drafter {drafter.paths[0]}: needs the native kernels, which cannot run it:"
                f" {kernels}; convert model and drafter to another type, or leave it out"
            )
        say(f"running on ggml, which is slower: {kernels}")
        return _load_ggml(file, settings)
    from orthrus_gguf.runtime.cpu.model import CpuModel

    threads = usable_threads(settings.threads, say)
    model = CpuModel.load(
        file,
        kernels,
        threads=threads,
        thread_counts=() if settings.threads else thread_counts(threads),
        cache_type_k=settings.cache_type_k or "f16",
        cache_type_v=settings.cache_type_v or "f16",
    )
    if drafter is None:
        return model
    from orthrus_gguf.runtime.cpu.drafter import CpuNetwork
    from orthrus_gguf.runtime.cpu.mtp import CpuBlock

    with ExitStack() as stack:
        stack.callback(model.close)
        network: Network
        if isinstance(drafter, MtpFile):
            network = MtpNetwork(CpuBlock(drafter, model), drafter.beside, drafter.taps)
        else:
            network = CpuNetwork(drafter, model)
        stack.pop_all()
    return ModelWithDrafter(model, network)


def _load_ggml(file: ModelFile, settings: RuntimeSettings) -> Model:
    from orthrus_gguf.runtime.ggml.model import GgmlModel

    return GgmlModel.load(
        file,
        threads=settings.threads,
        cache_type_k=settings.cache_type_k or "f16",
        cache_type_v=settings.cache_type_v or "f16",
    )


def _load_cuda(
    file: ModelFile,
    settings: RuntimeSettings,
    on_progress: Progress | None,
    say: Callable[[str], None],
    drafter: DrafterFile | MtpFile | None,
) -> Model:
    reason = why_unusable(settings.device)
    if reason is not None:
        raise OrthrusError(f"--runtime cuda cannot run here: {reason}")
    from orthrus_gguf.runtime.cuda.model import CudaModel

    model = CudaModel.load(
        file,
        device=settings.device,
        context=settings.context,
        cache_type_k=settings.cache_type_k or "f16",
        cache_type_v=settings.cache_type_v or "f16",
        on_progress=on_progress,
        say=say,
        drafter=drafter,
    )
    if drafter is None:
        return model
    from orthrus_gguf.runtime.cuda.drafter import CudaNetwork
    from orthrus_gguf.runtime.cuda.mtp import CudaBlock

    with ExitStack() as stack:
        stack.callback(model.close)
        network: Network
        if isinstance(drafter, MtpFile):
            network = MtpNetwork(CudaBlock.load_for(drafter, model), drafter.beside, drafter.taps)
        else:
            network = CudaNetwork.load_for(drafter, model)
        stack.pop_all()
    return ModelWithDrafter(model, network)


def _load_reference(
    file: ModelFile, settings: RuntimeSettings, drafter: DrafterFile | MtpFile | None
) -> Model:
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
    model = ReferenceModel(file)
    if drafter is None:
        return model
    if isinstance(drafter, MtpFile):
        from orthrus_gguf.runtime.reference_mtp import ReferenceBlock

        block = ReferenceBlock(drafter, model)
        return ModelWithDrafter(model, MtpNetwork(block, drafter.beside, drafter.taps))
    from orthrus_gguf.runtime.reference_drafter import ReferenceNetwork

    return ModelWithDrafter(model, ReferenceNetwork(drafter, model))
