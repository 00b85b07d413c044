"""The kernels of `sample.py`, which says how they work together."""

import triton
import triton.language as tl


@triton.jit
def _key(score, token):
    """Order-preserving i64 of a score and, below it, the token: higher scores, then lower ids."""
    score = tl.where(score != score, float("inf"), tl.where(score == 0.0, 0.0, score))
    bits = score.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - token.to(tl.int64))


@triton.jit
def _score_of(key):
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _token_of(key):
    return (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def penalize(
    logits,
    positions,
    history,
    numbers,
    integers,
    n_vocab,
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each distinct token of the window is handled once, where it occurs first."""
    row = tl.program_id(0)
    stop = tl.load(positions + row) + 1
    window = tl.minimum(tl.load(integers + 2), stop.to(tl.int64)).to(tl.int32)
    repeat = tl.load(numbers + 3).to(tl.float32)
    frequency = tl.load(numbers + 4)
    presence = tl.load(numbers + 5)
    i = tl.arange(0, TILE)
    begin = stop - window
    for at in range(begin + tl.program_id(1) * TILE, stop, PROGRAMS * TILE):
        mine = at + i
        token = tl.load(history + mine, mask=mine < stop, other=-1)
        count = tl.zeros((TILE,), tl.int32)
        earlier = tl.zeros((TILE,), tl.int32)
        for from_ in range(begin, stop, TILE):
            other = from_ + i
            its_token = tl.load(history + other, mask=other < stop, other=-2)
            same = token[:, None] == its_token[None, :]
            count += tl.sum(same.to(tl.int32), 1)
            earlier += tl.sum((same & (other[None, :] < mine[:, None])).to(tl.int32), 1)
        once = (earlier == 0) & (token >= 0) & (token < n_vocab)
        at_score = logits + row.to(tl.int64) * n_vocab + token
        score = tl.load(at_score, mask=once, other=0.0)
        repeats = tl.broadcast_to(repeat, (TILE,))
        score = tl.where(score <= 0.0, score * repeat, tl.div_rn(score, repeats))
        drop = count.to(tl.float64) * frequency + presence
        tl.store(at_score, (score.to(tl.float64) - drop).to(tl.float32), mask=once)


@triton.jit
def best_of_tile(logits, best, tokens, n_vocab, stride, TILE: tl.constexpr):
    """The largest score of a tile and its lowest token; NaN counts as infinite."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    at = logits + row.to(tl.int64) * n_vocab + token
    score = tl.load(at, mask=token < n_vocab, other=float("-inf"))
    score = tl.where(score != score, float("inf"), score)
    top = tl.max(score, 0)
    first = tl.min(tl.where((score == top) & (token < n_vocab), token, 0x7FFFFFFF), 0)
    tl.store(best + row * stride + tile, top.to(tl.float64))
    tl.store(tokens + row * stride + tile, first)


@triton.jit
def pack_keys(logits, keys, n_vocab, TILE: tl.constexpr):
    """The keys of a tile of logits."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    score = tl.load(logits + row * n_vocab + token, mask=token < n_vocab, other=0.0)
    tl.store(keys + row * n_vocab + token, _key(score, token), mask=token < n_vocab)


@triton.jit
def extract(
    source,
    out,
    integers,
    n,
    stride,
    out_stride,
    TILE: tl.constexpr,
    KEEP: tl.constexpr,
    FROM_KEYS: tl.constexpr,
):
    """The top-k largest keys of a tile, in order; the rest of KEEP is filled with -2^63."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    i = tile * TILE + tl.arange(0, TILE)
    lowest = tl.full((TILE,), -9223372036854775808, tl.int64)
    at = source + row * stride + i
    if FROM_KEYS:
        keys = tl.load(at, mask=i < n, other=-9223372036854775808)
    else:
        keys = tl.where(i < n, _key(tl.load(at, mask=i < n, other=0.0), i), lowest)
    slot = tl.arange(0, KEEP)
    found = tl.full((KEEP,), -9223372036854775808, tl.int64)
    count = tl.minimum(tl.load(integers + 1), KEEP).to(tl.int32)
    for s in range(count):
        best = tl.max(keys, 0)
        found = tl.where(slot == s, best, found)
        keys = tl.where(keys == best, lowest, keys)
    tl.store(out + row * out_stride + tile * KEEP + slot, found)


@triton.jit
def mass_of_tile(keys, numbers, integers, masses, n, stride, mass_stride, TILE: tl.constexpr):
    """Sum of exp(score - best score) over the tile's part of the top-k."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    i = tile * TILE + tl.arange(0, TILE)
    valid = i < tl.minimum(tl.load(integers + 1), n)
    key = tl.load(keys + row * stride + i, mask=valid, other=0)
    top = _score_of(tl.load(keys + row * stride))
    mass = tl.where(valid, tl.exp(_score_of(key) - top), 0.0)
    tl.store(masses + row * mass_stride + tile, tl.sum(mass, 0))


@triton.jit
def choose_in_tile(
    keys,
    numbers,
    integers,
    masses,
    positions,
    best,
    tokens,
    n,
    stride,
    mass_stride,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """The best noisy score among the tile's tokens that survive the filters."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    i = tile * TILE + tl.arange(0, TILE)
    valid = i < tl.minimum(tl.load(integers + 1), n)
    key = tl.load(keys + row * stride + i, mask=valid, other=0)
    score = _score_of(key)
    token = _token_of(key)
    top = _score_of(tl.load(keys + row * stride))

    # Top-p keeps the shortest prefix with enough mass: a token stays if those before lack some.
    t = tl.arange(0, TILES)
    per_tile = tl.load(masses + row * mass_stride + t, mask=t < tl.num_programs(1), other=0.0)
    before = tl.sum(tl.where(t < tile, per_tile, 0.0), 0)
    mass = tl.where(valid, tl.exp(score - top), 0.0)
    before += tl.cumsum(mass, 0) - mass
    top_p = tl.load(numbers + 1)
    enough = tl.where(top_p < 1.0, top_p * tl.sum(per_tile, 0), float("inf"))
    kept = valid & (before < enough) & (score >= top + tl.load(numbers + 2))

    position = tl.load(positions + row) + 1
    zero = token * 0
    w0, w1, w2, w3 = tl.philox(tl.load(integers), token >> 2, zero + position, zero, zero)
    low = tl.where((token & 1) == 0, w0, w1)
    high = tl.where((token & 1) == 0, w2, w3)
    word = tl.where((token & 2) == 0, low, high)
    uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    noisy = score / tl.load(numbers) - tl.log(-tl.log(uniform))
    noisy = tl.where(kept, noisy, float("-inf"))
    winner = tl.max(noisy, 0)
    first = tl.min(tl.where(kept & (noisy == winner), token, 0x7FFFFFFF), 0)
    tl.store(best + row * mass_stride + tile, winner)
    tl.store(tokens + row * mass_stride + tile, first)


@triton.jit
def pick(
    best,
    tokens,
    out,
    tiles,
    best_row,
    best_tile,
    token_row,
    token_tile,
    WIDTH: tl.constexpr,
):
    """The winner over the tiles of one row."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, WIDTH)
    value = tl.load(best + row * best_row + t * best_tile, mask=t < tiles, other=float("-inf"))
    token = tl.load(tokens + row * token_row + t * token_tile, mask=t < tiles, other=0x7FFFFFFF)
    value = tl.where(value != value, float("inf"), value)
    top = tl.max(value, 0)
    winner = tl.min(tl.where(value == top, token, 0x7FFFFFFF), 0)
    finite = (top < float("inf")) & (top > float("-inf"))
    tl.store(out + row, tl.where(finite, winner, -1))
