"""Several sequences in one pass on the CUDA runtime (stand-ins): each as it is alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from cuda_models import FakeGraphs, filled, stand_in
from gguf import GGMLQuantizationType as T
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_lists import mixed, of_one_sequence, parents_of_trees
from synthetic_model import model_shape, write_model

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.trees import tree_layout
from orthrus_gguf.runtime.protocol import Cache, Logits, Segment, View, ar_segment, depths, path_to

TOKENS: list[int] = np.random.default_rng(0).integers(0, 300, 400).tolist()
MASK = 319
LENGTHS = st.sampled_from((0, 3, 40, 63, 64, 65))


@pytest.fixture(scope="module", params=["f16", "q8_0"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[CudaModel]:
    """A little model of random weights; graphs that replay what they recorded."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("company") / "model.gguf"
    config = model_shape(n_layers=2, n_embd=64, n_ff=64, n_head=2, n_head_kv=1, block_size=24)
    write_model(load_library().api, path, config, lambda name: T.F16)
    kinds = {"cache_type_k": request.param, "cache_type_v": request.param}
    with stand_in(path, capture=FakeGraphs(), **kinds) as model:
        yield model


def by_sequence(segments: Sequence[Segment]) -> list[list[int]]:
    """Numbers of the segments of each sequence."""
    found: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        found.setdefault(id(segment.cache), []).append(number)
    return list(found.values())


@st.composite
def companies(draw: st.DrawFn, model: CudaModel) -> list[Segment]:
    """Segments of two to four sequences, on caches of different sizes."""
    lengths = draw(st.lists(LENGTHS, min_size=2, max_size=4))
    caches = [
        filled(model, TOKENS[:length], 160 + 7 * number) if length else model.new_cache(160)
        for number, length in enumerate(lengths)
    ]
    return draw(mixed([draw(of_one_sequence(cache, MASK)) for cache in caches]))


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_company_changes_nothing(model: CudaModel, data: st.DataObject) -> None:
    """Logits of rows and blocks, and what is committed afterwards, to the bit."""
    segments = data.draw(companies(model))
    alone: dict[int, Logits] = {}
    for numbers in by_sequence(segments):
        own = model.logits([segments[number] for number in numbers])
        alone.update(zip(numbers, own, strict=True))
    together = model.logits(segments)
    for number, logits in enumerate(together):
        what = f"{segments[number].view.value} rows of segment {number}"
        np.testing.assert_array_equal(logits, alone[number], what)
    paths = {}
    for number, segment in enumerate(segments):
        if segment.view is View.AR:
            row = data.draw(st.integers(-1, len(segment) - 1))
            path = list(range(row + 1))
            if segment.parents is not None and path:
                path = path_to(row, segment.parents)
            cast(Cache, segment.cache).commit(path)
            paths[number] = [segment.tokens[i] for i in path]
    if not paths:
        return
    # One pass behind all of them moves what their trees left behind.
    behind = model.logits(
        [ar_segment(segments[n].cache, [7, 8], segments[n].cache.length) for n in paths]
    )
    for (number, tokens), logits in zip(paths.items(), behind, strict=True):
        start = segments[number].start
        plain = model.new_cache(200)
        for part in (TOKENS[:start], tokens):
            for token in part:
                model.logits([ar_segment(plain, [token], plain.length, wanted=range(0))])
                plain.commit(range(1))
        (expected,) = model.logits([ar_segment(plain, [7, 8], plain.length)])
        np.testing.assert_array_equal(logits, expected, f"behind segment {number}")


@settings(deadline=None)
@given(parents_of_trees(), st.integers(0, 70))
def test_tree_layouts(parents: list[int], start: int) -> None:
    """Every row finds its ancestors where its branch looks for them, and nothing is in the way."""
    tree = tree_layout(parents, start)
    depth = depths(parents)
    assert sorted(tree.order) == list(range(len(parents)))
    held: dict[int, int] = {}  # column → row
    for row, place in enumerate(tree.places):
        for column in (place, *tree.more[row]):
            assert start <= column < tree.columns
            assert held.setdefault(column, row) == row
    for branch in tree.branches:
        for row in branch.rows:
            for ancestor in path_to(row, parents):
                column = start + depth[ancestor]
                place = column + (branch.shift if column >= branch.edge else 0)
                assert held[place] == ancestor
        rows = [depth[row] for row in branch.rows]
        assert rows == sorted(rows)
    for row in range(len(parents)):
        moves = tree.moves(path_to(row, parents))
        assert not {source for source, _ in moves} & {target for _, target in moves}


