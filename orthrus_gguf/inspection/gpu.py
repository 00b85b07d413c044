"""What fits on a GPU: contexts by type of cache and size of card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.inspection.report import Report
from orthrus_gguf.runtime.cuda.presence import INSTALL, extra_installed

if TYPE_CHECKING:
    from orthrus_gguf.runtime.cuda.fit import ContextFit

#: Tokens whose memory is told if none are named.
TARGET = 131_072


@dataclass(frozen=True)
class GpuFit:
    """cards: GiB. fits: one per type of cache, contexts in the order of the cards. drafter: name of
    the one that is counted, too."""

    cards: Sequence[int]
    fits: Sequence[ContextFit]
    drafter: str | None = None


def gpu_fit(report: Report, target: int | None) -> GpuFit:
    """target: tokens whose need is told, too. Raises OrthrusError for what is no model, or without
    the packages whose tensors are counted."""
    if report.config is None:
        raise OrthrusError(f"--gpu: not for this file: {report.problem}")
    if not extra_installed():
        raise OrthrusError(f"--gpu counts the tensors of PyTorch and Triton: {INSTALL}")
    from orthrus_gguf.runtime.cuda.fit import CARDS, context_table

    tensors = {info.name: info for _, info in report.tensors}
    one = report.drafter
    beside = None if one is None else (one.config, one.tensors)
    fits = context_table(report.config, tensors, target or TARGET, beside=beside)
    return GpuFit(CARDS, fits, None if one is None else one.config.name)
