"""The kernels of a gated DeltaNet in plain torch and float64, with their signatures: slow, the
oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from orthrus_kernels.elementwise.activation_rows import Int8Rows
from orthrus_kernels.elementwise.plain import normed, store_rows
from orthrus_kernels.elementwise.rows import Rows
from orthrus_kernels.recurrence.states import (
    ADVANCE,
    DRAFT,
    RUN,
    Runs,
    StateMemory,
    States,
    StateShape,
)


def convolve(
    inputs: Tensor,
    gates: Tensor,
    taps: Tensor,
    a: Tensor,
    dt: Tensor,
    rows: Rows,
    runs: Runs,
    states: States,
    layer: int,
    mixed: Tensor,
    strengths: Tensor,
) -> None:
    """See `orthrus_kernels.recurrence.delta_net.convolve`."""
    s = states.shape
    x = inputs[..., : s.channels].double().sum(0)
    alpha, beta = gates.double().sum(0).split(s.value_heads, dim=1)
    of = rows.views.clamp_min(0).long()
    decay = torch.exp(a[of] * softplus(alpha + dt[of]))
    strengths.copy_(torch.cat([decay, beta.sigmoid()], dim=1))
    back = torch.stack([runs.back_3, runs.back_2, runs.back_1], dim=1).tolist()
    keys = slice(s.key_heads * s.head_dim, 2 * s.key_heads * s.head_dim)
    for row, view in enumerate(rows.views.tolist()):
        if view < 0:
            continue
        records = states.held[int(rows.sequences[row])].records[layer]
        before = [x[at] if at >= 0 else records[-1 - at, : s.channels].double() for at in back[row]]
        y = silu((torch.stack([*before, x[row]], dim=1) * taps[view]).sum(1)).view(-1, s.head_dim)
        y[: 2 * s.key_heads] /= (y[: 2 * s.key_heads].pow(2).sum(1, keepdim=True) + 1e-6).sqrt()
        y[: s.key_heads] /= s.head_dim**0.5
        mixed[row] = y.flatten()
        slot = int(runs.record[row])
        if slot >= 0:
            own = _parts(records[slot], s)
            own[0].copy_(x[row])
            own[1].copy_(mixed[row, keys].view_as(own[1]))
            own[3].copy_(strengths[row, : s.value_heads])


def recur(
    mixed: Tensor, strengths: Tensor, runs: Runs, states: States, layer: int, out: Tensor
) -> None:
    """See `orthrus_kernels.recurrence.delta_net.recur`."""
    s = states.shape
    slots, share = runs.slots.tolist(), s.value_heads // s.key_heads
    begins, stops = runs.replay_first.tolist(), runs.replay_stop.tolist()
    for entry in runs.table.tolist():
        run = dict(zip(RUN, entry, strict=True))
        apply = slots[run["apply_first"] : run["apply_stop"]]
        if not run["rows"] and not apply:
            continue
        held = states.held[run["sequence"]]
        source, stamps = held.memory[run["source"], layer], held.stamps[layer]
        if apply and int(stamps[0, 0]) != run["stamp"]:
            applied = _replayed(source, apply, held, layer, s).float()
            if run["keeps"] == DRAFT:
                source = applied
            else:
                source.copy_(applied)
                stamps.fill_(run["stamp"])
        memory = source.double()
        for row in range(run["first"], run["first"] + run["rows"]):
            if begins[row] >= 0:
                memory = _replayed(source, slots[begins[row] : stops[row]], held, layer, s)
            heads = mixed[row].double().view(-1, s.head_dim)
            q, k = (part.repeat(share, 1) for part in heads[: 2 * s.key_heads].chunk(2))
            decay, beta = strengths[row].double().view(2, -1, 1)
            known = torch.einsum("hij,hi->hj", memory, k)
            delta = (beta * (heads[2 * s.key_heads :] - decay * known)).float().double()
            memory = _learned(memory, decay, k, delta)
            out[row] = torch.einsum("hij,hi->hj", memory, q).flatten()
            slot = int(runs.record[row])
            if slot >= 0:
                own = _parts(held.records[layer, slot], s)[2]
                own.copy_(delta)
        if run["keeps"] == ADVANCE:
            held.memory[run["target"], layer] = memory.float()


def gated_norm(
    x: Tensor,
    inputs: Tensor,
    first: int,
    weight: Tensor,
    eps: float,
    rows: Rows,
    out: Tensor | Int8Rows,
) -> None:
    """See `orthrus_kernels.recurrence.delta_net.gated_norm`."""
    count, n = x.shape
    own = weight[rows.views.clamp_min(0).long(), None]
    heads = normed(x.double().view(count, -1, weight.shape[1]), own, eps)
    gate = inputs[..., first : first + n].double().sum(0)
    store_rows(heads.flatten(1) * silu(gate), out)


def _parts(record: Tensor, s: StateShape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs [channels], k and delta [heads, head_dim], decay [value heads]."""
    sizes = (s.channels, s.key_heads * s.head_dim, s.value_heads * s.head_dim, s.value_heads)
    inputs, k, delta, decay = record[: sum(sizes)].split(sizes)
    return inputs, k.view(-1, s.head_dim), delta.view(-1, s.head_dim), decay


def _learned(memory: Tensor, decay: Tensor, k: Tensor, delta: Tensor) -> Tensor:
    """f64, but rounded to what the states hold: a record does the same wherever it is applied."""
    changed = memory * decay[..., None] + k[:, :, None] * delta[:, None, :]
    return changed.float().double()


def _replayed(
    memory: Tensor, slots: list[int], held: StateMemory, layer: int, s: StateShape
) -> Tensor:
    """What records do to the state of a layer, f64."""
    found = memory.double()
    for slot in slots:
        _, k, delta, decay = (part.double() for part in _parts(held.records[layer, slot], s))
        found = _learned(found, decay[:, None], k.repeat(len(delta) // len(k), 1), delta)
    return found
