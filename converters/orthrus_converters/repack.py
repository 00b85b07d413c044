"""Models that are GGUF already: convert, split and merge them.

`--split` and `--merge` are inverses: every tensor keeps its bytes, every entry its value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf

from orthrus_converters.encode import Job
from orthrus_converters.file_types import uniform_file_type
from orthrus_converters.gguf_source import (
    Entries,
    belongs_to_heads,
    is_heads_only,
    new_writer,
    number,
    open_model,
    open_pair,
    rename,
    text,
)
from orthrus_converters.imatrix import Imatrix
from orthrus_converters.jobs import plan_jobs
from orthrus_converters.metadata import imatrix_entries
from orthrus_converters.plan import (
    NewFile,
    Plan,
    Request,
    check_headless,
    check_outputs,
    heads_path,
)
from orthrus_converters.source_tensor import SourceTensor
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.model.architectures import Architecture
from orthrus_gguf.model.tensors import is_diffusion_tensor


def plan_gguf(request: Request, path: Path, imatrix: Imatrix | None) -> Plan:
    """Convert a GGUF, or split it into base and heads. Raises OrthrusError."""
    check_outputs(request, [path])
    if is_heads_only(path):
        raise OrthrusError(
            f"{path}: holds only diffusion heads; join them with their model: "
            f"orthrus-convert --base MODEL.gguf --heads {path} OUT.gguf"
        )
    source = open_model(path)
    check_outputs(request, source.paths)
    config = source.config
    assert config is not None
    if not config.has_heads:
        check_headless(str(path), request)
    jobs, job_notes = plan_jobs(
        source.tensors, config, request.choice, imatrix, allow_requantize=request.allow_requantize
    )
    entries = source.entries | imatrix_entries(imatrix, jobs.values())
    if request.choice.file_type is not None:
        entries[gguf.Keys.General.FILE_TYPE] = number(request.choice.file_type.number)
        entries[gguf.Keys.General.QUANTIZATION_VERSION] = number(gguf.GGML_QUANT_VERSION)
    notes = [*source.notes, *job_notes]
    if not request.split:
        return Plan([NewFile(request.output, new_writer(entries), [*jobs.values()])], notes)
    return Plan(_split_files(request, entries, jobs, config.architecture), notes)


def _split_files(
    request: Request, entries: Entries, jobs: Mapping[str, Job], architecture: Architecture
) -> list[NewFile]:
    base = [job for name, job in jobs.items() if not is_diffusion_tensor(name)]
    heads = [job for name, job in jobs.items() if is_diffusion_tensor(name)]
    heads_entries = _heads_entries(entries)
    if request.choice.heads is not None:
        file_type = uniform_file_type(request.choice.heads)
        heads_entries[gguf.Keys.General.FILE_TYPE] = number(file_type.number)
    return [
        NewFile(request.output, new_writer(_base_entries(entries, architecture)), base),
        NewFile(heads_path(request.output), new_writer(heads_entries), heads),
    ]


def plan_merge(request: Request, base_path: Path, heads: Path) -> Plan:
    """Put a base and its heads into one file. Raises OrthrusError unless they fit."""
    check_outputs(request, [base_path, heads])
    base, adapter = open_pair(base_path, heads)
    check_outputs(request, [*base.paths, *adapter.paths])
    entries = merged_entries(base.entries, adapter.entries)
    tensors = merged_tensors(base.tensors, adapter.tensors)
    return Plan([NewFile(request.output, new_writer(entries), verbatim(tensors))], base.notes)


def verbatim(tensors: Mapping[str, SourceTensor]) -> list[Job]:
    """Jobs that copy tensors byte for byte."""
    return [
        Job(name, source, gguf.GGMLQuantizationType[source.dtype], verbatim=True)
        for name, source in tensors.items()
    ]


def merged_tensors(
    base: Mapping[str, SourceTensor], heads: Mapping[str, SourceTensor]
) -> dict[str, SourceTensor]:
    """The twins of a layer behind the last of its AR tensors, else in the order of the files."""
    last = {_layer(name): name for name in base}
    merged: dict[str, SourceTensor] = {}
    for name, source in base.items():
        merged[name] = source
        if name == last[_layer(name)] and _layer(name):
            merged |= {
                twin: tensor for twin, tensor in heads.items() if _layer(twin) == _layer(name)
            }
    return merged


def merged_entries(base: Entries, heads: Entries) -> Entries:
    """Those of the base, under the other architecture, and what the heads add."""
    added = {key: entry for key, entry in heads.items() if belongs_to_heads(key)}
    architecture = str(base[gguf.Keys.General.ARCHITECTURE].value)
    return rename(base, architecture, keys.ARCH_ORTHRUS) | added


def _base_entries(entries: Entries, architecture: Architecture) -> Entries:
    kept = {key: entry for key, entry in entries.items() if not belongs_to_heads(key)}
    return rename(kept, keys.ARCH_ORTHRUS, architecture.name)


def _heads_entries(entries: Entries) -> Entries:
    """Everything but the tokenizer, marked as an adapter."""
    kept = {
        key: entry
        for key, entry in entries.items()
        if not key.startswith("tokenizer.") or belongs_to_heads(key)
    }
    kept[gguf.Keys.General.TYPE] = text(gguf.GGUFType.ADAPTER)
    kept[gguf.Keys.Adapter.TYPE] = text(keys.ADAPTER_HEADS)
    return kept


def _layer(name: str) -> str:
    """`blk.N`, or nothing."""
    return ".".join(name.split(".")[:2]) if name.startswith("blk.") else ""
