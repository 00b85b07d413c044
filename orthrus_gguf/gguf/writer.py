"""Write GGUF files in small pieces, and all or nothing.

Tensors arrive as chunks and go straight to disk, so memory does not grow with the model. Each file
is written under a temporary name beside its target (`.NAME.PID.tmp`) and renamed at the very end;
a failure or an interrupt removes it. Several files of one call succeed or fail together. What a
killed process leaves behind is removed by the next one that writes the same file.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.leftovers import lock, remove_leftovers, temporary_path

#: Bytes to write before the disk is given its next share.
_SYNC_BYTES = 1 << 28

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    shape: numpy order, rows first.
    chunks: called once, when the tensor's turn has come; yields its bytes in order, as contiguous
        arrays of any element type, `n_bytes` in all.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    chunks: Callable[[], Iterable[NDArray[Any]]]

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the data in the file, without padding."""
        qblock, qblock_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return self.n_elements // qblock * qblock_bytes


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written. `metadata` is a GGUFWriter with all keys added and no tensors."""

    path: Path
    metadata: gguf.GGUFWriter
    tensors: Sequence[PlannedTensor]


def write_files(
    files: Sequence[PlannedFile],
    progress: Callable[[int], object],
    *,
    overwrite: bool = False,
    verify: Callable[[Sequence[Path]], None] | None = None,
) -> list[int]:
    """Write all of `files` (which lie in one folder), or none. Returns their sizes in bytes.

    progress: called with a number of bytes of tensor data, each time after they were written.
    verify: called with the paths of the finished files before they get their names; what it raises
    keeps them from it.
    Raises OrthrusError if a file exists and `overwrite` is not set, or if writing fails; whatever
    is raised, no file of this call stays behind. With `overwrite`, files are replaced only after
    all data is safely on disk.
    """
    for file in files:
        check_target(file.path, overwrite=overwrite)
        remove_leftovers(file.path)
    outputs = [_Output(file) for file in files]
    try:
        for output in outputs:
            output.write_header()
        _check_space(outputs)
        for output in outputs:
            output.write_tensors(progress)
        sizes = [output.finish() for output in outputs]
        if verify is not None:
            verify([output.temporary for output in outputs])
        for output in outputs:  # writing may have taken an hour
            check_target(output.target, overwrite=overwrite)
        for output in outputs:
            output.publish()
    except BaseException as error:
        for output in outputs:
            output.discard()
        if isinstance(error, OSError):
            raise _write_error(files[0].path, error) from error
        raise
    _sync_folder(files[0].path.parent)
    return sizes


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raise OrthrusError unless a file may be written at `path`."""
    if path.is_dir():
        raise OrthrusError(f"{path}: is a folder; name the file to write, such as {path}/NAME.gguf")
    if not path.parent.is_dir():
        raise OrthrusError(f"{path}: there is no folder {path.parent}; create it first")
    if path.exists() and not path.is_file():
        raise OrthrusError(f"{path}: is not a regular file; choose another name")
    if path.exists() and not overwrite:
        raise OrthrusError(f"{path}: exists already; choose another name or pass --overwrite")


def file_size(file: PlannedFile) -> int:
    """The exact size in bytes that write_files() would give `file`.

    Writes the header to a temporary folder: `file` cannot be written after that.
    """
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "header"
        _write_header(file.metadata, file.tensors, header, file.path)
        file.metadata.close()
        sizes = [header.stat().st_size, *(tensor.n_bytes for tensor in file.tensors)]
    return sum(gguf.GGUFWriter.ggml_pad(size, file.metadata.data_alignment) for size in sizes)


def _write_header(
    writer: gguf.GGUFWriter, tensors: Sequence[PlannedTensor], path: Path, target: Path
) -> None:
    """Write everything up to the padding before the data to `path`, and leave it open.

    target: for error messages.
    """
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),  # anything but uint8, which would mean a shape in bytes
            tensor.n_bytes,
            raw_dtype=tensor.type,
        )
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
    except UnicodeEncodeError as error:
        start = max(error.start - 20, 0)
        raise OrthrusError(
            f"{target}: the text {error.object[start : error.end]!r} in the metadata is not valid "
            "Unicode; correct it in the source"
        ) from error
    writer.write_ti_data_to_file()


