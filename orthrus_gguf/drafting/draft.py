"""Drafts: tokens that may come next, from wherever they come, and guesses to draft ahead.

Nothing here can change the text: the decode loop commits only what the AR view confirms.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.runtime.protocol import Logits, Segment, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler


class Source(Enum):
    """Where a draft comes from, and what its acceptance is counted under.

    BLOCK: a draft pass. LAST, NEXT: a block carried by the verify pass before, under guess A or B
    (`Guess`). TAIL: what an earlier draft said beyond the token that was refused. LOOKUP: the
    continuation of an earlier occurrence of the last tokens.
    """

    BLOCK = "block"
    LAST = "carried A"
    NEXT = "carried B"
    TAIL = "tail"
    LOOKUP = "lookup"


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for the positions after the anchor.

    confidence: per token, the drafter's probability of it. second: per token, the drafter's second
    choice and its probability; empty when the source has none.
    """

    source: Source
    tokens: tuple[int, ...]
    confidence: tuple[float, ...]
    second: tuple[tuple[int, float], ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)

    def after(self, count: int) -> Draft:
        """The draft without its first `count` tokens."""
        return replace(
            self,
            tokens=self.tokens[count:],
            confidence=self.confidence[count:],
            second=self.second[count:],
        )


#: The draft of plain decoding.
NO_DRAFT = Draft(Source.BLOCK, (), ())


def draft_segment(config: ModelConfig, anchor: int, start: int, rows: int) -> Segment:
    """A block of `rows` rows whose anchor stands at `start`; row i predicts start + 1 + i."""
    if config.block_size is None or config.mask_token is None:
        raise ValueError("the model has no diffusion heads")
    return diffusion_segment(anchor, config.mask_token, min(rows, config.block_size), start)


def read_draft(sampler: Sampler, prefix: Sequence[int], logits: Logits, source: Source) -> Draft:
    """The draft that `logits` [rows, vocab] propose after `prefix`.

    Tokens are drawn with the noise of their positions, the noise that verification will use, so
    that they agree as often as the two views do. A broken drafter may cost time, never text: the
    draft ends at the first row that is not finite.
    """
    tokens = list(prefix)
    choices = []
    for row in logits:
        choice = sampler.choose(row, tokens)
        if choice is None:
            break
        choices.append(choice)
        tokens.append(choice.token)
    return Draft(
        source,
        tuple(choice.token for choice in choices),
        tuple(choice.probability for choice in choices),
        tuple((choice.second, choice.second_probability) for choice in choices),
    )


def remainder(draft: Draft, accepted: int, committed: Sequence[int]) -> Draft:
    """What is left of a draft of which `accepted` tokens and one more token were committed.

    If the token after the accepted ones is the draft's own, the rest goes on as it was meant.
    Otherwise it is a stale tail: it was written for another token, but often fits all the same.
    """
    rest = draft.after(accepted + 1)
    meant = draft.tokens[: accepted + 1] == tuple(committed)
    return rest if meant else replace(rest, source=Source.TAIL)


