"""ModelFile: one model as the runtimes see it, in one GGUF file or in a base and its heads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.closing import Closing
from orthrus_gguf.gguf.fields import MAX_NUMBER, Fields, describe
from orthrus_gguf.gguf.parts import open_gguf
from orthrus_gguf.gguf.reader import GGUFFile, TensorInfo, Value
from orthrus_gguf.model.belong import check_trained_on, differences
from orthrus_gguf.model.config import ModelConfig, architecture, ignored_keys
from orthrus_gguf.model.tensors import (
    FLOAT_TYPES,
    OUTPUT,
    ROPE_FREQS,
    TOKEN_EMBD,
    base_tensors,
    check_tensors,
    diffusion_tensors,
    is_diffusion_tensor,
    optional_tensors,
)

ADAPTER = gguf.GGUFType.ADAPTER


class WeightFile(Protocol):
    """An open file that weights are read from: a model's, or a drafter's."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def paths(self) -> tuple[Path, ...]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def data(self, name: str) -> NDArray[np.uint8]:
        """See `ModelFile.data`."""
        ...

    def release(self, name: str) -> None:
        """See `ModelFile.release`."""
        ...


class ModelFile(Closing):
    """An open model, checked as a whole. Use as a context manager, or close it.

    config: shapes and constants.
    metadata: of the base file, with the diffusion keys of the heads file where there is one.
    tensors: of all files, in file order. Offsets are within the tensor's own file: use data().
    paths: the base file and, where there is one, the heads file; all parts of split ones.
    notes: lines about what is in the files and has no effect.
    """

    def __init__(self, base: GGUFFile, heads: GGUFFile | None) -> None:
        self._files = (base,) if heads is None else (base, heads)
        self.paths: tuple[Path, ...] = tuple(path for file in self._files for path in file.paths)
        metadata = dict(base.metadata)
        if heads is None:
            self.config = _single_config(base)
        else:
            self.config = _pair_config(base, heads)
            metadata |= {key: heads.metadata[key] for key in (keys.BLOCK_SIZE, keys.MASK_TOKEN_ID)}
        self.metadata: Mapping[str, Value] = MappingProxyType(metadata)
        self.notes = tuple(ignored_keys(base.metadata, base.path))
        self._owner = {name: file for file in self._files for name in file.tensors}
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: file.tensors[name] for name, file in self._owner.items()}
        )

    @classmethod
    def open(cls, path: str | Path, heads: str | Path | None = None) -> ModelFile:
        """Open a model: one GGUF file, or a base and the heads that belong to it.

        A stock file without heads gives a model without the diffusion view. Raises OrthrusError if
        a file cannot be read, is no supported model, or if the two do not belong together.
        """
        with ExitStack() as stack:
            base_file = stack.enter_context(open_gguf(path))
            heads_file = None if heads is None else stack.enter_context(open_gguf(heads))
            model = cls(base_file, heads_file)
            stack.pop_all()
        return model

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of tensor `name`, shape (n_bytes,): a read-only view of the mapped file.

        Views stay valid after close(). Raises KeyError if there is no such tensor.
        """
        return self._owner[name].data(name)

    def prefetch(self, *, heads: bool) -> None:
        """Bring the tensors into memory, in the background, so that the first pass need not wait.

        heads: those of the diffusion view too. For what is in the system's cache this sets up the
        mapping only; what is not is read from the disk.
        """
        for file in self._files:
            file.prefetch([name for name in file.tensors if heads or not is_diffusion_tensor(name)])

    def release(self, name: str) -> None:
        """Let the system have the memory of a tensor's data; reading it again brings it back."""
        self._owner[name].release(name)

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files:
            file.close()


def _single_config(file: GGUFFile) -> ModelConfig:
    """The config of a file that is used on its own, after all checks."""
    _check_base(file)
    arch = file.metadata.get(gguf.Keys.General.ARCHITECTURE)
    twins = any(map(is_diffusion_tensor, file.tensors))
    if twins and arch != keys.ARCH_ORTHRUS:
        raise OrthrusError(
            f"{file.path}: holds diffusion tensors, but its general.architecture is {arch!r}, "
            "expected 'orthrus'; convert the model again with orthrus-convert"
        )
    config = _base_config(file, has_heads=arch == keys.ARCH_ORTHRUS)
    expected = base_tensors(config)
    if config.has_heads:
        if not twins:
            raise OrthrusError(
                f"{file.path}: is an Orthrus model, but holds no diffusion tensors such as "
                "blk.0.attn_q_diff.weight; convert the model again with orthrus-convert"
            )
        expected |= diffusion_tensors(config)
    arch_name, optional = config.architecture.name, optional_tensors(config)
    check_tensors(file.path, file.tensors, expected, arch_name, optional)
    return config


def _pair_config(base: GGUFFile, heads: GGUFFile) -> ModelConfig:
    """The config of a base and its heads, each checked by itself and against the other."""
    _check_base(base)
    if any(map(is_diffusion_tensor, base.tensors)):
        raise OrthrusError(
            f"{base.path}: already holds diffusion heads; leave out the heads file {heads.path}"
        )
    config = _base_config(base, has_heads=False)
    arch = config.architecture.name
    optional = optional_tensors(config)
    check_tensors(base.path, base.tensors, base_tensors(config), arch, optional)
    _check_heads(heads)
    theirs = _heads_config(heads, config)
    unlike = differences(config, theirs)
    if unlike:
        raise OrthrusError(
            f"{heads.path}: these heads do not belong to {base.path}: {unlike}; "
            "use the heads and the base of the same model"
        )
    wanted = Fields(heads.metadata, heads.path).text(keys.BASE_FINGERPRINT, "")
    if wanted:
        check_trained_on(heads.path, wanted, base.path, base.tensors, base.data)
    for name in heads.tensors:
        if name in base.tensors:
            raise OrthrusError(
                f"{heads.path}: tensor {name!r} is also in {base.path}, heads must not replace it; "
                "make the heads file again with orthrus-convert --split"
            )
    check_tensors(heads.path, heads.tensors, diffusion_tensors(config), arch)
    return replace(config, block_size=theirs.block_size, mask_token=theirs.mask_token)