class _Output:
    """One file on its way: a temporary file that becomes the target, or vanishes."""

    def __init__(self, plan: PlannedFile) -> None:
        self.target = plan.path
        self.temporary = temporary_path(plan.path, os.getpid())
        self._writer = plan.metadata
        self._tensors = plan.tensors
        self._lock = -1
        self._ours = False
        self._renaming = False

    @property
    def _file(self) -> Any:
        """The open temporary file (GGUFWriter opens it, for one of its possible shards)."""
        assert self._writer.fout is not None
        return self._writer.fout[0]

    @property
    def data_size(self) -> int:
        """Bytes that follow the header: the tensors with their padding."""
        return sum(self._padded(tensor.n_bytes) for tensor in self._tensors)

    def write_header(self) -> None:
        """Create the temporary file and write everything but tensor data."""
        self._create()
        _write_header(self._writer, self._tensors, self.temporary, self.target)
        self._pad(self._file.tell())
        self._file.flush()

    def _create(self) -> None:
        self._ours = True  # set first: an interrupt may come right after the file exists
        try:
            # Exclusively: neither another process' file nor the target of a link is touched.
            self._lock = os.open(self.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            self._ours = False
            raise
        with suppress(OSError):  # not every file system has locks
            lock(self._lock)

    def write_tensors(self, progress: Callable[[int], object]) -> None:
        """Stream the data of all tensors."""
        with _syncing(self._file.fileno()) as wrote:
            for tensor in self._tensors:
                written = 0
                for chunk in tensor.chunks():
                    self._file.write(chunk.data)
                    written += chunk.nbytes
                    wrote(chunk.nbytes)
                    progress(chunk.nbytes)
                if written != tensor.n_bytes:
                    raise ValueError(f"{tensor.name}: {written} bytes for {tensor.n_bytes}")
                self._pad(written)

    def finish(self) -> int:
        """Put everything on the disk and close the file. Returns its size."""
        self._file.flush()
        os.fsync(self._file.fileno())
        size: int = self._file.tell()
        self._writer.close()
        return size

    def publish(self) -> None:
        """Give the finished file its name."""
        self._renaming = True
        os.replace(self.temporary, self.target)
        self._unlock()

    def discard(self) -> None:
        """Remove what there is of this file, under either name. Never raises OSError."""
        if not self._ours:
            return
        with suppress(OSError):  # closing flushes, which fails again when the disk is full
            self._writer.close()
        try:
            self.temporary.unlink()
        except FileNotFoundError:
            if self._renaming:
                with suppress(OSError):
                    self.target.unlink()
        except OSError:
            pass
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _pad(self, size: int) -> None:
        self._file.write(bytes(self._padded(size) - size))

    def _padded(self, size: int) -> int:
        return gguf.GGUFWriter.ggml_pad(size, self._writer.data_alignment)


@contextmanager
def _syncing(descriptor: int) -> Iterator[Callable[[int], None]]:
    """Put a file on the disk while it is being written; call the result with bytes as they come.

    Left alone, systems begin when a good part of the memory is dirty, and all of that is then left
    to wait for at the end.
    """
    running: list[Future[None]] = []
    behind = 0

    def wrote(n_bytes: int) -> None:
        nonlocal behind
        behind += n_bytes
        if behind < _SYNC_BYTES or not all(future.done() for future in running):
            return
        while running:
            running.pop().result()
        running.append(pool.submit(os.fsync, descriptor))
        behind = 0

    with ThreadPoolExecutor(1, "sync") as pool:
        yield wrote
    for future in running:
        future.result()


def _check_space(outputs: Sequence[_Output]) -> None:
    """Raise OrthrusError if the data that is still to come cannot fit on the disk."""
    needed = sum(output.data_size for output in outputs)
    folder = outputs[0].target.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OrthrusError(
            f"{outputs[0].target}: not enough space in {folder}: needs {needed:,} bytes, "
            f"{free:,} are free; free some or write to another disk"
        )


def _write_error(path: Path, error: OSError) -> OrthrusError:
    if isinstance(error, FileExistsError):
        return OrthrusError(
            f"{error.filename}: exists already, left by an earlier run or in use by another; "
            "delete it if no other conversion is running"
        )
    advice = "free some space" if error.errno in _NO_SPACE else "check the folder"
    reason = error.strerror or str(error)
    return OrthrusError(f"{path}: cannot be written: {reason}; {advice} or write to another disk")


def _sync_folder(folder: Path) -> None:
    """Make the new names durable too. Not every file system can; the files are complete anyway."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
