"""Everything that inspection can say about files, gathered: what the command prints or dumps."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.parts import check_whole, open_gguf
from orthrus_gguf.gguf.reader import GGUFFile, TensorInfo, Value
from orthrus_gguf.inspection.anatomy import anatomy_json
from orthrus_gguf.inspection.drafter import DrafterReport, inspect_drafter
from orthrus_gguf.inspection.summary import Summary, Tally, summarize
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.tensors import is_diffusion_tensor
from orthrus_gguf.runtime.memory import cpu_memory

#: Contexts whose memory is shown, besides what the model was trained for.
CONTEXTS = (4096, 32768)

#: Elements of an array that `--json` shows.
MAX_SHOWN = 8


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes at a context of `context` tokens."""

    context: int
    base: int
    heads: int
    cache: int
    buffers: int

    @property
    def total(self) -> int:
        return self.base + self.heads + self.cache + self.buffers


@dataclass(frozen=True)
class Report:
    """What is known of one model or file.

    files: the file, or base and heads. tensors: with the file that each lies in.
    config: of the model; None where this is no whole model that can run, and `problem` says why.
    memory, cache_per_token (bytes), runtime (`cpu`, `ggml` or
    `reference`, whose memory it is): empty and None
    without a config. drafter: beside the model.
    """

    files: tuple[GGUFFile, ...]
    tensors: tuple[tuple[Path, TensorInfo], ...]
    summary: Summary
    config: ModelConfig | None
    problem: str | None
    cache_types: tuple[str, str]
    cache_per_token: float | None
    memory: tuple[MemoryNeed, ...]
    runtime: str | None = None
    drafter: DrafterReport | None = None


def inspect(
    path: str | Path,
    heads: str | Path | None = None,
    *,
    context: int | None = None,
    cache_types: tuple[str, str] = ("f16", "f16"),
    drafter: str | Path | None = None,
) -> Report:
    """Look at a GGUF file of any architecture, or at a base and its Orthrus heads.

    context: tokens to show the memory for, besides the usual ones. cache_types: of keys and values.
    drafter: of the model; without one, the MTP block that its file holds.
    Raises OrthrusError if a file cannot be read, if heads do not belong to their base, or if the
    model cannot use these cache types. The files are closed again: read tensors by their offsets.
    """
    with ExitStack() as stack:
        paths = [path] if heads is None else [path, heads]
        files = tuple(stack.enter_context(_open(one)) for one in paths)
        config, problem = _config(*files)
        beside = None
        hybrid = None if config is None else config.hybrid
        if drafter is not None or (hybrid is not None and hybrid.mtp):
            target = stack.enter_context(ModelFile.open(path, heads))
            beside = inspect_drafter(drafter, target, cache_types)
    tensors = tuple(
        (file.path_of(name), info) for file in files for name, info in file.tensors.items()
    )
    summary = summarize(info for _, info in tensors)
    per_token = runtime = None
    needs: tuple[MemoryNeed, ...] = ()
    if config is not None:
        plan = cpu_memory(config, {info.name: info for _, info in tensors}, *cache_types)
        per_token, runtime, cache_types = plan.row_bytes, plan.runtime, plan.types
        base = sum(plan.weight(info) for _, info in tensors if not is_diffusion_tensor(info.name))
        heads_bytes = sum(plan.weight(info) for _, info in tensors) - base
        contexts = {*CONTEXTS, config.n_ctx_train} - {
            usual for usual in CONTEXTS if usual > config.n_ctx_train
        }
        needs = tuple(
            MemoryNeed(
                tokens,
                base,
                heads_bytes,
                plan.cache(tokens),
                plan.buffers(tokens),
            )
            for tokens in sorted(contexts | ({context} if context else set()))
        )
    return Report(
        *(files, tensors, summary, config, problem, cache_types, per_token, needs, runtime), beside
    )


def _open(path: str | Path) -> GGUFFile:
    """A file, with the other parts of its model; of one that lacks them, what there is."""
    try:
        return open_gguf(path)
    except OrthrusError:
        return GGUFFile.open(path)


def _config(base: GGUFFile, heads: GGUFFile | None = None) -> tuple[ModelConfig | None, str | None]:
    """The model's config; for a single file that is no model, None and the reason."""
    try:
        for file in (base, *([] if heads is None else [heads])):
            check_whole(file)
        return ModelFile(base, heads).config, None
    except OrthrusError as error:
        if heads is not None:
            raise
        return None, str(error).removeprefix(f"{base.path}: ")


def report_json(report: Report) -> dict[str, Any]:
    """The report in plain JSON types. Arrays in the metadata show their first elements only."""
    summary = report.summary
    return {
        "files": [
            {
                "path": str(file.path),
                "bytes": file.n_bytes,
                "version": file.version,
                "alignment": file.alignment,
                "metadata": {key: value_json(value) for key, value in file.metadata.items()},
            }
            for file in report.files
        ],
        "problem": report.problem,
        "model": None if report.config is None else anatomy_json(report.config),
        "total": _tally_json(summary.total),
        "base": _tally_json(summary.base),
        "heads": _tally_json(summary.heads),
        "by_type": {name: _tally_json(count) for name, count in summary.by_type},
        "by_layer": [
            {
                "layers": list(group.layers),
                "types": dict(group.types),
                "each": _tally_json(group.each),
            }
            for group in summary.by_layer
        ],
        "tensors": [
            {
                "name": info.name,
                "file": str(path),
                "type": info.type.name,
                "shape": list(info.shape),
                "offset": info.offset,
                "bytes": info.n_bytes,
            }
            for path, info in report.tensors
        ],
        "cache_types": list(report.cache_types),
        "cache_bytes_per_token": report.cache_per_token,
        "drafter": None if report.drafter is None else report.drafter.to_json(),
        "memory_runtime": report.runtime,
        "memory": [{**vars(need), "total": need.total} for need in report.memory],
    }


def _tally_json(count: Tally) -> dict[str, Any]:
    return {
        "tensors": count.tensors,
        "elements": count.elements,
        "bytes": count.n_bytes,
        "bits_per_weight": count.bits_per_weight,
    }


def value_json(value: Value) -> Any:
    """A metadata value; NaN and infinities, which JSON lacks, as text."""
    if isinstance(value, np.ndarray):
        first = [value_json(item) for item in value[:MAX_SHOWN].tolist()]
        return {"array": value.dtype.name, "length": value.size, "first": first}
    if isinstance(value, list):
        return {"array": "string", "length": len(value), "first": value[:MAX_SHOWN]}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
