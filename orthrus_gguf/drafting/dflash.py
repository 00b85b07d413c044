"""DFlash: a drafter with a network of its own, which reads what the model's layers read.

It drafts a whole block at once, as diffusion heads do, but for a model that has none (Chen et al.
2026, z-lab/dflash).
"""

from __future__ import annotations

from orthrus_gguf.drafting.draft import Source
from orthrus_gguf.drafting.network import NetworkDrafter
from orthrus_gguf.drafting.sequence import TokenSequence

#: likely: what z-lab's drafters have on maths and code, nearly the same at every position.
DFLASH = Source("dflash", "DFlash", "#56B4E9", 0.8)


class DFlashDrafter(NetworkDrafter):
    """See `NetworkDrafter`."""

    def __init__(self, sequence: TokenSequence) -> None:
        super().__init__(sequence, DFLASH)
