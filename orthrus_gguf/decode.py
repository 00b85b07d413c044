"""The decode loop: draft, verify, commit. The heart of the project; read this first.

Terms (more in CONTRIBUTING.md): the *anchor* is the newest committed token. With `s` committed
tokens before it, its position is `s`, and the cache holds the rows `0 .. s-1`: the anchor itself is
not in the cache yet. Every cycle starts from an anchor and commits at least one token, the last of
which is the next anchor.

The text never depends on the strategy, because both strategies commit the same thing: the token
that the sampler picks from the AR logits of that position. Two facts make that byte-exact: AR
logits are row-invariant (`segments.py`), and sampling noise is keyed by position (`sampling.py`).
Drafts only decide how many of those tokens one pass can settle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.sampling import Sampler
from orthrus_gguf.segments import Cache, Logits, Model, ar_segment, diffusion_segment

#: Rows of one prompt pass, unless the caller says otherwise (llama.cpp's `-b` is 2048, `-ub` 512).
PROMPT_BATCH = 512


class Strategy(Enum):
    """How a cycle finds its tokens."""

    AR = "ar"
    TWO_PASS = "two-pass"


@dataclass(frozen=True)
class Plan:
    """A strategy and its width: the number of draft tokens verified per cycle."""

    strategy: Strategy
    width: int


@dataclass(frozen=True)
class Cycle:
    """One committed step.

    start: position of the anchor it started from.
    drafts: proposed tokens for the positions from start + 1 on (none in plain AR).
    accepted: how many of them, from the first on, the AR view confirmed.
    tokens: what was committed: the accepted drafts, then the AR view's own next token.
    """

    start: int
    drafts: tuple[int, ...]
    accepted: int
    tokens: tuple[int, ...]


def plan_for(model: Model, strategy: Strategy, width: int | None) -> Plan:
    """A validated plan. The default width is the official one, block size - 1.

    Raises OrthrusError when the model has no diffusion heads or the width does not fit a block.
    """
    if strategy is Strategy.AR:
        return Plan(strategy, 0)
    block = model.config.block_size
    if not model.config.has_heads or block is None:
        raise OrthrusError(
            f"strategy {strategy.value}: {model.config.name} has no diffusion heads; use"
            " --strategy ar, or name a heads file with --heads"
        )
    if width is not None and not 1 <= width <= block:
        raise OrthrusError(f"--draft-width {width}: must lie in 1..{block}, the model's block size")
    return Plan(strategy, block - 1 if width is None else width)


def prefill(
    model: Model,
    cache: Cache,
    prompt: Sequence[int],
    *,
    batch: int = PROMPT_BATCH,
    on_progress: Callable[[int], None] | None = None,
) -> Logits:
    """Append the part of `prompt` that the cache lacks; return its last token's logits [vocab].

    The cache must hold a proper prefix of the prompt. `on_progress` receives the number of prompt
    tokens held after each pass.
    """
    logits: Logits | None = None
    while cache.length < len(prompt):
        start = cache.length
        stop = min(start + batch, len(prompt))
        last = range(stop - start - 1, stop - start) if stop == len(prompt) else range(0)
        (rows,) = model.forward([ar_segment(prompt[start:stop], start, wanted=last)], cache)
        logits = rows[0] if last else None
        if on_progress is not None:
            on_progress(stop)
    if logits is None:
        raise ValueError("the cache already holds the whole prompt")
    return logits


def decode(
    model: Model,
    cache: Cache,
    sampler: Sampler,
    tokens: list[int],
    plan: Plan,
    max_tokens: int,
) -> Iterator[Cycle]:
    """Yield cycles until `max_tokens` tokens have been committed; stop earlier by closing.

    tokens: the committed tokens, whose last one is the anchor; the cache holds all before it. Each
        cycle's tokens are appended before it is yielded.
    """
    limit = len(tokens) + max_tokens
    while (room := limit - len(tokens)) > 0:
        # A cycle commits one token more than it accepts, so the last one needs no draft.
        width = min(plan.width, room - 1)
        if width > 0:
            cycle = two_pass_cycle(model, cache, sampler, tokens, width)
        else:
            cycle = ar_cycle(model, cache, sampler, tokens)
        tokens.extend(cycle.tokens)
        yield cycle


def ar_cycle(model: Model, cache: Cache, sampler: Sampler, tokens: Sequence[int]) -> Cycle:
    """Plain decoding: one AR row, one token."""
    start = len(tokens) - 1
    (logits,) = model.forward([ar_segment(tokens[-1:], start)], cache)
    return Cycle(start, (), 0, (sampler.sample(logits[0], tokens),))


def two_pass_cycle(
    model: Model, cache: Cache, sampler: Sampler, tokens: Sequence[int], width: int
) -> Cycle:
    """Draft `width` tokens in one diffusion pass, verify them in one AR pass, commit."""
    start, anchor = len(tokens) - 1, tokens[-1]
    drafts = draft(model, cache, sampler, tokens, width)

    (logits,) = model.forward([ar_segment([anchor, *drafts], start)], cache)
    committed = verify(sampler, tokens, drafts, logits)

    cache.truncate(start + len(committed))  # the anchor and the accepted drafts stay
    return Cycle(start, tuple(drafts), len(committed) - 1, tuple(committed))


def draft(
    model: Model, cache: Cache, sampler: Sampler, tokens: Sequence[int], width: int
) -> list[int]:
    """Propose up to `width` tokens after the anchor. Row i of the block predicts start + 1 + i.

    The block gets one row more than drafts, as in the official implementation: its last mask gives
    no draft, but the others attend to it. Drafts are drawn with the noise of their positions, the
    noise that verification will use, so that they agree as often as the two views do.
    """
    config = model.config
    if config.block_size is None or config.mask_token is None:
        raise ValueError("the model has no diffusion heads")
    rows = min(width + 1, config.block_size)
    start = len(tokens) - 1
    block = diffusion_segment(tokens[-1], config.mask_token, rows, start, wanted=range(width))
    (logits,) = model.forward([block], cache)
    prefix = list(tokens)
    for row in logits:
        if not np.isfinite(row.max()):
            break  # a broken drafter may cost time, never text
        prefix.append(sampler.sample(row, prefix))
    return prefix[len(tokens) :]


def verify(
    sampler: Sampler, tokens: Sequence[int], drafts: Sequence[int], logits: Logits
) -> list[int]:
    """The tokens to commit: what AR decoding would have produced, as far as `logits` reach.

    Row i of `logits` follows the anchor and the first i drafts. It counts while those drafts are
    the very tokens that AR sampling draws; the first row that disagrees gives the correction.
    """
    prefix = list(tokens)
    for i, row in enumerate(logits):
        prefix.append(sampler.sample(row, prefix))
        if i < len(drafts) and prefix[-1] != drafts[i]:
            break
    return prefix[len(tokens) :]
