"""Recordings: texts, and what the diffusion view drafted at every position of them.

A block sees the committed tokens and its anchor, so on a given text there is one block per anchor
position and number of rows, whatever strategy asks for it. With all of them, any strategy can be
replayed, without the model.

On disk a recording is an .npz file: an entry `header` (JSON), and arrays `N/prompt`, `N/output`,
`N/ROWS` for text number N.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError

VERSION = 1
FORMAT = "orthrus-recording"

#: Columns of a recorded row: first choice and its probability, second choice and its probability.
#: Ids fit: float32 counts to 2^24, the largest vocabulary that is read. A row that was not finite
#: is NaN.
COLUMNS = 4

RecordedRows = NDArray[np.float32]


@dataclass(frozen=True)
class Text:
    """One prompt and its continuation.

    blocks: rows of a block → what it drafted, [anchors, rows, COLUMNS]: entry i is the block
        anchored at output token i (all but the last of them).
    """

    domain: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    blocks: Mapping[int, RecordedRows]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.output


@dataclass(frozen=True)
class Origin:
    """Where a recording comes from.

    model: its name, or that of an acceptance table. real: drafted by a model. settings: one line.
    """

    model: str
    real: bool
    settings: str


@dataclass(frozen=True)
class Recording:
    """Texts of one model. block_size: rows of the largest block, which every text holds. network:
    whether a drafter's own network drafted (made up only: these are not saved)."""

    origin: Origin
    block_size: int
    texts: tuple[Text, ...]
    network: bool = False

    def domains(self) -> dict[str, list[Text]]:
        """Texts by domain, in order of first appearance."""
        found: dict[str, list[Text]] = {}
        for text in self.texts:
            found.setdefault(text.domain, []).append(text)
        return found

    def save(self, path: Path) -> None:
        """Raises OSError."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "origin": asdict(self.origin),
            "block_size": self.block_size,
            "texts": [{"domain": t.domain, "rows": sorted(t.blocks)} for t in self.texts],
        }
        arrays: dict[str, Any] = {"header": np.array(json.dumps(header))}
        for number, text in enumerate(self.texts):
            arrays[f"{number}/prompt"] = np.array(text.prompt, np.int32)
            arrays[f"{number}/output"] = np.array(text.output, np.int32)
            for rows, choices in text.blocks.items():
                arrays[f"{number}/{rows}"] = choices
        with path.open("wb") as file:
            np.savez_compressed(file, **arrays)


class _OtherVersionError(Exception):
    """A sound file of another format or version."""


def load(path: Path) -> Recording:
    """Raises OrthrusError for a file that is not a sound recording."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _parse(arrays)
    except FileNotFoundError:
        raise OrthrusError(f"{path}: no such file; make one with orthrus-bench record") from None
    except _OtherVersionError as error:
        reason = f"a recording that this version does not read ({error})"
        raise OrthrusError(f"{path}: {reason}; make it anew with orthrus-bench record") from error
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        reason = "not a recording, or a damaged one"  # what NumPy says of it means nothing to users
        raise OrthrusError(f"{path}: {reason}; make one with orthrus-bench record") from error


def _parse(arrays: Mapping[str, NDArray[Any]]) -> Recording:
    header = json.loads(str(arrays["header"]))
    if header["format"] != FORMAT or header["version"] != VERSION:
        raise _OtherVersionError(
            f"{header['format']} version {header['version']}, expected {VERSION}"
        )
    block_size = int(header["block_size"])
    texts = tuple(
        _text(arrays, number, str(entry["domain"]), [int(rows) for rows in entry["rows"]])
        for number, entry in enumerate(header["texts"])
    )
    if not texts or any(block_size not in text.blocks for text in texts):
        raise ValueError(f"no texts, or one without blocks of {block_size} rows")
    return Recording(Origin(**header["origin"]), block_size, texts)


def _text(arrays: Mapping[str, NDArray[Any]], number: int, domain: str, sizes: list[int]) -> Text:
    prompt, output = (
        tuple(int(token) for token in arrays[f"{number}/{part}"]) for part in ("prompt", "output")
    )
    blocks = {}
    for rows in sizes:
        choices = arrays[f"{number}/{rows}"]
        expected = (len(output) - 1, rows, COLUMNS)
        if choices.shape != expected or choices.dtype != np.float32:
            raise ValueError(f"text {number}, blocks of {rows} rows: {choices.shape}, {expected}")
        blocks[rows] = choices
    if not prompt or not output:
        raise ValueError(f"text {number}: empty")
    return Text(domain, prompt, output, blocks)
