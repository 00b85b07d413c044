"""What models in host memory share: a call is checked, cut into passes, and put together again."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import numpy as np

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.cache_layout import CacheLayout, spare_rows
from orthrus_gguf.runtime.drawing import draw_choices
from orthrus_gguf.runtime.host_cache import HostCache
from orthrus_gguf.runtime.passes import Piece, cut
from orthrus_gguf.runtime.protocol import Choices, Logits, Segment
from orthrus_gguf.runtime.results import Gathered, Outputs, Taps
from orthrus_gguf.runtime.sequences import OneSequence, check_call, sequences_of

C = TypeVar("C", bound=HostCache)
T = TypeVar("T")
M = TypeVar("M", bound="HostModel[Any]")


class HostModel(ABC, Generic[C]):
    """See `protocol.Model`. Use as a context manager, or close it.

    One pass runs at a time; calls from several threads wait for one another.
    """

    #: The kind of its caches.
    _kind: type[C]

    #: Blocks of a sequence begin at multiples of so many rows, counted from the first one's.
    _block_alignment = 1

    _finalizer: weakref.finalize[[threading.Lock, ExitStack], HostModel[C]]

    def __init__(self, config: ModelConfig, layout: CacheLayout, batch_rows: int) -> None:
        """layout: of its caches. batch_rows: most AR rows of one pass; longer segments run as
        several. Raises OrthrusError. What it takes besides it hands to `_own`.
        """
        if batch_rows < 1:
            raise OrthrusError(f"-b {batch_rows}: expected at least 1 row per batch")
        self.config, self._layout, self._batch_rows = config, layout, batch_rows
        self._block_rows = spare_rows(config)
        self._lock = threading.Lock()

    def _own(self, stack: ExitStack) -> None:
        """Close `stack` when the model is closed, or no longer used."""
        self._finalizer = weakref.finalize(self, _close, self._lock, stack)

    @property
    @abstractmethod
    def description(self) -> str:
        """See `Model.description`."""

    @abstractmethod
    def new_cache(self, capacity: int) -> C:
        """See `Model.new_cache`. The cache frees itself when it is no longer used."""

    @abstractmethod
    def _run_pass(
        self, pieces: Sequence[Piece], sequences: dict[int, OneSequence[C]], *, with_taps: bool
    ) -> Outputs:
        """Run one pass of a call that has been checked."""

    def _max_ar_rows(self, sequences: dict[int, OneSequence[C]]) -> int:
        """AR rows of one pass of a call."""
        return self._batch_rows

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """See `Model.forward`."""

        def draw(segment: Segment, logits: Logits, taps: Taps | None) -> Choices:
            return Choices(draw_choices(segment, logits), taps)

        return self._run(segments, draw, with_taps=True)

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        """See `Model.logits`."""
        return self._run(segments, lambda _, logits, __: logits.copy(), with_taps=False)

    def close(self) -> None:
        """Free everything but the caches handed out, which can only be closed from now on."""
        self._finalizer()

    def __enter__(self: M) -> M:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise OrthrusError("the model is closed; load it again")

    def _run(
        self,
        segments: Sequence[Segment],
        result: Callable[[Segment, Logits, Taps | None], T],
        *,
        with_taps: bool,
    ) -> list[T]:
        """Run the passes of a call; what `result` makes of each segment's logits and taps.

        It gets logits as they lie in the pass's memory, which the next pass overwrites.
        """
        with self._lock:
            self._check_open()
            sequences = sequences_of(segments, self._kind, self._layout)
            check_call(segments, self.config, self._block_rows)
            for own in sequences.values():
                own.prepare()
            gathered, found = Gathered(with_taps=with_taps), {}
            ar_rows = self._max_ar_rows(sequences)
            for pieces in cut(segments, ar_rows, self._block_rows, self._block_alignment):
                outputs = self._run_pass(pieces, sequences, with_taps=with_taps)
                for index, logits, taps in gathered.add(pieces, outputs):
                    found[index] = result(segments[index], logits, taps)
            for own in sequences.values():
                own.finish()
        nothing = np.empty((0, self.config.n_vocab), np.float32)
        return [
            found[index] if index in found else result(segment, nothing, None)
            for index, segment in enumerate(segments)
        ]


def _close(lock: threading.Lock, stack: ExitStack) -> None:
    """Free what a model holds, when the pass that may be under way has ended."""
    with lock:
        stack.close()
