"""What a drafter's own network is to the model that it runs beside."""

from __future__ import annotations

from orthrus_gguf.records import dataclass


@dataclass(frozen=True)
class Beside:
    """A drafter's own network beside a model.

    name: of the drafter, as plans spell it. block: rows of its blocks, the anchor's with them.
    width: tokens that it drafts unless it is told how many. chain: it drafts one token after the
    other, by as many rows, rather than in whole blocks.
    """

    name: str
    block: int
    width: int
    chain: bool = False

    @property
    def most(self) -> int:
        """The most tokens of a draft."""
        return self.block - 1

    def rows(self, tokens: int) -> int:
        """Rows that a draft of so many tokens takes."""
        return tokens if self.chain else self.block
