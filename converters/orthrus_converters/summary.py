"""What a conversion makes, in a few lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_converters.encode import Job
from orthrus_converters.plan import Plan
from orthrus_gguf.model.tensors import is_diffusion_tensor


def summary(plan: Plan, sizes: Sequence[int], verb: str = " wrote") -> str:
    """sizes: bytes of each file."""
    lines = [f"note: {note}" for note in plan.notes]
    jobs = plan.jobs
    for kind in dict.fromkeys(job.kind for job in jobs):
        of_kind = [job for job in jobs if job.kind == kind]
        lines.append(f"{kind.name:>6}  {len(of_kind):4} tensors  {human(_bytes(of_kind)):>9}")
    heads = _bytes([job for job in jobs if is_diffusion_tensor(job.name)])
    if heads:
        base = _bytes(jobs) - heads
        lines.append(
            f" heads  {human(heads)} on top of a base of {human(base)} (+{heads / base:.1%})"
        )
    for file, size in zip(plan.files, sizes, strict=True):
        lines.append(f"{verb}  {file.path}  {human(size)}")
    return "\n".join(lines)


def listing(plan: Plan, sizes: Sequence[int]) -> str:
    """Every tensor with its shape, type and exact size; then the summary."""
    lines: list[str] = []
    for file, size in zip(plan.files, sizes, strict=True):
        lines.append(f"{file.path}: {len(file.jobs)} tensors, {size:,} bytes")
        lines += [f"  {_described(job)}" for job in file.jobs]
    return "\n".join([*lines, summary(plan, sizes, "  plan")])


def _described(job: Job) -> str:
    shape = " x ".join(map(str, job.source.shape))
    types = (
        job.kind.name
        if job.kind.name == job.source.dtype
        else (f"{job.source.dtype} -> {job.kind.name}")
    )
    weighted = "  imatrix" if job.importance is not None else ""
    return f"{job.name:34} {shape:>16}  {types:>16}  {job.n_bytes:>15,} bytes{weighted}"


def human(n_bytes: float) -> str:
    """A size in decimal units: `5.03 GB`."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    for unit in ("kB", "MB"):
        n_bytes /= 1000
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
    return f"{n_bytes / 1000:.3g} GB"


def _bytes(jobs: Sequence[Job]) -> int:
    return sum(job.n_bytes for job in jobs)
