"""Every byte of every tensor read once: scales checked, digests computed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import gguf

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.inspection.scales import bad_qblocks, is_known
from orthrus_gguf.inspection.stream import pieces
from orthrus_gguf.model.tensors import is_diffusion_tensor

#: Hashing is the slowest step at 1 to 2 GB/s per thread; four keep up with the fastest disks.
MAX_THREADS = 4


@dataclass(frozen=True)
class TensorCheck:
    """What was found in one tensor.

    sha256: of its bytes, in hex. bad: number of qblocks (elements of plain types) with a NaN or
    infinite scale; None if the type is unknown and could not be checked. first_bad: the first.
    """

    info: TensorInfo
    sha256: str
    bad: int | None
    first_bad: int | None

    @property
    def damage(self) -> str | None:
        """What is wrong, in words; None if nothing is."""
        if not self.bad:
            return None
        kind = "values" if self.info.type.name in ("F32", "F16", "BF16", "F64") else "qblocks"
        what = "are NaN or infinite" if kind == "values" else "have a NaN or infinite scale"
        return f"{self.bad} {kind} {what}, the first at {self.first_bad}"


def verify(
    tensors: Iterable[tuple[Path, TensorInfo]],
    progress: Callable[[int], object] = lambda n_bytes: None,
    threads: int | None = None,
) -> Iterator[TensorCheck]:
    """Check `tensors` of the files that they lie in; the results come in the same order.

    progress: called with a number of bytes each time that many were read, from several threads.
    Raises OrthrusError if a file cannot be read.
    """
    count = threads or min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(count) as pool:
        yield from pool.map(lambda item: _check(item[0], item[1], progress), tensors)


def _check(path: Path, info: TensorInfo, progress: Callable[[int], object]) -> TensorCheck:
    digest = hashlib.sha256()
    known = is_known(info.type)
    bad, first, done = 0, None, 0
    _, size = gguf.GGML_QUANT_SIZES[info.type]
    for piece in pieces(path, info):
        digest.update(piece.data)
        if known:
            found = bad_qblocks(piece, info.type)
            if found.size:
                bad += found.size
                first = done // size + int(found[0]) if first is None else first
        done += piece.size
        progress(piece.size)
    return TensorCheck(info, digest.hexdigest(), bad if known else None, first)


def overall(checks: Iterable[TensorCheck]) -> Mapping[str, str]:
    """SHA-256 of the `base` and of the `heads`, of those that there are.

    It covers name, type, shape and bytes of each tensor, but not where they lie: one model has the
    same two digests in one file and in two. It is the SHA-256 of a text that has one line
    `NAME TYPE DIM,DIM,… SHA256` per tensor (numpy order, rows first), sorted.
    """
    lines: dict[str, list[str]] = {}
    for check in checks:
        info = check.info
        part = "heads" if is_diffusion_tensor(info.name) else "base"
        shape = ",".join(map(str, info.shape))
        line = f"{info.name} {info.type.name} {shape} {check.sha256}\n"
        lines.setdefault(part, []).append(line)
    return {
        part: hashlib.sha256("".join(sorted(members)).encode()).hexdigest()
        for part, members in sorted(lines.items())
    }
