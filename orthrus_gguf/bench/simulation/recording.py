"""Recordings: texts, and what diffusion heads, or a drafter's network, drafted at every position.

A block sees the committed tokens and its anchor, so on a given text there is one block per anchor
position and number of rows, whatever strategy asks for it. With all of them, any strategy can be
replayed, without the model. (A drafter's network always drafts whole blocks.)

On disk a recording is an .npz file: an entry `header` (JSON), and arrays `N/prompt`, `N/output`,
`N/ROWS`, `N/drafter` for text number N.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.drafter import dflash
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.model.shapes import SHAPES

#: Version 1 knew nothing of drafters, and is otherwise the same.
VERSION, READ = 2, (1, 2)
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
    drafter: what a drafter's network drafted, likewise: [anchors, rows of its block - 1, COLUMNS].
    """

    domain: str
    prompt: tuple[int, ...]
    output: tuple[int, ...]
    blocks: Mapping[int, RecordedRows]
    drafter: RecordedRows | None = None

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
    """Texts of one model.

    block_size: rows of the largest block of its diffusion heads, which every text holds; None
        without heads. drafter_block: rows of the blocks of a drafter's network beside it, likewise;
        of one that drafts chains (`drafter_chain`), a token more than they have.
    """

    origin: Origin
    block_size: int | None
    texts: tuple[Text, ...]
    drafter_block: int | None = None
    drafter_chain: bool = False

    @property
    def beside(self) -> Beside | None:
        """What the drafter's network is to the model; chains are an MTP block's."""
        if (rows := self.drafter_block) is None:
            return None
        if self.drafter_chain:
            return replace(MtpFile.beside, block=rows, width=min(rows - 1, MtpFile.beside.width))
        return dflash(replace(SHAPES["qwen3-8b"], block_size=rows))

    def domains(self) -> dict[str, list[Text]]:
        """Texts by domain, in order of first appearance."""
        found: dict[str, list[Text]] = {}
        for text in self.texts:
            found.setdefault(text.domain, []).append(text)
        return found

    def save(self, path: Path) -> None:
        """Written beside and renamed. Raises OSError."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "origin": asdict(self.origin),
            "block_size": self.block_size,
            "drafter_block": self.drafter_block,
            "drafter_chain": self.drafter_chain,
            "texts": [{"domain": t.domain, "rows": sorted(t.blocks)} for t in self.texts],
        }
        arrays: dict[str, Any] = {"header": np.array(json.dumps(header))}
        for number, text in enumerate(self.texts):
            arrays[f"{number}/prompt"] = np.array(text.prompt, np.int32)
            arrays[f"{number}/output"] = np.array(text.output, np.int32)
            for rows, choices in text.blocks.items():
                arrays[f"{number}/{rows}"] = choices
            if text.drafter is not None:
                arrays[f"{number}/drafter"] = text.drafter
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                np.savez_compressed(file, **arrays)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def blocks_in_words(recording: Recording) -> str:
    """Which blocks a recording holds for every position."""
    sizes = sorted(set.intersection(*(set(text.blocks) for text in recording.texts)))
    parts = [f"blocks of {', '.join(map(str, sizes))} rows"] if sizes else []
    if recording.beside is not None and recording.beside.chain:
        parts.append(f"chains of {recording.beside.most} tokens by an MTP block")
    elif recording.drafter_block is not None:
        parts.append(f"blocks of a drafter's network, {recording.drafter_block} rows each")
    return " and ".join(parts)


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
    if header["format"] != FORMAT or header["version"] not in READ:
        raise _OtherVersionError(
            f"{header['format']} version {header['version']}, expected {VERSION}"
        )
    block_size, drafter_block = (
        None if header.get(key) is None else int(header[key])
        for key in ("block_size", "drafter_block")
    )
    texts = tuple(
        _text(
            *(arrays, number, str(entry["domain"]), [int(rows) for rows in entry["rows"]]),
            drafter_block,
        )
        for number, entry in enumerate(header["texts"])
    )
    if block_size is None and drafter_block is None:
        raise ValueError("nothing drafted")
    if not texts or any(block_size not in {None, *text.blocks} for text in texts):
        raise ValueError(f"no texts, or one without blocks of {block_size} rows")
    chain = bool(header.get("drafter_chain", False))
    return Recording(Origin(**header["origin"]), block_size, texts, drafter_block, chain)


def _text(
    arrays: Mapping[str, NDArray[Any]],
    number: int,
    domain: str,
    sizes: list[int],
    drafter_block: int | None,
) -> Text:
    prompt, output = (
        tuple(int(token) for token in arrays[f"{number}/{part}"]) for part in ("prompt", "output")
    )

    def drafted(name: str, rows: int) -> RecordedRows:
        choices = arrays[f"{number}/{name}"]
        expected = (len(output) - 1, rows, COLUMNS)
        if choices.shape != expected or choices.dtype != np.float32:
            raise ValueError(f"text {number}, blocks of {rows} rows: {choices.shape}, {expected}")
        return choices

    blocks = {rows: drafted(str(rows), rows) for rows in sizes}
    drafter = None if drafter_block is None else drafted("drafter", drafter_block - 1)
    if not prompt or not output:
        raise ValueError(f"text {number}: empty")
    return Text(domain, prompt, output, blocks, drafter)
