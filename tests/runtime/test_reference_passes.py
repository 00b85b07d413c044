"""What a pass promises and what a cache does, on the reference runtime: rows, trees, sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import (
    Checkpoint,
    Draw,
    Segment,
    ar_segment,
    diffusion_segment,
    path_to,
)
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.runtime.reference_cache import ReferenceCache
from orthrus_gguf.sampling import Sampler, SamplingSettings
from tests.tiny_model import write_model

GREEDY = Sampler(SamplingSettings(temperature=0))
TREE = (-1, 0, 0, 1, 1, 3, 2, 6, 0)


@pytest.fixture(scope="module")
def model(demo_file: Callable[..., Path]) -> Iterator[ReferenceModel]:
    """The F32 demo model."""
    torch.set_num_threads(1)
    with ModelFile.open(demo_file("f32")) as file:
        yield ReferenceModel(file)


def filled(model: ReferenceModel, tokens: Sequence[int], capacity: int = 64) -> ReferenceCache:
    """A cache that holds `tokens`."""
    cache = model.new_cache(capacity)
    model.logits([ar_segment(cache, tokens, 0, wanted=range(0))])
    cache.commit(range(len(tokens)))
    return cache


def block_of(model: ReferenceModel, cache: ReferenceCache, *where: int, **more: Any) -> Segment:
    """A diffusion block: anchor, rows and start."""
    assert model.config.mask_token is not None
    anchor, rows, start = where
    return diffusion_segment(cache, anchor, model.config.mask_token, rows, start, **more)


def assert_same(model: ReferenceModel, one: ReferenceCache, two: ReferenceCache) -> None:
    """The two caches hold the same text: the row behind it has the same bits."""
    assert one.length == two.length
    after, fresh = model.logits([ar_segment(cache, [200], cache.length) for cache in (one, two)])
    assert np.array_equal(after, fresh)


def test_rows_do_not_depend_on_their_company(model: ReferenceModel) -> None:
    tokens = list(range(100, 117))
    (alone_rows,) = model.logits([ar_segment(model.new_cache(32), tokens, 0)])
    for size in (1, 2, 3, 7):
        cache, rows = model.new_cache(32), []
        other = model.new_cache(32)
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            segments = [
                ar_segment(other, part[::-1], start),
                ar_segment(cache, part, start),
                block_of(model, other, 7, 5, start),
            ]
            rows.append(model.logits(segments)[1])
            cache.commit(range(len(part)))
            other.commit(range(len(part)))
        assert np.array_equal(np.concatenate(rows), alone_rows)


def test_a_pass_of_several_segments_equals_passes_of_one(model: ReferenceModel) -> None:
    """Verify rows and blocks that see a part of them: the blocks find the very same cache."""
    rows = [9, 10, 11]
    cache = filled(model, [5, 6, 7, 8])
    segments = [
        ar_segment(cache, rows, 4, wanted=range(1, 3)),
        block_of(model, cache, 10, 6, 5, wanted=range(4)),
        block_of(model, cache, 12, 5, 7),
    ]
    fused = model.logits(segments)
    assert [len(logits) for logits in fused] == [2, 4, 5]
    assert cache.length == 4, "all is pending"

    (verify,) = model.logits([ar_segment(cache, rows, 4)])
    cache.commit(range(1))
    assert np.array_equal(fused[0], verify[1:])
    (first,) = model.logits([block_of(model, cache, 10, 6, 5)])
    assert np.array_equal(fused[1], first[:4])
    model.logits([ar_segment(cache, rows[1:], 5)])
    cache.commit(range(2))
    assert np.array_equal(fused[2], model.logits(segments[2:])[0])
    assert cache.length == 7, "blocks leave nothing behind"


def test_sequences_do_not_see_one_another(model: ReferenceModel) -> None:
    """A chain with its block, a tree, and a block of a third one; each as if it were alone."""
    texts = ([5, 6, 7, 8], [9, 8, 7], [100, 101, 102, 103, 104])
    tree = list(range(40, 40 + len(TREE)))

    def segments(caches: Sequence[ReferenceCache]) -> list[list[Segment]]:
        a, b, c = caches
        return [
            [ar_segment(a, [9, 10, 11], 4), block_of(model, a, 12, 5, 6)],
            [ar_segment(b, tree, 3, parents=TREE)],
            [block_of(model, c, 33, 6, 5)],
        ]

    caches = [filled(model, text) for text in texts]
    one, two, three = segments(caches)
    together = model.logits([two[0], one[0], three[0], one[1]])
    alone = [model.logits(part) for part in segments([filled(model, text) for text in texts])]
    expected = (alone[1][0], alone[0][0], alone[2][0], alone[0][1])
    for got, own in zip(together, expected, strict=True):
        assert np.array_equal(got, own)
    caches[0].commit(range(2))
    caches[1].commit([0, 2, 6])
    with pytest.raises(ValueError, match="pending"):
        caches[2].commit([])
    assert [cache.length for cache in caches] == [6, 6, 5]
    kept = ([5, 6, 7, 8, 9, 10], [9, 8, 7, 40, 42, 46], texts[2])
    for cache, text in zip(caches, kept, strict=True):
        assert_same(model, cache, filled(model, text))


def test_rows_of_a_tree_are_those_of_their_paths(model: ReferenceModel) -> None:
    """Bit for bit, and any path of it can be kept, or none."""
    prompt, tokens = [5, 6, 7, 8], list(range(40, 40 + len(TREE)))
    cache = filled(model, prompt)
    (rows,) = model.logits([ar_segment(cache, tokens, 4, parents=TREE)])
    for row in range(len(TREE)):
        path = path_to(row, TREE)
        along = [tokens[i] for i in path]
        (chain,) = model.logits([ar_segment(filled(model, prompt), along, 4)])
        assert np.array_equal(chain[-1], rows[row])

        cache.restore(Checkpoint(4))
        model.logits([ar_segment(cache, tokens, 4, parents=TREE)])
        cache.commit(path)
        assert cache.length == 4 + len(path)
        assert_same(model, cache, filled(model, [*prompt, *along]))
    cache.restore(Checkpoint(4))
    model.logits([ar_segment(cache, tokens, 4, parents=TREE)])
    cache.commit([])
    assert cache.length == 4


def test_paths_that_are_none(model: ReferenceModel) -> None:
    cache = filled(model, [5, 6])
    for rows in ([1], [0, 3], [0, 1, 2], [0, 0], [0, 1, 99], [-1], [0, -1]):
        model.logits([ar_segment(cache, list(range(9)), 2, parents=TREE)])
        with pytest.raises(ValueError, match="no path"):
            cache.commit(rows)
        cache.commit([0, 1, 3])
        cache.restore(Checkpoint(2))
    model.logits([ar_segment(cache, [1, 2], 2)])
    for rows in ([1], [0, 1, 2]):
        with pytest.raises(ValueError, match="no path"):
            cache.commit(rows)
    cache.commit([0, 1])
    with pytest.raises(ValueError, match="pending"):
        cache.commit([0])


def test_what_is_pending_goes_with_the_next_pass_or_a_restore(model: ReferenceModel) -> None:
    cache = filled(model, [5, 6, 7])
    place = cache.checkpoint()
    (first,) = model.logits([ar_segment(cache, [8, 9], 3)])
    (again,) = model.logits([ar_segment(cache, [8, 9], 3)])
    assert np.array_equal(first, again)
    model.logits([block_of(model, cache, 8, 3, 3)])
    with pytest.raises(ValueError, match="pending"):
        cache.commit(range(2))
    for leave in (partial(cache.restore, place), partial(cache.assume, 0)):
        model.logits([ar_segment(cache, [8, 9], 3)])
        leave()
        with pytest.raises(ValueError, match="pending"):
            cache.commit(range(2))


def test_checkpoints(model: ReferenceModel) -> None:
    cache = filled(model, list(range(10)))
    assert cache.checkpoint() == Checkpoint(10)
    assert cache.checkpoint(4) == Checkpoint(4)
    for length in (-1, 11):
        with pytest.raises(ValueError, match="no checkpoint"):
            cache.checkpoint(length)
        with pytest.raises(ValueError, match="no checkpoint"):
            cache.restore(Checkpoint(length))
    cache.restore(Checkpoint(4))
    assert_same(model, cache, filled(model, range(4)))
    cache.assume(60)
    assert cache.length == cache.capacity == 64
    with pytest.raises(ValueError, match="no room"):
        cache.assume(1)
    assert cache.fit(TREE) == len(TREE)


def test_choices_are_drawn_from_the_logits(model: ReferenceModel) -> None:
    """Of a chain along what is drawn, of a tree along its branch, of a block all."""
    prompt = [5, 6, 7, 8]
    seeded = Sampler(SamplingSettings(temperature=0.8, seed=3, repeat_penalty=1.3))
    for sampler in (GREEDY, seeded):
        cache = filled(model, prompt)
        history = [*prompt, 9]
        (logits,) = model.logits([ar_segment(cache, [9], 4)])
        best = sampler.draw(logits[0], history)
        assert best is not None
        draw = Draw(sampler, history, detail=True)
        verified, block = model.forward(
            [
                ar_segment(cache, [9, best.token, 0], 4, draw=replace(draw, top=3)),
                block_of(model, cache, 9, 5, 4, draw=draw),
            ]
        )
        assert verified[0] is not None
        assert verified[0].token == best.token
        assert verified[0].logprobs is not None
        assert len(verified[0].logprobs.top) == 3
        assert verified[1] is not None, "it follows the one before"
        assert (verified[2] is None) == (verified[1].token != 0)
        (rows,) = model.logits([block_of(model, cache, 9, 5, 4)])
        prefix = list(history)
        for row, choice in zip(rows, block, strict=True):
            assert choice == sampler.draw(row, prefix, detail=True)
            assert choice is not None
            prefix.append(choice.token)
        (tree,) = model.forward(
            [ar_segment(cache, [9, 1, best.token, 2], 4, parents=(-1, 0, 0, 2), draw=draw)]
        )
        assert [choice is not None for choice in tree][:3] == [True, False, True]


def test_what_a_pass_must_not_do(model: ReferenceModel) -> None:
    cache, draw = model.new_cache(8), Draw(GREEDY, [1])
    for segments in (
        [],
        [ar_segment(cache, [1], 1, draw=draw)],
        [ar_segment(cache, list(range(9)), 0, draw=draw)],
        [block_of(model, cache, 1, 4, 1, draw=draw)],
        [block_of(model, cache, 1, 4, 0, draw=draw), ar_segment(cache, [1], 0, draw=draw)],
        [ar_segment(cache, [1], 0, draw=draw)] * 2,
        [ar_segment(cache, [1], 0, draw=draw, taps=(model.config.n_layers + 2,))],
        [ar_segment(cache, [1], 0, draw=draw, taps=(-1,))],
        [ar_segment(cache, [1], 0)],
    ):
        model.logits([ar_segment(cache, [1], 0)])
        with pytest.raises(ValueError, match=r"segment|cache|rows|pass|tap"):
            model.forward(segments)
        assert cache.length == 0
        if segments:
            with pytest.raises(ValueError, match="pending"):
                cache.commit([0])


def test_tokens_and_heads_that_the_model_lacks(model: ReferenceModel, tmp_path: Path) -> None:
    cache, draw = model.new_cache(8), Draw(GREEDY, [1])
    for token in (-1, model.config.n_vocab):
        with pytest.raises(
            OrthrusError, match=rf"token {token} is outside the vocabulary of 4096;"
        ):
            model.forward([ar_segment(cache, [1, token], 0, draw=draw)])
    with ModelFile.open(write_model(tmp_path / "base.gguf", "qwen2")) as file:
        plain = ReferenceModel(file)
    with pytest.raises(OrthrusError, match="Tiny has no diffusion heads; use --strategy ar"):
        plain.forward([diffusion_segment(plain.new_cache(8), 1, 2, 4, 0, draw=draw)])


def test_a_cache_beyond_memory_is_refused(model: ReferenceModel) -> None:
    with pytest.raises(OrthrusError, match=r"needs .* GiB of key/value cache"):
        model.new_cache(1 << 45)
