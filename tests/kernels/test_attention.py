"""Attention kernels in the interpreter: against float64, and bit by bit against themselves.

Errors are measured as NMSE (sum of squared errors over sum of squares) against softmax attention in
float64 on the same f16 queries and the same stored keys and values (dequantized for q8_0 and q4_0),
before the result is rounded to f16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from long_cases import mostly_slow
from numpy.typing import NDArray
from orthrus_kernels.attention import plain as reference_attention
from orthrus_kernels.attention.attention import (
    CHUNK,
    LANES,
    NO_EDGE,
    AttentionScratch,
    Run,
    Sight,
    Tiles,
    attention,
    new_attention_scratch,
    tile_entries,
)
from orthrus_kernels.attention.kv_cache import Caches, KvPlanes, cache_entry, new_planes
from orthrus_kernels.elementwise.activation_rows import Int8Rows, new_int8_rows
from orthrus_kernels.elementwise.activations import deinterleave, interleave
from pass_rows import rows_of
from torch import Tensor

PERIOD = CHUNK * LANES
NAN = float("nan")
TYPES = ("f16", "q8_0", "q4_0")

#: What offsets of caches count from.
ANCHOR = torch.zeros(64, dtype=torch.uint8)


@dataclass(frozen=True)
class Case:
    """Rows of a pass in one layer of caches, and a scratch, in which every unwritten number is NaN.

    sequence: of each row, an index into `caches`. runs: by default one per sequence. positions: of
    rows, where a `sight` asks for them.
    """

    q: Tensor
    caches: tuple[tuple[KvPlanes, KvPlanes], ...]
    block_keys: KvPlanes
    block_values: KvPlanes
    visible: Tensor
    block_first: Tensor
    block_stop: Tensor
    sequence: tuple[int, ...] = ()
    runs: tuple[Run, ...] = ()
    layer: int = 1
    positions: tuple[int, ...] = ()
    sight: Sight | None = None

    @property
    def keys(self) -> KvPlanes:
        return self.caches[0][0].layer(self.layer)

    @property
    def values(self) -> KvPlanes:
        return self.caches[0][1].layer(self.layer)

    def tiles(self, window: int) -> Tiles:
        """Launches of up to `window` rows each."""
        rows, n_head, head_dim = self.q.shape
        group = n_head // self.keys.heads
        runs = self.runs or (Run(0, rows, 0),)
        entries: list[tuple[int, ...]] = []
        windows = []
        for first in range(0, rows, window):
            stop = min(first + window, rows)
            here = [
                Run(max(r.first - first, 0), min(r.first + r.rows, stop) - max(r.first, first),
                    r.sequence, r.edge, r.shift)
                for r in runs if r.first < stop and r.first + r.rows > first
            ]  # fmt: skip
            found = [*tile_entries(here, group, head_dim), (0, 0, 0, 0, NO_EDGE, 0)]
            windows.append((first, stop - first, len(entries), len(found)))
            entries += found
        return Tiles(torch.tensor(entries, dtype=torch.int32), tuple(windows))

    def call(
        self,
        function: Callable[..., None],
        window: int,
        out: Tensor | Int8Rows,
        scratch: AttentionScratch | None = None,
    ) -> None:
        """Run the kernels or the reference, the scratch full of NaN: default, that of a window."""
        n_head, head_dim = self.q.shape[1:]
        if scratch is None:
            scratch = new_attention_scratch(window, n_head, self.keys.heads, head_dim, "cpu")
        scratch.sums.fill_(NAN)
        scratch.stats.fill_(NAN)
        keys, values = self.caches[0]
        entries = [cache_entry(*planes, ANCHOR) for planes in self.caches]
        caches = Caches(
            keys.type_name, values.type_name, keys.heads, head_dim, ANCHOR,
            torch.tensor(entries), list(self.caches),
        )  # fmt: skip
        rows = rows_of(
            len(self.q),
            visible=self.visible,
            block_first=self.block_first,
            block_stop=self.block_stop,
            positions=self.positions or [0] * len(self.q),
        )
        function(
            self.q, caches, self.layer, self.block_keys, self.block_values, rows,
            self.tiles(window), scratch, out, sight=self.sight,
        )  # fmt: skip

    def row(self, i: int) -> Case:
        """The pass that holds row i alone (which must not see a block)."""
        one = slice(i, i + 1)
        visible, zero = self.visible[one], torch.zeros(1, dtype=torch.int32)
        block = poisoned("f16", self.keys.heads, 1, self.keys.head_dim)
        run = next((r for r in self.runs if r.first <= i < r.first + r.rows), Run(0, 1, 0))
        alone = (Run(0, 1, run.sequence, run.edge, run.shift),)
        return Case(
            self.q[one], self.caches, block, block, visible, zero, zero, runs=alone,
            layer=self.layer,
        )  # fmt: skip


def poisoned(
    type_name: str, heads: int, capacity: int, head_dim: int, layers: int | None = None
) -> KvPlanes:
    planes = new_planes(type_name, heads, capacity, head_dim, "cpu", layers)
    planes.scales.fill_(NAN)
    if type_name == "f16":
        planes.values.fill_(NAN)
    return planes


def fill(planes: KvPlanes, length: int, generator: torch.Generator) -> None:
    """Random numbers of about unit size in the first `length` positions."""
    held = planes.values[:, :length]
    if planes.type_name == "f16":
        held.copy_(torch.randn(held.shape, generator=generator))
        return
    held.copy_(torch.randint(0, 256, held.shape, dtype=torch.uint8, generator=generator))
    scales = planes.scales[:, :length]
    size = 0.013 if planes.type_name == "q8_0" else 0.2
    scales.copy_((torch.rand(scales.shape, generator=generator) + 0.5) * size)


def make(
    type_name: str,
    head_dim: int,
    visible: list[int],
    blocks: list[tuple[int, int]] | None = None,
    *,
    heads: int = 1,
    group: int = 4,
    capacity: int | None = None,
    seed: int = 0,
) -> Case:
    """Rows that see `visible[i]` of the cache, and the pass's rows `blocks[i]` (first, stop)."""
    g = torch.Generator().manual_seed(seed)
    rows, longest = len(visible), max(visible)
    spans = torch.tensor(blocks or [(0, 0)] * rows, dtype=torch.int32)
    # The middle one of three layers: what lies around it must not be read.
    keys, values = (
        poisoned(type_name, heads, capacity or longest + 70, head_dim, layers=3) for _ in "kv"
    )
    block_keys, block_values = (poisoned("f16", heads, rows, head_dim) for _ in "kv")
    for planes in (keys, values):
        fill(planes.layer(1), longest, g)
    for planes in (block_keys, block_values):
        numbers = torch.randn(planes.values.shape, generator=g)
        in_block = (spans[:, 1] > spans[:, 0])[None, :, None]
        planes.values.copy_(torch.where(in_block, numbers, NAN))
    q = torch.randn(rows, heads * group, head_dim, generator=g).half()
    seen = torch.tensor(visible, dtype=torch.int32)
    first, stop = (spans[:, i].contiguous() for i in (0, 1))
    return Case(q, ((keys, values),), block_keys, block_values, seen, first, stop)


