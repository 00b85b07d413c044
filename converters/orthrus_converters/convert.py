"""A Hugging Face checkpoint → the plan of its GGUF files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gguf

from orthrus_converters import metadata, tokenizer_files
from orthrus_converters.checkpoint import Checkpoint, check_folder, open_checkpoint
from orthrus_converters.drafter import is_drafter, plan_drafter
from orthrus_converters.encode import Job
from orthrus_converters.file_types import FileType, lossless_type, uniform_file_type
from orthrus_converters.hf_config import read_config, read_config_file, unknown_fields
from orthrus_converters.hf_qwen35 import text_model, with_mtp
from orthrus_converters.imatrix import Imatrix
from orthrus_converters.jobs import plan_jobs
from orthrus_converters.json_file import JsonFile
from orthrus_converters.plan import (
    NewFile,
    Plan,
    Request,
    check_headless,
    check_outputs,
    heads_path,
)
from orthrus_converters.sources import FolderSource
from orthrus_converters.tensor_names import has_heads, match_weights
from orthrus_converters.type_plan import TypeChoice
from orthrus_converters.vocabulary import Vocabulary
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.tensors import is_diffusion_tensor

CONFIG = "config.json"


@dataclass(frozen=True)
class _Model:
    """Everything that was read from the checkpoint, but the weights' values."""

    source: FolderSource
    config: ModelConfig
    vocabulary: Vocabulary
    jobs: Mapping[str, Job]
    choice: TypeChoice
    file_type: FileType
    imatrix: Imatrix | None


def inputs_of(folder: Path) -> list[Path]:
    """The files that a conversion of `folder` reads besides the weights."""
    names = (CONFIG, metadata.CARD, metadata.GENERATION, *tokenizer_files.FILES)
    return [folder / name for name in names]


def plan_checkpoint(request: Request, source: FolderSource, imatrix: Imatrix | None) -> Plan:
    """Read and check everything but the weights' values; decide all names, types and sizes.

    Raises OrthrusError if the checkpoint cannot be converted or the output may not be written.
    """
    folder = source.folder
    check_folder(folder)
    check_outputs(request, inputs_of(folder))
    config_file = read_config_file(folder / CONFIG)
    if is_drafter(config_file):
        return plan_drafter(request, source, config_file, imatrix)
    if request.target is not None:
        raise OrthrusError(
            f"--target {request.target}: goes with a drafter, and {folder} is a model; leave it out"
        )
    checkpoint = open_checkpoint(folder)
    check_outputs(request, checkpoint.files)
    _check_heads(checkpoint, config_file, request)
    config = read_config(config_file, source.name, has_heads=has_heads(checkpoint))
    if config.hybrid is not None:
        checkpoint = text_model(checkpoint)
        config = with_mtp(config, checkpoint)
    weights = match_weights(checkpoint, config)
    vocabulary = tokenizer_files.read_vocabulary(folder, config_file, config.n_vocab)
    file_type = request.choice.file_type or lossless_type(
        weight.dtype for weight in weights.values() if len(weight.shape) > 1
    )
    choice = replace(request.choice, file_type=file_type)
    jobs, notes = plan_jobs(weights, config, choice, imatrix)
    model = _Model(source, config, vocabulary, jobs, choice, file_type, imatrix)
    files = _split_files(model, request.output) if request.split else [_single(model, request)]
    return Plan(files, [*checkpoint.notes, *notes, *_field_notes(config_file), *vocabulary.notes])


def _check_heads(checkpoint: Checkpoint, config: JsonFile, request: Request) -> None:
    """Raise OrthrusError if heads are missing that the config or the flags speak of."""
    if has_heads(checkpoint):
        return
    if config.values.get("block_size") is not None:
        raise OrthrusError(
            f"{checkpoint.folder}: holds no diffusion heads (no *_diff weights), though "
            f"{CONFIG} has a block_size; the checkpoint is incomplete: download it again"
        )
    check_headless(str(checkpoint.folder), request)


def _single(model: _Model, request: Request) -> NewFile:
    """Base and heads in one `orthrus` file; a stock file if there are no heads."""
    jobs = [*model.jobs.values()]
    config = model.config
    arch = keys.ARCH_ORTHRUS if config.has_heads else config.architecture.name
    writer = _start(model, arch, jobs, model.file_type)
    metadata.add_tokenizer(writer, model.vocabulary)
    if config.has_heads:
        metadata.add_heads(writer, config)
    return NewFile(request.output, writer, jobs)


def _split_files(model: _Model, output: Path) -> list[NewFile]:
    """A stock file, and a file with nothing but the heads."""
    base = [job for name, job in model.jobs.items() if not is_diffusion_tensor(name)]
    heads = [job for name, job in model.jobs.items() if is_diffusion_tensor(name)]
    base_writer = _start(model, model.config.architecture.name, base, model.file_type)
    metadata.add_tokenizer(base_writer, model.vocabulary)
    kind = model.choice.heads
    heads_type = model.file_type if kind is None else uniform_file_type(kind)
    heads_writer = _start(model, keys.ARCH_ORTHRUS, heads, heads_type, gguf.GGUFType.ADAPTER)
    metadata.add_adapter_type(heads_writer)
    metadata.add_heads(heads_writer, model.config)
    return [
        NewFile(output, base_writer, base),
        NewFile(heads_path(output), heads_writer, heads),
    ]


def _start(
    model: _Model,
    arch: str,
    jobs: Sequence[Job],
    file_type: FileType,
    kind: str = gguf.GGUFType.MODEL,
) -> gguf.GGUFWriter:
    """A writer with the keys that every file has."""
    writer = gguf.GGUFWriter(None, arch)
    n_parameters = sum(job.source.n_elements for job in jobs)
    card = metadata.read_card(model.source.folder, model.source.name, n_parameters)
    if model.source.url:
        card.source_repo_url = model.source.url
    metadata.add_general(writer, card, kind)
    metadata.add_model(writer, model.config, file_type)
    metadata.add_entries(writer, metadata.imatrix_entries(model.imatrix, jobs))
    return writer


def _field_notes(config: JsonFile) -> list[str]:
    unknown = unknown_fields(config)
    return [f"{config.path}: ignored unknown fields: {', '.join(unknown)}"] if unknown else []
