"""Cases for the CPU kernels: products of every type with weights and activations of all sorts, and
whole passes of a small model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import numpy as np
from cpu_calls import Case, Recorder, Ref
from numpy.typing import NDArray
from orthrus_cpu_kernels.library import LANES, Kernels

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cpu import model as cpu_model
from orthrus_gguf.runtime.cpu import steps
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.cpu.state import HybridCpuCache
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment

TYPES = gguf.GGMLQuantizationType

#: Where the F16 numbers of a qblock lie; every other byte may have any value.
HALVES = {
    **dict.fromkeys((TYPES.Q4_0, TYPES.Q5_0, TYPES.Q8_0, TYPES.IQ4_NL, TYPES.IQ4_XS), (0,)),
    **dict.fromkeys((TYPES.Q4_1, TYPES.Q5_1, TYPES.Q4_K, TYPES.Q5_K), (0, 2)),
    TYPES.Q2_K: (80, 82),
    TYPES.Q3_K: (108,),
    TYPES.Q6_K: (208,),
}
FLOATS = {TYPES.F32: np.float32, TYPES.F16: np.float16, TYPES.BF16: np.uint16}
WEIGHTS = (*FLOATS, *HALVES)

#: Zeros of both signs, the smallest subnormal, others, the largest.
EXTREME = np.array([0.0, -0.0, 6e-8, -6e-8, 3e-5, -1e-3, 1.0, 65504.0, -65504.0], np.float16)

#: Kinds of activations.
ROWS = ("ordinary", "zeros", "outlier", "saturated", "denormal", "tiny", "huge", "wild")


def widths(kind: TYPES) -> tuple[int, ...]:
    """Rows lengths that fit a type, odd ones among them."""
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return {1: (1, 16, 50), 32: (32, 64, 160), 256: (256, 768)}[block]


def weights(kind: TYPES, columns: int, k: int, seed: int = 0, *, extreme: bool = False) -> Any:
    """GGUF data [columns, row bytes]: any codes; ordinary scales, or extreme ones. Every other
    qblock of the extreme is all zeros or all ones but for its scales."""
    rng = np.random.default_rng(seed)
    if kind in FLOATS:
        values = rng.standard_normal((columns, k)).astype(np.float32)
        if extreme:
            values = rng.choice(EXTREME, (columns, k)).astype(np.float32)
        if kind is TYPES.BF16:
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return values.astype(FLOATS[kind]).view(np.uint8).reshape(columns, -1)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (columns, k // block, size), dtype=np.uint8)
    if extreme:
        plain = rng.integers(0, 4, (columns, k // block, 1))
        raw = np.where(plain == 0, 0, np.where(plain == 1, 255, raw)).astype(np.uint8)
    for start in HALVES[kind]:
        scales = rng.uniform(-1e-3, 1e-3, (columns, k // block, 1)).astype(np.float16)
        if extreme:
            scales = rng.choice(EXTREME, scales.shape)
        raw[..., start : start + 2] = scales.view(np.uint8)
    return raw.reshape(columns, -1)


def activations(kind: str, rows: int, k: int, seed: int = 0) -> NDArray[np.float32]:
    """Floats [rows, k]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, k))
    if kind == "zeros":
        x = np.where(rng.integers(0, 2, x.shape), 0.0, -0.0)
    elif kind == "outlier":
        x[:, rng.integers(0, k)] = -3e4
    elif kind == "saturated":
        x = rng.choice([-1.0, 1.0], x.shape)
    elif kind == "denormal":
        x = x * 1e-41
    elif kind == "tiny":
        x = x * 10.0 ** rng.uniform(-37, -34, (rows, 1))
    elif kind == "huge":
        x = x * 1e36
    elif kind == "wild":
        x = np.where(rng.random(x.shape) < 0.02, rng.choice([np.inf, -np.inf, np.nan], x.shape), x)
    return x.astype(np.float32)


#: Tokens of a text in which blocks are left out.
LONG = 960


