"""Recording: what drafts at every position of a text that the model itself wrote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orthrus_gguf.bench.simulation.recording import COLUMNS, RecordedRows, Text
from orthrus_gguf.decode import drive, prefill
from orthrus_gguf.drafting.registry import make_drafters
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.protocol import Choices, Model
from orthrus_gguf.sampling import Sampler


def default_sizes(block_size: int) -> tuple[int, ...]:
    """Rows of the blocks that are recorded: the trained size, a half and a quarter of it.

    A block of other rows is replayed as the first rows of the next larger one, which is close and
    not exact, since rows of a block see each other.
    """
    return tuple(sorted({max(block_size // n, 2) for n in (4, 2, 1)}))


def record_text(
    model: Model,
    sampler: Sampler,
    domain: str,
    prompt: Sequence[int],
    output: Sequence[int],
    sizes: Sequence[int],
) -> Text:
    """Draft from every token of `output` but the last, in blocks of each of `sizes` rows, and with
    the network of a drafter beside the model.

    The text must be what `sampler` decodes; penalties are not provided for.
    """
    tokens, anchors = [*prompt, *output], len(output) - 1
    cache = model.new_cache(len(tokens))
    beside = model.new_draft_cache(len(tokens)) if isinstance(model, ModelWithDrafter) else None
    sequence = TokenSequence(model.config, cache, sampler, [], draft_cache=beside)
    names = set() if beside is None else {beside.beside.name}
    drafters = make_drafters(sequence, names)
    blocks = {rows: _nothing(anchors, rows) for rows in sizes}
    drafted = None if beside is None else _nothing(anchors, beside.beside.most)
    for anchor in range(anchors):
        start = len(prompt) + anchor
        sequence.tokens = tokens[:start]
        drive(model, prefill(sequence, drafters))
        sequence.tokens[start:] = tokens[start : start + 1]
        for rows, recorded in blocks.items():
            (choices,) = model.forward([sequence.block_segment(rows)])
            _fill(recorded[anchor], choices)
        if beside is not None and drafted is not None:
            (choices,) = model.forward([sequence.drafter_segment(beside.beside.most)])
            _fill(drafted[anchor], choices)
    return Text(domain, tuple(prompt), tuple(output), blocks, drafted)


def _nothing(anchors: int, rows: int) -> RecordedRows:
    return np.full((anchors, rows, COLUMNS), np.nan, np.float32)


def _fill(recorded: RecordedRows, choices: Choices) -> None:
    """recorded: [rows, COLUMNS], NaN so far."""
    for i, choice in enumerate(choices):
        if choice is None:
            break
        recorded[i] = choice.token, choice.probability, choice.second, choice.second_probability
