"""Models that were split for download, `NAME-00001-of-0000N.gguf`: their parts read as one file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.fields import Fields
from orthrus_gguf.gguf.reader import GGUFFile

_Split = gguf.Keys.Split
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)")
_MAX_PARTS = (1 << 16) - 1  # the counts are 16 bits wide


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file, and the other parts of the model with it where it is one of several.

    Raises OrthrusError for what GGUFFile.open() refuses, and unless all parts are there and belong
    together.
    """
    with ExitStack() as stack:
        file = stack.enter_context(GGUFFile.open(path))
        if _count(file) > 1:
            parts = [
                file if other == file.path else stack.enter_context(GGUFFile.open(other))
                for other in _paths(file)
            ]
            _check(parts)
            file = SplitGGUF(parts)
        stack.pop_all()
    return file


def check_whole(file: GGUFFile) -> None:
    """Raise OrthrusError for a part that was opened by itself, saying what is wrong with the others
    as far as their names tell."""
    if _count(file) > 1:
        paths = _paths(file)
        raise OrthrusError(
            f"{file.path}: is one of {len(paths)} parts, which do not belong together; download "
            "them again"
        )


class SplitGGUF(GGUFFile):
    """The parts of a split model, in order, as one file: the first one's metadata, all tensors.

    Made by open_gguf().
    """

    def __init__(self, parts: Sequence[GGUFFile]) -> None:
        first = parts[0]
        self._parts = tuple(parts)
        self._owner = {name: part for part in parts for name in part.tensors}
        self.path = first.path
        self.paths = tuple(part.path for part in parts)
        self.n_bytes = sum(part.n_bytes for part in parts)
        self.version = first.version
        self.alignment = first.alignment
        about_parts = {key for key in first.metadata if key.startswith("split.")}
        self.metadata = MappingProxyType(
            {key: value for key, value in first.metadata.items() if key not in about_parts}
        )
        self.types = MappingProxyType(
            {key: kind for key, kind in first.types.items() if key not in about_parts}
        )
        self.tensors = MappingProxyType(
            {name: part.tensors[name] for name, part in self._owner.items()}
        )

    def path_of(self, name: str) -> Path:
        return self._owner[name].path

    def data(self, name: str) -> NDArray[np.uint8]:
        return self._owner[name].data(name)

    def prefetch(self, names: Iterable[str]) -> None:
        wanted = set(names)
        for part in self._parts:
            part.prefetch([name for name in part.tensors if name in wanted])

    def release(self, name: str) -> None:
        self._owner[name].release(name)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _count(file: GGUFFile) -> int:
    return Fields(file.metadata, file.path).integer(_Split.LLM_KV_SPLIT_COUNT, 0, _MAX_PARTS, 1)


def _paths(file: GGUFFile) -> list[Path]:
    """Where the parts are, by their names, which all writers of such files give them."""
    count, number = _count(file), 1 + _number(file)
    name = _NAME.fullmatch(file.path.name)
    if name is None or (int(name[2]), int(name[3])) != (number, count):
        raise OrthrusError(
            f"{file.path}: is part {number} of a model split into {count} files, but is not called "
            f"NAME-{number:05d}-of-{count:05d}.gguf, so that the others cannot be found; give all "
            "of them their names back"
        )
    paths = [
        file.path.with_name(f"{name[1]}-{part:05d}-of-{count:05d}{name[4]}")
        for part in range(1, count + 1)
    ]
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise OrthrusError(
            f"{missing[0]}: this part of a model split into {count} files{more} is missing; "
            "download it, into the folder of the others"
        )
    return paths


def _number(file: GGUFFile) -> int:
    """Which part it is, from 0."""
    return Fields(file.metadata, file.path).integer(_Split.LLM_KV_SPLIT_NO, 0, _MAX_PARTS - 1)


def _check(parts: Sequence[GGUFFile]) -> None:
    """Raise OrthrusError unless these are the parts of one model, in order."""
    owner: dict[str, Path] = {}
    for index, part in enumerate(parts):
        found = (_count(part), _number(part))
        if found != (len(parts), index):
            raise OrthrusError(
                f"{part.path}: says that it is part {found[1] + 1} of {found[0]}; its name is "
                "wrong, or it belongs to another model: download it again"
            )
        for name in part.tensors:
            if owner.setdefault(name, part.path) != part.path:
                raise OrthrusError(
                    f"{part.path}: tensor {name!r} is also in {owner[name].name}; the parts are "
                    "not of one model: download them again"
                )
    first = Fields(parts[0].metadata, parts[0].path)
    total = first.integer(_Split.LLM_KV_SPLIT_TENSORS_COUNT, 0, 1 << 31, len(owner))
    if total != len(owner):
        raise OrthrusError(
            f"{parts[0].path}: expected {total} tensors in {len(parts)} files, found {len(owner)}; "
            "the parts are not of one model: download them again"
        )
