"""Sampling in plain torch, with the signatures of the kernels. Slow, row by row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from orthrus_kernels.sampling.sample import (
    GREEDY,
    RESULT,
    UNUSED,
    DrawKind,
    Draws,
    SampleScratch,
)


def draw(logits: Tensor, draws: Draws, kind: DrawKind, scratch: SampleScratch, out: Tensor) -> None:
    """See `orthrus_kernels.sampling.sample.draw`; `scratch` is not used."""
    given = logits.clone()
    if kind.bans:
        bans = draws.bans[draws.bans[:, 0] >= 0].long()
    for row, mode in enumerate(draws.modes.tolist()):
        if mode == UNUSED:
            out[row, 0] = -1
            continue
        if kind.penalizes:
            _penalize(logits[row], draws, row)
        if kind.bans:
            logits[row, bans[bans[:, 0] == row, 1]] = -math.inf
        if kind.masked:
            bit = torch.arange(logits.shape[1])
            allowed = (draws.masks[row].long()[bit // 32] >> (bit % 32)) & 1
            logits[row, allowed == 0] = -math.inf
        scores = logits[row].double().nan_to_num(math.inf, math.inf, -math.inf)
        kept = torch.ones_like(scores, dtype=torch.bool)
        if mode != GREEDY:
            scores, kept = _noisy(scores, int(draws.positions[row]) + 1, draws, row)
        best = int(scores.argmax())  # the lowest id wins a draw
        finite = bool(scores[best].isfinite())
        out[row, 0] = best if finite else -1
        if kind.detail and finite:
            _detail(scores, kept, best, out[row])
        if kind.top:
            _report(given[row], max(int(out[row, 0]), 0), kind.top, out[row])


def pick(values: Tensor, tokens: Tensor, out: Tensor) -> None:
    """See `orthrus_kernels.sampling.sample.pick`."""
    numbers = values[:2].flatten(0, 1).double()
    by_token = tokens.flatten(0, 1).sort(dim=0).indices
    ordered = numbers.gather(0, by_token).sort(dim=0, descending=True, stable=True).indices
    two = by_token.gather(0, ordered)[:2]
    best, second = numbers.gather(0, two)
    sums = (values[2].double() * (values[0].double() - best).exp()).sum(0)
    first, runner_up = tokens.flatten(0, 1).gather(0, two)
    out[:, 0] = torch.where(best.isfinite(), first, -1)
    out[:, 1] = runner_up
    out[:, 2] = _bits(1 / sums)
    out[:, 3] = _bits((second - best).exp() / sums)


def gumbel_noise(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise (f64) of i64 `tokens` at one position; see `sample.py`."""
    counter = [tokens >> 2, torch.full_like(tokens, position), tokens * 0, tokens * 0]
    words = torch.stack(_philox(counter, seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    chosen = words.gather(0, (tokens & 3)[None])[0]
    return -torch.log(-torch.log((chosen.double() + 0.5) * 2.0**-32))


def _bits(values: Tensor) -> Tensor:
    """f32 numbers as i32."""
    return values.float().view(torch.int32)


def _detail(scores: Tensor, kept: Tensor, best: int, out: Tensor) -> None:
    """Runner-up and probabilities. kept: tokens that count."""
    weights = (scores - scores[best]).exp()
    rest = scores.clone()
    rest[best] = -math.inf
    second = int(torch.where(kept & (rest == rest.max()), 1, 0).argmax())
    both = torch.stack([weights[best], (rest[second] - scores[best]).exp()]) / weights.sum()
    out[1] = second
    out[2:4] = _bits(both)


def _report(logits: Tensor, token: int, top: int, out: Tensor) -> None:
    """Log-probabilities of a row's token and of the likeliest ones."""
    logs = logits.double().log_softmax(0)
    likeliest = logits.nan_to_num(math.inf, math.inf, -math.inf).sort(descending=True, stable=True)
    tokens = likeliest.indices[:top]
    out[RESULT - 1] = _bits(logs[token : token + 1])[0]
    out[RESULT : RESULT + top] = tokens.int()
    out[RESULT + top :] = _bits(logs[tokens])


def _penalize(scores: Tensor, draws: Draws, row: int) -> None:
    _, _, _, repeat, frequency, presence = draws.numbers[row].tolist()
    window = draws.windows[int(draws.window_first[row]) : int(draws.window_stop[row])].long()
    tokens, counts = torch.unique(window[window < len(scores)], return_counts=True)
    seen = scores[tokens]
    seen = torch.where(seen <= 0, seen * repeat, seen / repeat)
    scores[tokens] = (seen.double() - (counts.double() * frequency + presence)).float()


def _noisy(scores: Tensor, position: int, draws: Draws, row: int) -> tuple[Tensor, Tensor]:
    """Tempered scores plus noise of the tokens that survive the filters, -inf for the others; and
    which survive."""
    temperature, top_p, log_min_p, *_ = draws.numbers[row].tolist()
    seed, top_k = draws.integers[row].tolist()
    ordered, tokens = scores.sort(descending=True, stable=True)
    ordered, tokens = ordered[:top_k], tokens[:top_k]
    mass = (ordered - ordered[0]).exp()
    before = mass.cumsum(0) - mass
    enough = top_p * mass.sum() if top_p < 1 else torch.tensor(math.inf)
    kept = (before < enough) & (ordered >= ordered[0] + log_min_p)
    ordered, tokens = ordered[kept], tokens[kept]
    result = torch.full_like(scores, -math.inf)
    result[tokens] = ordered / temperature + gumbel_noise(seed, position, tokens)
    return result, torch.zeros_like(result, dtype=torch.bool).index_fill_(0, tokens, True)


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
