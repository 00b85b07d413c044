"""Where tokens lie in a text: which stand in messages, and which of another vocabulary match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.records import dataclass
from orthrus_gguf.text.tokenizer import Tokenizer

Bools = NDArray[np.bool_]


def edges(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[bytes, NDArray[np.int64]]:
    """The bytes that tokens spell, and where each begins, with the end last: int64 [tokens + 1]."""
    parts = [tokenizer.token_bytes(token) for token in tokens]
    return b"".join(parts), np.concatenate([[0], np.cumsum([len(part) for part in parts])])


def within(tokenizer: Tokenizer, tokens: Sequence[int], contents: Iterable[str] | None) -> Bools:
    """Which tokens lie in one of `contents`, texts that the prompt holds in this order; None: in
    any text. Control tokens lie in none, and what is not found as it stands is left out.
    """
    plain = np.array([not tokenizer.is_special(token) for token in tokens], bool)
    if contents is None:
        return plain
    text, starts = edges(tokenizer, tokens)
    inside: Bools = np.zeros(len(tokens), bool)
    at = 0
    for content in contents:
        data = content.strip().encode()  # templates often strip it
        found = text.find(data, at) if data else -1
        if found >= 0:
            at = found + len(data)
            inside[
                np.searchsorted(starts[:-1], found) : np.searchsorted(starts[1:], at, "right")
            ] = True
    inside &= plain
    return inside


@dataclass(frozen=True)
class Alike:
    """A text in two vocabularies. tokens: in the other one. starts, stops: of each token of the
    first one, the tokens of the other that share bytes with it (at least one)."""

    tokens: tuple[int, ...]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]

    def largest(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """For each token of the first vocabulary, the largest score of those that it shares bytes
        with. scores: of the tokens of the other."""
        pairs = np.stack([self.starts, self.stops], axis=1).reshape(-1)
        padded = np.append(scores, np.float32(0))  # so that the last stop is an index
        found: NDArray[np.float32] = np.maximum.reduceat(padded, pairs)[::2]
        return found


def spelt_alike(first: Tokenizer, tokens: Sequence[int], other: Tokenizer) -> Alike | None:
    """The text of `tokens` in another vocabulary; None if that cannot spell it."""
    data, starts = edges(first, tokens)
    try:
        ids = other.encode(data.decode("utf-8"), add_eos=False)
    except UnicodeDecodeError:
        return None
    theirs, begins = edges(other, ids)
    before = len(theirs) - len(data)  # a beginning of text, or a space that the vocabulary adds
    if before < 0 or theirs[before:] != data:
        return None
    low, high = starts[:-1] + before, starts[1:] + before
    low = np.minimum(low, len(theirs) - 1)  # a token without bytes is where the next one is
    high = np.maximum(high, low + 1)
    from_ = np.searchsorted(begins, low, "right") - 1
    to = np.searchsorted(begins, high, "left")
    return Alike(tuple(ids), from_, to)
