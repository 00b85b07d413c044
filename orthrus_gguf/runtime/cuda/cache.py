"""Keys and values of one session on the device, and the tokens that they belong to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from orthrus_kernels.attention.kv_cache import FORMATS, QBLOCK, KvPlanes, new_planes

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig

if TYPE_CHECKING:
    from orthrus_gguf.runtime.cuda.stepper import Stepper


def check_cache_types(config: ModelConfig, type_k: str, type_v: str) -> None:
    """Raise OrthrusError for cache types that this runtime or this model cannot have."""
    for option, name in (("-ctk", type_k), ("-ctv", type_v)):
        if name not in FORMATS:
            raise OrthrusError(
                f"{option} {name}: the cuda runtime keeps its cache in {', '.join(FORMATS)}"
            )
        if name != "f16" and config.head_dim % QBLOCK:
            raise OrthrusError(
                f"{option} {name}: needs a head size that is a multiple of {QBLOCK}, this model's "
                f"is {config.head_dim}; use f16"
            )


class CudaCache:
    """See `segments.Cache`. Fixed in size, so that graphs can be captured on it.

    layers: keys and values of each layer. history: i32, tokens by position, with room for a block
    beyond the end. stepper: the decoding state on this cache, once there is one.
    """

    def __init__(
        self,
        config: ModelConfig,
        type_k: str,
        type_v: str,
        capacity: int,
        device: torch.device,
        spare: int,
    ) -> None:
        """spare: positions beyond the end that `history` needs. OrthrusError if it cannot fit."""
        if capacity < 1:
            raise OrthrusError(f"a context of {capacity} tokens: expected at least 1")
        self.layers: list[tuple[KvPlanes, KvPlanes]] = []
        try:
            for _ in range(config.n_layers):
                keys, values = (
                    new_planes(name, config.n_head_kv, capacity, config.head_dim, device)
                    for name in (type_k, type_v)
                )
                self.layers.append((keys, values))
            self.history = torch.zeros(capacity + spare, dtype=torch.int32, device=device)
        except RuntimeError as error:  # torch's out-of-memory errors, on any device
            self.layers.clear()
            raise OrthrusError(
                f"a context of {capacity} tokens cannot be allocated on {device}: "
                f"{str(error).splitlines()[0]}; choose a smaller one with -c, or smaller cache"
                " types with -ctk and -ctv"
            ) from error
        self.stepper: Stepper | None = None
        self._capacity = capacity
        self._length = 0

    @property
    def length(self) -> int:
        return self._length

    @property
    def capacity(self) -> int:
        return self._capacity

    def truncate(self, length: int) -> None:
        """See `Cache.truncate`."""
        if not 0 <= length <= self._length:
            raise ValueError(f"cannot truncate a cache of {self._length} rows to {length}")
        self._length = length

    def append(self, rows: int) -> None:
        """Count `rows` more rows as held."""
        if not 0 <= rows <= self._capacity - self._length:
            raise ValueError(f"no room for {rows} rows after {self._length} of {self._capacity}")
        self._length += rows

    def close(self) -> None:
        """Free the memory (and the graphs captured on it); it cannot be used afterwards."""
        self.layers.clear()
        self.stepper = None
        self._capacity = self._length = 0
