"""From the mapped file to the device, piece by piece: a thread reads while the device works.

The pieces pass through a few buffers of fixed size (pinned for CUDA), so that host memory stays
bounded however large a tensor is.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthrus_gguf.model.file import WeightFile

SLOTS = 4
SLOT_BYTES = 32 << 20


@dataclass(frozen=True)
class _Piece:
    """`count` bytes of the tensor that is being read, from `offset` on, in a slot."""

    offset: int
    count: int
    slot: Tensor


class StagedReader:
    """Iterate to receive, per name, the tensor's bytes on the device (u8 [n_bytes]).

    peak_bytes: the most bytes that were read and not yet handed on, over all slots.
    """

    def __init__(
        self,
        file: WeightFile,
        names: Sequence[str],
        device: torch.device,
        *,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ) -> None:
        self._file, self._names, self._device = file, names, device
        self._slot_bytes = slot_bytes
        self._pinned = device.type == "cuda"
        self._free: queue.Queue[Tensor | None] = queue.Queue()
        for _ in range(slots):
            buffer = torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            self._free.put(buffer)
        self._ready: queue.Queue[_Piece | BaseException] = queue.Queue()
        self._copying: deque[tuple[torch.cuda.Event, _Piece]] = deque()
        self._lock = threading.Lock()
        self._in_flight = 0
        self.peak_bytes = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        reader = threading.Thread(target=self._read, name="orthrus-reader", daemon=True)
        reader.start()
        try:
            for name in self._names:
                yield name, self._collect(self._file.tensors[name].n_bytes)
        finally:
            while self._copying:
                self._release()
            self._free.put(None)
            reader.join()

    def _read(self) -> None:
        """The reader thread: fill free slots in the order of the names, until told to stop."""
        try:
            for name in self._names:
                data = self._file.data(name)
                for offset in range(0, data.size, self._slot_bytes):
                    slot = self._free.get()
                    if slot is None:
                        return
                    count = min(self._slot_bytes, data.size - offset)
                    slot.numpy()[:count] = data[offset : offset + count]
                    self._count(count)
                    self._ready.put(_Piece(offset, count, slot))
        except BaseException as error:
            self._ready.put(error)

    def _collect(self, n_bytes: int) -> Tensor:
        target = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)
        held = 0
        while held < n_bytes:
            piece = self._ready.get()
            if isinstance(piece, BaseException):
                raise piece
            part = target[piece.offset : piece.offset + piece.count]
            part.copy_(piece.slot[: piece.count], non_blocking=self._pinned)
            held += piece.count
            if not self._pinned:
                self._hand_back(piece)
                continue
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._copying.append((event, piece))
            # Keep at most two copies under way: the reader needs slots to work on meanwhile.
            while len(self._copying) > 2:
                self._release()
        return target

    def _release(self) -> None:
        event, piece = self._copying.popleft()
        event.synchronize()
        self._hand_back(piece)

    def _hand_back(self, piece: _Piece) -> None:
        self._count(-piece.count)
        self._free.put(piece.slot)

    def _count(self, change: int) -> None:
        with self._lock:
            self._in_flight += change
            self.peak_bytes = max(self.peak_bytes, self._in_flight)
