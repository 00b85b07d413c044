"""Add heads to an existing stock GGUF, whose tensors keep every byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import gguf

from orthrus_converters.checkpoint import check_folder, open_checkpoint
from orthrus_converters.convert import CONFIG, inputs_of
from orthrus_converters.file_types import FILE_TYPES
from orthrus_converters.gguf_source import (
    Entries,
    GGUFSource,
    is_heads_only,
    new_writer,
    number,
    open_model,
    open_pair,
    text,
)
from orthrus_converters.hf_config import read_config, read_config_file
from orthrus_converters.imatrix import Imatrix
from orthrus_converters.jobs import plan_jobs
from orthrus_converters.metadata import imatrix_entries
from orthrus_converters.pairing import check_weights
from orthrus_converters.plan import NewFile, Plan, Request, check_outputs
from orthrus_converters.repack import merged_entries, merged_tensors, verbatim
from orthrus_converters.source_tensor import SourceTensor, read_chunks
from orthrus_converters.sources import FileSource, FolderSource, resolve
from orthrus_converters.tensor_names import has_heads, match_weights
from orthrus_converters.type_plan import TypeChoice
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.model.architectures import QWEN3
from orthrus_gguf.model.belong import check_trained_on, differences
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.tensors import is_diffusion_tensor

#: In config.json of a folder of trained heads: the GGUF that they are for, as `file` (seen from the
#: folder) and `fingerprint`.
TRAINED_ON = "orthrus_base"

_CHUNK = 1 << 22  # elements hashed at a time


@dataclass(frozen=True)
class _Heads:
    """Heads and what is known about the model that they were trained on.

    reference: its AR weights, or as many of them as there are. entries: about the heads.
    is_gguf: they have types that were chosen already. notes: what was left out. trained_on: the
    fingerprint of their base, where a folder tells it.
    """

    name: str
    config: ModelConfig
    twins: Mapping[str, SourceTensor]
    reference: Mapping[str, SourceTensor]
    entries: Entries
    inputs: Sequence[Path]
    is_gguf: bool
    notes: Sequence[str] = ()
    trained_on: str = ""


def base_of(source: FolderSource) -> Path | None:
    """The GGUF that the heads in a folder were trained on; None for any other checkpoint. Raises
    OrthrusError if it is not there."""
    if not (source.folder / CONFIG).exists():
        return None
    base = read_config_file(source.folder / CONFIG).mapping(TRAINED_ON)
    if not base:
        return None
    path = source.folder / str(base.get("file"))
    if not path.is_file():
        raise OrthrusError(
            f"{source.folder}: these heads are for {path}, which is not there; name that file: "
            f"--base FILE.gguf --heads {source.folder}"
        )
    return path


def plan_graft(request: Request, base_path: Path, heads: str, imatrix: Imatrix | None) -> Plan:
    """Check that both belong together; plan the file. Raises OrthrusError."""
    check_outputs(request, [base_path])
    base = _open_base(base_path)
    check_outputs(request, base.paths)
    assert base.config is not None
    source = resolve(heads, request.revision)
    found = (
        _from_file(base, source.path) if isinstance(source, FileSource) else _from_folder(source)
    )
    check_outputs(request, found.inputs)
    _check_constants(base.config, found.config, str(base_path), found.name)
    if found.trained_on:
        with ModelFile.open(base_path) as stock:
            check_trained_on(
                Path(found.name), found.trained_on, base_path, stock.tensors, stock.data
            )
    agreement = check_weights(base.tensors, found.reference, found.name)

    choice = _heads_choice(request.choice, base, found)
    twins, job_notes = plan_jobs(
        found.twins, found.config, choice, imatrix, allow_requantize=request.allow_requantize
    )
    digest = digest_of(base.tensors)
    entries = merged_entries(base.entries, found.entries | _provenance(base, found, digest))
    entries |= imatrix_entries(imatrix, twins.values())
    order = merged_tensors(base.tensors, found.twins)
    jobs = {job.name: job for job in verbatim(base.tensors)} | twins
    file = NewFile(request.output, new_writer(entries), [jobs[name] for name in order])

    notes = [*base.notes, *found.notes, *job_notes]
    if found.trained_on:
        notes.append(f"{found.name}: was trained on this file: its fingerprint is the same")
    elif agreement is None:
        notes.append(f"{found.name}: has no AR weights; only shapes and constants were compared")
    else:
        notes.append(
            f"{agreement.n_tensors} AR tensors agree with those of {found.name}: the error is at "
            f"most {agreement.worst:.2f} times that of quantization ({agreement.name})"
        )
    notes.append(f"{len(base.tensors)} base tensors byte for byte: SHA-256 {digest}")

    def verify(paths: Sequence[Path]) -> None:
        _verify(paths[0], base, digest)

    return Plan([file], notes, verify)


def _check_constants(base: ModelConfig, heads: ModelConfig, name: str, heads_name: str) -> None:
    """Raise OrthrusError unless architecture, shapes, RoPE and epsilon are the same."""
    found = differences(base, heads)
    if found:
        raise OrthrusError(
            f"{heads_name}: these heads do not belong to {name}: {found}; use the heads and the "
            "base of the same model"
        )


def digest_of(tensors: Mapping[str, SourceTensor]) -> str:
    """SHA-256 over name, type, shape and data of all tensors in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        source = tensors[name]
        digest.update(f"{name} {source.dtype} {source.shape}\n".encode())
        for chunk in read_chunks(source, _CHUNK):
            digest.update(chunk.data)
    return digest.hexdigest()


