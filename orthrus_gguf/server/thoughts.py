"""A bound on thoughts: an answer that has thought for as many tokens as it may goes on behind the
tag that closes the thought, as llama-server's reasoning budget has it.

What must be said is a mask like a grammar's, for every row that a pass verifies: the text is what
it would be without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import count

import numpy as np

from orthrus_gguf.drafting.forced import Forcing
from orthrus_gguf.drafting.sequence import Constraint
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.runtime.protocol import Masks
from orthrus_gguf.server.splitter import THINK, THOUGHT
from orthrus_gguf.text.tokenizer import Tokenizer


class _Phase(Enum):
    BEFORE = "nothing but the beginning of a thought has come, if anything"
    WITHIN = "in a thought"
    CLOSING = "what closes the thought must come"
    BEHIND = "there is no thought, or no more"


@dataclass(frozen=True)
class _Place:
    """Where an answer stands. tail: its last bytes, as far as they matter. tokens: of the thought,
    or of what closes it, so far."""

    phase: _Phase
    tail: bytes = b""
    tokens: int = 0


@dataclass(frozen=True)
class Bound:
    """Of the thoughts of a vocabulary's answers. closing: the tokens that end one."""

    tokenizer: Tokenizer
    closing: tuple[int, ...]
    budget: int

    def first(self, *, begun: bool) -> _Place:
        """Before an answer. begun: the prompt opens a thought."""
        return self._within(b"", 0) if begun else _Place(_Phase.BEFORE)

    def after(self, place: _Place, token: int) -> _Place:
        """The place behind one more token."""
        if place.phase is _Phase.BEHIND:
            return place
        if place.phase is _Phase.CLOSING:
            done = place.tokens + 1 == len(self.closing)
            return _Place(_Phase.BEHIND if done else _Phase.CLOSING, tokens=place.tokens + 1)
        # Control tokens have no text in an answer.
        special = self.tokenizer.is_special(token)
        tail = place.tail + (b"" if special else self.tokenizer.token_bytes(token))
        if place.phase is _Phase.WITHIN:
            return self._within(tail, place.tokens + 1)
        told = tail.lstrip()
        if told.startswith(THINK.encode()):
            return self._within(told.removeprefix(THINK.encode()), 0)
        return _Place(_Phase.BEFORE if THINK.encode().startswith(told) else _Phase.BEHIND, told)

    def _within(self, tail: bytes, tokens: int) -> _Place:
        if THOUGHT.encode() in tail:
            return _Place(_Phase.BEHIND)
        # A character is not cut in two.
        if tokens >= self.budget and not _cut(tail):
            return _Place(_Phase.CLOSING)
        return _Place(_Phase.WITHIN, tail[-len(THOUGHT) :], tokens)

    def next(self, place: _Place) -> tuple[int, ...]:
        """The tokens that must follow."""
        return self.closing[place.tokens :] if place.phase is _Phase.CLOSING else ()


def _cut(tail: bytes) -> bool:
    """Whether the last character is incomplete."""
    for back, byte in enumerate(reversed(tail[-3:]), start=1):
        if byte >= 0xC0:
            return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        if byte < 0x80:
            return False
    return False


class Bounded:
    """See `sequence.Constraint`. It follows one answer from its first token on.

    inner: what binds the answer besides; where it does not let a thought end, it is none.
    """

    def __init__(
        self, bound: Bound, inner: Constraint | None, prompt_tokens: int, *, begun: bool
    ) -> None:
        self._bound, self._inner = bound, inner
        self._seen, self._place = prompt_tokens, bound.first(begun=begun)

    def __call__(self, tokens: Sequence[int], tree: Tree) -> Masks | None:
        masks = None if self._inner is None else self._inner(tokens, tree)
        places = [self._follow(tokens)]
        for parent, token in zip(tree.parents or count(), tree.tokens, strict=False):
            places.append(self._bound.after(places[parent], token))
        for row, place in enumerate(places):
            for token in self._bound.next(place)[:1]:
                if masks is None:
                    words = -(-self._bound.tokenizer.n_vocab // 32)
                    masks = np.full((len(places), words), 0xFFFFFFFF, np.uint32)
                bit = masks[row, token // 32] & np.uint32(1 << token % 32)
                if bit:
                    masks[row] = 0
                    masks[row, token // 32] = bit
        return masks

    def _follow(self, tokens: Sequence[int]) -> _Place:
        """Learn what was committed."""
        for token in tokens[self._seen :]:
            self._place = self._bound.after(self._place, token)
        self._seen = len(tokens)
        return self._place


class BoundedForcing(Bounded):
    """One beside a grammar whose forced tokens are drafts. See `drafting.forced.Forcing`."""

    def forced(self, tokens: Sequence[int]) -> Sequence[int]:
        """Tokens that must come next."""
        must = self._bound.next(self._follow(tokens))
        return must or (self._inner.forced(tokens) if isinstance(self._inner, Forcing) else ())


def bounded(
    bound: Bound, inner: Constraint | None, prompt_tokens: int, *, begun: bool, drafts: bool
) -> Bounded:
    """A constraint for one answer. drafts: whether tokens that must come are drafts."""
    kind = BoundedForcing if drafts else Bounded
    return kind(bound, inner, prompt_tokens, begun=begun)