def _heads_config(heads: GGUFFile, base: ModelConfig) -> ModelConfig:
    """What a heads file says of itself; constants that it shares with its base it need not say."""
    shared: dict[str, Value] = {
        keys.model_key(gguf.Keys.LLM.CONTEXT_LENGTH, keys.ARCH_ORTHRUS): base.n_ctx_train,
        keys.model_key(gguf.Keys.LLM.FEED_FORWARD_LENGTH, keys.ARCH_ORTHRUS): base.n_ff,
        keys.model_key(gguf.Keys.Attention.LAYERNORM_RMS_EPS, keys.ARCH_ORTHRUS): base.rms_eps,
    }
    return ModelConfig.from_metadata(
        shared | dict(heads.metadata),
        path=heads.path,
        n_vocab=base.n_vocab,
        tied=base.tied,
        has_heads=True,
    )


def _check_base(file: GGUFFile) -> None:
    """Refuse what is not one whole model, before asking for the keys of one."""
    fields = Fields(file.metadata, file.path)
    if fields.text(gguf.Keys.General.TYPE, "model") != ADAPTER:
        _, record = architecture(fields)
        if record.hybrid:
            _check_hybrid(file)
        return
    kind = fields.text(gguf.Keys.Adapter.TYPE, "unknown")
    if kind == keys.ADAPTER_HEADS:
        _, base = architecture(fields)
        raise OrthrusError(
            f"{file.path}: holds only diffusion heads; "
            f"open their base model ({base.name}), with --heads {file.path}"
        )
    raise fields.error(
        gguf.Keys.General.TYPE,
        f"expected a model, found an adapter of type {describe(kind)}",
        "name the model's own file",
    )


def _check_hybrid(file: GGUFFile) -> None:
    """Refuse other layouts of the architecture, and parts of its models, by their names."""
    odd = next((name for name in file.tensors if name.startswith(("v.", "mtp."))), None)
    if odd is not None:
        raise OrthrusError(
            f"{file.path}: holds {odd}: Ollama's layout of this architecture, with vision and MTP"
            " tensors of other names, is not supported; use a file made by llama.cpp's converter"
            " or orthrus-convert"
        )
    mtp = next((name for name in file.tensors if ".nextn." in name), None)
    if mtp is not None and "blk.0.attn_norm.weight" not in file.tensors:
        raise OrthrusError(
            f"{file.path}: holds only an MTP block ({mtp}), which drafts for its model; open that"
            f" model, with --drafter {file.path}"
        )


def _check_heads(file: GGUFFile) -> None:
    """Refuse what is not a heads file."""
    fields = Fields(file.metadata, file.path)
    for key, expected in (
        (gguf.Keys.General.TYPE, ADAPTER),
        (gguf.Keys.Adapter.TYPE, keys.ADAPTER_HEADS),
        (gguf.Keys.General.ARCHITECTURE, keys.ARCH_ORTHRUS),
    ):
        found = fields.text(key, "model" if key == gguf.Keys.General.TYPE else None)
        if found != expected:
            raise fields.error(
                key,
                f"is not a heads file: expected {expected!r}, found {describe(found)}",
                "make heads with orthrus-convert --split",
            )


def _base_config(file: GGUFFile, *, has_heads: bool) -> ModelConfig:
    """The config of a file that holds the AR model."""
    if TOKEN_EMBD not in file.tensors:
        raise OrthrusError(
            f"{file.path}: tensor {TOKEN_EMBD} is missing; the file holds no whole model: "
            "download or convert it again"
        )
    config = ModelConfig.from_metadata(
        file.metadata,
        path=file.path,
        n_vocab=file.tensors[TOKEN_EMBD].shape[0],
        tied=OUTPUT not in file.tensors,
        has_heads=has_heads,
    )
    if ROPE_FREQS not in file.tensors:
        return config
    return replace(config, rope=replace(config.rope, freq_factors=_freq_factors(file, config)))


def _freq_factors(file: GGUFFile, config: ModelConfig) -> tuple[float, ...]:
    """What RoPE's frequencies are divided by, one number per pair."""
    info, pairs = file.tensors[ROPE_FREQS], config.head_dim // 2
    if info.shape != (pairs,) or info.type not in FLOAT_TYPES:
        raise OrthrusError(
            f"{file.path}: tensor {ROPE_FREQS}: expected {pairs} floats, one per pair of a head, "
            f"found {info.type.name} {info.shape}; convert the model again"
        )
    from gguf.quants import dequantize

    factors = dequantize(file.data(ROPE_FREQS).reshape(1, -1), info.type).ravel()
    wrong = [value for value in factors.tolist() if not 0 < value <= MAX_NUMBER]
    if wrong:
        raise OrthrusError(
            f"{file.path}: tensor {ROPE_FREQS}: expected numbers above 0, found {wrong[0]}; "
            "convert the model again"
        )
    return tuple(factors.tolist())
