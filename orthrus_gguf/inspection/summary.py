"""Tensors counted: by type, by layer, and as base and heads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.tensors import is_diffusion_tensor


@dataclass(frozen=True)
class Tally:
    """Some tensors together: how many, their elements, their bytes in the file (no padding)."""

    tensors: int
    elements: int
    n_bytes: int

    @property
    def bits_per_weight(self) -> float | None:
        """Bits per element; None where there are none."""
        return 8 * self.n_bytes / self.elements if self.elements else None


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose tensors have the same names, shapes and types.

    layers: their numbers in order; none of them for the tensors outside the layers.
    types: of one layer's tensors, the most frequent first, with their number.
    each: one layer.
    """

    layers: tuple[int, ...]
    types: tuple[tuple[str, int], ...]
    each: Tally


@dataclass(frozen=True)
class Summary:
    """All tensors, in every way that they are counted. heads: the diffusion twins."""

    total: Tally
    base: Tally
    heads: Tally
    by_type: tuple[tuple[str, Tally], ...]
    by_layer: tuple[LayerGroup, ...]


def summarize(tensors: Iterable[TensorInfo]) -> Summary:
    """Count `tensors`; types come largest first, layers in order."""
    all_tensors = list(tensors)
    by_type: defaultdict[str, list[TensorInfo]] = defaultdict(list)
    for info in all_tensors:
        by_type[info.type.name].append(info)
    types = [(name, tally(members)) for name, members in by_type.items()]
    return Summary(
        total=tally(all_tensors),
        base=tally(info for info in all_tensors if not is_diffusion_tensor(info.name)),
        heads=tally(info for info in all_tensors if is_diffusion_tensor(info.name)),
        by_type=tuple(sorted(types, key=lambda item: -item[1].n_bytes)),
        by_layer=_by_layer(all_tensors),
    )


def tally(tensors: Iterable[TensorInfo]) -> Tally:
    """Count `tensors` together."""
    members = list(tensors)
    return Tally(
        len(members),
        sum(math.prod(info.shape) for info in members),
        sum(info.n_bytes for info in members),
    )


def layer_of(name: str) -> int | None:
    """The layer of a tensor `blk.N.…`, None for others."""
    parts = name.split(".")
    if len(parts) > 2 and parts[0] == "blk" and parts[1].isascii() and parts[1].isdigit():
        return int(parts[1])
    return None


def _by_layer(tensors: Sequence[TensorInfo]) -> tuple[LayerGroup, ...]:
    layers: defaultdict[int, list[TensorInfo]] = defaultdict(list)
    outside = []
    for info in tensors:
        layer = layer_of(info.name)
        if layer is None:
            outside.append(info)
        else:
            layers[layer].append(info)
    alike: defaultdict[object, list[int]] = defaultdict(list)
    for layer, members in sorted(layers.items()):
        parts = sorted((info.name.split(".", 2)[2], info.type, info.shape) for info in members)
        alike[tuple(parts)].append(layer)
    groups = [(tuple(numbers), layers[numbers[0]]) for numbers in alike.values()]
    if outside:
        groups.append(((), outside))
    return tuple(
        LayerGroup(numbers, _type_counts(members), tally(members)) for numbers, members in groups
    )


def _type_counts(tensors: Iterable[TensorInfo]) -> tuple[tuple[str, int], ...]:
    counts: defaultdict[str, int] = defaultdict(int)
    for info in tensors:
        counts[info.type.name] += 1
    return tuple(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
