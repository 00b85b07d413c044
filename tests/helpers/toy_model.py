"""A model without weights: logits are a hash of the prefix, and the drafter is as told.

AR logits of a position depend on all tokens before it and on nothing else, so the text of a
generation has one right answer, whatever drafts say. The cache holds the very tokens, so that a
loop that leaves a wrong row behind changes the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.runtime.drawing import draw_choices
from orthrus_gguf.runtime.protocol import (
    Checkpoint,
    Choices,
    Logits,
    Segment,
    View,
    check_segments,
    path_to,
)
from orthrus_gguf.sampling import Sampler, SamplingSettings

VOCAB, MASK, BLOCK = 64, 63, 8
END, OTHER_END, CONTROL = 60, 61, 62

#: Given the prefix and the number of rows, the tokens that a diffusion block proposes.
Drafter = Callable[[Sequence[int], int], list[int]]


def toy_config(*, heads: bool = True) -> ModelConfig:
    return ModelConfig(
        name="toy",
        n_layers=1,
        n_ctx_train=256,
        n_embd=8,
        n_ff=8,
        n_head=1,
        n_head_kv=1,
        head_dim=8,
        n_vocab=VOCAB,
        rms_eps=1e-6,
        rope=Rope(1e4),
        tied=True,
        block_size=BLOCK if heads else None,
        mask_token=MASK if heads else None,
    )


def ar_logits(prefix: Sequence[int]) -> Logits:
    """Logits [VOCAB] after `prefix`; not to be written to."""
    return _logits_of_hash(hash(tuple(prefix)) % 2**32)


@lru_cache(maxsize=100_000)
def _logits_of_hash(seed: int) -> Logits:
    logits = np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)
    logits.setflags(write=False)
    return logits


def greedy_continuation(prefix: Sequence[int], rows: int) -> list[int]:
    """What greedy AR decoding appends: the drafter that is always right."""
    tokens = list(prefix)
    for _ in range(rows):
        tokens.append(int(ar_logits(tokens).argmax()))
    return tokens[len(prefix) :]


def one_hot(token: int, height: float = 99) -> Logits:
    """Logits that leave no doubt, or with a lower height, some."""
    return np.where(np.arange(VOCAB) == token, height, 0).astype(np.float32)


def tapped(layer: int, token: int) -> int:
    """What the toy's residual stream holds at the input of a layer, in every element."""
    return VOCAB * layer + token


class ToyTokenizer:
    """Ids 0..25 are letters, 26.. are single UTF-8 bytes of "é東🙂", 60 up are control tokens."""

    eog = frozenset({END, OTHER_END})
    space_prefix = False
    raw = "é東🙂".encode()

    def token_bytes(self, id: int) -> bytes:
        if id < 26:
            return bytes([97 + id])
        return self.raw[id - 26 : id - 25]

    def is_special(self, id: int) -> bool:
        return id >= END

    def special_id(self, text: str) -> int | None:
        return {"<end>": END, "<control>": CONTROL}.get(text)


class ToyCache:
    def __init__(self, capacity: int) -> None:
        self.tokens: list[int] = []
        self.pending: Segment | None = None
        #: What `fit` says at most.
        self.tree_room = 1000
        self._capacity = capacity

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        return self._capacity

    def commit(self, rows: Sequence[int]) -> None:
        assert self.pending is not None
        segment, rows = self.pending, list(rows)
        parents = segment.parents or range(-1, len(segment) - 1)
        assert not rows or rows == path_to(rows[-1], parents)
        self.tokens += [segment.tokens[row] for row in rows]
        self.pending = None

    def checkpoint(self, length: int | None = None) -> Checkpoint:
        return Checkpoint(self.length if length is None else length)

    def restore(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.length <= self.length
        del self.tokens[checkpoint.length :]
        self.pending = None

    def take(self, rows: int) -> list[NDArray[np.uint8]]:
        assert rows <= self.length
        return [np.array(self.tokens[:rows], np.uint8)]

    def put(self, parts: Sequence[NDArray[np.uint8]], rows: int) -> None:
        (tokens,) = parts
        assert len(tokens) == rows <= self._capacity
        self.tokens, self.pending = tokens.tolist(), None

    def fit(self, parents: Sequence[int]) -> int:
        return min(len(parents), self.tree_room)

    def assume(self, rows: int) -> None:
        self.tokens += [0] * rows
        self.pending = None


class ToyModel:
    """Implements `orthrus_gguf.runtime.protocol.Model`; counts its passes in `forwards`."""

    def __init__(
        self,
        drafter: Drafter = greedy_continuation,
        *,
        heads: bool = True,
        logits: Callable[[Sequence[int]], Logits] = ar_logits,
        sureness: float = 99,
    ) -> None:
        """sureness: logit of the drafter's tokens above all others."""
        self.config = toy_config(heads=heads)
        self.description = "toy"
        self.drafter = drafter
        self.ar_logits = logits
        self.sureness = sureness
        self.forwards = 0

    def close(self) -> None:
        pass

    def new_cache(self, capacity: int) -> ToyCache:
        return ToyCache(capacity)

    def sequence(
        self, tokens: Sequence[int], sampling: SamplingSettings, capacity: int = 10_000
    ) -> TokenSequence:
        """A sequence on a cache of its own."""
        return TokenSequence(self.config, self.new_cache(capacity), Sampler(sampling), list(tokens))

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        logits = self.logits(segments)
        return [
            Choices(draw_choices(segment, rows), self._taps(segment))
            for segment, rows in zip(segments, logits, strict=True)
        ]

    def _taps(self, segment: Segment) -> NDArray[np.float32] | None:
        """Planes that tell the layer and the token of each row (`tapped`)."""
        if not segment.taps:
            return None
        rows = [[tapped(layer, token) for token in segment.tokens] for layer in segment.taps]
        return np.repeat(np.array(rows, np.float32)[..., None], self.config.n_embd, axis=2)

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        check_segments(segments)
        self.forwards += 1
        for segment in segments:
            segment.cache.pending = None  # type: ignore[attr-defined]
        return [self._segment(segment) for segment in segments]

    def _segment(self, segment: Segment) -> Logits:
        rows = []
        cache = segment.cache
        assert isinstance(cache, ToyCache)
        if segment.view is View.AR:
            cache.pending = segment
            parents = segment.parents or range(-1, len(segment) - 1)
            for row in range(len(segment)):
                path = [segment.tokens[i] for i in path_to(row, parents)]
                rows.append(self.ar_logits([*cache.tokens, *path]))
        else:
            assert segment.tokens[1:] == (MASK,) * (len(segment) - 1)
            held = list(cache.tokens)
            if cache.pending is not None:
                held += cache.pending.tokens
            prefix = [*held[: segment.start], segment.tokens[0]]
            rows = [one_hot(t, self.sureness) for t in self.drafter(prefix, len(segment))]
        wanted = [rows[i] for i in segment.wanted]
        return np.stack(wanted) if wanted else np.empty((0, VOCAB), np.float32)
