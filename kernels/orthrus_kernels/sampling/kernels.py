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
    windows,
    window_first,
    window_stop,
    numbers,
    n_vocab,
    PROGRAMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Each distinct token of the row's window is handled once, where it occurs first."""
    row = tl.program_id(0)
    begin = tl.load(window_first + row)
    stop = tl.load(window_stop + row)
    repeat = tl.load(numbers + row * 6 + 3).to(tl.float32)
    frequency = tl.load(numbers + row * 6 + 4)
    presence = tl.load(numbers + row * 6 + 5)
    i = tl.arange(0, TILE)
    for at in range(begin + tl.program_id(1) * TILE, stop, PROGRAMS * TILE):
        mine = at + i
        token = tl.load(windows + mine, mask=mine < stop, other=-1)
        count = tl.zeros((TILE,), tl.int32)
        earlier = tl.zeros((TILE,), tl.int32)
        for from_ in range(begin, stop, TILE):
            other = from_ + i
            its_token = tl.load(windows + other, mask=other < stop, other=-2)
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
def ban(logits, bans, n_bans, n_vocab, TILE: tl.constexpr):
    """-inf for the tokens of some pairs (row, token); row -1: none."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.load(bans + 2 * i, mask=i < n_bans, other=-1)
    token = tl.load(bans + 2 * i + 1, mask=i < n_bans, other=0)
    lowest = tl.full((TILE,), float("-inf"), tl.float32)
    tl.store(logits + row.to(tl.int64) * n_vocab + token, lowest, mask=row >= 0)


@triton.jit
def mask(logits, masks, n_vocab, words, TILE: tl.constexpr):
    """-inf for the tokens of a tile whose bit is not set."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    word = tl.load(masks + row * words + token // 32, mask=token < n_vocab, other=0)
    refused = ((word >> (token % 32)) & 1) == 0
    lowest = tl.full((TILE,), float("-inf"), tl.float32)
    tl.store(logits + row * n_vocab + token, lowest, mask=refused & (token < n_vocab))


@triton.jit
def _summary(
    score, token, valid, at, best, tokens, second, second_tokens, sums, DETAIL: tl.constexpr
):
    """What a tile leaves for `settle`: its best score, the lowest token that has it; with DETAIL
    the runner-up, and the sum of exp(score - best). Scores that do not count are -inf."""
    top = tl.max(score, 0)
    first = tl.min(tl.where(valid & (score == top), token, 0x7FFFFFFF), 0)
    tl.store(best + at, top.to(tl.float64))
    tl.store(tokens + at, first)
    if DETAIL:
        rest = tl.where(token == first, float("-inf"), score)
        runner_up = tl.max(rest, 0)
        lowest = tl.min(tl.where(valid & (rest == runner_up), token, 0x7FFFFFFF), 0)
        level = tl.where(top > float("-inf"), top, 0.0)
        mass = tl.exp(score - level)
        tl.store(second + at, runner_up.to(tl.float64))
        tl.store(second_tokens + at, lowest)
        tl.store(sums + at, tl.sum(mass, 0).to(tl.float64))


@triton.jit
def best_of_tile(
    logits,
    modes,
    best,
    tokens,
    second,
    second_tokens,
    sums,
    n_vocab,
    stride,
    TILE: tl.constexpr,
    DETAIL: tl.constexpr,
):
    """The largest score of a tile of a greedy row, see `_summary`; NaN counts as infinite."""
    row = tl.program_id(0)
    if tl.load(modes + row) != 0:
        return
    tile = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    at = logits + row.to(tl.int64) * n_vocab + token
    score = tl.load(at, mask=token < n_vocab, other=float("-inf"))
    score = tl.where(score != score, float("inf"), score)
    _summary(
        score, token, token < n_vocab, row * stride + tile, best, tokens, second, second_tokens,
        sums, DETAIL,
    )  # fmt: skip


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
    modes,
    integers,
    n,
    stride,
    out_stride,
    TILE: tl.constexpr,
    KEEP: tl.constexpr,
    FROM_KEYS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The largest keys of a tile, in order; the rest of KEEP is filled with -2^63. COUNT of all
    rows, or if that is 0, of rows in mode EXTRACTED as many as their top-k says."""
    row = tl.program_id(0).to(tl.int64)
    if COUNT == 0 and tl.load(modes + row) != 1:
        return
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
    count = COUNT
    if COUNT == 0:
        count = tl.minimum(tl.load(integers + row * 2 + 1), KEEP).to(tl.int32)
    for s in range(count):
        best = tl.max(keys, 0)
        found = tl.where(slot == s, best, found)
        keys = tl.where(keys == best, lowest, keys)
    tl.store(out + row * out_stride + tile * KEEP + slot, found)


@triton.jit
def mass_of_tile(
    keys, modes, integers, masses, n, stride, mass_stride, TILE: tl.constexpr, MODE: tl.constexpr
):
    """Sum of exp(score - best score) over the tile's part of the top-k."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(modes + row) != MODE:
        return
    tile = tl.program_id(1)
    i = tile * TILE + tl.arange(0, TILE)
    valid = i < tl.minimum(tl.load(integers + row * 2 + 1), n)
    key = tl.load(keys + row * stride + i, mask=valid, other=0)
    top = _score_of(tl.load(keys + row * stride))
    mass = tl.where(valid, tl.exp(_score_of(key) - top), 0.0)
    tl.store(masses + row * mass_stride + tile, tl.sum(mass, 0))


