"""Which machine this is: for the head of every table of figures, and to tell machines apart."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

from orthrus_gguf import __version__


def machine() -> dict[str, str]:
    """What the figures were measured on, for the head of every table."""
    return {
        "cpu": _cpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "orthrus-gguf": __version__,
    }


def _cpu_name() -> str:
    try:
        lines: Sequence[str] = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = ()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
