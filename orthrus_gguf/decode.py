"""The decode loop: draft, verify, commit. The heart of the project; read this first.

Terms (more in CONTRIBUTING.md): the *anchor* is the newest committed token. With `s` committed
tokens before it, its position is `s`, and the cache holds the rows `0 .. s-1`: the anchor itself is
not in the cache yet. Every cycle starts from an anchor and commits at least one token, the last of
which is the next anchor.

Every strategy is the same cycle (`run_cycle`) with other choices of a `Policy`: plain decoding
verifies an empty draft; two-pass drafts in a pass of its own; fused lets blocks that draft the next
cycle ride in the verify pass, on guesses at its outcome. What is verified is a tree of
alternatives, mostly a chain.

A cycle does not run its passes: it yields the segments that it wants to know about, and is sent
what came of them. Whoever drives it may put the segments of several sequences into one pass
(`run_together`); one alone is driven by `drive`.

The text never depends on any of this, because every cycle commits the same thing: the token that
the sampler draws from the AR logits of that position. Two facts make that byte-exact: AR logits are
row-invariant (`runtime/protocol.py`), and sampling noise is keyed by position (`sampling.py`).
Drafts only decide how many of those tokens one pass can settle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TypeVar

from orthrus_gguf.drafting.cycle import Cycle, Pass
from orthrus_gguf.drafting.draft import Draft
from orthrus_gguf.drafting.drafter import Drafter, DraftPass, Results
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.protocol import Choices, Model, Segment, View
from orthrus_gguf.sampling import Choice

#: Rows of one prompt pass, unless the caller says otherwise (llama.cpp's `-b` is 2048, `-ub` 512).
PROMPT_BATCH = 512

Clock = Callable[[], float]

T = TypeVar("T")


@dataclass(frozen=True)
class Done:
    """A pass that has run, as one sequence sees it: its choices, one per segment, and its cost."""

    choices: Sequence[Choices]
    cost: Pass


#: Work on one sequence: yields segments for a pass, receives what came of them, returns a T.
Steps = Generator[list[Segment], Done, T]


def prefill(
    sequence: TokenSequence,
    drafters: Sequence[Drafter] = (),
    *,
    batch: int | Callable[[], int] = PROMPT_BATCH,
    places: Sequence[int] = (),
    on_progress: Callable[[int], None] | None = None,
) -> Steps[Choice]:
    """Commit the tokens that the cache lacks; append the token drawn after them.

    The cache must hold a proper prefix of the sequence's tokens. `batch`: rows of a pass, asked for
    before each of them if it is a function. `places`: ascending, where passes end besides, so that
    caches can go back there. `on_progress` receives the number of prompt tokens held after each
    pass.
    """
    prompt, cache, taps = len(sequence.tokens), sequence.cache, _taps(drafters)
    if cache.length >= prompt:
        raise ValueError("the cache already holds the whole prompt")
    choice: Choice | None = None
    while cache.length < prompt:
        rows_now = batch() if callable(batch) else batch
        stop = min(cache.length + rows_now, prompt)
        stop = next((place for place in places if cache.length < place < stop), stop)
        done = yield [sequence.prompt_segment(stop, taps)]
        rows = range(stop - cache.length)
        cache.commit(rows)
        if on_progress is not None:
            on_progress(stop)
        _tell(drafters, sequence, None, done.choices[0], rows)
        choice = done.choices[0][0] if stop == prompt else None
        if stop in places:
            sequence.checkpoint()
    if choice is None:
        raise _nothing_drawn(sequence, prompt)
    sequence.checkpoint()  # where the next turn of a conversation is likely to begin
    sequence.tokens.append(choice.token)
    return choice


def decode(
    model: Model,
    sequence: TokenSequence,
    policy: Policy,
    max_tokens: int,
    *,
    clock: Clock = time.perf_counter,
) -> Iterator[Cycle]:
    """Yield cycles until `max_tokens` tokens have been committed; stop earlier by closing.

    The cache holds all of the sequence's tokens but the last one, the anchor. Each cycle's tokens
    are appended before it is yielded.
    """
    drafters = policy.drafters(sequence)
    limit = len(sequence.tokens) + max_tokens
    while (most := limit - len(sequence.tokens)) > 0:
        cycle, _ = drive(model, run_cycle(sequence, policy, drafters, most, clock), clock)
        yield cycle


def run_cycle(
    sequence: TokenSequence,
    policy: Policy,
    drafters: Sequence[Drafter],
    most: int,
    clock: Clock = time.perf_counter,
) -> Steps[tuple[Cycle, tuple[Choice, ...]]]:
    """Draft, verify, commit: the tokens are appended; the cycle and the choices made are returned.

    most: tokens that may be committed, at least 1.
    """
    began, start, anchor = clock(), sequence.start, sequence.tokens[-1]
    room = most - 1  # a cycle commits one token more than it accepts
    costs = []
    drafts, passes = offered(drafters, sequence.tokens, room)
    draft = policy.choose(drafts, passes, room, start)
    if isinstance(draft, DraftPass):
        done = yield draft.segments(sequence, draft.width)
        costs.append(done.cost)
        draft = draft.read(done.choices)

    tree, guesses = policy.shape(draft, anchor, room, start)
    tree = fitted(tree, sequence)
    blocks = [guess.segment(sequence, tree) for guess in guesses]
    done = yield [sequence.verify_segment(tree, _taps(drafters)), *blocks]
    costs.append(done.cost)

    verified, *carried = done.choices
    chosen, path = follow(sequence, tree, verified)
    committed = tuple([choice.token for choice in chosen])
    kept = path[: sequence.ended(committed)]  # a cache may be unable to drop rows later
    sequence.cache.commit(kept)
    sequence.tokens.extend(committed)
    accepted, seen = len(path) - 1, tree.likeliest(path)
    cycle = Cycle(
        start, seen, accepted, committed, draft, tuple(costs), tuple(guesses), clock() - began
    )
    policy.observe(cycle)
    _tell(drafters, sequence, cycle, verified, kept, tuple(carried))
    return cycle, chosen


def offered(
    drafters: Sequence[Drafter], tokens: Sequence[int], room: int
) -> tuple[list[Draft], list[DraftPass]]:
    """What the drafters propose: drafts at hand, and passes that would bring one."""
    drafts: list[Draft] = []
    passes: list[DraftPass] = []
    for drafter in drafters if room else ():
        for offer in drafter.propose(tokens, room):
            if isinstance(offer, DraftPass):
                passes.append(offer)
            elif len(offer):
                drafts.append(offer)
    return drafts, passes


def fitted(tree: Tree, sequence: TokenSequence) -> Tree:
    """As much of a tree as the cache has room for."""
    count = len(tree.tokens)
    parents = range(count) if tree.parents is None else tree.parents
    return tree.first(sequence.cache.fit((-1, *parents)) - 1) if count else tree


def follow(
    sequence: TokenSequence, tree: Tree, choices: Choices
) -> tuple[tuple[Choice, ...], list[int]]:
    """What to commit: what AR decoding would have drawn, as far as the choices reach; and the rows
    that stay.

    Row 0 follows the anchor, the others one draft each. From row 0 on, the token drawn leads to the
    row of the draft that says so; where there is none, it ends.
    """
    found: list[Choice] = []
    path: list[int] = []
    row: int | None = 0
    while row is not None:
        choice = choices[row]
        if choice is None:
            raise _nothing_drawn(sequence, len(sequence.tokens) + len(found))
        found.append(choice)
        path.append(row)
        row = tree.child(row, choice.token)
    return tuple(found), path


def drive(model: Model, steps: Steps[T], clock: Clock = time.perf_counter) -> T:
    """Run the passes of one sequence."""
    try:
        segments = next(steps)
        while True:
            (done,) = run_together(model, [segments], clock)
            segments = steps.send(done)
    except StopIteration as end:
        found: T = end.value
        return found


def run_together(
    model: Model, wanted: Sequence[list[Segment]], clock: Clock = time.perf_counter
) -> list[Done]:
    """Run the segments of several sequences in one pass, and give each what is its own."""
    before = clock()
    choices = model.forward([segment for segments in wanted for segment in segments])
    seconds = clock() - before
    rows = [_rows(segments) for segments in wanted]
    total = sum([sum(counts) for counts in rows])
    found, first = [], 0
    for segments, (ar, diffusion, drafter) in zip(wanted, rows, strict=True):
        company = total - ar - diffusion - drafter
        cost = Pass(ar, diffusion, segments[0].start, seconds, company, drafter)
        found.append(Done(choices[first : first + len(segments)], cost))
        first += len(segments)
    return found


def _rows(segments: Sequence[Segment]) -> tuple[int, int, int]:
    """Rows of some segments: AR, diffusion, and of a drafter's network."""
    ar = diffusion = drafter = 0
    for segment in segments:
        if segment.view is View.AR:
            ar += len(segment.tokens)
        elif segment.view is View.DIFFUSION:
            diffusion += len(segment.tokens)
        else:
            drafter += len(segment.tokens)
    return ar, diffusion, drafter


