"""Recording: one block at every position of a text that the model itself wrote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orthrus_gguf.bench.simulation.recording import COLUMNS, Choices, Text
from orthrus_gguf.decode import prefill
from orthrus_gguf.drafting.draft import Source, draft_segment, read_draft
from orthrus_gguf.runtime.protocol import Model
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
    """Draft from every token of `output` but the last, in blocks of each of `sizes` rows.

    The text must be what `sampler` decodes; penalties are not provided for.
    """
    tokens = [*prompt, *output]
    cache = model.new_cache(len(tokens))
    prefill(model, cache, tokens[:-1])
    anchors = len(output) - 1
    blocks = {rows: np.full((anchors, rows, COLUMNS), np.nan, np.float32) for rows in sizes}
    for anchor in reversed(range(anchors)):
        start = len(prompt) + anchor
        cache.truncate(start)
        for rows, choices in blocks.items():
            segment = draft_segment(model.config, tokens[start], start, rows)
            (logits,) = model.forward([segment], cache)
            draft = read_draft(sampler, tokens[: start + 1], logits, Source.BLOCK)
            _fill(choices[anchor], draft.tokens, draft.confidence, draft.second)
    return Text(domain, tuple(prompt), tuple(output), blocks)


def _fill(
    row: Choices,
    tokens: Sequence[int],
    confidence: Sequence[float],
    second: Sequence[tuple[int, float]],
) -> None:
    for i, (token, sure, (other, other_sure)) in enumerate(
        zip(tokens, confidence, second, strict=True)
    ):
        row[i] = token, sure, other, other_sure
