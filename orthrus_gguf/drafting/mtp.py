"""MTP: the block behind a hybrid's layers that was trained to predict one token more.

It drafts a chain, one token after the other, each from what the block itself gave for the one
before; so a longer draft costs more, and its later tokens are worth less.
"""

from __future__ import annotations

from orthrus_gguf.drafting.draft import Source
from orthrus_gguf.drafting.network import NetworkDrafter
from orthrus_gguf.drafting.sequence import TokenSequence

#: likely: between what is published for prose (0.63) and for code (0.83) with 27B.
MTP = Source("mtp", "MTP", "#CC79A7", 0.75)


class MtpDrafter(NetworkDrafter):
    """See `NetworkDrafter`."""

    def __init__(self, sequence: TokenSequence) -> None:
        super().__init__(sequence, MTP)
