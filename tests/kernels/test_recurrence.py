"""The gated DeltaNet's kernels in the interpreter: against their plain twins, and against the
recurrence written out row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from orthrus_kernels.elementwise.activation_rows import new_f16_rows, new_int8_rows
from orthrus_kernels.elementwise.activations import deinterleave
from orthrus_kernels.recurrence import delta_net, plain
from orthrus_kernels.recurrence.states import (
    BACK,
    ROW,
    RUN,
    Runs,
    StateMemory,
    States,
    StateShape,
    new_state,
    state_entry,
)
from pass_rows import rows_of
from torch import Tensor

KERNELS, TWINS = delta_net, plain
SHAPE = StateShape(layers=3, key_heads=2, value_heads=4, head_dim=16, records=10)
LAYER = 1
ANCHOR = torch.zeros(64, dtype=torch.uint8)
INNER = SHAPE.value_heads * SHAPE.head_dim


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = random(2, 24, SHAPE.channels + INNER, seed=1)
GATES = random(4, 24, 2 * SHAPE.value_heads, seed=2)
#: Of both views.
TAPS = random(2, SHAPE.channels, 4, seed=3)
A, DT = -random(2, SHAPE.value_heads, seed=4).exp(), random(2, SHAPE.value_heads, seed=5)
NORM = random(2, 32, seed=6)


def states_of(*held: StateMemory) -> States:
    entries = torch.tensor([state_entry(state, ANCHOR) for state in held])
    return States(SHAPE, ANCHOR, entries, list(held))


def runs_of(
    count: int, table: Sequence[Sequence[int]], slots: Sequence[int] = (), **rows: Sequence[int]
) -> Runs:
    """Rows that follow one another, have no record, and nothing before them, unless said."""
    nothing = {"record": -1, "back_1": -1, "back_2": -2, "back_3": -3, "replay_first": -1}
    columns = {
        name: torch.tensor(rows.get(name, [nothing.get(name, 0)] * count), dtype=torch.int32)
        for name in ROW
    }
    return Runs(
        torch.tensor(table, dtype=torch.int32).view(-1, len(RUN)),
        slots=torch.tensor([*slots, 0], dtype=torch.int32),
        **columns,
    )


def in_order(count: int) -> dict[str, list[int]]:
    """What lies before the rows of a chain: records 2, 1 and 0, of which 0 is the nearest."""
    before = [-3, -2, -1]
    way = [*before, *range(count)]
    return {f"back_{i}": way[BACK - i : BACK - i + count] for i in (1, 2, 3)}


def through(
    kernels: ModuleType,
    states: States,
    runs: Runs,
    first: int,
    sequences: Sequence[int],
    blocks: Sequence[int] = (),
) -> Tensor:
    """What rows of INPUTS give, from `first` on; unused ones among them have the sequence -1.
    blocks: those of the diffusion view, whose run is the last one."""
    count = len(sequences)
    inputs, gates = INPUTS[:, first : first + count], GATES[:, first : first + count]
    rows = rows_of(
        count,
        views=[-(sequence < 0) + (row in blocks) for row, sequence in enumerate(sequences)],
        sequences=[max(sequence, 0) for sequence in sequences],
    )
    mixed = torch.full((count, SHAPE.channels), 9.0)
    strengths = torch.full((count, 2 * SHAPE.value_heads), 9.0)
    out = torch.full((count, INNER), 9.0)
    kernels.convolve(
        inputs, gates, TAPS, A, DT, rows, runs, states, LAYER, mixed, strengths
    )  # fmt: skip
    last = len(runs.table) - bool(blocks)
    for table in (runs.table[:last], runs.table[last:]):
        if len(table):
            kernels.recur(mixed, strengths, replace(runs, table=table), states, LAYER, out)
    return out


def begun(seed: int = 7) -> StateMemory:
    """A state in the middle of a text."""
    state = new_state(SHAPE, "cpu")
    state.memory.copy_(random(*state.memory.shape, seed=seed))
    state.records.copy_(random(*state.records.shape, seed=seed + 1))
    return state


def equal(found: StateMemory, wanted: StateMemory) -> bool:
    pairs = zip(vars(found).values(), vars(wanted).values(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_rows_written_out() -> None:
    """Decay, correction and output of each row, from nothing, in double precision."""
    count = 5
    state = new_state(SHAPE, "cpu")
    table = [[0, count, 0, 0, 1, 0, 0, 0, 1]]
    found = through(KERNELS, states_of(state), runs_of(count, table, **in_order(count)), 0,
                    [0] * count)  # fmt: skip
    u = np.concatenate([np.zeros((3, SHAPE.channels)), INPUTS.double().sum(0)[:count, :-INNER]])
    alpha, beta = np.split(GATES.double().sum(0)[:count].numpy(), 2, axis=1)
    size, keys = SHAPE.head_dim, SHAPE.key_heads
    memory = np.zeros((SHAPE.value_heads, size, size))
    for row in range(count):
        total = (u[row : row + 4].T * TAPS[0].numpy()).sum(1)
        heads = (total / (1 + np.exp(-total))).reshape(-1, size)
        norms = np.sqrt((heads[: 2 * keys] ** 2).sum(1, keepdims=True) + 1e-6)
        q, k = np.split(heads[: 2 * keys] / norms, 2)
        for h in range(SHAPE.value_heads):
            step = np.log1p(np.exp(alpha[row, h] + float(DT[0, h])))
            memory[h] *= np.exp(float(A[0, h]) * step)
            own, v = k[h % keys], heads[2 * keys + h]
            delta = (v - own @ memory[h]) / (1 + np.exp(-beta[row, h]))
            memory[h] += np.outer(own, delta)
            part = found[row, h * size : (h + 1) * size].double().numpy()
            np.testing.assert_allclose(part, q[h % keys] @ memory[h] / size**0.5, atol=3e-6)
    np.testing.assert_allclose(state.memory[1, LAYER], memory, atol=1e-5)
    assert not state.memory[0].any()
    assert not state.memory[:, [0, 2]].any()


def both(call: Callable[[ModuleType, list[StateMemory]], Tensor]) -> Tensor:
    """Two sequences through kernels and twins: they agree, states and records included."""
    held = [[begun(), begun(9)] for _ in range(2)]
    found, wanted = call(KERNELS, held[0]), call(TWINS, held[1])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    for ours, theirs in zip(*held, strict=True):
        for name in ("memory", "records"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4,
                                       atol=2e-5)  # fmt: skip
        assert torch.equal(ours.stamps, theirs.stamps)
    return found


def test_a_pass_of_everything() -> None:
    """A chain with records behind accepted rows, an unused row, a tree of another sequence, a run
    that nothing but records are applied in, and an unused one."""
    parents = (-1, 0, 1, 0)
    way = [[-1, -2, -3], [4, -1, -2], [5, 4, -1], [4, -1, -2]]

    def call(kernels: ModuleType, held: list[StateMemory]) -> Tensor:
        chain = in_order(3)
        rows = {
            "record": [3, 4, 5, -1, 6, 7, 8, 9],
            **{f"back_{i}": [*chain[f"back_{i}"], -1, *(w[i - 1] for w in way)] for i in (1, 2, 3)},
            "replay_first": [-1] * 7 + [2],
            "replay_stop": [0] * 7 + [3],
        }
        table = [
            [0, 3, 0, 0, 0, 0, 2, 1, 0],
            [4, 4, 1, 1, 1, 0, 0, 0, 0],
            [0, 0, 2, 0, 0, 0, 2, 4, 0],
            [0] * 9,
        ]
        held.append(begun(11))
        runs = runs_of(8, table, [0, 1, 6], **rows)
        return through(kernels, states_of(*held), runs, 0, [0, 0, 0, -1, 1, 1, 1, 1])

    assert parents[3] == 0
    found = both(call)
    assert (found[3] == 9).all()


def test_rows_do_not_depend_on_their_number() -> None:
    """One run of rows, and one row after another, whose inputs take turns in records: same bits."""
    count, together, alone = 5, begun(), begun()
    chain = runs_of(count, [[0, count, 0, 0, 1, 0, 0, 0, 1]], **in_order(count))
    wanted = through(KERNELS, states_of(together), chain, 0, [0] * count)
    slots = [2, 1, 0, *(3 + row % 5 for row in range(count))]
    for row in range(count):
        back = {f"back_{i}": [-1 - slots[BACK + row - i]] for i in (1, 2, 3)}
        table = [[0, 1, 0, int(row > 0), 1, 0, 0, 0, 1]]
        one = runs_of(1, table, record=[slots[BACK + row]], **back)
        found = through(KERNELS, states_of(alone), one, row, [0])
        assert torch.equal(found[0], wanted[row]), row
    assert torch.equal(alone.memory[1, LAYER], together.memory[1, LAYER])


def test_a_record_does_what_its_row_did() -> None:
    """Applied by the next pass, and once only: however often that runs, the bits of one run."""
    count, kept = 3, 2
    chain = runs_of(count, [[0, count, 0, 0, 0, 0, 0, 0, 0]], record=[3, 4, 5],
                    **in_order(count))  # fmt: skip
    state, other = begun(), begun()
    through(KERNELS, states_of(state), chain, 0, [0] * count)
    assert torch.equal(state.memory, other.memory), "rows with records leave the state alone"
    advance = runs_of(kept, [[0, kept, 0, 0, 1, 0, 0, 0, 1]], **in_order(kept))
    through(KERNELS, states_of(other), advance, 0, [0] * kept)
    apply = runs_of(1, [[0, 0, 0, 0, 0, 0, kept, 1, 0]], [3, 4])
    for _ in range(2):
        through(KERNELS, states_of(state), apply, 0, [-1])
        assert torch.equal(state.memory[0, LAYER], other.memory[1, LAYER])
        assert (state.stamps[LAYER] == 1).all()
    broken = state.stamps.clone()
    broken[LAYER, 2:] = 0  # some tiles were reached, some not
    again = begun()
    again.records.copy_(state.records)
    again.memory[0, LAYER, :2] = state.memory[0, LAYER, :2]
    again.stamps.copy_(broken)
    through(KERNELS, states_of(again), apply, 0, [-1])
    assert equal(again, state)


def test_a_block_behind_rows_of_its_pass() -> None:
    """Behind one of two rows, whose records are not there before the pass: what it gives behind
    them alone, to the bit, whether what was accepted has become part of the state or not; and
    nothing stays of it."""
    slots, begin, state, other = [8, 9, 3], [0, 2, 0, 0, 1, 0, 2, 1, 0], begun(), begun()

    def run_of(first: int) -> list[int]:
        return [first, 2, 0, 0, 1, 0, 2, 1, -1]

    pair = runs_of(
        4, [begin, run_of(2)], slots, record=[3, 4, -1, -1],
        back_1=[-3, 0, 0, 2], back_2=[-2, -3, -3, 0], back_3=[-1, -2, -2, -3],
        replay_first=[-1, -1, 2, -1], replay_stop=[0, 0, 3, 0],
    )  # fmt: skip
    found, wanted = (
        through(kernels, states_of(held), pair, 0, [0] * 4, (2, 3))
        for kernels, held in ((KERNELS, state), (TWINS, other))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    single = runs_of(
        2, [run_of(0)], slots, back_1=[-4, 0], back_2=[-3, -4], back_3=[-2, -3],
        replay_first=[2, -1], replay_stop=[3, 0],
    )  # fmt: skip
    for applied in (True, False):
        if not applied:  # as behind a pass that broke off
            state.memory.copy_(begun().memory)
            state.stamps.zero_()
        before = StateMemory(*(part.clone() for part in vars(state).values()))
        assert torch.equal(
            through(KERNELS, states_of(state), single, 2, [0] * 2, (0, 1)), found[2:]
        )
        assert equal(state, before)


@pytest.mark.parametrize("int8", [False, True])
def test_gated_norm(int8: bool) -> None:
    x = random(5, INNER, seed=12)
    found, wanted = (normed_by(kernels, x, int8=int8) for kernels in (KERNELS, TWINS))
    # int8 rows may differ by a unit where the last bits do.
    torch.testing.assert_close(found, wanted, rtol=2e-3, atol=0.05 if int8 else 1e-4)
    assert found.abs().max() > 1


def normed_by(kernels: ModuleType, x: Tensor, *, int8: bool) -> Tensor:
    """Rows as floats, in their order: two of the AR view, two of the other, an unused one."""
    pass_rows = rows_of(5, views=[0, 0, 1, 1, -1])
    if int8:
        rows = new_int8_rows(5, INNER, "cpu")
        kernels.gated_norm(x, INPUTS[:, :5], SHAPE.channels, NORM, 1e-6, pass_rows, rows)
        return (rows.quants.float() * rows.scales[..., None]).flatten(1)
    halves = new_f16_rows(5, INNER, "cpu")
    kernels.gated_norm(x, INPUTS[:, :5], SHAPE.channels, NORM, 1e-6, pass_rows, halves)
    return deinterleave(halves, INNER).float()
