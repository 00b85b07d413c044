"""Logits → tokens: penalties, filters, greedy choice, and seeded noise keyed by position.

Sampling at temperature > 0 uses the Gumbel-max trick: `argmax(logits / T + noise)` is an exact
sample of the softmax when the noise is Gumbel-distributed. The noise of token `v` at absolute
position `p` is a function of `(seed, p, v)` alone, so plain AR decoding and draft verification draw
the same token at the same position, and the text cannot depend on the strategy.

Filters run in llama.cpp's default order: penalties, top-k, top-p, min-p, temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.records import dataclass

MAX_SEED = 2**64 - 1

#: Below it, noise outweighs no difference of two logits that single precision can tell apart.
COLDEST = 1e-10
#: The strongest penalty: what it does to the largest logits still is a number.
STRONGEST = 1e6

#: Field of SamplingSettings → what is right for it, in words and as a test.
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a number", math.isfinite),
    "top_p": ("a number", math.isfinite),
    "min_p": ("a number", math.isfinite),
    "repeat_penalty": (
        f"{1 / STRONGEST:g} to {STRONGEST:g}",
        lambda value: 1 / STRONGEST <= value <= STRONGEST,
    ),
    "repeat_last_n": ("-1 or more", lambda value: value >= -1),
    "presence_penalty": (f"-{STRONGEST:g} to {STRONGEST:g}", lambda value: abs(value) <= STRONGEST),
    "frequency_penalty": (
        f"-{STRONGEST:g} to {STRONGEST:g}",
        lambda value: abs(value) <= STRONGEST,
    ),
    "seed": ("0 to 2^64 - 1", lambda value: 0 <= value <= MAX_SEED),
}


def out_of_range(field: str, value: float) -> str:
    """What is wrong with a field's value ("expected …, found …"); empty if nothing is."""
    words, test = RANGES.get(field, ("", lambda value: True))
    return "" if test(value) else f"expected {words}, found {value}"


@dataclass(frozen=True)
class SamplingSettings:
    """Names, meaning and defaults of llama.cpp's sampling flags.

    temperature: <= 0 is greedy. top_k <= 0, top_p >= 1 and min_p <= 0 switch a filter off. What
    is beyond sense is kept as what it comes to, whatever computes: a temperature next to 0 as 0,
    top_p <= 0, which leaves the likeliest token alone, as top_k 1, min_p > 1 as 1.
    repeat_last_n: window of the penalties in tokens; 0 switches them off, -1 is the whole context.
    banned: token ids that are never chosen (for `--ignore-eos`).
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    banned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in RANGES:
            if problem := out_of_range(field, getattr(self, field)):
                raise OrthrusError(f"{field}: {problem}; choose another value")
        plain: dict[str, float] = {}
        if self.temperature < COLDEST:
            plain["temperature"] = 0.0
        if self.top_p <= 0:
            plain |= {"top_k": 1, "top_p": 1.0}
        if self.min_p > 1:
            plain["min_p"] = 1.0
        for field, value in plain.items():
            object.__setattr__(self, field, value)

    @property
    def greedy(self) -> bool:
        return self.temperature <= 0

    @property
    def penalizes(self) -> bool:
        return self.repeat_last_n != 0 and (
            self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        )


@dataclass(frozen=True)
class LogProbs:
    """Natural logarithms of the model's own probabilities, as llama-server reports them.

    They are those of the softmax of the raw logits: before penalties, bans, masks, filters and
    temperature. chosen: of the token that was drawn. top: the likeliest tokens, best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Choice:
    """The token drawn from one row of logits.

    probability, second, second_probability: how sure the choice is, and the runner-up; only where
        they were asked for (`detail`), else NaN and -1. They are those of the softmax over what
        decides (the logits when greedy, tempered logits plus noise otherwise), so that they measure
        how far the first choice is ahead.
    logprobs: only where asked for.
    """

    token: int
    probability: float = math.nan
    second: int = -1
    second_probability: float = math.nan
    logprobs: LogProbs | None = None


