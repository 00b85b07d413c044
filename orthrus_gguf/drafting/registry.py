"""The drafters there are, by the name that a plan spells (`+lookup`).

A drafter is a file of this folder and an entry of `KINDS`. Statistics, plots, `--strategy auto` and
the plan language know it by that.
"""

from __future__ import annotations

from collections.abc import Callable

from orthrus_gguf.drafting.block import BlockDrafter
from orthrus_gguf.drafting.carried_blocks import CarriedBlocks
from orthrus_gguf.drafting.dflash import DFlashDrafter
from orthrus_gguf.drafting.drafter import Drafter
from orthrus_gguf.drafting.lookup import LOOKUP, LookupDrafter
from orthrus_gguf.drafting.mtp import MtpDrafter
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.drafting.tail import TailDrafter
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.records import dataclass


@dataclass(frozen=True)
class Kind:
    """make: a drafter for a new sequence. heads: whether it needs diffusion heads. network: what it
    needs beside the model, in words for who lacks it, if it has a network of its own
    (`TokenSequence.draft_cache`); empty if not. optional: plans
    name it, as `+name`, or leave it to `auto`, which goes without it at `+no-name`; the others come
    with the strategies. words: what an optional one drafts, for help texts. margin: of its source
    (`Source.margin`)."""

    make: Callable[[TokenSequence], Drafter]
    heads: bool = False
    network: str = ""
    optional: bool = True
    words: str = ""
    margin: float = 1.0


#: In the order in which they are asked; of drafts that promise the same, the first is taken.
KINDS: dict[str, Kind] = {
    "carried": Kind(CarriedBlocks, heads=True, optional=False),
    "tail": Kind(TailDrafter, optional=False),
    "lookup": Kind(
        LookupDrafter, words="what followed the last tokens before", margin=LOOKUP.margin
    ),
    "dflash": Kind(
        DFlashDrafter,
        network="a drafter; name one with --drafter",
        words="with the DFlash network of --drafter",
    ),
    "mtp": Kind(
        MtpDrafter,
        network="an MTP block: a model that holds one, or mtp-*.gguf with --drafter",
        words="with the model's MTP block",
    ),
    "block": Kind(BlockDrafter, heads=True, optional=False),
}


def optional_names() -> tuple[str, ...]:
    """Drafters that plans name."""
    return tuple(name for name, kind in KINDS.items() if kind.optional)


def make_drafters(sequence: TokenSequence, names: set[str]) -> list[Drafter]:
    """New drafters of these kinds, as far as there is what they need."""
    cache = sequence.draft_cache
    heads, network = sequence.config.has_heads, None if cache is None else cache.beside.name
    return [
        kind.make(sequence)
        for name, kind in KINDS.items()
        if name in names and (heads or not kind.heads) and (not kind.network or name == network)
    ]


def lacks(name: str, config: ModelConfig) -> str:
    """What a drafter needs beside a model, in words, if that is not there."""
    beside = config.beside is not None and config.beside.name == name
    return "" if beside else KINDS[name].network
