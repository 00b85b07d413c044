"""Thread pools, one per thread count, shared by all models of the process."""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.binding import THREADPOOL_PARAMS_BYTES, Ggml

if TYPE_CHECKING:
    from collections.abc import Iterator


class ThreadPool:
    """ggml threads that wait for graphs. Hold `lock` while one runs: a pool runs one at a time."""

    def __init__(self, api: Ggml, threads: int) -> None:
        params = ctypes.create_string_buffer(THREADPOOL_PARAMS_BYTES)
        api.threadpool_params_init(params, threads)
        self.handle: int | None = api.threadpool_new(params)
        if not self.handle:
            raise OrthrusError(f"cannot start {threads} threads; use fewer with --threads")
        self.lock = threading.Lock()
        self.users = 0


# Reentrant, because garbage collection may drop a model, and so leave its pool, inside it.
_registry_lock = threading.RLock()
_registry: dict[tuple[Ggml, int], ThreadPool] = {}


@contextmanager
def shared_pool(api: Ggml, threads: int) -> Iterator[ThreadPool]:
    """The process's pool of `threads` threads; its threads end when its last user leaves."""
    key = (api, threads)
    with _registry_lock:
        pool = _registry.get(key)
        if pool is None:
            pool = _registry[key] = ThreadPool(api, threads)
        pool.users += 1
    try:
        yield pool
    finally:
        with _registry_lock:
            pool.users -= 1
            if pool.users == 0:
                del _registry[key]
                api.threadpool_free(pool.handle)