def test_trees_near_the_end_of_the_context(model: CudaModel) -> None:
    """`fit` says what a pass takes; what it refuses is an error, not an overrun."""
    parents = [-1, *[0] * 40]
    cache = filled(model, TOKENS[:8], 10)
    assert cache.fit(parents) == 41
    (logits,) = model.logits([ar_segment(cache, TOKENS[:41], 8, parents=parents)])
    assert len(logits) == 41
    cache.commit([0, 40])
    assert cache.length == 10
    # Leaves of one long branch, which each of them has a copy of.
    comb = [-1, 0, 0, *range(2, 12), *[12] * 30]
    tight = filled(model, TOKENS[:8], 40)
    room = tight.fit(comb)
    assert 13 < room < len(comb)
    layouts = [tree_layout(comb[:rows], 8) for rows in (room, room + 1)]
    assert [tight.holds(layout) for layout in layouts] == [True, False]
    rows = len(model.logits([ar_segment(tight, [1] * room, 8, parents=comb[:room])])[0])
    assert rows == room
    with pytest.raises(ValueError, match="ask `fit` first"):
        model.logits([ar_segment(tight, [1] * (room + 1), 8, parents=comb[: room + 1])])
    roomy = model.new_cache(400)
    long = [-1, 0, *range(79)]
    assert roomy.fit(long) == 64
    with pytest.raises(ValueError, match="tree of 81 rows, at most 64 fit"):
        model.logits([ar_segment(roomy, [1] * 81, 0, parents=long)])


# --- a cache alone ---


def bare_cache(model: CudaModel, capacity: int = 10) -> CudaCache:
    return model.new_cache(capacity)


def test_bookkeeping(model: CudaModel) -> None:
    cache = bare_cache(model)
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit([])
    model.logits([ar_segment(cache, [1, 2, 3], 0)])
    for wrong in ([1], [0, 2], range(4)):
        with pytest.raises(ValueError, match="are not the first of 3 that are pending"):
            cache.commit(wrong)
    cache.commit(range(2))
    assert cache.length == 2
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit(range(1))
    place = cache.checkpoint()
    model.logits([ar_segment(cache, [4], 2)])
    cache.restore(place)
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit(range(1))
    cache.assume(5)
    assert cache.length == 7
    assert cache.checkpoint(3).length == 3
    for length in (-1, 8):
        with pytest.raises(ValueError, match="no place to come back to"):
            cache.checkpoint(length)
    cache.restore(cache.checkpoint(1))
    assert cache.length == 1
    with pytest.raises(ValueError, match="no room for 10 rows after 1 of 10"):
        cache.assume(10)


def test_what_is_pending_is_dropped_by_the_next_pass(model: CudaModel) -> None:
    cache = bare_cache(model, 32)
    tree = ar_segment(cache, [1, 2, 3], 0, parents=(-1, 0, 0))
    model.logits([tree])
    with pytest.raises(ValueError, match="no path of the tree"):
        cache.commit([0, 1, 2])
    model.logits([ar_segment(cache, [5, 6], 0)])
    cache.commit(range(2))
    plain = filled(model, [5, 6], 32)
    found, expected = model.logits([ar_segment(c, [9], 2) for c in (cache, plain)])
    np.testing.assert_array_equal(found, expected)


def test_dropped_caches_free_their_memory(model: CudaModel) -> None:
    """At once, without waiting for the garbage collector: on a GPU that would be gigabytes."""
    import gc
    import weakref

    cache = filled(model, [1, 2, 3], 20)
    assert cache.planes is not None
    values = weakref.ref(cache.planes[0].values)
    gc.disable()
    try:
        del cache
        assert values() is None
    finally:
        gc.enable()
