"""Two GGUF files compared: metadata by value, tensors by shape, type and bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from orthrus_gguf.gguf.fields import describe
from orthrus_gguf.gguf.reader import GGUFFile, TensorInfo, Value
from orthrus_gguf.inspection.stream import pieces


@dataclass(frozen=True)
class Comparison:
    """Names (keys or tensors) sorted into four kinds. different: with what differs, in words."""

    same: tuple[str, ...]
    different: Mapping[str, str]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not (self.different or self.only_first or self.only_second)


def diff_metadata(first: GGUFFile, second: GGUFFile) -> Comparison:
    """Compare the metadata. Integers of one value in different widths count as the same."""

    def differs(key: str) -> str | None:
        one, two = first.metadata[key], second.metadata[key]
        return None if _same_value(one, two) else _value_difference(one, two)

    return _compare(first.metadata, second.metadata, differs)


def diff_tensors(first: GGUFFile, second: GGUFFile) -> Comparison:
    """Compare the tensors, byte by byte where shape and type agree; their order does not count.

    Raises OrthrusError if a file cannot be read.
    """

    def differs(name: str) -> str | None:
        one, two = first.tensors[name], second.tensors[name]
        if (one.type, one.shape) != (two.type, two.shape):
            return f"{_kind(one)} and {_kind(two)}"
        return _byte_difference(first, second, name)

    return _compare(first.tensors, second.tensors, differs)


def _compare(
    first: Mapping[str, Any], second: Mapping[str, Any], differs: Callable[[str], str | None]
) -> Comparison:
    same, different = [], {}
    for name in first:
        if name in second:
            difference = differs(name)
            if difference is None:
                same.append(name)
            else:
                different[name] = difference
    return Comparison(
        tuple(same),
        different,
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
    )


def _same_value(one: Value, two: Value) -> bool:
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        return one.dtype == two.dtype and one.tobytes() == two.tobytes()
    if isinstance(one, float) and isinstance(two, float):
        return struct.pack("<d", one) == struct.pack("<d", two)  # NaN is the same as itself
    return one == two


def _value_difference(one: Value, two: Value) -> str:
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        at = next(i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b)
        return f"element {at}: {one[at]!r:.60} and {two[at]!r:.60}"
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray) and one.dtype == two.dtype:
        if one.size == two.size:
            width = one.itemsize
            a, b = (array.view(np.uint8).reshape(-1, width) for array in (one, two))
            at = int(np.flatnonzero((a != b).any(axis=1))[0])
            return f"element {at}: {one[at]} and {two[at]}"
    elif isinstance(one, str) and isinstance(two, str):
        pairs = enumerate(zip(one, two, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(one), len(two)))
        if at > 20:
            return f"from character {at}: {one[at : at + 30]!r} and {two[at : at + 30]!r}"
    return f"{describe(one)} and {describe(two)}"


def _kind(info: TensorInfo) -> str:
    return f"{info.type.name} {info.shape}"


def _byte_difference(first: GGUFFile, second: GGUFFile, name: str) -> str | None:
    one, two = first.tensors[name], second.tensors[name]
    count, at, done = 0, None, 0
    streams = pieces(first.path_of(name), one), pieces(second.path_of(name), two)
    for a, b in zip(*streams, strict=True):
        if not np.array_equal(a, b):
            unequal = np.flatnonzero(a != b)
            count += unequal.size
            at = done + int(unequal[0]) if at is None else at
        done += a.size
    return None if at is None else f"{count} of {one.n_bytes} bytes differ, the first at {at}"