def _verify(path: Path, base: GGUFSource, digest: str) -> None:
    """Read the base tensors back from the new file."""
    written = open_model(path).tensors
    found = digest_of({name: written[name] for name in base.tensors})
    if found != digest:
        raise OrthrusError(
            f"{path}: the base tensors differ from those of {base.path} (SHA-256 {found}, expected "
            f"{digest}); the disk or the memory is faulty, or {base.path} has changed meanwhile"
        )


def _open_base(path: Path) -> GGUFSource:
    if path.is_dir():
        raise OrthrusError(f"{path}: is a folder; --base takes a GGUF file")
    base = open_model(path)
    if any(map(is_diffusion_tensor, base.tensors)):
        raise OrthrusError(
            f"{path}: holds diffusion heads already; give a plain model, or take its heads off "
            "with --split"
        )
    return base


def _from_file(base: GGUFSource, path: Path) -> _Heads:
    """Heads of a GGUF: of one that holds nothing else, or of a whole model."""
    if is_heads_only(path):
        source = open_pair(base.path, path)[1]
        assert base.config is not None
        config, reference = base.config, {}  # open_pair() has compared them
    else:
        source = open_model(path)
        if source.config is None or not source.config.has_heads:
            raise OrthrusError(f"{path}: holds no diffusion heads; name an Orthrus model")
        config = source.config
        reference = {
            name: tensor for name, tensor in source.tensors.items() if not is_diffusion_tensor(name)
        }
    twins = {name: t for name, t in source.tensors.items() if is_diffusion_tensor(name)}
    inputs = source.paths
    return _Heads(str(path), config, twins, reference, source.entries, inputs, is_gguf=True)


def _from_folder(source: FolderSource) -> _Heads:
    """Heads of a checkpoint, which may leave out the AR weights."""
    folder = source.folder
    check_folder(folder)
    config_file = read_config_file(folder / CONFIG)
    checkpoint = open_checkpoint(folder)
    if not has_heads(checkpoint):
        raise OrthrusError(
            f"{folder}: holds no diffusion heads (no *_diff weights); name an Orthrus checkpoint"
        )
    config = read_config(config_file, source.name, has_heads=True)
    weights = match_weights(checkpoint, config, heads_only=True)
    assert config.block_size is not None
    assert config.mask_token is not None
    entries: Entries = {}
    if config.architecture is not QWEN3:
        entries[keys.BASE_ARCHITECTURE] = text(config.architecture.name)
    entries |= {
        keys.BLOCK_SIZE: number(config.block_size),
        keys.MASK_TOKEN_ID: number(config.mask_token),
        gguf.Keys.General.NAME: text(source.url or source.name),
    }
    if source.revision:
        entries[f"{keys.ARCH_ORTHRUS}.graft.heads.revision"] = text(source.revision)
    return _Heads(
        str(folder),
        config,
        {name: weight for name, weight in weights.items() if is_diffusion_tensor(name)},
        {name: weight for name, weight in weights.items() if not is_diffusion_tensor(name)},
        entries,
        [*inputs_of(folder), *checkpoint.files],
        is_gguf=False,
        notes=checkpoint.notes,
        trained_on=str(config_file.mapping(TRAINED_ON).get("fingerprint", "")),
    )


def _heads_choice(choice: TypeChoice, base: GGUFSource, heads: _Heads) -> TypeChoice:
    """Heads of a GGUF keep their types, those of a checkpoint take the usual one of the base."""
    if heads.is_gguf:
        return choice
    entry = base.entries.get(gguf.Keys.General.FILE_TYPE)
    for file_type in FILE_TYPES.values():
        if entry is not None and entry.value == file_type.number:
            return replace(choice, file_type=file_type)
    if choice.heads is None:
        raise OrthrusError(
            f"{base.path}: its general.file_type is none that we know; say which type the heads "
            "should have: --heads-type TYPE"
        )
    return replace(choice, file_type=FILE_TYPES["f32"])


def _provenance(base: GGUFSource, heads: _Heads, digest: str) -> Entries:
    """Where the parts come from."""
    prefix = f"{keys.ARCH_ORTHRUS}.graft"
    name = heads.entries.get(gguf.Keys.General.NAME)
    return {
        f"{prefix}.base.name": text(base.name),
        f"{prefix}.base.file": text(base.path.name),
        f"{prefix}.base.sha256": text(digest),
        f"{prefix}.heads.name": text(Path(heads.name).name if name is None else str(name.value)),
    }
