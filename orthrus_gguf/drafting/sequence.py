"""TokenSequence: one text that is being decoded, and the segments that ask about it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.beside import DraftCache
from orthrus_gguf.runtime.protocol import (
    Cache,
    Draw,
    Masks,
    Segment,
    View,
    ar_segment,
    diffusion_segment,
)
from orthrus_gguf.sampling import Sampler

#: Given the committed tokens and a tree of drafts, which tokens each of its rows may be followed
#: by, row 0 (the anchor) included: [rows, words]; None where everything may.
Constraint = Callable[[Sequence[int], Tree], Masks | None]


@dataclass
class TokenSequence:
    """One text that is being decoded.

    cache: of its committed tokens; behind a prompt it holds all of them but the last, the anchor.
    tokens: committed so far, the prompt's first. top: see `Draw.top`.
    constraint: what may be drawn (a grammar). draft_cache: of the drafter's network beside the
    model, where there is one. ends: tokens behind which the text does not go on.
    """

    config: ModelConfig
    cache: Cache
    sampler: Sampler
    tokens: list[int]
    top: int = 0
    constraint: Constraint | None = None
    draft_cache: DraftCache | None = None
    ends: Collection[int] = ()

    @property
    def start(self) -> int:
        """Position of the anchor."""
        return len(self.tokens) - 1

    def prompt_segment(self, stop: int, taps: tuple[int, ...] = ()) -> Segment:
        """Prompt rows from where the cache ends to `stop`. The prompt's last row is drawn."""
        start = self.cache.length
        rows = self.tokens[start:stop]
        last = stop == len(self.tokens)
        draw = None
        if last:
            allowed = None
            if self.constraint is not None:
                allowed = self.constraint(self.tokens, Tree(()))
            draw = Draw(self.sampler, self.tokens, top=self.top, allowed=allowed)
        wanted = range(len(rows) - 1, len(rows)) if last else range(0)
        return ar_segment(self.cache, rows, start, wanted=wanted, draw=draw, taps=taps)

    def verify_segment(self, tree: Tree, taps: tuple[int, ...] = ()) -> Segment:
        """The anchor and a tree of drafts, all of them drawn after."""
        allowed = None if self.constraint is None else self.constraint(self.tokens, tree)
        draw = Draw(self.sampler, self.tokens, top=self.top, allowed=allowed)
        rows = (self.tokens[-1], *tree.tokens)
        parents = None if tree.parents is None else (-1, *tree.parents)
        wanted = range(len(rows))
        return Segment(self.cache, View.AR, rows, self.start, wanted, parents, draw, taps)

    def block_segment(self, rows: int, ahead: tuple[int, ...] = ()) -> Segment:
        """A block of up to `rows` rows whose row i predicts the token i + 1 positions behind the
        anchor; or behind `ahead`, tokens taken to follow it, the last of which is then the block's
        anchor.
        """
        config = self.config
        if config.block_size is None or config.mask_token is None:
            raise ValueError("the model has no diffusion heads")
        return diffusion_segment(
            self.cache,
            ahead[-1] if ahead else self.tokens[-1],
            config.mask_token,
            min(rows, config.block_size),
            self.start + len(ahead),
            draw=Draw(self.sampler, self.tokens, ahead, detail=True),
        )

    def drafter_segment(self, tokens: int) -> Segment:
        """What asks the drafter's network for `tokens` tokens behind the committed ones."""
        if self.draft_cache is None:
            raise ValueError("there is no drafter beside the model")
        draw = Draw(self.sampler, self.tokens, detail=True)
        return self.draft_cache.segment(self.tokens[-1], self.start, tokens, draw)

    def ended(self, tokens: Sequence[int]) -> int:
        """How many of these the text still has: up to the first that ends it."""
        return next((i + 1 for i, token in enumerate(tokens) if token in self.ends), len(tokens))

    def checkpoint(self) -> None:
        """Let the caches be able to come back to where they stand."""
        self.cache.checkpoint()
        if self.draft_cache is not None:
            self.draft_cache.checkpoint()
