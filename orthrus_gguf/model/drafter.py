"""DrafterFile: the network of a drafter in a GGUF of its own, checked against its target.

The format is mainline llama.cpp's `dflash`: layers as Qwen3 has them, without embedding and output
matrix, which are the target's; `fc.weight` makes one vector of what the target's layers read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.closing import Closing
from orthrus_gguf.gguf.fields import Fields, describe
from orthrus_gguf.gguf.parts import open_gguf
from orthrus_gguf.gguf.reader import GGUFFile, TensorInfo, Value
from orthrus_gguf.model.architectures import DFLASH
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.config import BLOCK_SIZES, MAX_VOCAB, ModelConfig
from orthrus_gguf.model.tensors import check_tensors, drafter_tensors
from orthrus_gguf.model.window import Window, read_window
from orthrus_gguf.records import dataclass

#: Architectures of other dialects, and what their files are.
DIALECTS = {
    "dflash-draft": "a draft of the format, with other names",
    "qwen35-dflash-draft": "a draft of the format for Qwen3.5, whose layer ids count from 0",
    "dflash2": "DFlash 2, with convolutions and selectors",
    "dspark": "DSpark, with a Markov head",
}

#: Parts of tensor names that betray a dialect under the architecture `dflash`.
PARTS = {
    "dflash_fc": "dflash-draft",
    "dflash_hidden_norm": "dflash-draft",
    "markov": "dspark",
    "conf_proj": "dspark",
    "conv": "dflash2",
    "selector": "dflash2",
}

#: Optional keys of `dflash`, and the values under which they change nothing.
NEUTRAL: dict[str, tuple[Value, ...]] = {
    "dflash.has_confidence_head": (False,),
    "dflash.sample_from_anchor": (True,),  # of Markov heads; llama.cpp's default
}

#: Keys of an older converter, whose layer ids may lack the 1 that mainline adds.
OLDER = ("dflash.mask_token_id", "dflash.target_hidden_size")


@dataclass(frozen=True)
class DrafterConfig:
    """A drafter's network. model: its own sizes, its block and mask token, with the vocabulary of
    the target. target_layers: of the target, whose inputs it reads (`Segment.taps`). window: what
    some of its layers see, None if all see everything."""

    model: ModelConfig
    target_layers: tuple[int, ...]
    window: Window | None


class DrafterFile(Closing):
    """An open drafter, checked against its target. Use as a context manager, or close it.

    config: shapes and constants of its network. target_layers, window: see `DrafterConfig`.
    """

    def __init__(self, file: GGUFFile, target: ModelConfig, metadata: Mapping[str, Value]) -> None:
        """target, metadata: of the model that it drafts for. Raises OrthrusError."""
        found = read_config(file, target, metadata)
        self._file = file
        self.config, self.target_layers = found.model, found.target_layers
        self.window = found.window
        self.metadata, self.tensors, self.paths = file.metadata, file.tensors, tuple(file.paths)

    @classmethod
    def open(
        cls, path: str | Path, target: ModelConfig, metadata: Mapping[str, Value]
    ) -> DrafterFile:
        """Raises OrthrusError if it cannot be read, is no drafter of this format, or of another
        target."""
        with ExitStack() as stack:
            found = cls(stack.enter_context(open_gguf(path)), target, metadata)
            stack.pop_all()
        return found

    @property
    def taps(self) -> tuple[int, ...]:
        """What it reads of the model (`Segment.taps`)."""
        return self.target_layers

    @property
    def beside(self) -> Beside:
        """What its network is to the model."""
        return dflash(self.config)

    def data(self, name: str) -> NDArray[np.uint8]:
        """See `ModelFile.data`."""
        return self._file.data(name)

    def release(self, name: str) -> None:
        """See `ModelFile.release`."""
        self._file.release(name)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()


def dflash(config: ModelConfig) -> Beside:
    """What a network of these sizes is to the model beside it."""
    if config.block_size is None:
        raise ValueError("a drafter drafts in blocks")
    return Beside("dflash", config.block_size, config.block_size - 1)


def read_config(
    file: GGUFFile, target: ModelConfig, metadata: Mapping[str, Value]
) -> DrafterConfig:
    """What the file says of its network, with every value and tensor checked. Raises OrthrusError,
    naming key or tensor."""
    fields = Fields(file.metadata, file.path)
    _check_dialect(fields, file.tensors)
    check_vocabulary(fields, metadata, target.n_vocab, f"{DFLASH.name}.vocab_size")
    config = ModelConfig.from_metadata(
        file.metadata,
        path=file.path,
        n_vocab=target.n_vocab,
        tied=True,
        has_heads=False,
        layers=DFLASH,
    )
    if config.n_embd != target.n_embd:
        raise fields.error(
            f"{DFLASH.name}.embedding_length",
            f"is {config.n_embd}, the rows of {target.name} have {target.n_embd} elements",
            "use the drafter that was trained for this model",
        )
    config = replace(
        config,
        block_size=fields.integer(keys.DFLASH_BLOCK_SIZE, *BLOCK_SIZES),
        mask_token=fields.integer(keys.MASK_TOKEN_ID, 0, target.n_vocab - 1),
    )
    layers, window = _target_layers(fields, target), read_window(fields, config)
    expected = drafter_tensors(config, len(layers))
    check_tensors(file.path, file.tensors, expected, DFLASH.name)
    return DrafterConfig(config, layers, window)


def _check_dialect(fields: Fields, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse what is no drafter, or one of another format, by its name."""
    key = gguf.Keys.General.ARCHITECTURE
    arch = fields.text(key)
    dialect = arch if arch in DIALECTS else None
    if arch != DFLASH.name and dialect is None:
        raise fields.error(
            key, f"expected 'dflash', found {describe(arch)}", "name a drafter with --drafter"
        )
    why = f"its {key} is {arch!r}"
    for name in tensors if dialect is None else ():
        dialect = next((d for part, d in PARTS.items() if part in name), None)
        if dialect is not None:
            why = f"it holds {name}"
            break
    if dialect is not None:
        raise OrthrusError(
            f"{fields.path}: is a drafter of the dialect {dialect} ({DIALECTS[dialect]}; {why}),"
            " which is not supported; get one of mainline llama.cpp's format, or convert the"
            " original with orthrus-convert"
        )
    for old in OLDER:
        if old in fields.metadata:
            raise fields.error(
                old,
                f"is of an older converter, whose {keys.DFLASH_TARGET_LAYERS} may be off by one",
                "convert the original again, with orthrus-convert or a new llama.cpp",
            )
    for name, harmless in NEUTRAL.items():
        value = fields.metadata.get(name)
        if value is not None and not (isinstance(value, (bool, int)) and value in harmless):
            raise fields.error(
                name, f"{describe(value)} is not supported", "drafters that use it cannot run here"
            )