def _taps(drafters: Sequence[Drafter]) -> tuple[int, ...]:
    """Layers whose input somebody reads."""
    found = [layer for drafter in drafters for layer in drafter.taps]
    return tuple(sorted(set(found))) if found else ()


def _tell(
    drafters: Sequence[Drafter],
    sequence: TokenSequence,
    cycle: Cycle | None,
    choices: Choices,
    rows: Sequence[int],
    blocks: tuple[Choices, ...] = (),
) -> None:
    """Let every drafter learn what was committed. rows: of the AR segment, those that stay."""
    if not drafters:
        return
    planes, start = _taps(drafters), sequence.cache.length - len(rows)
    for drafter in drafters:
        taps = None
        if drafter.taps and choices.taps is not None:
            taps = choices.taps[[planes.index(layer) for layer in drafter.taps]][:, list(rows)]
        drafter.committed(sequence.tokens, cycle, Results(start, taps, blocks))


def _nothing_drawn(sequence: TokenSequence, position: int) -> OrthrusError:
    """Why a row that must say something does not."""
    if sequence.constraint is not None:
        return OrthrusError(
            f"no token can be drawn at position {position}: the constraint (grammar) allows none"
            " there, or the model's logits are not finite; try without it"
        )
    return OrthrusError(
        f"the model's logits at position {position} are not finite: the weights are damaged or"
        " overflow; convert the model again, or try another quantization"
    )
