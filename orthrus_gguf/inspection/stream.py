"""The bytes of tensors in pieces, in constant memory.

Read rather than mapped: the pages of a mapping would all count as this process's memory, and a file
that shrinks meanwhile would end it with a signal.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo

#: Bytes per piece: fits the second-level cache of most processors, so that what is done with a
#: piece after reading it costs little more.
PIECE = 1 << 19


def pieces(path: Path, info: TensorInfo) -> Iterator[NDArray[np.uint8]]:
    """The tensor's bytes in order, in pieces of whole qblocks; each is overwritten by the next.

    Raises OrthrusError if the file can no longer be read as it was when it was opened.
    """
    _, size = gguf.GGML_QUANT_SIZES[info.type]
    buffer = np.empty(max(PIECE // size, 1) * size, np.uint8)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(info.offset)
            left = info.n_bytes
            while left:
                piece = buffer[: min(left, buffer.size)]
                _fill(piece, file, path)
                yield piece
                left -= piece.size
    except OSError as error:
        raise OrthrusError(
            f"{path}: cannot be read: {error.strerror or error}; check the disk"
        ) from error


def _fill(piece: NDArray[np.uint8], file: RawIOBase, path: Path) -> None:
    filled = 0
    while filled < piece.size:
        count = file.readinto(piece[filled:].data)
        if not count:
            raise OrthrusError(f"{path}: became shorter while it was read; try again")
        filled += count