class Sampler:
    """Chooses the token after a prefix. It has no state: same prefix and logits, same token."""

    def __init__(self, settings: SamplingSettings) -> None:
        self.settings = settings
        self._banned = np.asarray(settings.banned, dtype=np.int64)

    def draw(
        self,
        logits: NDArray[np.float32],
        prefix: Sequence[int],
        *,
        detail: bool = False,
        top: int = 0,
        allowed: NDArray[np.uint32] | None = None,
    ) -> Choice | None:
        """The token at position `len(prefix)`, given its logits of shape [vocab].

        detail: with its probability and the runner-up. top: with log-probabilities, of this many of
        the likeliest tokens. allowed: one bit per token that may be drawn, [ceil(vocab / 32)].
        None for logits that are not finite, or where no token is allowed. Of `prefix` only the
        length counts, and the tokens that penalties look at.
        """
        scores = self._adjusted(logits, prefix, allowed)
        best = int(np.argmax(scores))  # the lowest id wins a tie; NaN wins over numbers
        if not np.isfinite(scores[best]):
            return None
        tokens: NDArray[np.int64] | None = None
        deciding: NDArray[np.floating[Any]] = scores
        if not self.settings.greedy:
            tokens, deciding = self._deciding(scores, len(prefix))
            best = int(np.argmax(deciding))
        token = best if tokens is None else int(tokens[best])
        logprobs = log_probabilities(logits, token, top) if top else None
        if not detail:
            return Choice(token, logprobs=logprobs)
        height = deciding[best]
        weights = deciding - height
        total = float(np.exp(weights, out=weights).sum())
        second = _second_best(deciding, best)
        return Choice(
            token,
            1 / total,
            second if tokens is None else int(tokens[second]),
            float(weights[second]) / total if second != best else 0.0,
            logprobs,
        )

    @property
    def looks_back(self) -> int:
        """Tokens of a prefix that can change a draw: 0 without penalties, -1 for all of them."""
        return self.settings.repeat_last_n if self.settings.penalizes else 0

    def _deciding(
        self, scores: NDArray[np.float32], position: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Tokens that survive the filters, and the noisy scores of which the largest wins."""
        tokens = _filtered(scores, self.settings)
        noise = gumbel_noise(self.settings.seed, position, tokens)
        return tokens, scores[tokens].astype(np.float64) / self.settings.temperature + noise

    def _adjusted(
        self,
        logits: NDArray[np.float32],
        prefix: Sequence[int],
        allowed: NDArray[np.uint32] | None,
    ) -> NDArray[np.float32]:
        """Logits after penalties, bans and the mask; the input itself when there are none."""
        if not self.settings.penalizes and not self._banned.size and allowed is None:
            return logits
        scores: NDArray[np.float32] = logits.copy()
        if self.settings.penalizes:
            _penalize(scores, prefix, self.settings)
        scores[self._banned] = -np.inf
        if allowed is not None:
            bits = np.unpackbits(allowed.view(np.uint8), count=scores.size, bitorder="little")
            scores[bits == 0] = -np.inf
        return scores


def _second_best(deciding: NDArray[np.floating[Any]], best: int) -> int:
    """Where the largest of the others is, the lowest index of equals; `best` if there is none."""
    found = [int(np.argmax(deciding[:best]))] if best else []
    if best + 1 < deciding.size:
        found.append(best + 1 + int(np.argmax(deciding[best + 1 :])))
    return max(found, key=lambda i: float(deciding[i]), default=best)


def log_probabilities(logits: NDArray[np.float32], token: int, top: int) -> LogProbs:
    """See `LogProbs`. logits: raw, [vocab]."""
    wide = logits.astype(np.float64)
    norm = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    likeliest = _top_k(logits, top)
    order = likeliest[np.argsort(-logits[likeliest], kind="stable")]
    return LogProbs(
        float(wide[token] - norm), tuple((int(v), float(wide[v] - norm)) for v in order)
    )


def _penalize(
    scores: NDArray[np.float32], prefix: Sequence[int], settings: SamplingSettings
) -> None:
    """Apply repeat, frequency and presence penalties to `scores` [vocab] in place."""
    # A slice is a list at once; other sequences of tokens are slow to read one by one.
    window = prefix[:] if settings.repeat_last_n < 0 else prefix[-settings.repeat_last_n :]
    tokens, counts = np.unique(np.asarray(window, dtype=np.int64), return_counts=True)
    seen = scores[tokens]
    seen = np.where(seen <= 0, seen * settings.repeat_penalty, seen / settings.repeat_penalty)
    seen -= counts * settings.frequency_penalty + settings.presence_penalty
    scores[tokens] = seen


def _filtered(scores: NDArray[np.float32], settings: SamplingSettings) -> NDArray[np.int64]:
    """Ids of the tokens that survive top-k, top-p and min-p, in ascending order."""
    tokens = _top_k(scores, settings.top_k)
    if settings.top_p < 1:
        order = np.argsort(-scores[tokens], kind="stable")
        kept = scores[tokens[order]].astype(np.float64)
        mass = np.cumsum(np.exp(kept - kept[0]))
        enough = int(np.searchsorted(mass, settings.top_p * mass[-1])) + 1
        tokens = np.sort(tokens[order[:enough]])
    if settings.min_p > 0:
        floor = scores[tokens].max() + np.log(settings.min_p)
        tokens = tokens[scores[tokens] >= floor]
    return tokens


#: Scores in a group, of whose maxima `_top_k` looks at first.
TILE = 128


def _top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids of the k largest scores, ascending; at the threshold the lowest ids win.

    Of a large vocabulary, only groups that can hold one are partitioned: those whose maximum is
    among the k largest maxima. (Without them, the threshold would be lower than k scores.) A group
    is every n-th score, so that maxima are taken along rows of memory.
    """
    if not 0 < k < scores.size:
        return np.arange(scores.size)
    groups = scores.size // TILE
    if k >= groups:
        return _top_k_of(scores, k)
    whole = groups * TILE
    maxima = scores[:whole].reshape(TILE, groups).max(axis=0)
    floor = np.partition(maxima, groups - k)[groups - k]
    columns = np.flatnonzero(maxima >= floor)
    ids = np.concatenate(
        [(np.arange(0, whole, groups)[:, None] + columns).ravel(), np.arange(whole, scores.size)]
    )
    ids = ids[scores[ids] >= floor]
    found: NDArray[np.int64] = ids[_top_k_of(scores[ids], k)]
    return found


def _top_k_of(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """The same by partitioning all of them; all, if there are not more than k."""
    if k >= scores.size:
        return np.arange(scores.size)
    threshold = np.partition(scores, scores.size - k)[scores.size - k]
    above = np.flatnonzero(scores > threshold)
    level = np.flatnonzero(scores == threshold)[: k - above.size]
    return np.sort(np.concatenate([above, level]))


def gumbel_noise(seed: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Standard Gumbel noise of `tokens` at one position; a pure function of its arguments.

    Word `token % 4` of Philox4x32-10 with counter (token // 4, position, 0, 0) and the 64-bit seed
    as key gives a uniform u = (word + ½) / 2³²; the noise is -ln(-ln u).
    """
    zero = np.zeros(tokens.shape, np.uint32)
    counter = ((tokens >> 2).astype(np.uint32), zero + np.uint32(position), zero, zero)
    words = np.stack(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)))
    chosen = words[tokens & 3, np.arange(tokens.size)]
    uniform = (chosen.astype(np.float64) + 0.5) / 2.0**32
    noise: NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


Words = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32 with 10 rounds (Salmon et al., SC 2011), elementwise over uint32 arrays.

    The same function as `tl.philox` in Triton and the generator of CUDA's cuRAND, so that GPU
    runtimes can draw identical noise.
    """
    even, odd = np.stack(counter[0::2]), np.stack(counter[1::2])
    for keys in (key + _KEY_STEPS & 0xFFFFFFFF).astype(np.uint32)[..., None]:
        products = np.multiply(even, _FACTORS).view(np.uint32).reshape(2, -1, 2)
        low, high = products[::-1, :, 0], products[::-1, :, 1]
        even, odd = high ^ odd ^ keys, low
    return even[0], odd[0], even[1], odd[1]


#: Of Philox4x32, for words 0 and 2; and what a key grows by, round by round.
_FACTORS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_KEY_STEPS = np.arange(10)[:, None] * np.array([0x9E3779B9, 0xBB67AE85])
