"""MtpFile: the MTP block of a hybrid as a drafter's network, in the model's file or one of its own.

The block is one more layer of attention behind the model's (`nextn` in tensor names). It predicts
the token after the next, from a token's embedding and what the model's last layer gave for the
token before. Embedding and output matrix are the model's, unless the block has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.closing import Closing
from orthrus_gguf.gguf.fields import Fields
from orthrus_gguf.gguf.parts import open_gguf
from orthrus_gguf.gguf.reader import GGUFFile, TensorInfo
from orthrus_gguf.model.belong import differences
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.config import ModelConfig, architecture
from orthrus_gguf.model.drafter import DrafterFile, check_vocabulary
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.hybrid import mtp_key
from orthrus_gguf.model.tensors import (
    MTP_NORM,
    OUTPUT,
    OUTPUT_NORM,
    TOKEN_EMBD,
    check_tensors,
    mtp_tensors,
    optional_tensors,
)

#: The longest draft; the published acceptance of the eighth token is under a third. How long it is
#: unless somebody chooses (llama.cpp's `--spec-draft-n-max`).
MOST, USUAL = 8, 3

#: Rows of two embeddings that are compared, and how alike (cosine) those of one model are at least,
#: whatever their types.
ROWS, ALIKE = 64, 0.7


class MtpFile(Closing):
    """An MTP block, checked against its model. Use as a context manager, or close it.

    config: its sizes, those of a model of one layer. tensors: by the names of such a model,
    whatever the file calls them: layer 0, and the norm behind it. ids: the first ones of the
    vocabulary, of which drafts are made.
    """

    beside = Beside("mtp", MOST + 1, USUAL, chain=True)

    def __init__(
        self, file: GGUFFile | ModelFile, target: ModelFile, own: GGUFFile | None = None
    ) -> None:
        """file: holds the block, where `target` has its layers' end. own: to close with it."""
        config = target.config
        self._file, self._target, self._own = file, target, own
        self.paths = (own.path,) if own is not None else target.paths
        #: What it reads of the model: the residual stream behind the last norm.
        self.taps = (config.n_layers + 1,)
        self.config, self.ids = block_config(config), config.n_vocab
        self._names = _names(file.tensors, config.n_layers)
        self.tensors = block_tensors(file.tensors, config.n_layers)
        self.tensors.setdefault(OUTPUT_NORM, target.tensors[OUTPUT_NORM])

    @classmethod
    def inside(cls, target: ModelFile) -> MtpFile:
        """The block that the model's own file holds (`Hybrid.mtp`)."""
        return cls(target, target)

    @classmethod
    def open(cls, path: str | Path, target: ModelFile) -> MtpFile:
        """The block in a file of its own (`mtp-*.gguf`). Raises OrthrusError if that cannot be
        read, holds none, or one of another model."""
        with ExitStack() as stack:
            file = stack.enter_context(open_gguf(path))
            _check(file, target)
            found = cls(file, target, file)
            stack.pop_all()
        return found

    def cut(self, ids: int) -> None:
        """Draft with the first `ids` of the vocabulary only, which are the most frequent ones where
        ids count merges. Less of the output matrix is read then. Raises OrthrusError."""
        if not 1 <= ids <= self.config.n_vocab:
            raise OrthrusError(f"--draft-ids {ids}: expected 1 to {self.config.n_vocab:,}")
        self.ids = ids
        self.config = replace(self.config, name=f"{self.config.name}, {ids:,} ids")

    def data(self, name: str) -> NDArray[np.uint8]:
        """See `ModelFile.data`."""
        if name in self._names:
            return self._file.data(self._names[name])
        return self._target.data(OUTPUT_NORM)

    def release(self, name: str) -> None:
        """See `ModelFile.release`."""
        if name in self._names:
            self._file.release(self._names[name])

    def close(self) -> None:
        """Let go of its own file."""
        if self._own is not None:
            self._own.close()


