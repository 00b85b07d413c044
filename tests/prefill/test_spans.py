"""Where tokens lie in a text, in one vocabulary and in two."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from vocabularies import (
    bpe_metadata,
    library_lines,
    sentencepiece_metadata,
    train_sentencepiece,
)

from orthrus_gguf.prefill.spans import spelt_alike, within
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer

TEXT = "def spam(eggs):\n    return 'Grüße, 世界'  # twice\n" * 3


@pytest.fixture(scope="module")
def bpe(checkpoint: Path) -> Tokenizer:
    metadata = bpe_metadata(json.loads((checkpoint / "tokenizer.json").read_text("utf-8")))
    count = len(metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    return load_tokenizer(metadata, path=Path("bpe.gguf"), n_vocab=count)


@pytest.fixture(scope="module")
def spm() -> Tokenizer:
    processor = train_sentencepiece([TEXT, *library_lines(300)])
    metadata = sentencepiece_metadata(processor)
    count = len(metadata["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    return load_tokenizer(metadata, path=Path("spm.gguf"), n_vocab=count)


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def test_tokens_of_messages(bpe: Tokenizer) -> None:
    """In their order, whole tokens only; control tokens and what is not found are none of them."""
    end = next(i for i in range(bpe.n_vocab) if bpe.is_special(i))
    ids = [*bpe.encode(f"user\n{TEXT}\nuser\n"), end, *bpe.encode("import os, sys\nuser\n")]
    inside = within(bpe, ids, [f"  {TEXT}", "not there", "import os"])
    found = [i for i, one in zip(ids, inside, strict=True) if one]
    assert text_of(bpe, found).strip() == TEXT.strip() + "import os"
    assert not inside[ids.index(end)]
    assert within(bpe, ids, None).tolist() == [i != end for i in ids]
    assert not within(bpe, ids, []).any()
    assert not within(bpe, ids, ["import os", TEXT, ""])[: ids.index(end)].any(), "out of order"


@pytest.mark.parametrize("swapped", [False, True], ids=["bpe to spm", "spm to bpe"])
def test_scores_go_to_the_tokens_that_share_bytes(
    bpe: Tokenizer, spm: Tokenizer, swapped: bool
) -> None:
    first, other = (spm, bpe) if swapped else (bpe, spm)
    ids = first.encode(TEXT)
    alike = spelt_alike(first, ids, other)
    assert alike is not None
    scores = np.zeros(len(alike.tokens), np.float32)
    data = [other.token_bytes(token) for token in alike.tokens]
    named = [i for i, part in enumerate(data) if b"spam" in part or part.strip() in (b"s", b"sp")]
    scores[named] = np.arange(1, len(named) + 1)
    found = alike.largest(scores)
    assert found.shape == (len(ids),)
    assert found.max() == len(named)
    ends = np.cumsum([len(first.token_bytes(token)) for token in ids])
    their_ends = np.cumsum([len(part) for part in data])
    shift = their_ends[-1] - ends[-1]
    for token, end, score in zip(ids, ends + shift, found, strict=True):
        begin = end - len(first.token_bytes(token))
        touched = (their_ends > begin) & (their_ends - [len(part) for part in data] < end)
        assert score == scores[touched].max(), first.token_bytes(token)


def test_what_another_vocabulary_cannot_spell(bpe: Tokenizer, spm: Tokenizer) -> None:
    half = bpe.encode("世")[:1]
    assert bpe.token_bytes(half[0]) != "世".encode()
    assert spelt_alike(bpe, half, spm) is None
    assert bpe.same_ids(bpe)
    assert not bpe.same_ids(spm)
