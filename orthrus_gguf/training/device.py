"""Where training runs: one choice for torch, for the base's own answers, and for compiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.cuda.presence import why_unusable
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, resolve

#: Makes a faster function of one.
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """What does not compile."""
    return function


@dataclass(frozen=True)
class Device:
    """tensors: where torch's are. dtype: of its matrix products. compiler: of a layer of blocks.
    runtime: where the base writes and the heads are tried."""

    tensors: torch.device
    dtype: torch.dtype
    compiler: Compiler
    runtime: RuntimeSettings


def choose(name: str, dtype: str, threads: int | None, say: Callable[[str], None]) -> Device:
    """name: cpu, cuda, or auto, which takes a GPU that can be used. dtype: float32, bfloat16, or
    auto, which takes bfloat16 where it is multiplied faster. Raises OrthrusError for a GPU that
    cannot be used."""
    settings = resolve(RuntimeSettings(RuntimeName(name), threads=threads), say)
    if settings.name is RuntimeName.CPU:
        kind = torch.bfloat16 if _multiplies_bfloat16() else torch.float32
        return Device(torch.device("cpu"), _dtype(dtype, kind), as_it_is, settings)
    reason = why_unusable()
    if reason is not None:
        raise OrthrusError(f"--device {name}: {reason}; or train on the CPU: --device cpu")
    compiler = partial(torch.compile, dynamic=True)
    return Device(torch.device("cuda"), _dtype(dtype, torch.bfloat16), compiler, settings)


def _dtype(name: str, default: torch.dtype) -> torch.dtype:
    return default if name == "auto" else {"float32": torch.float32}.get(name, torch.bfloat16)


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it, as far as torch knows."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))
