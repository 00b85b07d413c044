"""A model without weights: logits are a hash of the prefix, and the drafter is as told.

AR logits of a position depend on all tokens before it and on nothing else, so the text of a
generation has one right answer, whatever drafts say. The cache holds the very tokens, so that a
loop that leaves a wrong row behind changes the text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.runtime.protocol import Logits, Segment, View, check_path, check_segments, path_to

VOCAB, MASK, BLOCK = 64, 63, 8

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
    """Logits [VOCAB] after `prefix`."""
    seed = hash(tuple(prefix)) % 2**32
    return np.random.default_rng(seed).normal(0, 3, VOCAB).astype(np.float32)


def greedy_continuation(prefix: Sequence[int], rows: int) -> list[int]:
    """What greedy AR decoding appends: the drafter that is always right."""
    tokens = list(prefix)
    for _ in range(rows):
        tokens.append(int(ar_logits(tokens).argmax()))
    return tokens[len(prefix) :]


def one_hot(token: int, height: float = 99) -> Logits:
    """Logits that leave no doubt, or with a lower height, some."""
    return np.where(np.arange(VOCAB) == token, height, 0).astype(np.float32)


class ToyCache:
    def __init__(self, capacity: int) -> None:
        self.tokens: list[int] = []
        self.tree: Segment | None = None
        #: What `fit_tree` says at most.
        self.tree_room = 1000
        self._capacity = capacity

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        return self._capacity

    def truncate(self, length: int) -> None:
        assert length <= self.length
        del self.tokens[length:]
        self.tree = None

    def append(self, rows: int) -> None:
        self.tokens += [0] * rows
        self.tree = None

    def fit_tree(self, parents: Sequence[int]) -> int:
        return min(len(parents), self.tree_room)

    def keep_path(self, rows: Sequence[int]) -> None:
        assert self.tree is not None
        assert self.tree.parents is not None
        check_path(rows, self.tree.parents)
        self.tokens += [self.tree.tokens[row] for row in rows]
        self.tree = None


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

    def forward(self, segments: Sequence[Segment], cache: ToyCache) -> list[Logits]:
        check_segments(segments, cache)
        self.forwards += 1
        cache.tree = None
        return [self._segment(segment, cache) for segment in segments]

    def _segment(self, segment: Segment, cache: ToyCache) -> Logits:
        rows = []
        if segment.parents is not None:
            cache.tree = segment
            for row in range(len(segment)):
                path = [segment.tokens[i] for i in path_to(row, segment.parents)]
                rows.append(self.ar_logits([*cache.tokens, *path]))
        elif segment.view is View.AR:
            for token in segment.tokens:
                cache.tokens.append(token)
                rows.append(self.ar_logits(cache.tokens))
        else:
            assert segment.tokens[1:] == (MASK,) * (len(segment) - 1)
            prefix = [*cache.tokens[: segment.start], segment.tokens[0]]
            rows = [one_hot(t, self.sureness) for t in self.drafter(prefix, len(segment))]
        wanted = [rows[i] for i in segment.wanted]
        return np.stack(wanted) if wanted else np.empty((0, VOCAB), np.float32)
