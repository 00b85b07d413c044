"""The decode loop: draft, verify, commit. The heart of the project; read this first.

Terms (more in CONTRIBUTING.md): the *anchor* is the newest committed token. With `s` committed
tokens before it, its position is `s`, and the cache holds the rows `0 .. s-1`: the anchor itself is
not in the cache yet. Every cycle starts from an anchor and commits at least one token, the last of
which is the next anchor.

Every strategy is the same cycle (`run_cycle`) with other choices of a `Policy`: plain decoding
verifies an empty draft; two-pass drafts in a pass of its own; fused lets blocks that draft the next
cycle ride in the verify pass, on guesses at its outcome. What is verified may be a tree of
alternatives instead of a chain.

The text never depends on those choices, because every cycle commits the same thing: the token
that the sampler picks from the AR logits of that position. Two facts make that byte-exact: AR
logits are row-invariant (`segments.py`), and sampling noise is keyed by position (`sampling.py`).
Drafts only decide how many of those tokens one pass can settle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence

from orthrus_gguf.drafting.draft import Draft, Source, Tree, draft_segment, read_draft, remainder
from orthrus_gguf.drafting.lookup import LookupIndex
from orthrus_gguf.drafting.policy import Cycle, FixedPolicy, Pass, Plan, Policy, Strategy, plan_for
from orthrus_gguf.runtime.protocol import Cache, Logits, Model, Segment, TreeCache, View, ar_segment
from orthrus_gguf.sampling import Sampler

__all__ = [
    "PROMPT_BATCH",
    "Clock",
    "Cycle",
    "Plan",
    "Policy",
    "Strategy",
    "decode",
    "plan_for",
    "prefill",
    "run_cycle",
    "verify",
]

#: Rows of one prompt pass, unless the caller says otherwise (llama.cpp's `-b` is 2048, `-ub` 512).
PROMPT_BATCH = 512

Clock = Callable[[], float]


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
    plan: Plan | Policy,
    max_tokens: int,
    *,
    clock: Clock = time.perf_counter,
) -> Generator[Cycle, None, None]:
    """Yield cycles until `max_tokens` tokens have been committed; stop earlier by closing.

    tokens: the committed tokens, whose last one is the anchor; the cache holds all before it. Each
        cycle's tokens are appended before it is yielded.
    plan: a fixed plan, or a policy that decides cycle by cycle.
    """
    policy = FixedPolicy(plan) if isinstance(plan, Plan) else plan
    index = LookupIndex() if policy.lookup else None
    limit = len(tokens) + max_tokens
    offers: list[Draft] = []
    while (room := limit - len(tokens)) > 0:
        # A cycle commits one token more than it accepts, so the last one needs no draft.
        found = index.draft(tokens, room - 1) if index is not None else None
        if found is not None:
            offers.append(found)
        cycle, offers = run_cycle(model, cache, sampler, tokens, policy, offers, room - 1, clock)
        policy.observe(cycle)
        yield cycle


def run_cycle(
    model: Model,
    cache: Cache,
    sampler: Sampler,
    tokens: list[int],
    policy: Policy,
    offers: Sequence[Draft],
    room: int,
    clock: Clock,
) -> tuple[Cycle, list[Draft]]:
    """Draft, verify, commit: the tokens are appended, and drafts for the next cycle returned.

    offers: drafts that are at hand. room: the most draft tokens of use.
    """
    began, start, anchor = clock(), len(tokens) - 1, tokens[-1]
    passes: list[Pass] = []

    def forward(segments: list[Segment]) -> list[Logits]:
        before = clock()
        logits = model.forward(segments, cache)
        rows = [sum(len(s) for s in segments if s.view is view) for view in View]
        passes.append(Pass(rows[0], rows[1], start, clock() - before))
        return logits

    choice = policy.choose(offers, room, start)
    if isinstance(choice, Draft):
        draft = choice
    else:
        (logits,) = forward([draft_segment(model.config, anchor, start, choice)])
        draft = read_draft(sampler, tokens, logits, Source.BLOCK)

    shape, guesses = policy.shape(draft, anchor, room, start)
    tree = fitted(shape, cache) if isinstance(shape, Tree) else Tree(draft.tokens[:shape])
    verify_pass = [tree.segment(anchor, start)]
    for guess in guesses:
        at = start + guess.offset
        verify_pass.append(draft_segment(model.config, guess.anchor, at, guess.rows))
    logits, *blocks = forward(verify_pass)

    committed = verify(sampler, tokens, tree, logits)
    accepted = len(committed) - 1
    path = tree.path(committed[:accepted])
    keep(cache, start, tree, path)
    tokens.extend(committed)

    carried = [
        guess.resolve(sampler, tokens, accepted, block)
        for guess, block in zip(guesses, blocks, strict=True)
    ]
    left = remainder(draft, accepted, committed)
    drafts = tree.likeliest(path)
    cycle = Cycle(
        start,
        drafts,
        accepted,
        tuple(committed),
        draft,
        tuple(passes),
        tuple(guesses),
        clock() - began,
    )
    return cycle, [offer for offer in (*carried, left) if offer is not None and len(offer)]


def verify(sampler: Sampler, tokens: Sequence[int], drafts: Tree, logits: Logits) -> list[int]:
    """The tokens to commit: what AR decoding would have produced, as far as `logits` reach.

    Row 0 of `logits` follows the anchor, the others one draft each. From row 0 on, the token that
    AR sampling draws leads to the row of the draft that says so; where there is none, it ends.
    """
    prefix = list(tokens)
    row: int | None = 0
    while row is not None:
        prefix.append(sampler.sample(logits[row], prefix))
        row = drafts.child(row, prefix[-1])
    return prefix[len(tokens) :]


def fitted(tree: Tree, cache: Cache) -> Tree:
    """As much of a tree as the cache has room for."""
    if tree.parents is None:
        return tree
    if not isinstance(cache, TreeCache):
        raise ValueError("this runtime verifies chains only")
    return tree.first(cache.fit_tree((-1, *tree.parents)) - 1)


def keep(cache: Cache, start: int, tree: Tree, path: Sequence[int]) -> None:
    """Have the cache hold the rows of `path`, the anchor and the accepted drafts, from `start`."""
    if tree.parents is None:
        cache.truncate(start + len(path))
    else:
        assert isinstance(cache, TreeCache)
        cache.keep_path(path)