def block_tensors(tensors: Mapping[str, TensorInfo], layers: int) -> dict[str, TensorInfo]:
    """Those of a block that lies behind so many layers, by the names of a model of one layer."""
    return {
        name: replace(tensors[stored], name=name)
        for name, stored in _names(tensors, layers).items()
    }


def _names(stored: Iterable[str], layers: int) -> dict[str, str]:
    """Names of a block's tensors in a model of one layer, and in a file."""
    block = f"blk.{layers}."
    return {
        OUTPUT_NORM if name == block + MTP_NORM else f"blk.0.{name.removeprefix(block)}": name
        for name in stored
        if name.startswith(block)
    }


def block_config(config: ModelConfig) -> ModelConfig:
    """The sizes of a hybrid's MTP block, as those of a model of one layer."""
    assert config.hybrid is not None
    return replace(
        config,
        name=f"{config.name}'s MTP block",
        n_layers=1,
        hybrid=replace(config.hybrid, attention_every=1, mtp=False),
        block_size=MtpFile.beside.block,
        mask_token=None,
    )


def open_beside(path: str | Path, target: ModelFile) -> DrafterFile | MtpFile:
    """The drafter in a file of its own, of either kind, checked against its model. Raises
    OrthrusError."""
    with open_gguf(path) as file:
        block = _is_block(file)
    if block:
        return MtpFile.open(path, target)
    return DrafterFile.open(path, target.config, target.metadata)


def _is_block(file: GGUFFile) -> bool:
    """Whether a file holds an MTP block and not the model that it drafts for."""
    return "blk.0.attn_norm.weight" not in file.tensors and any(
        ".nextn." in name for name in file.tensors
    )


def _check(file: GGUFFile, target: ModelFile) -> None:
    """Raise OrthrusError unless a file holds the MTP block of this model."""
    fields, ours = Fields(file.metadata, file.path), target.config
    _, record = architecture(fields)
    if ours.hybrid is None or record != ours.architecture:
        raise OrthrusError(
            f"{file.path}: is an MTP block of {record.name}, {ours.name} is"
            f" {ours.architecture.name}; use the block that was trained for this model"
        )
    rows = file.tensors[TOKEN_EMBD].shape[0] if TOKEN_EMBD in file.tensors else ours.n_vocab
    theirs = ModelConfig.from_metadata(
        file.metadata, path=file.path, n_vocab=rows, tied=ours.tied, has_heads=False
    )
    if theirs.hybrid is None or not theirs.hybrid.mtp:
        raise fields.error(mtp_key(record.name), "is not 1, and yet there is an MTP block")
    unlike = differences(ours, theirs)
    if unlike:
        raise OrthrusError(
            f"{file.path}: this MTP block does not belong to {target.paths[0]}: {unlike}; use the"
            " block that was trained for this model"
        )
    if gguf.Keys.Tokenizer.LIST in file.metadata:
        check_vocabulary(fields, target.metadata, ours.n_vocab, "")
    shared = {TOKEN_EMBD: (ours.n_vocab, ours.n_embd), OUTPUT_NORM: (ours.n_embd,)}
    shared[OUTPUT] = shared[TOKEN_EMBD]
    optional = {**optional_tensors(theirs), **shared}
    check_tensors(file.path, file.tensors, mtp_tensors(theirs), record.name, optional)
    if TOKEN_EMBD in file.tensors and _likeness(file, target) < ALIKE:
        raise OrthrusError(
            f"{file.path}: this MTP block does not belong to {target.paths[0]}: their embeddings"
            " are not alike; use the block that was trained for this model"
        )


def _likeness(file: GGUFFile, target: ModelFile) -> float:
    """How alike some rows of two embeddings are, -1 to 1."""
    from gguf.quants import dequantize

    some = []
    for source in (file, target):
        info = source.tensors[TOKEN_EMBD]
        rows = source.data(TOKEN_EMBD).reshape(info.shape[0], -1)
        values = dequantize(np.ascontiguousarray(rows[:: max(len(rows) // ROWS, 1)]), info.type)
        some.append(values.astype(np.float64).ravel())
    one, other = some
    size = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / size if size else 0.0
