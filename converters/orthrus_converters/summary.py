"""What a conversion made, in a few lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_converters.convert import Plan
from orthrus_gguf.tensors import is_diffusion_tensor
from orthrus_gguf.gguf.writer import PlannedTensor


def summary(plan: Plan, sizes: Sequence[int]) -> str:
    """sizes: bytes of each written file."""
    lines = [f"note: {note}" for note in plan.notes]
    tensors = plan.tensors
    for kind in dict.fromkeys(tensor.type for tensor in tensors):
        of_kind = [tensor for tensor in tensors if tensor.type == kind]
        lines.append(f"{kind.name:>6}  {len(of_kind):4} tensors  {human(_bytes(of_kind)):>9}")
    heads = _bytes([tensor for tensor in tensors if is_diffusion_tensor(tensor.name)])
    base = _bytes(tensors) - heads
    lines.append(f" heads  {human(heads)} on top of a base of {human(base)} (+{heads / base:.1%})")
    for file, size in zip(plan.files, sizes, strict=True):
        lines.append(f" wrote  {file.path}  {human(size)}")
    return "\n".join(lines)


def human(n_bytes: float) -> str:
    """A size in decimal units: `5.03 GB`."""
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    for unit in ("kB", "MB"):
        n_bytes /= 1000
        if n_bytes < 999.5:
            return f"{n_bytes:.3g} {unit}"
    return f"{n_bytes / 1000:.3g} GB"


def _bytes(tensors: Sequence[PlannedTensor]) -> int:
    return sum(tensor.n_bytes for tensor in tensors)
