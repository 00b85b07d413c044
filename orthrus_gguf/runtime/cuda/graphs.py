"""CUDA graphs, captured lazily: a step runs plainly the first time, as a graph from the second on.

The first run compiles what the step launches, which a capture could not do. A step whose capture
fails goes on running plainly, and a log line says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch

from orthrus_gguf.runtime.cuda.device import Machine

log = logging.getLogger(__name__)


class Graphs:
    """The graphs of one decoding state. They share one memory pool: no two run at a time, and none
    leaves anything there for another (results live in static buffers).

    captured: how many graphs there are. On the CPU, or while rows are checked, there are none.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._enabled = machine.is_cuda and not machine.check_rows
        self._pool: Any = None
        self._ready: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._seen: set[Hashable] = set()
        self._failed: set[Hashable] = set()

    @property
    def captured(self) -> int:
        return len(self._ready)

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Enqueue `step`, whose launches must depend on `key` and on nothing else."""
        graph = self._ready.get(key)
        if graph is not None:
            graph.replay()
        elif self._enabled and key in self._seen and key not in self._failed:
            self._capture(key, step)
        else:
            self._seen.add(key)
            step()

    def _capture(self, key: Hashable, step: Callable[[], None]) -> None:
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=self._machine.stream,
                capture_error_mode="thread_local",
            ):
                step()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            log.warning("no CUDA graph for %s, it runs launch by launch: %s", key, reason)
            self._failed.add(key)
            step()
            return
        self._ready[key] = graph
        graph.replay()