@dataclass(frozen=True)
class Product:
    """Activations [rows, k] times weights of a type [columns, k]."""

    kind: TYPES
    raw: NDArray[np.uint8]
    x: NDArray[np.float32]

    def case(self, kernels: Kernels, *, add: bool = False) -> Case:
        """Outputs: panels, quantized rows, product, every weight as a float. Panels are repacked,
        and multiplied, in two parts."""
        number, columns = int(self.kind), len(self.raw)
        rows, k = self.x.shape
        form, panels = kernels.form(number), -(-columns // LANES)
        assert form is not None
        case, row_bytes = Case(f"{self.kind.name} {columns}x{k}, {rows} rows"), None
        row_bytes = kernels.row_bytes(form, k)
        raw, x = case.put(self.raw), case.put(self.x)
        packed = case.get(panels * kernels.panel_bytes(number, k))
        q, y = case.get(rows * row_bytes), case.get(4 * rows * panels * LANES, np.float32)
        case.buffers[y][:] = 0
        half = panels // 2
        for first, stop in ((0, half), (half, panels)):
            case.call("repack", number, Ref(raw), columns, k, first, stop, Ref(packed))
        for row in range(rows):
            case.call("quantize", form, Ref(x, row * k * 4), k, Ref(q, row * row_bytes))
        for first, stop in ((0, half), (half, panels)):
            for adding in (0, 1)[: 1 + add]:
                place = (number, Ref(packed), k, first, stop, Ref(q), rows, Ref(y))
                case.call("product", *place, panels * LANES, adding)
        unpacked = case.get(4 * columns * k, np.float32)
        for column in range(columns):
            case.call("unpack_row", number, Ref(packed), k, column, Ref(unpacked, 4 * column * k))
        return case


def products(kind: TYPES) -> Iterator[Product]:
    """All sorts of weights and activations of one type, in small sizes that nothing divides."""
    columns = (1, 16, 23, 40)
    for number, k in enumerate(widths(kind)):
        for extreme in (False, True):
            for seed, x in enumerate(ROWS):
                raw = weights(kind, columns[(number + seed) % 4], k, seed, extreme=extreme)
                yield Product(kind, raw, activations(x, 1 + (seed + number) % 7, k, seed))


# --- whole passes ---


def passes(path: Path, kernels: Kernels, k: str, v: str) -> list[Case]:
    """Passes of a model with these cache types: prompt, block and verification, tree, taps. Logits,
    caches and taps are compared."""
    recorder = Recorder(kernels.library)
    library: Any = recorder
    recording = replace(kernels, library=library)
    with (
        ModelFile.open(path) as file,
        CpuModel.load(file, recording, threads=2, cache_type_k=k, cache_type_v=v) as model,
    ):
        model.wait()
        cache, other = model.new_cache(100), model.new_cache(40)
        mask = model.config.mask_token
        assert mask is not None

        def run(*segments: Any, taps: bool = False) -> None:
            recorder.memory = memory(model, cache, other)
            if taps:
                model.forward(segments)
            else:
                model.logits(segments)

        model._angles.point(model._buffers.row[:1], np.array([0]))
        steps._every_row(model._buffers.rows)
        run(ar_segment(cache, range(2, 22), 0), ar_segment(other, range(5), 0))
        cache.commit(range(20))
        run(
            ar_segment(cache, [4, 5, 6], 20),
            diffusion_segment(cache, 7, mask, 8, 22),
            diffusion_segment(cache, 8, mask, 5, 23),
        )
        parents = (-1, 0, 1, 0, 3, 3)
        run(ar_segment(cache, range(6), 20, parents=parents))
        cache.commit([0, 3, 5])
        for tap in (0, 2):  # so that they are among the memory
            model._buffers.tap(tap)
        run(ar_segment(cache, [9, 8], 23, wanted=range(0), taps=(0, 2)), taps=True)
    return recorder.cases


def attention_passes(path: Path, kernels: Kernels, k: str, v: str) -> list[Case]:
    """The end of a long text through a scorer's layers: rows that attend to blocks of it, and the
    weights that the last ones give. These, and caches, are compared. kernels: that read what comes
    before; quick ones, as it is long."""
    recorder = Recorder(kernels.library)
    library: Any = recorder
    with (
        ModelFile.open(path) as file,
        CpuModel.load(file, kernels, threads=1, cache_type_k=k, cache_type_v=v) as model,
        patch.multiple(cpu_model, EXACT=0, BLOCKS=1),
    ):
        cache, layers, before = model.new_cache(LONG), (0, 1), LONG - 36
        model.attention(
            ar_segment(cache, [i % 79 for i in range(before)], 0, wanted=range(0)), layers
        )
        cache.commit(range(before))
        model._pool._library = library

        def watch(layers: tuple[int, ...], weights: NDArray[np.float32]) -> steps.Watch:
            recorder.memory.append((weights, True))
            return steps.Watch(layers, weights)

        recorder.memory = memory(model, cache)
        with patch.object(cpu_model, "Watch", watch):
            model.attention(ar_segment(cache, range(36), before, wanted=range(33, 36)), layers)
    return recorder.cases


def hybrid_passes(path: Path, kernels: Kernels) -> list[Case]:
    """Passes of a hybrid: a prompt that changes the state at once, drafts of which some stay, a
    tree, two sequences. Logits, caches, states and records are compared."""
    recorder = Recorder(kernels.library)
    library: Any = recorder
    recording = replace(kernels, library=library)
    with (
        ModelFile.open(path) as file,
        CpuModel.load(file, recording, threads=2) as model,
    ):
        model.wait()
        cache, other = model.new_cache(100), model.new_cache(40)

        def run(*segments: Any) -> None:
            recorder.memory = memory(model, cache, other)
            model.logits(segments)

        model._angles.point(model._buffers.row[:1], np.array([0]))
        run(ar_segment(cache, range(2, 42), 0, wanted=range(39, 40)))
        cache.commit(range(40))
        run(ar_segment(cache, [4, 5, 6, 7], 40), ar_segment(other, range(2), 0))
        cache.commit(range(3))
        run(ar_segment(cache, range(6), 43, parents=(-1, 0, 1, 0, 3, 3)))
        cache.commit([0, 3, 5])
        run(ar_segment(cache, range(35), 46, wanted=range(0)))
    return recorder.cases


def memory(model: CpuModel, *caches: Any) -> list[tuple[NDArray[Any], bool]]:
    """All arrays that steps of a model point into, and whether they are worth comparing."""
    b = model._buffers
    found: list[tuple[NDArray[Any], bool]] = [(model._weights._block, False)]
    for layer in model._weights.layers:
        found += [(layer.attn_norm, False), (layer.ffn_norm, False)]
        for net in layer.delta_net.values():
            found += [(vector, False) for vector in (net.conv, net.a, net.dt, net.norm)]
        for attention in layer.attention.values():
            vectors = (*attention.biases, attention.q_norm, attention.k_norm)
            found += [(vector, False) for vector in vectors if vector is not None]
    found.append((model._weights.output_norm, False))
    found += [
        (a, True) for a in (b.x, b.picked, b.normed, b.qkv, b.mixed, b.gated, b.other, b.logits)
    ]
    found.append((b.convolved, True))
    found += [(a, False) for a in (b.state_row, b.run, b.states)]
    found += [(a, False) for a in (b.row, b.group, b.index, b.caches, *b.q)]
    found += [(tap, True) for tap in b.taps.values()]
    found += [(part, True) for cache in caches for part in (cache.keys, cache.values)]
    states = [cache for cache in caches if isinstance(cache, HybridCpuCache)]
    found += [(part, True) for one in states for part in (one.memory, one.saved, one.records)]
    tables = (*model._angles._tables.values(), *steps._EVERY.values())
    return found + [(table, False) for table in tables]
