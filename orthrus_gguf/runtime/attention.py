"""What rows attend to, as far as a runtime tells it: the seam that prefill compression reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.protocol import Segment, View, check_segments

#: Rows that a call tells about at most.
MOST_ROWS = 64


@runtime_checkable
class Attentive(Protocol):
    """A model that tells what rows attend to."""

    def attention(self, segment: Segment, layers: Sequence[int]) -> NDArray[np.float32]:
        """Run the AR rows of a chain as `Model.forward` does, but through the layers up to the last
        of `layers` only, and say what the wanted rows attend to: the last ones, up to MOST_ROWS.

        Returns [len(segment.wanted), segment.stop]: the largest weight that any head of these
        layers gives to a key, where the weights of a row and head sum up to 1; 0 for keys that the
        row does not see. Nothing is drawn. Rows that nobody asks about may attend to the most
        promising parts only of a text of more than 4096 tokens (the CPU runtime's do). What the
        cache holds then is good for nothing but more of this, through the same layers. Raises
        ValueError for layers without attention.
        """
        ...


def attention_layers(config: ModelConfig) -> list[int]:
    """Layers that have attention."""
    return [i for i, kind in enumerate(config.layer_kinds) if kind is LayerKind.ATTENTION]


def check_attention(segment: Segment, layers: Sequence[int], config: ModelConfig) -> None:
    """Raise ValueError unless that can be asked of a model."""
    check_segments([segment])
    known = attention_layers(config)
    if not layers or not set(layers) <= set(known):
        raise ValueError(f"attention of layers {list(layers)}: it is in {known}")
    if segment.parents is not None or segment.view is not View.AR:
        raise ValueError("attention is told of chains of AR rows only")
    wanted = segment.wanted
    if len(wanted) > MOST_ROWS or (wanted and wanted.stop != len(segment)):
        raise ValueError(f"attention is told of up to {MOST_ROWS} rows, the last ones: {wanted}")
