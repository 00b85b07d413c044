"""From the flags to the type of every tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import gguf

from orthrus_converters.file_types import TENSOR_TYPES, FileType
from orthrus_converters.source_tensor import FLOAT_DTYPES, SourceTensor
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.mix import Kind, Mix, counted, fitting
from orthrus_gguf.model.tensors import OUTPUT, TOKEN_EMBD, is_diffusion_tensor

_Type = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Override:
    """`--tensor-type REGEX=TYPE`: tensors in whose name the pattern is found get the type."""

    pattern: re.Pattern[str]
    type: Kind


@dataclass(frozen=True)
class TypeChoice:
    """What the flags ask for. file_type: None keeps the type of every tensor.

    output, embedding, heads: for the output matrix, the token embedding, the diffusion twins.
    pure: no mix, the default type for all.
    """

    file_type: FileType | None = None
    overrides: Sequence[Override] = ()
    output: Kind | None = None
    embedding: Kind | None = None
    heads: Kind | None = None
    pure: bool = False


@dataclass(frozen=True)
class Fallback:
    """A tensor whose rows do not divide into the qblocks of the type `wanted`."""

    source: SourceTensor
    wanted: Kind


@dataclass(frozen=True)
class TypePlan:
    """The type of every tensor by name, and those that could not get the one they should."""

    types: Mapping[str, Kind]
    fallbacks: Mapping[str, Fallback]


def parse_override(text: str) -> Override:
    """`REGEX=TYPE`. Raises OrthrusError, saying what is wrong with it."""
    pattern, _, name = text.rpartition("=")
    if not pattern:
        raise OrthrusError(
            f"--tensor-type {text}: expected REGEX=TYPE, such as 'attn_v=q6_k' or 'blk\\.0\\.=q8_0'"
        )
    if name.lower() not in TENSOR_TYPES:
        raise OrthrusError(
            f"--tensor-type {text}: unknown type {name!r}; choose from {', '.join(TENSOR_TYPES)}"
        )
    try:
        return Override(re.compile(pattern), TENSOR_TYPES[name.lower()])
    except re.error as error:
        raise OrthrusError(
            f"--tensor-type {text}: {pattern!r} is no regular expression ({error}); correct it"
        ) from None


def plan_types(
    tensors: Mapping[str, SourceTensor],
    config: ModelConfig,
    choice: TypeChoice,
    *,
    has_imatrix: bool,
) -> TypePlan:
    """The types for `tensors` (by their names in the file) of a model of shape `config`.

    Raises OrthrusError for a flag that matches nothing.
    """
    _check_overrides(tensors, choice)
    _check_single(tensors, config, choice)
    mix = _mix(config, choice, has_imatrix=has_imatrix)
    types: dict[str, Kind] = {}
    fallbacks: dict[str, Fallback] = {}
    counts: Counter[str] = Counter()
    for name in sorted(tensors, key=_layer_order):
        source = tensors[name]
        if not is_matrix(name, source.shape):
            keep = choice.file_type is None or source.is_quantized  # such as a table of integers
            types[name] = _own_type(source) if keep else _Type.F32
            continue
        kind = _asked_for(name, choice, tied=config.tied)
        if kind is None:
            kind = _default(name, source, choice, mix, counts)
        types[name] = fitting(kind, source.columns)
        if types[name] != kind:
            fallbacks[name] = Fallback(source, kind)
    return TypePlan({name: types[name] for name in tensors}, fallbacks)


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """True for tensors that are quantized; norms, vectors and small convolutions are not."""
    kept = "_norm" in name or "ssm_conv1d" in name
    return len(shape) > 1 and not kept and name.endswith(".weight")


def _layer_order(name: str) -> tuple[int, str]:
    """llama.cpp's order of tensors, in which a mix counts: those outside of layers come first."""
    parts = name.split(".")
    is_layer = len(parts) > 2 and parts[0] == "blk" and parts[1].isdecimal()
    return (int(parts[1]) if is_layer else -1), name


def _mix(config: ModelConfig, choice: TypeChoice, *, has_imatrix: bool) -> Mix | None:
    """None where there is nothing to mix."""
    file_type = choice.file_type
    if file_type is None or file_type.weights.name in FLOAT_DTYPES or choice.pure:
        return None
    return Mix.of(config, file_type.name, file_type.weights, has_imatrix=has_imatrix)


def _asked_for(name: str, choice: TypeChoice, *, tied: bool) -> Kind | None:
    """The type that a flag names for this very tensor."""
    if name == TOKEN_EMBD and choice.embedding is not None:
        return choice.embedding
    if name == OUTPUT and choice.output is not None:
        return choice.output
    for override in choice.overrides:
        if override.pattern.search(name):
            return override.type
    if name == TOKEN_EMBD and tied:
        return choice.output
    return choice.heads if is_diffusion_tensor(name) else None


def _default(
    name: str, source: SourceTensor, choice: TypeChoice, mix: Mix | None, counts: Counter[str]
) -> Kind:
    """The type by the rules. counts: of the parts seen; those that a flag took do not count."""
    if choice.file_type is None:
        return _own_type(source)
    if name == TOKEN_EMBD and mix is not None:
        return mix.embedding(source.columns)
    if name == OUTPUT and mix is not None:
        return mix.output(source.columns)
    if mix is None or not name.startswith("blk.") or is_diffusion_tensor(name):
        return choice.file_type.weights
    part = name.split(".")[2]
    index = counts[counted(part)]
    counts[counted(part)] += 1
    return mix.matrix(part, index)


def _own_type(source: SourceTensor) -> Kind:
    return gguf.GGMLQuantizationType[source.dtype]


def _check_single(
    tensors: Mapping[str, SourceTensor], config: ModelConfig, choice: TypeChoice
) -> None:
    """As in llama-quantize, a tied embedding is the output matrix too, if it has no own flag."""
    embedding = TOKEN_EMBD in tensors
    output = OUTPUT in tensors or (config.tied and embedding and choice.embedding is None)
    for flag, kind, found, what in (
        ("--output-tensor-type", choice.output, output, "an output matrix of its own"),
        ("--token-embedding-type", choice.embedding, embedding, "a token embedding"),
    ):
        if kind is not None and not found:
            raise OrthrusError(
                f"{flag} {kind.name.lower()}: without {what}, it has no use; leave it out"
            )


def _check_overrides(tensors: Mapping[str, SourceTensor], choice: TypeChoice) -> None:
    matrices = [name for name, source in tensors.items() if is_matrix(name, source.shape)]
    for override in choice.overrides:
        if not any(map(override.pattern.search, matrices)):
            raise OrthrusError(
                f"--tensor-type {override.pattern.pattern}={override.type.name.lower()}: no matrix "
                f"has such a name; names are like {matrices[-1]}"
            )
