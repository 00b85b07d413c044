"""GGUF files as sources: their tensors, and their metadata with the types that Python loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from orthrus_converters.source_tensor import SourceTensor
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.parts import open_gguf
from orthrus_gguf.gguf.reader import DEFAULT_ALIGNMENT, GGUFFile, Value
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ADAPTER, ModelFile

_Type = gguf.GGUFValueType

#: Metadata in file order: key → value and its type, as GGUFWriter keeps them.
Entries = dict[str, gguf.GGUFValue]

#: Entries that are called alike whatever the architecture.
_OF_FILES = (keys.SYNTHETIC, keys.SYNTHETIC_SEED)


@dataclass(frozen=True)
class GGUFSource:
    """A GGUF file that passed all checks of its kind.

    path: as it was named. paths: of all parts, were it split into several. config: None for a file
    of heads only. notes: what of the file cannot be kept.
    """

    path: Path
    paths: Sequence[Path]
    entries: Entries
    tensors: Mapping[str, SourceTensor]
    config: ModelConfig | None
    notes: Sequence[str]

    @property
    def name(self) -> str:
        """What the model calls itself, else the file's name."""
        entry = self.entries.get(gguf.Keys.General.NAME)
        return str(entry.value) if entry is not None else self.path.stem


def is_gguf(path: Path) -> bool:
    """True if the file starts like a GGUF, or is called one. False for folders."""
    if path.is_dir():
        return False
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF" or path.suffix == ".gguf"
    except OSError:
        return path.suffix == ".gguf"


def is_heads_only(path: Path) -> bool:
    """True for a GGUF that says that it is an adapter. Raises OrthrusError if it is damaged."""
    with open_gguf(path) as file:
        return file.metadata.get(gguf.Keys.General.TYPE) == ADAPTER


def open_model(path: Path) -> GGUFSource:
    """A whole model, with or without heads. Raises OrthrusError if it is none."""
    with ModelFile.open(path) as model:
        return _source(path, model.config)


def open_pair(base: Path, heads: Path) -> tuple[GGUFSource, GGUFSource]:
    """A stock model and a file of nothing but heads. Raises OrthrusError unless they fit."""
    with ModelFile.open(base, heads) as model:
        return _source(base, model.config), _source(heads, None)


def new_writer(entries: Entries) -> gguf.GGUFWriter:
    """A writer with exactly these entries, in their order."""
    arch = str(entries[gguf.Keys.General.ARCHITECTURE].value)
    writer = gguf.GGUFWriter(None, arch)
    writer.kv_data[0].clear()
    for key, entry in entries.items():
        writer.add_key_value(key, entry.value, entry.type, entry.sub_type)
    alignment = entries.get(gguf.Keys.General.ALIGNMENT)
    writer.data_alignment = DEFAULT_ALIGNMENT if alignment is None else int(alignment.value)
    return writer


def text(value: str) -> gguf.GGUFValue:
    """An entry that holds a string."""
    return gguf.GGUFValue(value, _Type.STRING)


def number(value: int) -> gguf.GGUFValue:
    """An entry that holds an unsigned 32-bit number."""
    return gguf.GGUFValue(value, _Type.UINT32)


def _source(path: Path, config: ModelConfig | None) -> GGUFSource:
    with open_gguf(path) as file:
        tensors = {
            name: SourceTensor(
                name, info.type.name, info.shape, file.path_of(name), info.offset, info.n_bytes
            )
            for name, info in file.tensors.items()
        }
        paths = file.paths
        entries = _read_entries(file)
        empty = [
            key for key, item in entries.items() if item.type == _Type.ARRAY and not item.value
        ]
        for key in empty:  # GGUFWriter cannot write them
            del entries[key]
    notes = [f"{path}: left out empty arrays: {', '.join(empty)}"] if empty else []
    return GGUFSource(path, paths, entries, tensors, config, notes)


def _read_entries(file: GGUFFile) -> Entries:
    """The metadata with its types."""
    entries: Entries = {}
    for key, value in file.metadata.items():
        if key.startswith("split."):  # about a download in one part
            continue
        kind, item = file.types[key]
        entries[key] = gguf.GGUFValue(_plain(value), kind, item)
    if gguf.Keys.General.ARCHITECTURE not in entries:
        raise OrthrusError(f"{file.path}: general.architecture is missing; convert it again")
    return entries


def _plain(value: Value) -> Any:
    """A value as GGUFWriter takes it."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def rename(entries: Entries, old: str, new: str) -> Entries:
    """Entries of a model of architecture `old`, as those of architecture `new`."""
    renamed: Entries = {}
    for key, entry in entries.items():
        if key.startswith(f"{old}.") and key not in _OF_FILES:
            key = new + key[len(old) :]
        renamed[key] = entry
    renamed[gguf.Keys.General.ARCHITECTURE] = text(new)
    return renamed


def belongs_to_heads(key: str) -> bool:
    """True for entries that are about the diffusion view, and go where its tensors go."""
    prefixes = (f"{keys.ARCH_ORTHRUS}.diffusion.", f"{keys.ARCH_ORTHRUS}.graft.")
    return key in (keys.MASK_TOKEN_ID, keys.BASE_ARCHITECTURE) or key.startswith(prefixes)
