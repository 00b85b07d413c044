"""Is there a GPU, and can this installation use it? Answered without torch where possible."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from orthrus_gguf.errors import OrthrusError

INSTALL = "pip install 'orthrus-gguf[cuda]'"

#: The oldest GPU that the kernels are compiled for (Ampere).
MIN_CAPABILITY = 80

#: GPUs whose MMAs (tcgen05) miscompute products of several dots in one accumulator, as ours are,
#: with the Triton releases so far (triton issue 10821): B100, B200, B300, GB10x.
UNSAFE_CAPABILITIES = range(100, 120)


def gpu_visible() -> bool:
    """Whether this machine seems to have an NVIDIA GPU: a device file (/dev/dxg under WSL), or the
    driver's own tool."""
    files = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    return files or shutil.which("nvidia-smi") is not None


def extra_installed() -> bool:
    """Whether the packages of the `cuda` extra can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "triton"))


def missing_build_tool() -> str | None:
    """What Triton lacks to build the launchers of kernels, and the package that brings it; None if
    nothing. It looks where Triton looks."""
    if not os.environ.get("CC") and not any(map(shutil.which, ("gcc", "clang"))):
        return "a C compiler: install gcc (apt install gcc, dnf install gcc), or set CC"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    if not header.exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"Python's headers ({header}): install python{version}-dev (apt install) or "
            "python3-devel (dnf install)"
        )
    return None


def why_unusable(device: str | None = None) -> str | None:
    """What keeps the CUDA runtime from `device` (default: the first one); None if nothing does.

    Imports torch, if it is there and a GPU is. The text completes "cannot run on a GPU: ...".
    """
    if not gpu_visible():
        return "no NVIDIA GPU was found (no /dev/nvidia*, no nvidia-smi)"
    if not extra_installed():
        return f"PyTorch and Triton are not installed: {INSTALL}"
    import torch

    if not torch.cuda.is_available():
        return (
            f"PyTorch {torch.__version__} finds no usable GPU: update the NVIDIA driver, or install"
            " a CUDA build of PyTorch"
        )
    tool = missing_build_tool()
    if tool is not None:
        return f"Triton, which compiles the kernels, needs {tool}"
    index = device_index(device)
    count = torch.cuda.device_count()
    if index >= count:
        return f"there is no cuda:{index}, only cuda:0 to cuda:{count - 1}"
    major, minor = torch.cuda.get_device_capability(index)
    if major * 10 + minor < MIN_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}; "
            f"the kernels need {MIN_CAPABILITY / 10} (RTX 30 and later)"
        )
    if major * 10 + minor in UNSAFE_CAPABILITIES:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, where "
            "Triton may miscompute the products; use --runtime cpu"
        )
    return None


def describe_devices() -> list[str]:
    """A line for each GPU: `cuda:N: its name (memory)`, or one that says why there is none."""
    reason = why_unusable()
    if reason is not None:
        return [f"no GPU: {reason}"]
    import torch

    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        unusable = why_unusable(f"cuda:{index}")
        memory = f"{total / 2**20:.0f} MiB, {free / 2**20:.0f} MiB free"
        lines.append(f"cuda:{index}: {name} ({unusable or memory})")
    return lines


def device_index(device: str | None) -> int:
    """N of `cuda:N`; 0 for `cuda` and None. Raises OrthrusError for anything else."""
    name, _, number = (device or "cuda").partition(":")
    if name != "cuda" or not (number or "0").isdecimal() or (device or "").endswith(":"):
        raise OrthrusError(f"--device {device}: expected cuda or cuda:N")
    return int(number or 0)
