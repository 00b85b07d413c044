"""A checkpoint → the plan of its GGUF files. Writing the plan is orthrus_gguf.gguf.writer's job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf

from orthrus_converters import metadata, tokenizer_files
from orthrus_converters.checkpoint import check_folder, open_checkpoint
from orthrus_converters.encode import encode
from orthrus_converters.file_types import FileType, lossless_type, tensor_type
from orthrus_converters.hf_config import read_config, unknown_fields
from orthrus_converters.json_file import JsonFile
from orthrus_converters.tensor_names import Weight, has_heads, match_weights
from orthrus_converters.vocabulary import Vocabulary
from orthrus_gguf.config import ModelConfig
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.tensors import is_diffusion_tensor
from orthrus_gguf.gguf.writer import PlannedFile, PlannedTensor, check_target

CONFIG = "config.json"


@dataclass(frozen=True)
class Request:
    """What to convert. file_type: None keeps the checkpoint's own type, so that nothing is lost."""

    source: Path
    output: Path
    file_type: FileType | None = None
    split: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Plan:
    """The files to write, the type chosen, and remarks for the user."""

    files: Sequence[PlannedFile]
    file_type: FileType
    notes: Sequence[str]

    @property
    def tensors(self) -> list[PlannedTensor]:
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def n_bytes(self) -> int:
        """Bytes of tensor data in all files."""
        return sum(tensor.n_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class _Model:
    """Everything that was read from the checkpoint, but the weights' values."""

    folder: Path
    config: ModelConfig
    vocabulary: Vocabulary
    weights: Sequence[Weight]
    file_type: FileType


def heads_path(output: Path) -> Path:
    """Where `--split` puts the heads: OUT.gguf → OUT-heads.gguf."""
    return output.with_name(f"{output.stem}-heads{output.suffix}")


def plan_conversion(request: Request) -> Plan:
    """Read and check everything but the weights' values; decide all names, types and sizes.

    Raises OrthrusError if the checkpoint cannot be converted or the output may not be written.
    """
    check_folder(request.source)
    outputs = [request.output, *([heads_path(request.output)] if request.split else [])]
    _check_outputs(outputs, _other_inputs(request.source))
    for output in outputs:
        check_target(output, overwrite=request.overwrite)
    config = JsonFile.read(request.source / CONFIG)
    checkpoint = open_checkpoint(request.source)
    _check_outputs(outputs, checkpoint.files)
    if not has_heads(checkpoint):
        raise OrthrusError(
            f"{request.source}: holds no diffusion heads (no *_diff weights): a plain "
            f"{config.values.get('model_type', 'model')}, not an Orthrus checkpoint"
            f"{', so there is nothing to split' if request.split else ''}; llama.cpp's "
            "convert_hf_to_gguf.py converts plain models"
        )
    model_config = read_config(config, request.source.name)
    weights = match_weights(checkpoint, model_config)
    model = _Model(
        request.source,
        model_config,
        tokenizer_files.read_vocabulary(request.source, config, model_config.n_vocab),
        weights,
        request.file_type
        or lossless_type(weight.source.dtype for weight in weights if len(weight.source.shape) > 1),
    )
    files = _split_files(model, outputs) if request.split else [_single_file(model, outputs[0])]
    notes = _type_notes(files, model.file_type) + _field_notes(config)
    return Plan(files, model.file_type, notes)


def _other_inputs(folder: Path) -> list[Path]:
    names = (CONFIG, metadata.CARD, metadata.GENERATION, *tokenizer_files.FILES)
    return [folder / name for name in names]


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise OrthrusError if an output would replace an input, under whatever name."""
    for output in outputs:
        for path in inputs:
            if output.exists() and path.exists() and output.samefile(path):
                raise OrthrusError(f"{output}: is part of the checkpoint; choose another name")


def _single_file(model: _Model, path: Path) -> PlannedFile:
    """Base and heads in one `orthrus` file."""
    writer, tensors = _start(model, keys.ARCH_ORTHRUS, model.weights)
    metadata.add_tokenizer(writer, model.vocabulary)
    metadata.add_heads(writer, model.config)
    return PlannedFile(path, writer, tensors)


def _split_files(model: _Model, paths: Sequence[Path]) -> list[PlannedFile]:
    """A stock `qwen3` file, and a file with nothing but the heads."""
    base = [weight for weight in model.weights if not is_diffusion_tensor(weight.name)]
    heads = [weight for weight in model.weights if is_diffusion_tensor(weight.name)]
    base_writer, base_tensors = _start(model, keys.ARCH_QWEN3, base)
    metadata.add_tokenizer(base_writer, model.vocabulary)
    heads_writer, heads_tensors = _start(
        model, keys.ARCH_ORTHRUS, heads, kind=gguf.GGUFType.ADAPTER
    )
    metadata.add_adapter_type(heads_writer)
    metadata.add_heads(heads_writer, model.config)
    return [
        PlannedFile(paths[0], base_writer, base_tensors),
        PlannedFile(paths[1], heads_writer, heads_tensors),
    ]


def _start(
    model: _Model, arch: str, weights: Sequence[Weight], kind: str = gguf.GGUFType.MODEL
) -> tuple[gguf.GGUFWriter, list[PlannedTensor]]:
    """A writer with the keys that every file has, and the tensors for `weights`."""
    tensors = [_plan_tensor(weight, model.file_type) for weight in weights]
    writer = gguf.GGUFWriter(None, arch)
    card = metadata.read_card(model.folder, sum(tensor.n_elements for tensor in tensors))
    metadata.add_general(writer, card, kind)
    metadata.add_model(writer, model.config, model.file_type)
    return writer, tensors


def _plan_tensor(weight: Weight, file_type: FileType) -> PlannedTensor:
    source = weight.source
    kind = tensor_type(weight.name, source.shape, file_type)
    return PlannedTensor(weight.name, source.shape, kind, partial(encode, source, kind))


def _type_notes(files: Sequence[PlannedFile], file_type: FileType) -> list[str]:
    """Says which matrices could not get the type that was asked for."""
    others = [
        tensor
        for file in files
        for tensor in file.tensors
        if tensor.type not in (file_type.weights, gguf.GGMLQuantizationType.F32)
    ]
    if not others:
        return []
    first = others[0]
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    return [
        f"{first.name}{more}: rows of {first.shape[-1]} are no multiple of the qblock of "
        f"{file_type.weights.name}; written as {first.type.name}"
    ]


def _field_notes(config: JsonFile) -> list[str]:
    unknown = unknown_fields(config)
    return [f"{config.path}: ignored unknown fields: {', '.join(unknown)}"] if unknown else []
