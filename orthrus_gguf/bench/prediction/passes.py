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
either way, and take with them what is multiplied in the same product. `Activations.AUTO` follows
the kernels: int8 on GeForce, fp16 elsewhere.

**Tails**: a product's last programs leave a part of the card idle, and narrow ones never fill it.
On sm_90 a program is also a chain of wgmmas that wait for one another, which may take longer.

**Attention** packs the rows of all query heads of a KV head into tiles of 64. The busiest SM counts
(short contexts occupy few of them), steps one after the other with the latency of each, or the
card's memory if that takes longer: keys and values once, and the partial results of the lanes where
they do not fit the cache.

**DeltaNet** layers of a hybrid read and write their state once, whatever the rows; the rows of the
pass run through it one after the other, each with a latency, and before them those that were
accepted of the last pass (taken to be as many, up to what it can hold back).

**Small** kernels (norms, rotation, the lanes' combination, the convolution) do next to nothing, but
not in no time.

**Launches** are the time between kernels of a graph, as many as the runtime launches: nine per
layer, two more with both views, two more where the inputs of a DeltaNet are two products.

**MTP**: a token of a draft is a pass of one row through the block and the head, one after the
other; and the block's keys and values of committed rows are made again.

Shares say how much of each rate kernels reach. Left out: sampling beyond greedy choice, and what
the host does between passes (50-100 us) and between the tokens of a chain.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property

import gguf

from orthrus_gguf.bench.prediction.cards import DEFAULT_SHARES, ISSUE_PER_CYCLE, Card, Shares
from orthrus_gguf.bench.prediction.shapes import (
    FILE_TYPES,
    PACKED_BITS,
    PassShape,
    Product,
    cache_bytes_per_layer,
    chain_shape,
    following_shape,
    pass_shape,
    record_bytes,
    split_for,
    state_bytes_per_layer,
)
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.protocol import View

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

# The attention kernel (orthrus_kernels/attention/attention.py, f16 cache): rows of a tile, and
# instructions per thread and step of sm_86 and sm_90, counted like the others, for heads up to 128
# and beyond.
_ATTENTION = (64, 406, 370)
_WIDE_ATTENTION = (32, 445, 441)
_KEYS_PER_STEP = 32
_CHUNK = 64
_LANES = 16
_THREADS = 128

# The recurrence (orthrus_kernels/recurrence/delta_net.py): a warp takes COLUMNS columns of a head's
# state through all rows. Instructions per row, counted likewise; rows that a pass can hold back.
_COLUMNS = 8
_ROW, _REPLAYED_ROW = 436, 103
_HELD_BACK = 16

# Guesses until there is a device. Seconds: of a step of attention however little it computes (two
# stages of loads in flight), of its first loads and last stores, of a small kernel.
_STEP_LATENCY, _ATTENTION_START, _SMALL = 1.0e-6, 1.5e-6, 1.1e-6
#: Of a row of the recurrence, whose numbers are loaded when it begins, and of one that is replayed.
_ROW_LATENCY, _REPLAY_LATENCY = 0.7e-6, 0.4e-6
_PROGRAMS_PER_SM = 2  # of a product: what shared memory holds
_TAIL = 0.1  # of the time that idle programs would need: the others get more of the memory
_WGMMA_CYCLES, _WGMMAS_PER_STEP, _STEP_WEIGHTS = 85, 16, 256


ShapeOf = Callable[[ModelConfig, str, Collection[Kind]], PassShape]


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
    recurrence: float
    small: float
    launches: float

    @property
    def total(self) -> float:
        between = self.attention + self.recurrence
        return self.weights + self.tails + between + self.small + self.launches


@dataclass(frozen=True)
class PredictedCurve:
    """A cost curve: what passes of one model cost on one card. Predicted, not measured.

    file_type: one of shapes.FILE_TYPES; OrthrusError for others, and what else has no prediction,
    at the first use. shape_of: what runs.
    """

    card: Card
    config: ModelConfig
    file_type: str
    activations: Activations = Activations.AUTO
    shares: Shares = DEFAULT_SHARES
    shape_of: ShapeOf = pass_shape

    @property
    def has_block(self) -> bool:
        """Whether the model has an MTP block."""
        return self.config.hybrid is not None and self.config.hybrid.mtp

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
        counts = {View.AR: ar_rows, View.DIFFUSION: diffusion_rows}
        views = [view for view, count in counts.items() if count]
        shape = self._shape
        seconds = tails = 0.0
        for product, count in shape.of(views).items():
            here = rows if product.view is None else counts[product.view]
            seconds += count * self._product(product, here)
            tails += count * self._tail(product)
        return PassTime(
            weights=1e3 * seconds,
            tails=1e3 * tails * -(-rows // TILES[-1]),
            attention=1e3 * shape.attention * self._attention(rows, context),
            recurrence=1e3 * shape.recurrences * self._recurrence(ar_rows),
            small=1e3 * shape.small * _SMALL,
            launches=1e3 * shape.launches(views) * self.card.launch,
        )

    @cached_property
    def _shape(self) -> PassShape:
        int8 = self.activations is Activations.INT8
        if self.activations is Activations.AUTO:
            int8 = self.card.int8
        return self.shape_of(self.config, self.file_type, INT8_SM86 if int8 else ())

    def _instructions(self, kind: Kind, tile: int, *, int8: bool) -> float:
        fp16 = FP16_SM86 if self.card.int8 else FP16_SM90
        return (INT8_SM86 if int8 else fp16)[kind][TILES.index(tile)]

    def _product(self, product: Product, rows: int) -> float:
        """Seconds of a product with `rows` rows."""
        whole, rest = divmod(rows, TILES[-1])
        windows = [TILES[-1]] * whole
        if rest:
            windows.append(next(tile for tile in TILES if rest <= tile))
        return sum(
            self.limits(kind, count, tile, int8=product.int8).slowest
            for kind, count in product.weights
            for tile in windows
        )

    def limits(self, kind: Kind, count: int, tile: int, *, int8: bool) -> Limits:
        """What holds up the product of `count` weights of one type with a tile of rows."""
        card, shares = self.card, self.shares
        rate = card.int8_mma if int8 else card.fp16_mma
        return Limits(
            memory=count * PACKED_BITS[kind] / 8 / card.memory / shares.memory,
            issue=count * self._instructions(kind, tile, int8=int8) / card.issue / shares.compute,
            mma=2 * count * tile / rate / shares.compute,
        )

    def _tail(self, product: Product) -> float:
        """Seconds that a product takes beyond its slowest limit, because of its grid."""
        kind, columns, k = FILE_TYPES[self.file_type], product.columns, product.k
        card, tile = self.card, 128 if self.card.capability == 90 else 64
        split = split_for(columns)
        waves = -(-columns // tile) * split / (card.sms * _PROGRAMS_PER_SM)
        memory = self.limits(kind, columns * k, TILES[0], int8=product.int8).memory
        idle = _TAIL * (math.ceil(waves) - waves) * memory / waves
        if card.capability != 90:
            return idle
        steps = math.ceil(waves) * -(-k // _STEP_WEIGHTS) / split
        chain = steps * _WGMMAS_PER_STEP * _WGMMA_CYCLES / card.clock
        return idle + max(0.0, chain - memory)

    def _attention(self, rows: int, context: int) -> float:
        """Seconds of attention in a layer."""
        card, config = self.card, self.config
        tile, *_ = self._attention_tile
        tiles = -(-rows * (config.n_head // config.n_head_kv) // tile)
        chunks = -(-context // _CHUNK)
        lanes = min(_LANES, chunks)
        keys = -(-chunks // _LANES) * _CHUNK if chunks > 1 else context
        programs_per_sm = -(-config.n_head_kv * tiles * lanes // card.sms)
        steps = -(-keys // _KEYS_PER_STEP)
        computing = programs_per_sm * self.attention_step() / card.clock / self.shares.compute
        busiest = _ATTENTION_START * (context > 0) + steps * max(computing, _STEP_LATENCY)
        moved = context * cache_bytes_per_layer(config)
        partial = 4 * rows * config.n_head * (config.head_dim + 2) * lanes
        if partial > card.l2:
            moved += 2 * partial
        return max(busiest, moved / card.memory / self.shares.memory)

    @property
    def _attention_tile(self) -> tuple[int, int, int]:
        return _ATTENTION if self.config.head_dim <= 128 else _WIDE_ATTENTION

    def attention_step(self) -> float:
        """Cycles of an SM for one tile and one step of keys."""
        card, (tile, sm86, sm90) = self.card, self._attention_tile
        mma = 4 * tile * _KEYS_PER_STEP * self.config.head_dim
        per_cycle = card.fp16_mma / card.sms / card.clock
        instructions = sm86 if card.int8 else sm90
        return max(mma / per_cycle, instructions * _THREADS / ISSUE_PER_CYCLE)

    def _recurrence(self, rows: int) -> float:
        """Seconds of the recurrence of one sequence in a DeltaNet."""
        card, hybrid = self.card, self.config.hybrid
        if hybrid is None or not rows:
            return 0.0
        replayed = min(rows, _HELD_BACK)
        moved = 2 * state_bytes_per_layer(self.config)
        moved += (rows + replayed) * record_bytes(self.config)
        memory = moved / card.memory / self.shares.memory
        warps = -(-hybrid.n_value_heads * hybrid.head_dim // _COLUMNS // card.sms)
        cycles = warps * (rows * _ROW + replayed * _REPLAYED_ROW) * 32 / ISSUE_PER_CYCLE
        computing = cycles / card.clock / self.shares.compute
        in_turn = rows * _ROW_LATENCY + replayed * _REPLAY_LATENCY
        return max(memory, computing, in_turn)


def two_pass_step(curve: PredictedCurve, block: int, context: int) -> float:
    """Milliseconds of a cycle of two passes: a draft of `block` rows, then as many to verify."""
    return curve.milliseconds(0, block, context) + curve.milliseconds(block, 0, context)


def fused_step(curve: PredictedCurve, block: int, context: int) -> float:
    """Milliseconds of a cycle whose pass verifies `block` rows and drafts the next block."""
    return curve.milliseconds(block, block, context)


def mtp_step(curve: PredictedCurve, depth: int, context: int) -> float:
    """Milliseconds of a cycle that verifies a chain of `depth` tokens of the MTP block, all of
    which are accepted, and drafts the next."""
    following = replace(curve, shape_of=following_shape).milliseconds(depth + 1, 0, context)
    verify = curve.milliseconds(depth + 1, 0, context)
    return verify + following + depth * chain_token(curve, context)


def chain_token(curve: PredictedCurve, context: int) -> float:
    """Milliseconds of a token of such a chain."""
    return replace(curve, shape_of=chain_shape).milliseconds(1, 0, context)
