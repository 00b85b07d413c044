"""Milliseconds of a pass, from what it reads, multiplies and launches.

    pass = weights (max of memory, issue slots, MMA) + tails + attention + small + launches

**Weights**, by type and by the rows they meet (a view's attention its own rows, MLP and head all):
- memory: their packed bytes over the card's bandwidth, once per window of 64 rows;
- issue slots: their number times the instructions that dequantizing and multiplying one costs at
  this row tile, over the instructions that the card issues;
- MMA: two operations per weight and row, rows filled up to tiles of 16, 32 or 64.
The kernels overlap the three, so that the slowest counts.

**fp16 or int8 activations.** With fp16, products sum in fp32, which GeForce cards do at half rate:
an RTX 3090 is bound by it from about 24 rows on. With int8 the MMA is four times as fast there, but
each output costs instructions for its scales. Types with a scale per 16 weights (Q6_K) keep fp16
either way. `Activations.AUTO` follows the kernels: int8 on GeForce, fp16 elsewhere.

**Tails**: a product's last programs leave a part of the card idle, and narrow ones never fill it.
On sm_90 a program is also a chain of wgmmas that wait for one another, which may take longer.

**Attention** packs the rows of all query heads of a KV head into tiles of 64. The busiest SM counts
(short contexts occupy few of them), steps one after the other with the latency of each, or the
card's memory if that takes longer: keys and values once, and the partial results of the lanes where
they do not fit the cache.

**Small** kernels (norms, rotation, the lanes' combination) do next to nothing, but not in no time.

**Launches** are the time between kernels of a graph: nine per layer, two more with both views.

Shares say how much of each rate kernels reach. Left out: sampling beyond greedy choice, and what
the host does between passes (50-100 us).
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import gguf

from orthrus_gguf.bench.prediction.cards import DEFAULT_SHARES, ISSUE_PER_CYCLE, Card, Shares
from orthrus_gguf.bench.prediction.shapes import (
    FILE_TYPES,
    PACKED_BITS,
    PassWeights,
    cache_bytes_per_token,
    launches,
    pass_weights,
    product_shapes,
    split_for,
)
from orthrus_gguf.model.config import ModelConfig

_Type = gguf.GGMLQuantizationType
Kind = gguf.GGMLQuantizationType

TILES = (16, 32, 64)
"""Row tiles of the products; more rows than the last run in windows of it."""

#: Instructions per weight at each row tile, counted in compiled kernels
#: (orthrus_kernels/tools/budgets.json): sm_86 (also used for sm_89), sm_90, and int8.
FP16_SM86 = {
    _Type.Q4_K: (3.24, 3.66, 4.27),
    _Type.Q6_K: (4.25, 4.64, 5.34),
    _Type.Q8_0: (2.86, 3.19, 3.94),
}
FP16_SM90 = {
    _Type.Q4_K: (3.30, 3.55, 3.48),
    _Type.Q6_K: (4.84, 4.77, 4.66),
    _Type.Q8_0: (3.02, 3.18, 3.15),
}
INT8_SM86 = {_Type.Q4_K: (6.39, 8.70, 13.60), _Type.Q8_0: (4.00, 5.81, 9.24)}

# The attention kernel (orthrus_kernels/attention/attention.py, head size 128, f16 cache).
_ATTENTION_ROWS = 64
_KEYS_PER_STEP = 32
_CHUNK = 64
_LANES = 16
_THREADS = 128
_STEP_SM86, _STEP_SM90 = 406, 370  # instructions per thread and step, counted like the others

# Guesses until there is a device. Seconds: of a step of attention however little it computes (two
# stages of loads in flight), of its first loads and last stores, of a small kernel.
_STEP_LATENCY, _ATTENTION_START, _SMALL = 1.0e-6, 1.5e-6, 1.1e-6
_SMALL_PER_LAYER = 4  # two norms, finish_qkv, the lanes' combination
_PROGRAMS_PER_SM = 2  # of a product: what shared memory holds
_TAIL = 0.1  # of the time that idle programs would need: the others get more of the memory
_WGMMA_CYCLES, _WGMMAS_PER_STEP, _STEP_WEIGHTS = 85, 16, 256


class Activations(enum.Enum):
    """What the rows are multiplied as."""

    AUTO = "auto"
    FP16 = "fp16"
    INT8 = "int8"


@dataclass(frozen=True)
class Limits:
    """Seconds that a product would take if one thing alone held it up."""

    memory: float
    issue: float
    mma: float

    @property
    def slowest(self) -> float:
        """They overlap."""
        return max(self.memory, self.issue, self.mma)


@dataclass(frozen=True)
class PassTime:
    """Milliseconds of the parts of a pass."""

    weights: float
    tails: float
    attention: float
    small: float
    launches: float

    @property
    def total(self) -> float:
        return self.weights + self.tails + self.attention + self.small + self.launches


@dataclass(frozen=True)
class PredictedCurve:
    """A cost curve: what passes of one model cost on one card. Predicted, not measured.

    file_type: one of shapes.FILE_TYPES; OrthrusError for others, at the first use.
    """

    card: Card
    config: ModelConfig
    file_type: str
    activations: Activations = Activations.AUTO
    shares: Shares = DEFAULT_SHARES

    def milliseconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        """Time of a pass of so many rows of each view that see `context` cache rows.

        Raises ValueError for a pass without rows, or for negative numbers.
        """
        return self.parts(ar_rows, diffusion_rows, context).total

    def parts(self, ar_rows: int, diffusion_rows: int, context: int) -> PassTime:
        """The same by parts."""
        rows = ar_rows + diffusion_rows
        if min(ar_rows, diffusion_rows, context) < 0 or rows == 0:
            raise ValueError(f"{ar_rows} and {diffusion_rows} rows at {context}: nothing to run")
        weights = self._weights
        seconds = (
            self._products(weights.ar, ar_rows)
            + self._products(weights.diffusion, diffusion_rows)
            + self._products(weights.shared, rows)
        )
        count = launches(self.config, both_views=min(ar_rows, diffusion_rows) > 0)
        views = (ar_rows > 0) + (diffusion_rows > 0)
        return PassTime(
            weights=1e3 * seconds,
            tails=1e3 * self._tails(views) * -(-rows // TILES[-1]),
            attention=1e3 * self._attention(rows, context),
            small=1e3 * self.config.n_layers * _SMALL_PER_LAYER * _SMALL,
            launches=1e3 * count * self.card.launch,
        )

    @cached_property
    def _weights(self) -> PassWeights:
        return pass_weights(self.config, self.file_type)

    def _is_int8(self, kind: Kind) -> bool:
        if self.activations is Activations.AUTO:
            return self.card.int8 and kind in INT8_SM86
        return self.activations is Activations.INT8 and kind in INT8_SM86

    def _instructions(self, kind: Kind, tile: int) -> float:
        fp16 = FP16_SM86 if self.card.int8 else FP16_SM90
        return (INT8_SM86 if self._is_int8(kind) else fp16)[kind][TILES.index(tile)]

    def _products(self, weights: Mapping[Kind, int], rows: int) -> float:
        """Seconds of multiplying `rows` rows by all of `weights`."""
        whole, rest = divmod(rows, TILES[-1])
        windows = [TILES[-1]] * whole
        if rest:
            windows.append(next(tile for tile in TILES if rest <= tile))
        return sum(
            self.limits(kind, count, tile).slowest
            for kind, count in weights.items()
            for tile in windows
        )

    def limits(self, kind: Kind, count: int, tile: int) -> Limits:
        """What holds up the product of `count` weights of one type with a tile of rows."""
        card, shares = self.card, self.shares
        rate = card.int8_mma if self._is_int8(kind) else card.fp16_mma
        return Limits(
            memory=count * PACKED_BITS[kind] / 8 / card.memory / shares.memory,
            issue=count * self._instructions(kind, tile) / card.issue / shares.compute,
            mma=2 * count * tile / rate / shares.compute,
        )

    def _tails(self, views: int) -> float:
        """Seconds that products take beyond their slowest limit, because of their grids."""
        kind = FILE_TYPES[self.file_type]
        return sum(
            count * self._tail(columns, k, kind)
            for columns, k, count in product_shapes(self.config, views)
        )

    def _tail(self, columns: int, k: int, kind: Kind) -> float:
        card, tile = self.card, 128 if self.card.capability == 90 else 64
        split = split_for(columns)
        waves = -(-columns // tile) * split / (card.sms * _PROGRAMS_PER_SM)
        memory = self.limits(kind, columns * k, TILES[0]).memory
        idle = _TAIL * (math.ceil(waves) - waves) * memory / waves
        if card.capability != 90:
            return idle
        steps = math.ceil(waves) * -(-k // _STEP_WEIGHTS) / split
        chain = steps * _WGMMAS_PER_STEP * _WGMMA_CYCLES / card.clock
        return idle + max(0.0, chain - memory)

    def _attention(self, rows: int, context: int) -> float:
        """Seconds of attention in all layers."""
        card, config = self.card, self.config
        tiles = -(-rows * (config.n_head // config.n_head_kv) // _ATTENTION_ROWS)
        chunks = -(-context // _CHUNK)
        lanes = min(_LANES, chunks)
        keys = -(-chunks // _LANES) * _CHUNK if chunks > 1 else context
        programs_per_sm = -(-config.n_head_kv * tiles * lanes // card.sms)
        steps = -(-keys // _KEYS_PER_STEP)
        computing = programs_per_sm * self.attention_step() / card.clock / self.shares.compute
        busiest = _ATTENTION_START * (context > 0) + steps * max(computing, _STEP_LATENCY)
        moved = context * cache_bytes_per_token(config) / config.n_layers
        partial = 4 * rows * config.n_head * (config.head_dim + 2) * lanes
        if partial > card.l2:
            moved += 2 * partial
        memory = moved / card.memory / self.shares.memory
        return config.n_layers * max(busiest, memory)

    def attention_step(self) -> float:
        """Cycles of an SM for one tile and one step of keys."""
        card = self.card
        mma = 4 * _ATTENTION_ROWS * _KEYS_PER_STEP * self.config.head_dim
        per_cycle = card.fp16_mma / card.sms / card.clock
        instructions = _STEP_SM86 if card.int8 else _STEP_SM90
        return max(mma / per_cycle, instructions * _THREADS / ISSUE_PER_CYCLE)


def two_pass_step(curve: PredictedCurve, block: int, context: int) -> float:
    """Milliseconds of a cycle of two passes: a draft of `block` rows, then as many to verify."""
    return curve.milliseconds(0, block, context) + curve.milliseconds(block, 0, context)


def fused_step(curve: PredictedCurve, block: int, context: int) -> float:
    """Milliseconds of a cycle whose pass verifies `block` rows and drafts the next block."""
    return curve.milliseconds(block, block, context)
