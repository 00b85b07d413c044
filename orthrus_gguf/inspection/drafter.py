"""What a drafter beside a model is, and the memory that it adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile, open_beside
from orthrus_gguf.model.window import Window
from orthrus_gguf.runtime.memory import cpu_memory


@dataclass(frozen=True)
class DrafterReport:
    """config, tensors: of its network. weights, cache_per_token: bytes that it adds to the model's
    on the CPU."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    beside: Beside
    taps: tuple[int, ...]
    window: Window | None
    weights: int
    cache_per_token: float

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table: what, and what it is."""
        count = self.config.n_layers
        drafts = f"blocks of {self.beside.block}"
        if self.window is not None:
            drafts += f"; {sum(self.window.layers)} see the last {self.window.size} positions"
        reads = f"the inputs of layers {', '.join(map(str, self.taps))}"
        if self.beside.chain:
            drafts, reads = f"chains of up to {self.beside.most}", "what the last layer gives"
        return [
            ("network", f"{count} layer{'s' * (count != 1)}, {drafts}"),
            ("reads", reads),
            ("weights", f"{self.weights:,} bytes"),
            ("cache", f"{1000 * self.cache_per_token:,.0f} bytes per 1,000 tokens"),
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "name": self.config.name,
            "n_layers": self.config.n_layers,
            "block_size": self.beside.block,
            "chain": self.beside.chain,
            "target_layers": list(self.taps),
            "sliding_window": None if self.window is None else self.window.size,
            "weights": self.weights,
            "cache_per_token": self.cache_per_token,
        }


def inspect_drafter(
    path: str | Path | None, target: ModelFile, cache_types: tuple[str, str]
) -> DrafterReport:
    """path: None for the MTP block that the model's own file holds. Raises OrthrusError if it is no
    drafter of this model, or cannot use these cache types."""
    with MtpFile.inside(target) if path is None else open_beside(path, target) as file:
        plan = cpu_memory(file.config, file.tensors, *cache_types)
        return DrafterReport(
            file.paths[0],
            file.config,
            file.tensors,
            file.beside,
            file.taps,
            file.window if isinstance(file, DrafterFile) else None,
            sum(plan.weight(info) for info in file.tensors.values()),
            plan.row_bytes,
        )
