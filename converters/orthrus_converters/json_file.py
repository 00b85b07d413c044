"""JSON files of a checkpoint: read with one-line errors, looked up with types and ranges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus_gguf.errors import OrthrusError

_DOWNLOAD = "download it again"
_SMALLEST, _LARGEST = 1e-30, 1e30


@dataclass(frozen=True)
class JsonFile:
    """The JSON object in the file `path`. Every method raises OrthrusError naming file and key."""

    path: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> JsonFile:
        """Raises OrthrusError if the file is missing, unreadable or no JSON object."""
        return cls(path, parse_object(read_bytes(path), path))

    @classmethod
    def read_if_present(cls, path: Path) -> JsonFile:
        """Like read(), but a file that does not exist is an empty object."""
        return cls.read(path) if path.exists() else cls(path, {})

    def error(self, key: str, problem: str, advice: str) -> OrthrusError:
        """The error to raise for `key`."""
        return OrthrusError(f"{self.path}: {key}: {problem}; {advice}")

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer in low..high, both ends included. Required if there is no default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"expected an integer, found {describe(value)}", _DOWNLOAD)
        if not low <= value <= high:
            raise self.error(key, f"expected {low} to {high}, found {value}", _DOWNLOAD)
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0 that float32 holds well. Required if there is no default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"expected a number, found {describe(value)}", _DOWNLOAD)
        if not _SMALLEST <= value <= _LARGEST:
            problem = f"expected a number above 0, up to {_LARGEST:g}, found {describe(value)}"
            raise self.error(key, problem, _DOWNLOAD)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, found {describe(value)}", _DOWNLOAD)
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """An object; empty if the key is absent or null."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            raise self.error(key, f"expected an object, found {describe(value)}", _DOWNLOAD)
        return value

    def array(self, key: str) -> list[Any]:
        """A list; empty if the key is absent or null."""
        value = self._get(key, [])
        if not isinstance(value, list):
            raise self.error(key, f"expected a list, found {describe(value)}", _DOWNLOAD)
        return value

    def _get(self, key: str, default: Any) -> Any:
        """The value of `key`; the default stands in for an absent key and for null."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(key, "is missing", _DOWNLOAD)
        return value


def read_bytes(path: Path) -> bytes:
    """The contents of a small file. Raises OrthrusError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise OrthrusError(f"{path}: no such file; the checkpoint is not complete") from None
    except OSError as error:
        raise OrthrusError(f"{path}: cannot be read: {error.strerror or error}") from error


def parse_object(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises OrthrusError; `path` is for its message."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        if data.startswith(b"version https://git-lfs"):
            raise OrthrusError(
                f"{path}: is a Git LFS pointer, not the file; fetch it with `git lfs pull`"
            ) from error
        raise OrthrusError(f"{path}: is not valid JSON ({error}); {_DOWNLOAD}") from error
    if not isinstance(value, dict):
        raise OrthrusError(f"{path}: expected a JSON object, found {describe(value)}; {_DOWNLOAD}")
    return value


def describe(value: object) -> str:
    """A value in a few words, for error messages."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:60] + "…"
