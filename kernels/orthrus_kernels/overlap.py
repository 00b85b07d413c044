"""Programmatic dependent launch: a kernel's blocks are placed while the one before still runs.

Between two kernels of a graph a card idles for a microsecond or two, 300 times a pass. With the
environment variable ORTHRUS_PDL=1 the kernels of a layer are launched such that, on compute
capability 9.0 and later, a kernel's blocks may be there before those of its predecessor are
through; they wait at once (`begin`) until it has ended and all that it wrote can be seen. So the
order of all reads and writes stays what it is. Off by default: no device has shown yet that it is
faster, and kernels compile anew with it.
"""

from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

CAPABILITY = 90
"""The first that can."""

PDL = tl.constexpr(os.environ.get("ORTHRUS_PDL") == "1" and not triton.knobs.runtime.interpret)


@triton.jit
def begin():
    """First of all in every kernel that is launched with `overlapped`, on every way through it."""
    if PDL and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


def overlapped() -> dict[str, Any]:
    """Options of a launch whose kernel calls `begin`."""
    if not PDL.value or triton.runtime.driver.active.get_current_target().arch < CAPABILITY:
        return {}
    return {"launch_pdl": True}
