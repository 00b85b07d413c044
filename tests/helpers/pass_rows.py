"""Rows of a pass for kernel tests: columns by name, zeros for the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from orthrus_kernels.elementwise.rows import Rows, new_angles
from torch import Tensor


def rows_of(count: int, *, head_dim: int = 2, **columns: Sequence[int] | Tensor) -> Rows:
    """`count` rows; columns that are not given hold zeros."""
    given = {name: torch.as_tensor(column).int() for name, column in columns.items()}
    found = {}
    for field in dataclasses.fields(Rows):
        if field.name not in ("cos", "sin", "more"):
            zeros = torch.zeros(count, dtype=torch.int32)
            found[field.name] = given.pop(field.name, zeros).contiguous()
    more = given.pop("more", torch.zeros(1, dtype=torch.int32))
    assert not given, f"no such columns: {list(given)}"
    cos, sin = new_angles(count, head_dim, "cpu")
    return Rows(**found, more=more, cos=cos, sin=sin)
