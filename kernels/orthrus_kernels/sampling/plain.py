"""Sampling and commit in plain torch, with the signatures of the kernels. Slow, row by row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthrus_kernels.elementwise.rows import (
    BAD_LOGITS,
    CYCLES,
    DIFFUSION,
    EMITTED,
    LIMIT,
    POSITION,
    RUNNING,
    STATUS,
    STOPPED,
)
from orthrus_kernels.sampling.sample import SampleScratch, SamplingParameters


def sample(
    logits: Tensor,
    positions: Tensor,
    history: Tensor,
    parameters: SamplingParameters,
    scratch: SampleScratch,
    out: Tensor,
) -> None:
    """See `orthrus_kernels.sampling.sample.sample`; `scratch` is not used."""
    for row in range(logits.shape[0]):
        prefix = history[: int(positions[row]) + 1].long()
        if parameters.penalizes:
            _penalize(logits[row], prefix, parameters)
        logits[row, parameters.banned] = -math.inf
        scores = logits[row].double().nan_to_num(math.inf, math.inf, -math.inf)
        if not parameters.greedy:
            scores = _noisy(scores, len(prefix), parameters)
        best = int(scores.argmax())  # the lowest id wins a draw
        out[row] = best if scores[best].isfinite() else -1


def pick(best: Tensor, tokens: Tensor, out: Tensor) -> None:
    """See `orthrus_kernels.sampling.sample.pick`."""
    values = best.double().nan_to_num(math.inf, math.inf, -math.inf)
    top = values.amax(1, keepdim=True)
    winners = torch.where(values == top, tokens, 2**31 - 1).amin(1)
    out.copy_(torch.where(top[:, 0].isfinite(), winners, -1))


def gumbel_noise(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise (f64) of i64 `tokens` at one position; see `sample.py`."""
    counter = [tokens >> 2, torch.full_like(tokens, position), tokens * 0, tokens * 0]
    words = torch.stack(_philox(counter, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    chosen = words.gather(0, (tokens & 3)[None])[0]
    return -torch.log(-torch.log((chosen.double() + 0.5) * 2.0**-32))


def accept(
    ar_tokens: Tensor,
    segments: Tensor,
    history: Tensor,
    stop_tokens: Tensor,
    state: Tensor,
    ring: Tensor,
    log: Tensor,
) -> None:
    """See `orthrus_kernels.sampling.accept.accept`."""
    position, emitted = int(state[POSITION]), int(state[EMITTED])
    drawn, width = ar_tokens.tolist(), int(segments[0, 2]) - 1
    drafts = history[position + 1 : position + 1 + width].tolist()
    accepted = 0
    while accepted < width and drawn[accepted] == drafts[accepted]:
        accepted += 1

    count = 0
    while state[STATUS] == RUNNING and count <= accepted and emitted + count < int(state[LIMIT]):
        token = drawn[count]
        if token < 0:
            state[STATUS] = BAD_LOGITS
            break
        history[position + 1 + count] = token
        ring[(emitted + count) % ring.numel()] = token
        count += 1
        if token in stop_tokens.tolist():
            state[STATUS] = STOPPED
    entry = [position, width, accepted, count]
    log[int(state[CYCLES]) % log.shape[0]] = torch.tensor(entry, dtype=log.dtype)
    state[POSITION], state[EMITTED] = position + count, emitted + count
    state[CYCLES] += 1


def write_drafts(
    tokens: Tensor, views: Tensor, positions: Tensor, history: Tensor, shift: int = 1
) -> None:
    """See `orthrus_kernels.sampling.accept.write_drafts`."""
    at = positions.long() + shift
    mine = (views == DIFFUSION) & (at < history.numel())
    history[at[mine]] = tokens[mine].clamp_min(0)


def _penalize(scores: Tensor, prefix: Tensor, parameters: SamplingParameters) -> None:
    _, _, _, repeat, frequency, presence = parameters.numbers.tolist()
    window = prefix[-int(parameters.integers[2]) :]
    tokens, counts = torch.unique(window, return_counts=True)
    seen = scores[tokens]
    seen = torch.where(seen <= 0, seen * repeat, seen / repeat)
    scores[tokens] = (seen.double() - (counts.double() * frequency + presence)).float()


def _noisy(scores: Tensor, position: int, parameters: SamplingParameters) -> Tensor:
    """Tempered scores plus noise of the tokens that survive the filters, -inf for the others."""
    temperature, top_p, log_min_p, *_ = parameters.numbers.tolist()
    seed, top_k, _ = parameters.integers.tolist()
    ordered, tokens = scores.sort(descending=True, stable=True)
    ordered, tokens = ordered[:top_k], tokens[:top_k]
    mass = (ordered - ordered[0]).exp()
    before = mass.cumsum(0) - mass
    enough = top_p * mass.sum() if top_p < 1 else torch.tensor(math.inf)
    kept = (before < enough) & (ordered >= ordered[0] + log_min_p)
    ordered, tokens = ordered[kept], tokens[kept]
    result = torch.full_like(scores, -math.inf)
    result[tokens] = ordered / temperature + gumbel_noise(seed, position, tokens)
    return result


def _philox(counter: list[Tensor], key0: int, key1: int) -> list[Tensor]:
    """Philox4x32-10 over 32-bit words held in i64 tensors."""
    c0, c1, c2, c3 = counter
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high1, low1 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def _product(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, without overflowing i64."""
    low = word * (factor & 0xFFFF)
    high = word * (factor >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
