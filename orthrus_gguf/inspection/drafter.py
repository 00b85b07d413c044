"""What a drafter beside a model is, and the memory that it adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.memory import cpu_memory


@dataclass(frozen=True)
class DrafterReport:
    """config, tensors: of its network. weights, cache_per_token: bytes that it adds to the model's
    on the CPU."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    target_layers: tuple[int, ...]
    weights: int
    cache_per_token: float

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Lines of a table: what, and what it is."""
        return [
            ("network", f"{self.config.n_layers} layers, blocks of {self.config.block_size}"),
            ("reads", f"the inputs of layers {', '.join(map(str, self.target_layers))}"),
            ("weights", f"{self.weights:,} bytes"),
            ("cache", f"{1000 * self.cache_per_token:,.0f} bytes per 1,000 tokens"),
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "name": self.config.name,
            "n_layers": self.config.n_layers,
            "block_size": self.config.block_size,
            "target_layers": list(self.target_layers),
            "weights": self.weights,
            "cache_per_token": self.cache_per_token,
        }


def inspect_drafter(
    path: str | Path, target: ModelFile, cache_types: tuple[str, str]
) -> DrafterReport:
    """Raises OrthrusError if it is no drafter of this model, or cannot use these cache types."""
    with DrafterFile.open(path, target.config, target.metadata) as file:
        plan = cpu_memory(file.config, file.tensors, *cache_types)
        return DrafterReport(
            file.paths[0],
            file.config,
            file.tensors,
            file.target_layers,
            sum(plan.weight(info) for info in file.tensors.values()),
            plan.row_bytes,
        )