def run(case: Case, *, window: int = 64) -> Tensor:
    """The kernels' f16 output in natural order."""
    columns = case.q[0].numel()
    out = interleave(torch.full((case.q.shape[0], columns), NAN, dtype=torch.float16))
    case.call(attention, window, out)
    return deinterleave(out, columns)


def exact(case: Case) -> Tensor:
    """The float64 oracle's output in natural order."""
    columns = case.q[0].numel()
    out = interleave(torch.full((case.q.shape[0], columns), NAN, dtype=torch.float64))
    case.call(reference_attention.attention, 1, out)
    return deinterleave(out, columns)


def nmse(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).pow(2).sum() / wanted.pow(2).sum())


@pytest.fixture
def ordered_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products whose every element sums its terms in one fixed order.

    The interpreter's own go through BLAS, where a row's bits depend on its place in the matrix
    (a GPU's MMA treats all rows alike; `gpu_check_ops.py` shows it on the device).
    """

    def matmul(a: NDArray[Any], b: NDArray[Any], dtype: type = np.float32) -> NDArray[Any]:
        terms: NDArray[Any] = a.astype(dtype)[:, :, None] * b.astype(dtype)[None]
        return np.asarray(terms.sum(axis=1))

    monkeypatch.setattr(np, "matmul", matmul)


def mixed(type_name: str, head_dim: int, length: int, **more: int) -> Case:
    """Four AR rows after `length` tokens, two blocks guessing 1 and 3 acceptances, a spare row."""
    rows = [length + 1, length + 2, length + 3, length + 4]
    rows += [length + 1] * 3 + [length + 3] * 2 + [0]
    blocks = [(0, 0)] * 4 + [(4, 7)] * 3 + [(7, 9)] * 2 + [(0, 0)]
    return make(type_name, head_dim, rows, blocks, **more)


SEGMENTS = [("f16", 64), ("f16", 80), ("q8_0", 96), ("q4_0", 128), ("f16", 256), ("q8_0", 80)]


@pytest.mark.parametrize(
    ("type_name", "head_dim"),
    mostly_slow(SEGMENTS, sorted({*product(TYPES, (64, 80, 96, 128, 256))} - {*SEGMENTS})),
)
def test_mixed_segments(type_name: str, head_dim: int) -> None:
    if type_name != "f16" and head_dim % 32:
        with pytest.raises(ValueError, match="divisible by 32"):
            new_planes(type_name, 1, 1, head_dim, "cpu")
        return
    case = mixed(type_name, head_dim, 300, heads=2, group=2)
    found = run(case)
    assert nmse(found, exact(case)) < 1e-6
    assert torch.equal(found[-1], torch.zeros_like(found[-1])), "a row without keys gives zeros"


@pytest.mark.parametrize(
    "length", mostly_slow([0, 31, 32, 257, 513], [1, 33, 255, 256, 511, 512, 1024])
)
def test_context_edges(length: int) -> None:
    case = mixed("f16", 64, length)
    assert nmse(run(case), exact(case)) < 1e-6


@pytest.mark.parametrize(
    "length", mostly_slow([PERIOD + CHUNK + 5], [PERIOD - 1, PERIOD, PERIOD + 1])
)
def test_lanes_come_round(length: int) -> None:
    """Every lane holds several chunks beyond LANES * CHUNK positions."""
    case = make("f16", 64, [length, 5, length + 1], group=2)
    assert nmse(run(case), exact(case)) < 1e-6


@pytest.mark.parametrize(
    ("length", "back"), mostly_slow([(PERIOD + 90, 70)], [(PERIOD + 90, PERIOD), (5, 5), (90, 86)])
)
def test_sliding_windows(length: int, back: int) -> None:
    """Blocks of two lengths, whose rows see the last positions only, against softmax attention to
    those."""
    rows, spans = [length] * 2 + [length - 3], [(0, 2)] * 2 + [(2, 3)]
    positions = (length, length + 1, length - 3)
    case = make("f16", 64, rows, spans, group=1)
    every = exact(case)
    for causal in (True, False):
        sliding = dataclasses.replace(case, positions=positions, sight=Sight(back, causal))
        found = exact(sliding)
        assert nmse(run(sliding), found) < 1e-6
        keys, values = (planes.values[:, :length].double() for planes in (case.keys, case.values))
        for row, (first, stop) in enumerate(spans):
            since = max(positions[row] + 1 - back, 0)
            end = row + 1 if causal else stop
            k, v = (
                torch.cat([cached[0, since : rows[row]], block.values[0, first:end].double()])
                for cached, block in ((keys, case.block_keys), (values, case.block_values))
            )
            seen = (case.q[row].double() @ k.T / 8).softmax(-1) @ v
            torch.testing.assert_close(found[row], seen.flatten())
        assert not torch.allclose(found[0], every[0], atol=1e-3)


@pytest.mark.parametrize(("heads", "group"), mostly_slow([(1, 5), (2, 8)], [(1, 1), (3, 1)]))
def test_head_groups(heads: int, group: int) -> None:
    """Groups that do not divide the tile put one row's heads into two tiles."""
    case = mixed("f16", 64, 40, heads=heads, group=group)
    assert nmse(run(case), exact(case)) < 1e-6


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("rows", mostly_slow([5, 33], [1, 31, 64]))
def test_row_counts(rows: int) -> None:
    case = make("f16", 64, [50 + i for i in range(rows)], group=2)
    found = run(case)
    assert nmse(found, exact(case)) < 1e-6
    assert torch.equal(run(case, window=7), found), "windows of rows change nothing"


@pytest.mark.parametrize(("rows", "room", "lanes"), [(3, 2, 7), (16, 2, 1)])
def test_prompts_take_fewer_lanes(rows: int, room: int, lanes: int) -> None:
    """More rows at a time than the scratch has all lanes for."""
    case = make("f16", 64, [700 + i for i in range(rows)], heads=1, group=4)
    scratch = new_attention_scratch(room, 4, 1, 64, "cpu")
    assert scratch.lanes(rows)[0] == lanes
    assert scratch.lanes(room) == (LANES, 64)
    out = interleave(torch.full((rows, 4 * 64), NAN, dtype=torch.float16))
    case.call(attention, rows, out, scratch)
    assert nmse(deinterleave(out, 4 * 64), exact(case)) < 1e-6


def test_extreme_scores() -> None:
    """A score of +-60,000 leaves one key in charge; nothing overflows on the way."""
    case = make("f16", 64, [70, 71])
    case.q.mul_(100)
    case.keys.values[:, 20] = 100 * case.q[0, 0].sign()
    found = run(case)
    assert found.isfinite().all()
    assert nmse(found, exact(case)) < 1e-6


def test_int8_output() -> None:
    """Rows for an int8 product: the f16 result, up to half a quantization step."""
    case = mixed("f16", 96, 100, group=2)
    out = new_int8_rows(case.q.shape[0], 192, "cpu")
    case.call(attention, 64, out)
    wanted = exact(case)
    value = out.quants.double() * out.scales.double()[..., None]
    step = wanted.view(10, -1, 32).abs().amax(-1, keepdim=True) / 127
    assert ((value.view(10, -1, 32) - wanted.view(10, -1, 32)).abs() <= step * 0.51 + 1e-4).all()
    sums = out.scales * out.quants.float().sum(-1)
    torch.testing.assert_close(out.sums, sums, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("type_name", "length"),
    mostly_slow([("q8_0", 254), ("f16", PERIOD - 2)], [("f16", 30), ("q4_0", 510)]),
)
@pytest.mark.usefixtures("ordered_products")
def test_bitwise_row_invariance(type_name: str, length: int) -> None:
    """An AR row gives the same bits alone, beside other rows and blocks, and in any capacity."""
    case = mixed(type_name, 64, length)
    together = run(case)
    for i in (0, 1, 3):
        assert torch.equal(run(case.row(i))[0], together[i])
    roomy = mixed(type_name, 64, length, capacity=length + 600)
    for ours, theirs in ((case.keys, roomy.keys), (case.values, roomy.values)):
        theirs.values[:, : length + 4] = ours.values[:, : length + 4]
        if type_name != "f16":
            theirs.scales[:, : length + 4] = ours.scales[:, : length + 4]
    assert torch.equal(run(case), run(roomy))


@pytest.mark.usefixtures("ordered_products")
def test_rows_beyond_the_context_are_not_seen() -> None:
    """Rewriting keys and values after a row's position leaves its bits alone."""
    case = make("f16", 64, [30, 31, 32, 90])
    before = run(case)
    case.keys.values[:, 32:] = 7.0
    case.values.values[:, 32:90] *= -3
    after = run(case)
    assert torch.equal(after[:3], before[:3])
    assert not torch.equal(after[3], before[3])


# --- several sequences, trees ---


def joined(cases: Sequence[Case]) -> Case:
    """One pass of the rows of several cases without blocks, a sequence each."""
    runs, first = [], 0
    for number, case in enumerate(cases):
        runs.append(Run(first, len(case.q), number))
        first += len(case.q)
    heads, head_dim = cases[0].keys.heads, cases[0].keys.head_dim
    block = poisoned("f16", heads, first, head_dim)
    zeros = torch.zeros(first, dtype=torch.int32)
    return Case(
        torch.cat([case.q for case in cases]),
        tuple(case.caches[0] for case in cases),
        block,
        block,
        torch.cat([case.visible for case in cases]),
        zeros,
        zeros,
        runs=tuple(runs),
    )


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("type_name", mostly_slow(["f16", "q4_0"], ["q8_0"]))
def test_sequences_share_a_pass(type_name: str) -> None:
    """Caches of different sizes: each row gives what it gives in a pass of its sequence alone."""
    parts = [
        make(type_name, 64, [length + i for i in range(rows)], group=2, seed=length)
        for rows, length in ((3, 40), (1, 300), (33, 7), (5, 1))
    ]
    together = joined(parts)
    found = run(together)
    assert nmse(found, exact(together)) < 1e-6
    assert torch.equal(found, torch.cat([run(part) for part in parts]))
    assert torch.equal(run(together, window=9), found), "windows of rows change nothing"


BRANCHES = [("f16", 257), ("q8_0", 5), ("q4_0", 300), ("f16", 0)]
OTHER_BRANCHES = sorted({*product(TYPES, (0, 5, 64, 257, 300))} - {*BRANCHES})


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize(("type_name", "edge"), mostly_slow(BRANCHES, OTHER_BRANCHES))
def test_branches_have_the_bits_of_chains(type_name: str, edge: int) -> None:
    """Keys from a column on lie elsewhere: the rows do not notice."""
    length, count = 300, 6
    chain = make(type_name, 64, [length + 1 + i for i in range(count)], group=2, capacity=1000)
    branch = make(type_name, 64, [length + 1 + i for i in range(count)], group=2, capacity=1000)
    place, last = 517, length + count
    for ours, theirs in zip(chain.caches[0], branch.caches[0], strict=True):
        pairs = [(ours.values, theirs.values)]
        if type_name != "f16":
            pairs.append((ours.scales, theirs.scales))
        for source, target in pairs:
            target[1, :, place : place + last - edge] = source[1, :, edge:last]
            target[1, :, edge:last] = 0 if type_name == "f16" else 1
    moved = dataclasses.replace(branch, runs=(Run(0, count, 0, edge, place - edge),))
    assert torch.equal(run(moved), run(chain))
    assert torch.equal(run(moved.row(4))[0], run(chain)[4])
    assert nmse(run(moved), exact(moved)) < 1e-6
    if edge < length:
        assert not torch.equal(run(branch), run(chain))
