"""Weights + types + imatrix → what the encoder has to do, and remarks for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import gguf

from orthrus_converters.encode import Importance, Job
from orthrus_converters.imatrix import Imatrix
from orthrus_converters.source_tensor import FLOAT_DTYPES, SourceTensor
from orthrus_converters.type_plan import Fallback, TypeChoice, TypePlan, plan_types
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.tensors import OUTPUT, TOKEN_EMBD, is_diffusion_tensor

_Type = gguf.GGMLQuantizationType

#: Types that ggml itself does not quantize to without an imatrix, whatever the tensor.
_ALWAYS = (_Type.IQ1_S, _Type.IQ2_XXS, _Type.IQ2_XS)
#: Those, and the ones that llama-quantize refuses because the result would be garbage.
_IN_LAYERS = (*_ALWAYS, _Type.IQ1_M, _Type.IQ2_S, _Type.IQ3_XXS)


def plan_jobs(
    tensors: Mapping[str, SourceTensor],
    config: ModelConfig,
    choice: TypeChoice,
    imatrix: Imatrix | None,
    *,
    allow_requantize: bool = False,
) -> tuple[dict[str, Job], list[str]]:
    """One job per tensor of a model of shape `config`, in the order of `tensors`; and remarks.

    Raises OrthrusError if a quantized tensor would be quantized again without `allow_requantize`,
    if a type needs importance values that there are not, or if a flag matches nothing.
    """
    plan = plan_types(tensors, config, choice, has_imatrix=imatrix is not None)
    jobs = _make_jobs(tensors, plan, choice, imatrix, allow_requantize=allow_requantize)
    return jobs, _notes_on(plan, jobs, imatrix)


def _make_jobs(
    tensors: Mapping[str, SourceTensor],
    plan: TypePlan,
    choice: TypeChoice,
    imatrix: Imatrix | None,
    *,
    allow_requantize: bool,
) -> dict[str, Job]:
    jobs: dict[str, Job] = {}
    for name, source in tensors.items():
        kind = plan.types[name]
        importance = None
        if kind.name != source.dtype:
            if source.is_quantized and not allow_requantize:
                raise OrthrusError(
                    f"{source.path}: tensor {name} is quantized already ({source.dtype}), and "
                    f"{kind.name} from that loses quality; convert the original checkpoint, or "
                    "pass --allow-requantize"
                )
            importance = _importance(name, source, kind, choice, imatrix)
        verbatim = choice.file_type is None and kind.name == source.dtype
        jobs[name] = Job(name, source, kind, importance, verbatim)
    return jobs


def _importance(
    name: str,
    source: SourceTensor,
    kind: gguf.GGMLQuantizationType,
    choice: TypeChoice,
    imatrix: Imatrix | None,
) -> Importance | None:
    if kind.name in FLOAT_DTYPES:
        return None
    found = imatrix.find(name, source.columns) if imatrix is not None else None
    if found is None and _needs_imatrix(name, kind, choice):
        where = "pass --imatrix FILE" if imatrix is None else f"{imatrix.path} has nothing for it"
        flag = "--heads-type" if is_diffusion_tensor(name) else "--type"
        raise OrthrusError(
            f"{source.path}: tensor {name} would become {kind.name}, which is garbage without an "
            f"imatrix: {where}, or choose a larger {flag} such as iq3_s or q2_k"
        )
    return found


def _needs_imatrix(name: str, kind: gguf.GGMLQuantizationType, choice: TypeChoice) -> bool:
    if name in (TOKEN_EMBD, OUTPUT):
        return kind in _ALWAYS
    in_q2_k_s = choice.file_type is not None and choice.file_type.name == "q2_k_s"
    return kind in _IN_LAYERS or (kind == _Type.Q2_K and in_q2_k_s)


def _notes_on(plan: TypePlan, jobs: Mapping[str, Job], imatrix: Imatrix | None) -> list[str]:
    """What did not go as the flags say: types that do not fit, tensors that the imatrix lacks."""
    notes = [
        f"{_and_more(names)}: rows of {first.source.columns} are no multiple of the qblock of "
        f"{first.wanted.name}; written as {plan.types[names[0]].name}"
        for names, first in _grouped(plan)
    ]
    if imatrix is None:
        return notes
    if all(job.importance is None for job in jobs.values()):
        return [*notes, f"{imatrix.path}: was not used, no tensor that it knows is quantized"]
    without = [
        name
        for name, job in jobs.items()
        if job.importance is None
        and job.kind.name not in (*FLOAT_DTYPES, job.source.dtype)
        and name not in (TOKEN_EMBD, OUTPUT)
    ]
    if without:
        notes.append(f"{imatrix.path}: has nothing for {_and_more(without)}; quantized without")
    return notes


def _grouped(plan: TypePlan) -> list[tuple[list[str], Fallback]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, fallback in plan.fallbacks.items():
        groups.setdefault((fallback.wanted.name, plan.types[name].name), []).append(name)
    return [(names, plan.fallbacks[names[0]]) for names in groups.values()]


def _and_more(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