@dataclass(frozen=True)
class Tree:
    """Draft tokens to verify in one pass. A chain is a tree without branches.

    tokens: of the rows behind the anchor's, which is row 0. parents: the row that each of these
    rows follows; None for a chain, where that is the row before.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...] | None = None

    def segment(self, anchor: int, start: int) -> Segment:
        """Its rows for a pass, from an anchor at `start` on."""
        parents = None if self.parents is None else (-1, *self.parents)
        return ar_segment((anchor, *self.tokens), start, parents=parents)

    def first(self, count: int) -> Tree:
        """The tree of its first `count` tokens."""
        parents = self.parents
        return Tree(self.tokens[:count], None if parents is None else parents[:count])

    def children(self, row: int) -> Sequence[int]:
        """The rows that follow a row, likeliest first."""
        if self.parents is None:
            return range(row + 1, min(row + 2, len(self.tokens) + 1))
        return [child for child, parent in enumerate(self.parents, 1) if parent == row]

    def child(self, row: int, token: int) -> int | None:
        """The row of `token` among those that follow a row."""
        return next((i for i in self.children(row) if self.tokens[i - 1] == token), None)

    def path(self, tokens: Sequence[int]) -> list[int]:
        """The rows that spell `tokens`, as far as there are such, behind row 0."""
        path = [0]
        for token in tokens:
            row = self.child(path[-1], token)
            if row is None:
                break
            path.append(row)
        return path

    def likeliest(self, path: Sequence[int]) -> tuple[int, ...]:
        """Tokens of a path from row 0 on, and then of its likeliest continuation."""
        rows = list(path)
        while children := self.children(rows[-1]):
            rows.append(children[0])
        return tuple(self.tokens[row - 1] for row in rows[1:])


def best_first(draft: Draft, accept: Sequence[float], nodes: int) -> Tree:
    """The tree of the `nodes` likeliest continuations that a draft's two choices per token allow.

    accept: per token, the probability that the first choice is accepted if the tokens before it
    are; the tree is no deeper. What follows a second choice is what the same draft says behind it.
    """
    tokens: list[int] = []
    parents: list[int] = []
    waiting: list[tuple[float, int, int, int, int]] = []

    def add_children(row: int, depth: int, probability: float) -> None:
        if depth == len(accept):
            return
        choices = [(draft.tokens[depth], accept[depth])]
        second = _second(draft, depth)
        if second is not None:
            choices.append((second[0], (1 - accept[depth]) * second[1]))
        for rank, (token, share) in enumerate(choices):
            if share > 0:  # of equals, the first found goes first
                heapq.heappush(waiting, (-probability * share, row, rank, depth, token))

    add_children(0, 0, 1.0)
    while waiting and len(tokens) < nodes:
        probability, parent, _, depth, token = heapq.heappop(waiting)
        tokens.append(token)
        parents.append(parent)
        add_children(len(tokens), depth + 1, -probability)
    chain = parents == list(range(len(tokens)))
    return Tree(tuple(tokens), None if chain else tuple(parents))


class Guess(Enum):
    """What a block that is drafted together with its verification is anchored at.

    LAST (A): the last accepted draft, so that its row 0 names the correction. NEXT (B): the next
    anchor itself, guessed.
    """

    LAST = "A"
    NEXT = "B"


@dataclass(frozen=True)
class Hypothesis:
    """A block drafted on the guess that exactly `accepted` drafts will be accepted.

    anchor: the token of its first row. probability: that the guess comes true, as far as the draft
    can tell. rows: size of the block.
    """

    guess: Guess
    accepted: int
    anchor: int
    probability: float
    rows: int = field(default=0)

    @property
    def offset(self) -> int:
        """Position of its first row, counted from the anchor of the draft."""
        return self.accepted + (self.guess is Guess.NEXT)

    def resolve(
        self, sampler: Sampler, tokens: Sequence[int], accepted: int, logits: Logits
    ) -> Draft | None:
        """The draft that its block holds for the anchor `tokens[-1]`; None if the guess was wrong.

        accepted: drafts that were accepted. logits: of all rows of the block.
        """
        if accepted != self.accepted:
            return None
        if self.guess is Guess.NEXT:
            if self.anchor != tokens[-1]:
                return None
            return read_draft(sampler, tokens, logits, Source.NEXT)
        # Row 0 predicts the anchor's own position. If it would have named another token, the rows
        # behind it are less to be trusted, and the first of them says how much less.
        named = sampler.choose(logits[0], tokens[:-1])
        draft = read_draft(sampler, tokens, logits[1:], Source.LAST)
        if named is None or not draft.tokens:
            return None
        if named.token == tokens[-1]:
            return draft
        doubt = named.second_probability if named.second == tokens[-1] else 1 - named.probability
        return replace(draft, confidence=(draft.confidence[0] * doubt, *draft.confidence[1:]))


def hypotheses(
    draft: Draft, width: int, accept: Sequence[float], anchor: int
) -> Iterator[Hypothesis]:
    """Every guess at the outcome of verifying the first `width` tokens of `draft`.

    accept: per draft token, the probability that it is accepted if those before it are. anchor:
    the token before the draft. Guess A of "none accepted" is a block at that anchor, and left out
    where the draft came from one.
    """
    survival = 1.0
    for accepted in range(width + 1):
        if accepted < width:
            ends, survival = survival * (1 - accept[accepted]), survival * accept[accepted]
            following = _second(draft, accepted)
        else:
            ends = survival
            following = (draft.tokens[width], accept[width]) if width < len(draft) else None
        if accepted:
            yield Hypothesis(Guess.LAST, accepted, draft.tokens[accepted - 1], ends)
        elif not len(draft) or draft.source not in (Source.BLOCK, Source.NEXT):
            yield Hypothesis(Guess.LAST, 0, anchor, ends)
        if following is not None:
            yield Hypothesis(Guess.NEXT, accepted, following[0], ends * following[1])


def _second(draft: Draft, position: int) -> tuple[int, float] | None:
    """The draft's second choice, and its probability if the first choice is refused."""
    if not draft.second:
        return None
    token, probability = draft.second[position]
    return token, min(probability / max(1 - draft.confidence[position], 1e-6), 1.0)
