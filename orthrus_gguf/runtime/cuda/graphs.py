"""CUDA graphs, captured lazily: a pass runs plainly the first time, as a graph from the second on.

The first run compiles what the pass launches, which a capture could not do. A pass whose capture
fails goes on running plainly, and a log line says so.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

from orthrus_gguf.runtime.cuda.device import Machine

log = logging.getLogger(__name__)

Launch = Callable[[], None]

#: Records what a function launches, without running it; the result runs it.
Capture = Callable[[Launch], Launch]


class Graphs:
    """What has been captured, by key. capture: None where nothing is (`capture_for`)."""

    def __init__(self, capture: Capture | None) -> None:
        self._capture = capture
        self._ready: dict[Hashable, Launch] = {}
        self._seen: set[Hashable] = set()
        self._failed: set[Hashable] = set()

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._ready)

    @property
    def failed(self) -> int:
        """How many captures failed."""
        return len(self._failed)

    def run(self, key: Hashable, step: Launch) -> None:
        """Enqueue `step`, whose launches must depend on `key` and on nothing else."""
        graph = self._ready.get(key)
        if graph is not None:
            graph()
        elif self._capture is not None and key in self._seen and key not in self._failed:
            self._record(self._capture, key, step)
        else:
            step()
            self._seen.add(key)  # only now: an interrupted run may have compiled nothing

    def drop(self, key: Hashable) -> None:
        """Forget a key; its graph is freed."""
        self._ready.pop(key, None)
        self._seen.discard(key)

    def _record(self, capture: Capture, key: Hashable, step: Launch) -> None:
        try:
            graph = capture(step)
        except Exception as error:  # triton's errors have no base class of their own
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            log.warning(
                "no CUDA graph for %s, it runs launch by launch: %s (what the attempt reserved on"
                " the GPU is free again after a restart)", key, reason,
            )  # fmt: skip
            self._failed.add(key)
            step()
            return
        self._ready[key] = graph
        graph()


def capture_for(machine: Machine) -> Capture | None:
    """How passes are captured; None on the CPU, or while rows are checked."""
    if not machine.is_cuda or machine.check_rows:
        return None
    return CudaCapture(machine)


class CudaCapture:
    """Graphs that share one memory pool: no two run at a time, and none leaves anything there for
    another (results live in static buffers)."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._pool: Any = None

    def __call__(self, step: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # A collection inside the capture might free pinned memory, which records an event.
        gc.collect()
        collects = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._machine.stream,
                capture_error_mode="thread_local",
            ):
                step()
        except BaseException:
            self._pool = None  # the allocator may still take this one for a capture's
            raise
        finally:
            if collects:
                gc.enable()
        replay: Launch = graph.replay
        return replay
