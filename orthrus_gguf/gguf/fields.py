"""Typed, range-checked look-ups in metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import Value
from orthrus_gguf.records import dataclass

#: Far above any real setting, far below what overflows single precision.
MAX_NUMBER = 1e12

#: What to do about metadata that describes no usable model.
CONVERT_AGAIN = "convert the model again, or get another file"


@dataclass(frozen=True)
class Fields:
    """The metadata of the file `path`. Every method raises OrthrusError naming file and key.

    A `default` is returned when the key is absent; without one (None) the key is required.
    """

    metadata: Mapping[str, Value]
    path: Path

    def error(self, key: str, problem: str, advice: str = CONVERT_AGAIN) -> OrthrusError:
        """The error to raise for `key`."""
        return OrthrusError(f"{self.path}: metadata key {key}: {problem}; {advice}")

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"expected a string, found {describe(value)}")
        return value

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer (of any width) in low..high, both ends included."""
        return self._checked_integer(key, self._get(key, default), low, high)

    def uniform_integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """Like integer(), but the file may hold an array that repeats one number per layer."""
        value = self._get(key, default)
        if isinstance(value, np.ndarray) and value.size:
            if np.any(value != value[0]):
                raise self.error(key, "differs between layers, which is not supported")
            value = value[0].item()
        return self._checked_integer(key, value, low, high)

    def number(self, key: str, default: float | None = None) -> float:
        """A float of a sane size: finite, and at most MAX_NUMBER from zero."""
        value = self._get(key, default)
        if not isinstance(value, float):
            raise self.error(key, f"expected a float, found {describe(value)}")
        if not abs(value) <= MAX_NUMBER:  # also true of NaN
            raise self.error(key, f"expected at most {MAX_NUMBER:g} in size, found {value}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Like number(), above 0."""
        value = self.number(key, default)
        if value <= 0:
            raise self.error(key, f"expected a number above 0, found {value}")
        return value

    def _get(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def _checked_integer(self, key: str, value: Value, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"expected an integer, found {describe(value)}")
        if not low <= value <= high:
            raise self.error(key, f"expected {low} to {high}, found {value}")
        return value


def describe(value: Value) -> str:
    """A metadata value in a few words, for error messages."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.size} {value.dtype.name}"
    if isinstance(value, list):
        return f"an array of {len(value)} strings"
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"
