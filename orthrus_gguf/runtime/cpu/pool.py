"""Threads of the kernels, and what they do before the first pass."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable

from orthrus_cpu_kernels.library import Kernels, Step

from orthrus_gguf.errors import OrthrusError

#: Steps, and what is to be done when they have run.
Part = tuple["ctypes.Array[Step]", Callable[[], None]]


class Pool:
    """Threads that run steps. One call at a time; `run` and all others wait for what runs in the
    background."""

    def __init__(self, kernels: Kernels, threads: int) -> None:
        """Raises OrthrusError."""
        self._library, self._handle, self.threads = kernels.library, None, 0
        self._background: threading.Thread | None = None
        self._failed: Exception | None = None
        self._closing = False
        self.start(threads)

    def start(self, threads: int) -> None:
        """Run on so many threads from now on. Raises OrthrusError."""
        if threads == self.threads:
            return
        handle = self._library.orthrus_pool_new(threads) if threads > 0 else None
        if not handle:
            raise OrthrusError(f"cannot start {threads} threads; use fewer with --threads")
        self.wait()
        self._free()
        self._handle, self.threads = handle, threads

    def run(self, steps: ctypes.Array[Step]) -> None:
        """Run the steps, one after the other. Raises OrthrusError in a forked process."""
        self.wait()
        self._run(steps)

    def run_in_background(self, parts: Iterable[Part]) -> None:
        """Run parts one after the other, while the caller goes on.

        Python's lock is needed between two parts only: few and large ones let the caller run.
        """
        self.wait()

        def work() -> None:
            try:
                for steps, then in parts:
                    if self._closing:
                        return
                    self._run(steps)
                    then()
            except Exception as error:  # for whoever waits
                self._failed = error

        self._background = threading.Thread(target=work, name="repack")
        self._background.start()

    def wait(self) -> None:
        """Return when nothing runs in the background. Raises what failed there."""
        if self._background is not None:
            self._background.join()
            self._background = None
        if self._failed is not None:
            raise self._failed

    def close(self) -> None:
        """Free the threads; what runs in the background ends with the part that it is at."""
        self._closing = True
        if self._background is not None:
            self._background.join()
        self._free()

    def _run(self, steps: ctypes.Array[Step]) -> None:
        if self._library.orthrus_run(self._handle, ctypes.addressof(steps), len(steps)):
            raise OrthrusError(
                "the model was loaded by another process, whose threads this one lacks; load it"
                " after the fork"
            )

    def _free(self) -> None:
        if self._handle:
            self._library.orthrus_pool_free(self._handle)
        self._handle = None