@triton.jit
def choose_in_tile(
    keys,
    modes,
    numbers,
    integers,
    masses,
    positions,
    best,
    tokens,
    second,
    second_tokens,
    sums,
    n,
    stride,
    mass_stride,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    MODE: tl.constexpr,
    DETAIL: tl.constexpr,
):
    """The best noisy score among the tile's tokens that survive the filters, see `_summary`."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(modes + row) != MODE:
        return
    tile = tl.program_id(1)
    i = tile * TILE + tl.arange(0, TILE)
    valid = i < tl.minimum(tl.load(integers + row * 2 + 1), n)
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
    top_p = tl.load(numbers + row * 6 + 1)
    enough = tl.where(top_p < 1.0, top_p * tl.sum(per_tile, 0), float("inf"))
    kept = valid & (before < enough) & (score >= top + tl.load(numbers + row * 6 + 2))

    position = tl.load(positions + row) + 1
    zero = token * 0
    w0, w1, w2, w3 = tl.philox(tl.load(integers + row * 2), token >> 2, zero + position, zero, zero)
    low = tl.where((token & 1) == 0, w0, w1)
    high = tl.where((token & 1) == 0, w2, w3)
    word = tl.where((token & 2) == 0, low, high)
    uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    noisy = score / tl.load(numbers + row * 6) - tl.log(-tl.log(uniform))
    noisy = tl.where(kept, noisy, float("-inf"))
    _summary(
        noisy, token, kept, row * mass_stride + tile, best, tokens, second, second_tokens, sums,
        DETAIL,
    )  # fmt: skip


@triton.jit
def settle(
    modes,
    best,
    tokens,
    second,
    second_tokens,
    sums,
    out,
    greedy_tiles,
    extracted_tiles,
    sorted_tiles,
    stride,
    out_stride,
    WIDTH: tl.constexpr,
    DETAIL: tl.constexpr,
):
    """One row of results, from the tiles of the row's mode: the token or -1; with DETAIL also the
    runner-up and both probabilities."""
    row = tl.program_id(0)
    mode = tl.load(modes + row)
    tiles = tl.where(mode == 0, greedy_tiles, tl.where(mode == 1, extracted_tiles, sorted_tiles))
    tiles = tl.where(mode < 0, 0, tiles)
    t = tl.arange(0, WIDTH)
    there = t < tiles
    at = row * stride + t
    value = tl.load(best + at, mask=there, other=float("-inf"))
    value = tl.where(value != value, float("inf"), value)
    token = tl.load(tokens + at, mask=there, other=0x7FFFFFFF)
    top = tl.max(value, 0)
    winner = tl.min(tl.where(value == top, token, 0x7FFFFFFF), 0)
    finite = (top < float("inf")) & (top > float("-inf"))
    tl.store(out + row * out_stride, tl.where(finite, winner, -1))
    if DETAIL:
        won = token == winner
        rest = tl.load(second + at, mask=there, other=float("-inf"))
        rest_token = tl.load(second_tokens + at, mask=there, other=0x7FFFFFFF)
        value_left = tl.where(won, rest, value)
        token_left = tl.where(won, rest_token, token)
        runner_up = tl.max(value_left, 0)
        lowest = tl.min(tl.where(there & (value_left == runner_up), token_left, 0x7FFFFFFF), 0)
        level = tl.where(finite, top, 0.0)
        part = tl.load(sums + at, mask=there, other=0.0)
        total = tl.sum(part * tl.exp(value - level), 0)
        total = tl.where(finite, total, 1.0)
        sure = (1.0 / total).to(tl.float32)
        less_sure = tl.where(finite, tl.exp(runner_up - level) / total, 0.0).to(tl.float32)
        tl.store(out + row * out_stride + 1, lowest)
        tl.store(out + row * out_stride + 2, sure.to(tl.int32, bitcast=True))
        tl.store(out + row * out_stride + 3, less_sure.to(tl.int32, bitcast=True))


@triton.jit
def pick(values, tokens, out, tiles, rows, out_stride, WIDTH: tl.constexpr):
    """One row of results, from what the tiles of the head left (`store_top2`): as `settle` with
    DETAIL, but in f32, for there are thousands of tiles."""
    row = tl.program_id(0)
    t = tl.arange(0, WIDTH)
    there = t < tiles
    plane = tiles * rows
    at = t * rows + row
    value = tl.load(values + at, mask=there, other=float("-inf"))
    token = tl.load(tokens + at, mask=there, other=0x7FFFFFFF)
    top = tl.max(value, 0)
    winner = tl.min(tl.where(value == top, token, 0x7FFFFFFF), 0)
    finite = (top < float("inf")) & (top > float("-inf"))
    level = tl.where(finite, top, 0.0)
    mass = tl.load(values + 2 * plane + at, mask=there, other=0.0)
    total = tl.where(finite, tl.sum(mass * tl.exp(value - level), 0), 1.0)
    won = token == winner
    rest = tl.load(values + plane + at, mask=there & won, other=float("-inf"))
    rest_token = tl.load(tokens + plane + at, mask=there & won, other=0x7FFFFFFF)
    value_left = tl.where(won, rest, value)
    token_left = tl.where(won, rest_token, token)
    runner_up = tl.max(value_left, 0)
    lowest = tl.min(tl.where(there & (value_left == runner_up), token_left, 0x7FFFFFFF), 0)
    sure = 1.0 / total
    less_sure = tl.where(finite, tl.exp(runner_up - level) / total, 0.0)
    to = out + row * out_stride
    tl.store(to, tl.where(finite, winner, -1))
    tl.store(to + 1, lowest)
    tl.store(to + 2, sure.to(tl.int32, bitcast=True))
    tl.store(to + 3, less_sure.to(tl.int32, bitcast=True))


@triton.jit
def log_sum_of_tile(logits, tops, sums, n_vocab, stride, TILE: tl.constexpr):
    """The largest score of a tile and the sum of exp(score - largest), in f64."""
    row = tl.program_id(0)
    tile = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    at = logits + row.to(tl.int64) * n_vocab + token
    score = tl.load(at, mask=token < n_vocab, other=float("-inf"))
    top = tl.max(score, 0)
    mass = tl.exp(score - tl.where(top > float("-inf"), top, 0.0))
    tl.store(tops + row * stride + tile, top.to(tl.float64))
    tl.store(sums + row * stride + tile, tl.sum(mass.to(tl.float64), 0))


@triton.jit
def report(
    logits,
    tops,
    sums,
    keys,
    out,
    tiles,
    n_vocab,
    stride,
    key_stride,
    out_stride,
    WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Log-probabilities of the row's token (in column 0 of `out`) and of the TOP likeliest ones."""
    row = tl.program_id(0)
    t = tl.arange(0, WIDTH)
    at = row * stride + t
    level = tl.load(tops + at, mask=t < tiles, other=float("-inf"))
    mass = tl.load(sums + at, mask=t < tiles, other=0.0)
    top = tl.max(level, 0)
    total = tl.sum(mass * tl.exp(level - tl.where(top > float("-inf"), top, 0.0)), 0)
    norm = top + tl.log(total)
    to = out + row * out_stride
    token = tl.maximum(tl.load(to), 0)
    chosen = tl.load(logits + row.to(tl.int64) * n_vocab + token).to(tl.float64) - norm
    tl.store(to + 4, chosen.to(tl.float32).to(tl.int32, bitcast=True))
    i = tl.arange(0, SPAN)
    key = tl.load(keys + row.to(tl.int64) * key_stride + i, mask=i < TOP, other=0)
    likely = (_score_of(key) - norm).to(tl.float32)
    tl.store(to + 5 + i, _token_of(key), mask=i < TOP)
    tl.store(to + 5 + TOP + i, likely.to(tl.int32, bitcast=True), mask=i < TOP)
