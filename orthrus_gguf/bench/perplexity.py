"""Perplexity of a text, and how far two files are apart on it, by llama-perplexity's definition.

The text is cut into windows of `n_ctx` tokens that know nothing of each other; what is left over at
the end does not count. Where the vocabulary wants a BOS token, it takes the place of each window's
first token. The first half of a window is context only: scored are the tokens `n_ctx/2 + 1 ..
n_ctx - 1`. Errors are standard errors of the mean over tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.protocol import Logits, Model, ar_segment

Array = NDArray[np.float64]

#: Rows turned to float64 at once, so that a vocabulary of 150,000 stays below 100 MB.
CHUNK = 64


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Array) -> Estimate:
        """Of at least two values."""
        return cls(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))

    def exp(self) -> Estimate:
        """Of the exponential, to first order."""
        value = float(np.exp(self.value))
        return Estimate(value, value * self.error)

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "error": self.error}


@dataclass(frozen=True)
class Difference:
    """One token on which two files differ. place: its index in the tokens of the text.

    token: what the text says there; p, p_base: its probabilities. top, top_base: likeliest tokens.
    """

    place: int
    token: int
    kl: float
    p: float
    p_base: float
    top: int
    top_base: int


def cut(tokens: Sequence[int], n_ctx: int, chunks: int = -1) -> list[list[int]]:
    """The windows of a text, at most `chunks` of them unless that is negative.

    Raises OrthrusError for a text of less than two windows, as llama-perplexity refuses it: its
    error would mean nothing.
    """
    if len(tokens) < 2 * n_ctx:
        raise OrthrusError(
            f"the text has {len(tokens)} tokens, windows of {n_ctx} need at least {2 * n_ctx};"
            " give more text, or a smaller -c"
        )
    starts = range(0, len(tokens) - n_ctx + 1, n_ctx)
    return [list(tokens[s : s + n_ctx]) for s in (starts if chunks < 0 else starts[:chunks])]


def window_logits(
    model: Model, windows: Sequence[Sequence[int]], first: int, *, batch: int
) -> Iterator[Logits]:
    """Per window float32 [n_ctx - 1 - first, n_vocab]: of its rows `first .. n_ctx - 2`.

    windows: of one length each, beginning with BOS where that is wanted. batch: rows of a pass;
    several windows share one where there is room, and a long window takes several.
    """
    if not windows:
        return
    n_ctx = len(windows[0])
    abreast = max(1, min(batch // n_ctx, len(windows)))
    caches: list[Any] = [model.new_cache(n_ctx) for _ in range(abreast)]
    for begin in range(0, len(windows), abreast):
        group = windows[begin : begin + abreast]
        parts: list[list[Logits]] = [[] for _ in group]
        for cache in caches:
            cache.restore(cache.checkpoint(0))
        for start in range(0, n_ctx, batch):
            stop = min(start + batch, n_ctx)
            low, high = max(first, start) - start, min(stop, n_ctx - 1) - start
            wanted = range(min(low, high), high)
            found = model.logits(
                [
                    ar_segment(cache, window[start:stop], start, wanted=wanted)
                    for cache, window in zip(caches, group, strict=False)
                ]
            )
            for cache, part, logits in zip(caches, parts, found, strict=False):
                cache.commit(range(stop - start))
                part.append(logits)
        yield from map(np.concatenate, parts)


def log_softmax(logits: Logits) -> Array:
    """Natural logarithms of probabilities, float64 [rows, n_vocab]."""
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    values -= np.log(np.exp(values).sum(-1, keepdims=True))
    return values


class Text:
    """Sums over the windows of a text: perplexity, and beside a base model the distance to it."""

    def __init__(self, windows: Sequence[Sequence[int]], first: int) -> None:
        """first: rows of a window that are context only."""
        self.first = first
        self.nll: list[Array] = []
        self.nll_base: list[Array] = []
        self.kl: list[Array] = []
        self.tops: list[NDArray[np.int64]] = []
        self._windows = windows

    def add(self, logits: Logits, base: Logits | None = None) -> None:
        """Score the next window; logits as `window_logits` yields them.

        Raises OrthrusError for logits that are not finite.
        """
        window = self._windows[self.windows]
        for whose, found in (("", logits), ("base ", base)):
            if found is not None and not np.isfinite(found).all():
                raise OrthrusError(
                    f"window {self.windows + 1}: the {whose}model's logits are not finite: the"
                    " weights are damaged or overflow; convert the model again"
                )
        targets = np.asarray(window[self.first + 1 :])
        nll, nll_base, kl, tops = [], [], [], []
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            ours, rows = log_softmax(logits[part]), np.arange(len(targets[part]))
            nll.append(-ours[rows, targets[part]])
            if base is not None:
                theirs = log_softmax(base[part])
                nll_base.append(-theirs[rows, targets[part]])
                kl.append((np.exp(theirs) * (theirs - ours)).sum(-1))
                tops.append(np.stack([ours.argmax(-1), theirs.argmax(-1)]))
        self.nll.append(np.concatenate(nll))
        if base is not None:
            self.nll_base.append(np.concatenate(nll_base))
            self.kl.append(np.concatenate(kl))
            self.tops.append(np.concatenate(tops, axis=1))

    @property
    def windows(self) -> int:
        """How many are scored."""
        return len(self.nll)

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(map(len, self.nll))

    @property
    def perplexity(self) -> Estimate:
        return Estimate.of(np.concatenate(self.nll)).exp()

    def comparison(self) -> Comparison:
        """The distance to the base model, of which every window must have had the logits."""
        return Comparison(
            np.concatenate(self.nll),
            np.concatenate(self.nll_base),
            np.concatenate(self.kl),
            np.concatenate(self.tops, axis=1),
        )

    def largest(self, count: int) -> list[Difference]:
        """The tokens with the largest divergence, largest first."""
        found = self.comparison()
        per_window = len(self.nll[0])
        differences = []
        for row in np.argsort(-found.kl, kind="stable")[:count].tolist():
            number, within = divmod(row, per_window)
            window = self._windows[number]
            place = self.first + 1 + within
            differences.append(
                Difference(
                    place=number * len(window) + place,
                    token=window[place],
                    kl=float(found.kl[row]),
                    p=float(np.exp(-found.nll[row])),
                    p_base=float(np.exp(-found.nll_base[row])),
                    top=int(found.tops[0, row]),
                    top_base=int(found.tops[1, row]),
                )
            )
        return differences


@dataclass(frozen=True)
class Comparison:
    """One file beside its base, token by token: everything has shape [tokens].

    kl: divergence of the file from the base, in nats. tops [2, tokens]: likeliest tokens, the
    base's second.
    """

    nll: Array
    nll_base: Array
    kl: Array
    tops: NDArray[np.int64]

    @property
    def base_perplexity(self) -> Estimate:
        return Estimate.of(self.nll_base).exp()

    @property
    def perplexity_ratio(self) -> Estimate:
        """Perplexity over the base's. Its error is that of paired differences."""
        return Estimate.of(self.nll - self.nll_base).exp()

    @property
    def mean_kl(self) -> Estimate:
        return Estimate.of(self.kl)

    def kl_quantile(self, share: float) -> float:
        return float(np.quantile(self.kl, share))

    @property
    def probability_changes(self) -> Array:
        """Per token, by how much the file's probability of what the text says is higher."""
        return np.asarray(np.exp(-self.nll) - np.exp(-self.nll_base))

    @property
    def rms_change(self) -> Estimate:
        """Root mean square of `probability_changes`."""
        square = Estimate.of(self.probability_changes**2)
        root = float(np.sqrt(square.value))
        return Estimate(root, 0.5 / root * square.error if root else 0.0)

    @property
    def same_top(self) -> Estimate:
        """Share of tokens where both hold the same token to be the likeliest."""
        share = float((self.tops[0] == self.tops[1]).mean())
        return Estimate(share, float(np.sqrt(share * (1 - share) / (len(self.kl) - 1))))
