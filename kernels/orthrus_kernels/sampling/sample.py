"""Logits → tokens on the device: seeded sampling with the noise and filter order of the CPU's.

The token at position p is `argmax(score / temperature + noise(seed, p, token))` over tokens that
survive penalties, top-k, top-p and min-p (llama.cpp's order). The noise is standard Gumbel noise
made from word `token % 4` of Philox4x32-10 with counter (token // 4, p, 0, 0) and the seed as key,
in double precision, as are the sums for top-p.

Candidates are sorted as 64-bit keys: the score in an order-preserving form, then the token, lower
ids first; equal scores thus have one order, and so does everything after. Up to MAX_TOP_K of them
are extracted by two small kernels; a larger (or no) top-k sorts the vocabulary with torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from orthrus_kernels.sampling import kernels as kernels

MAX_TOP_K = 128
"""Largest top-k that does not sort the whole vocabulary."""

EXTRACT_TILE = 4096
SORTED_TILE = 1024
ROW_PROGRAMS = 16
"""Programs that share the penalty window of one row; its cost grows with the window squared."""


@dataclass(frozen=True)
class SamplingParameters:
    """Settings of one request. The tensors may be rewritten between replays of a graph; the rest
    decides which kernels run.

    numbers: f64 [6], temperature, top-p, ln(min-p), repeat, frequency and presence penalty.
    integers: i64 [3], seed (two's complement), top-k, penalty window (both resolved to a count).
    banned: i64, tokens that are never chosen.
    """

    numbers: Tensor
    integers: Tensor
    banned: Tensor
    greedy: bool
    penalizes: bool
    top_k: int


def sampling_parameters(
    n_vocab: int,
    device: torch.device | str,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repeat_penalty: float = 1.0,
    repeat_last_n: int = 0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    banned: tuple[int, ...] = (),
) -> SamplingParameters:
    """Parameters with the meaning of llama.cpp's flags: temperature <= 0 is greedy; top_k <= 0,
    top_p >= 1 and min_p <= 0 are off; repeat_last_n -1 is the whole context."""
    kept = top_k if 0 < top_k < n_vocab else n_vocab
    window = 2**31 - 1 if repeat_last_n < 0 else repeat_last_n
    log_min_p = math.log(min_p) if min_p > 0 else -math.inf
    numbers = [temperature, top_p, log_min_p, repeat_penalty, frequency_penalty, presence_penalty]
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    return SamplingParameters(
        torch.tensor(numbers, dtype=torch.float64, device=device),
        torch.tensor([signed_seed, kept, window], dtype=torch.int64, device=device),
        torch.tensor(banned, dtype=torch.int64, device=device),
        greedy=temperature <= 0,
        penalizes=window > 0
        and (repeat_penalty != 1 or presence_penalty != 0 or frequency_penalty != 0),
        top_k=kept,
    )


@dataclass(frozen=True)
class SampleScratch:
    """Buffers between the kernels, for up to `rows` rows of one vocabulary size.

    extracted: i64 [rows, tiles * MAX_TOP_K]; top: i64 [rows, MAX_TOP_K];
    masses, best: f64 [rows, tiles]; tokens: i32 [rows, tiles].
    """

    extracted: Tensor
    top: Tensor
    masses: Tensor
    best: Tensor
    tokens: Tensor


def new_sample_scratch(rows: int, n_vocab: int, device: torch.device | str) -> SampleScratch:
    """Uninitialised scratch."""
    extract = triton.cdiv(n_vocab, EXTRACT_TILE)
    tiles = triton.cdiv(n_vocab, SORTED_TILE)
    return SampleScratch(
        torch.empty(rows, extract * MAX_TOP_K, dtype=torch.int64, device=device),
        torch.empty(rows, MAX_TOP_K, dtype=torch.int64, device=device),
        torch.empty(rows, tiles, dtype=torch.float64, device=device),
        torch.empty(rows, tiles, dtype=torch.float64, device=device),
        torch.empty(rows, tiles, dtype=torch.int32, device=device),
    )


def sample(
    logits: Tensor,
    positions: Tensor,
    history: Tensor,
    parameters: SamplingParameters,
    scratch: SampleScratch,
    out: Tensor,
) -> None:
    """out[i] = the token after row i, or -1 where the logits have no finite maximum.

    logits: f32 [rows, vocab], contiguous; changed in place by penalties and bans.
    positions: i32 [rows] of the rows; the token drawn belongs one further.
    history: i32, tokens by position, valid up to and including each row's own (for penalties). The
        rows of a draft see the drafts before them only if they are sampled one by one, with
        `accept.write_drafts` in between; otherwise they draw from a coarser distribution, which
        costs acceptance and nothing else.
    out: i32 [rows].
    """
    rows, n_vocab = logits.shape
    if parameters.penalizes:
        kernels.penalize[(rows, ROW_PROGRAMS)](
            logits,
            positions,
            history,
            parameters.numbers,
            parameters.integers,
            n_vocab,
            PROGRAMS=ROW_PROGRAMS,
            TILE=64,
            num_warps=4,
            enable_fp_fusion=False,
        )
    if parameters.banned.numel():
        logits.index_fill_(1, parameters.banned, -math.inf)
    if parameters.greedy:
        tiles = triton.cdiv(n_vocab, EXTRACT_TILE)
        kernels.best_of_tile[(rows, tiles)](
            logits, scratch.best, scratch.tokens, n_vocab, scratch.best.stride(0), TILE=EXTRACT_TILE
        )
        pick(scratch.best[:, :tiles], scratch.tokens[:, :tiles], out)
        return
    keys = _sorted_keys(logits, parameters, scratch)
    tiles = triton.cdiv(keys.shape[1], SORTED_TILE)
    tile = min(SORTED_TILE, triton.next_power_of_2(keys.shape[1]))
    shared = (keys, parameters.numbers, parameters.integers, scratch.masses)
    sizes = (keys.shape[1], keys.stride(0), scratch.masses.stride(0))
    kernels.mass_of_tile[(rows, tiles)](*shared, *sizes, TILE=tile, enable_fp_fusion=False)
    kernels.choose_in_tile[(rows, tiles)](
        *shared,
        positions,
        scratch.best,
        scratch.tokens,
        *sizes,
        TILE=tile,
        TILES=triton.next_power_of_2(tiles),
        enable_fp_fusion=False,
    )
    pick(scratch.best[:, :tiles], scratch.tokens[:, :tiles], out)


def pick(best: Tensor, tokens: Tensor, out: Tensor) -> None:
    """The token of the largest value per row, the lowest id on a draw, -1 if that is not finite.

    best: f32 or f64 [rows, tiles], largest value per tile; tokens: i32, where it was. Any strides,
    so that the tiles of a head with a fused argmax serve, too. out: i32 [rows].
    """
    rows, tiles = best.shape
    width = triton.next_power_of_2(tiles)
    kernels.pick[(rows,)](best, tokens, out, tiles, *best.stride(), *tokens.stride(), WIDTH=width)


def _sorted_keys(logits: Tensor, parameters: SamplingParameters, scratch: SampleScratch) -> Tensor:
    """Keys [rows, n] in descending order, n at least top-k."""
    rows, n_vocab = logits.shape
    if parameters.top_k > MAX_TOP_K:
        keys = torch.empty(rows, n_vocab, dtype=torch.int64, device=logits.device)
        kernels.pack_keys[(rows, triton.cdiv(n_vocab, 1024))](logits, keys, n_vocab, TILE=1024)
        return keys.sort(dim=1, descending=True).values
    tiles = triton.cdiv(n_vocab, EXTRACT_TILE)
    extracted = scratch.extracted if tiles > 1 else scratch.top
    kernels.extract[(rows, tiles)](
        logits,
        extracted,
        parameters.integers,
        n_vocab,
        logits.stride(0),
        extracted.stride(0),
        TILE=min(EXTRACT_TILE, triton.next_power_of_2(n_vocab)),
        KEEP=MAX_TOP_K,
        FROM_KEYS=False,
        num_warps=8,
    )
    if tiles > 1:
        found = tiles * MAX_TOP_K
        kernels.extract[(rows, 1)](
            extracted,
            scratch.top,
            parameters.integers,
            found,
            extracted.stride(0),
            scratch.top.stride(0),
            TILE=triton.next_power_of_2(found),
            KEEP=MAX_TOP_K,
            FROM_KEYS=True,
            num_warps=8,
        )
    return scratch.top[:rows]
