"""Prompts and conversations, shortened by a scorer that looks for certain tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from toy_model import CONTROL, ToyModel

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.prefill.choice import CHUNK, FIRST, LAST
from orthrus_gguf.prefill.compression import Compression, Compressor, Selection
from orthrus_gguf.prefill.scorer import ROWS, Scorer, layers_of
from orthrus_gguf.runtime.protocol import Segment

LOOKED_FOR = 50


class Looker(ToyModel):
    """Attends to one token, wherever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def attention(self, segment: Segment, layers: Sequence[int]) -> NDArray[np.float32]:
        assert list(layers) == [0]
        cache: Any = segment.cache
        if segment.start == 0:
            self.read = []
        assert segment.start == len(self.read)
        self.read += segment.tokens
        cache.pending = segment
        assert len(segment.wanted) in (0, ROWS)
        weights = np.full((len(segment.wanted), segment.stop), 1e-4, np.float32)
        weights[:, np.array(self.read) == LOOKED_FOR] = 1
        return weights


class Letters:
    """A tokenizer of single letters."""

    def token_bytes(self, token: int) -> bytes:
        return bytes([48 + token])

    def is_special(self, token: int) -> bool:
        return token == CONTROL


def text(tokens: Sequence[int]) -> str:
    return "".join(chr(48 + token) for token in tokens)


def filler(count: int, seed: int = 0, *places: int) -> list[int]:
    tokens = np.random.default_rng(seed).integers(0, 40, count)
    tokens[list(places)] = LOOKED_FOR
    return [int(token) for token in tokens]


@pytest.fixture
def model() -> Looker:
    return Looker()


@pytest.fixture
def compressor(model: Looker) -> Compressor:
    tokenizer: Any = Letters()
    return Compressor(Scorer("looker", model, (0,), tokenizer), Compression(0.05, 300))


def test_what_is_looked_for_stays(compressor: Compressor, model: Looker) -> None:
    prompt = filler(1000, 0, 400)
    read: list[int] = []
    selection = compressor.select(prompt, on_progress=read.append)
    assert selection is not None
    assert model.read == prompt
    assert read == [512, 1000]
    assert LOOKED_FOR in selection.tokens
    assert selection.tokens[:FIRST] == tuple(prompt[:FIRST])
    assert selection.tokens[-LAST:] == tuple(prompt[-LAST:])
    droppable = 1000 - FIRST - LAST
    assert 0.05 * droppable <= len(selection.tokens) - FIRST - LAST < 0.05 * droppable + CHUNK
    assert [prompt[place] for place in selection.kept] == list(selection.tokens)
    assert selection.places((10, 400, 1000)) == (10, selection.kept.index(400), len(selection.kept))
    assert (selection.full, selection.scored, selection.scorer) == (1000, 1000, "looker")
    assert "the answer may differ" in selection.words
    assert selection.to_json()["lossy"] is True


def test_what_is_read_whole(compressor: Compressor, model: Looker) -> None:
    """Up to the threshold, at a share of 1, and where nothing may be dropped; nobody scores it."""
    assert compressor.select(filler(300)) is None
    assert compressor.select(filler(1000), compression=Compression(1, 0)) is None
    assert compressor.select(filler(1000), contents=[]) is None
    assert model.read == []


def test_only_messages_are_shortened(compressor: Compressor) -> None:
    """What stands around them stays, and so do control tokens within."""
    system, question, answer = filler(200, 1), filler(400, 2, 300), filler(400, 3)
    question[50:52] = [CONTROL, CONTROL]
    prompt = [*system, CONTROL, *question, CONTROL, *answer, *filler(80, 4)]
    selection = compressor.select(prompt, [text(question), text(answer)])
    assert selection is not None
    assert selection.tokens[:201] == (*system, CONTROL)
    assert selection.tokens.count(CONTROL) == 4
    assert LOOKED_FOR in selection.tokens
    assert selection.tokens[-80:] == tuple(prompt[-80:])


def turn(compressor: Compressor, prompt: list[int], *contents: list[int]) -> Selection:
    found = compressor.select(prompt, [text(content) for content in contents])
    assert found is not None
    return found


def test_the_next_turn_begins_with_what_was_kept(compressor: Compressor, model: Looker) -> None:
    """A cache holds that. What is new is read whole up to the threshold, beyond it by score."""
    document, head, tail = filler(900, 0, 400), [CONTROL] * 3, [CONTROL] * 2
    first = turn(compressor, [*head, *document, *tail], document)
    model.read = []
    again = turn(compressor, [*head, *document, *tail], document)
    assert (again.tokens, again.scored, model.read) == (first.tokens, 0, [])
    more = filler(100, 5)
    second_prompt = [*head, *document, *tail, *more, *tail]
    second = turn(compressor, second_prompt, document, more)
    assert second.tokens == (*first.tokens, *more, *tail)
    assert (second.scored, model.read) == (0, [])
    other = filler(700, 6, 300)
    third = turn(compressor, [*second_prompt, *other, *tail], document, more, other)
    assert third.tokens[: len(second.tokens)] == second.tokens
    assert model.read == [*second.tokens, *other, *tail]
    assert third.scored == len(model.read)
    assert len(second.tokens) + LAST < len(third.tokens) < len(second.tokens) + 300
    assert third.tokens.count(LOOKED_FOR) == 2


def test_another_question_about_the_same_text_is_scored_anew(
    compressor: Compressor, model: Looker
) -> None:
    document = filler(900, 0, 400)
    first, second = [*document, 1, 2, 3], [*document, 4, 5, 6]
    turn(compressor, [*first, CONTROL], first)
    model.read = []
    turn(compressor, [*second, CONTROL], second)
    assert model.read == [*second, CONTROL]
    # Another share is another choice.
    half = compressor.select([*second, CONTROL], [text(second)], Compression(0.5, 300))
    assert half is not None
    assert half.scored == len(second) + 1


def test_shares_that_make_no_sense() -> None:
    for keep in (0, -1, 1.5, float("nan")):
        with pytest.raises(OrthrusError, match="more than 0 and at most 1"):
            Compression(keep, 0)


def test_layers_that_are_looked_at(model: Looker) -> None:
    assert layers_of(model.config, None) == (0,)
    assert layers_of(model.config, 1) == (0,)
    for count in (0, 2):
        with pytest.raises(OrthrusError, match=f"self:{count}: toy has 1 layers"):
            layers_of(model.config, count)