def _target_layers(fields: Fields, target: ModelConfig) -> tuple[int, ...]:
    key = keys.DFLASH_TARGET_LAYERS
    value = fields.metadata.get(key)
    if value is None:
        raise fields.error(key, "is missing")
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu" or not value.size:
        raise fields.error(key, f"expected an array of integers, found {describe(value)}")
    layers = tuple(value.tolist())
    wrong = [layer for layer in layers if not 1 <= layer <= target.n_layers]
    if wrong:
        raise fields.error(
            key,
            f"names layer {wrong[0]}, {target.name} has 1 to {target.n_layers}",
            "use the drafter that was trained for this model",
        )
    return layers


def check_vocabulary(
    fields: Fields, target: Mapping[str, Value], n_vocab: int, size_key: str
) -> None:
    """Refuse a drafter whose tokens are others than the target's. One without tokens says only how
    many there are, under `size_key`."""
    key = gguf.Keys.Tokenizer.LIST
    ours, theirs = target.get(key), fields.metadata.get(key)
    advice = "use the drafter that was trained for this model"
    if theirs is None:
        size = fields.integer(size_key, 1, MAX_VOCAB)
        if size != n_vocab:
            raise fields.error(size_key, f"is {size}, the model has {n_vocab} tokens", advice)
        return
    if not isinstance(theirs, list) or len(theirs) != n_vocab:
        raise fields.error(key, f"is {describe(theirs)}, the model has {n_vocab} tokens", advice)
    if isinstance(ours, list) and ours != theirs:
        unlike = next(i for i, word in enumerate(ours) if word != theirs[i])
        raise fields.error(
            key, f"token {unlike} is {theirs[unlike]!r}, the model's is {ours[unlike]!r}", advice
        )
