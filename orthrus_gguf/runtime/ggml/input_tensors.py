"""The input tensors of a graph, which `inputs.py` fills."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import gguf

from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.ggml.cache_layout import transposed
from orthrus_gguf.runtime.ggml.shape import Shape, Share

_F16 = int(gguf.GGMLQuantizationType.F16)
_I32 = int(gguf.GGMLQuantizationType.I32)
_I64 = int(gguf.GGMLQuantizationType.I64)


@dataclass(frozen=True)
class ShareInputs:
    """Input tensors about one sequence's rows, AR rows first.

    key_rows: I64 [rows], where keys go in the cache. value_rows: the same for values; where these
    lie transposed, I64 [rows * kv_dim], element by element. mask: F16 [rows, columns].
    stored: I32 [stores] for a tree, the rows that key_rows and value_rows, as long, are about.
    """

    key_rows: int
    value_rows: int
    mask: int
    stored: int | None


@dataclass(frozen=True)
class Inputs:
    """Input tensors of a graph. All must be set before every run: their memory is reused in it.

    tokens, positions: I32 [rows]. wanted: I32 [wanted], None when all rows are wanted, or none.
    """

    tokens: int
    positions: int
    wanted: int | None
    shares: tuple[ShareInputs, ...]


def input_tensors(api: Ggml, context: int, caches: Sequence[GgmlCache], shape: Shape) -> Inputs:
    """Inputs of a graph of this shape, whose shares are on these caches."""

    def column(qtype: int, count: int) -> int:
        tensor: int = api.new_tensor_1d(context, qtype, count)
        api.set_input(tensor)
        return tensor

    def of_share(cache: GgmlCache, share: Share) -> ShareInputs:
        layout, stores = cache.layout, share.stores or share.rows
        mask = api.new_tensor_2d(context, _F16, share.columns, share.rows)
        api.set_input(mask)
        return ShareInputs(
            key_rows=column(_I64, stores),
            value_rows=column(_I64, stores * layout.kv_dim if transposed(layout) else stores),
            mask=mask,
            stored=column(_I32, stores) if share.stores else None,
        )

    return Inputs(
        tokens=column(_I32, shape.rows),
        positions=column(_I32, shape.rows),
        wanted=column(_I32, shape.wanted) if 0 < shape.wanted < shape.rows else None,
        shares=tuple(map(of_share, caches, shape.shares)),
    )
