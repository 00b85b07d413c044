"""The cache: types, sizes, and refusals with the arithmetic shown."""

from __future__ import annotations

import gc
import mmap
import re
import weakref

import pytest
from synthetic_model import model_shape, qwen3_0_6b

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.runtime.cache_layout import cache_layout
from orthrus_gguf.runtime.ggml.cache import GgmlCache
from orthrus_gguf.runtime.protocol import Cache, Checkpoint
from orthrus_gguf.runtime.trees import tree_layout


def small_cache(capacity: int = 10, k: str = "f16", v: str = "f16") -> GgmlCache:
    return GgmlCache(load_library().api, cache_layout(model_shape(), k, v), capacity, 32)


def test_bookkeeping() -> None:
    cache: Cache = small_cache()
    assert (cache.length, cache.capacity) == (0, 10)
    cache.assume(7)
    place = cache.checkpoint()
    cache.restore(cache.checkpoint(5))
    assert cache.length == 5
    for length in (-1, 6):
        with pytest.raises(ValueError, match=f"no place to come back to: {length} of 5 rows"):
            cache.checkpoint(length)
        with pytest.raises(ValueError, match="no place to come back to"):
            cache.restore(Checkpoint(length))
    with pytest.raises(ValueError, match="no place to come back to: 7 of 5 rows"):
        cache.restore(place)
    for rows in (6, -1):
        with pytest.raises(ValueError, match="no room"):
            cache.assume(rows)
    cache.assume(5)
    assert cache.length == 10
    cache.restore(place)
    assert cache.length == 7


def test_what_is_pending_is_committed_once_or_dropped() -> None:
    cache = small_cache()
    for rows in ([], [0]):
        with pytest.raises(ValueError, match="no AR rows are pending"):
            cache.commit(rows)
    for rows in ([1], [0, 2], [0, 1, 2, 3, 4], [1, 0], [-1]):
        cache.hold(4)
        with pytest.raises(ValueError, match="not the first of 4 that are pending"):
            cache.commit(rows)
        assert cache.length == 0
        cache.commit(range(0))
    cache.hold(4)
    cache.commit([0, 1, 2])
    assert cache.length == 3
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit([])
    for forget in (
        cache.drop,
        lambda: cache.restore(cache.checkpoint()),
        lambda: cache.assume(0),
    ):
        cache.hold(2)
        forget()
        with pytest.raises(ValueError, match="no AR rows are pending"):
            cache.commit([0])
        assert cache.length == 3
    cache.hold(2)
    assert cache.checkpoint().length == 3, "what is pending is not part of it"
    cache.commit(range(2))
    assert cache.length == 5


@pytest.mark.parametrize(
    ("k", "v", "expected"),
    [
        # 28 layers x 8 heads x 128 elements x (2 + 2) bytes, from the shape of Qwen3-0.6B
        ("f16", "f16", 28 * 8 * 128 * 4),
        ("f32", "f16", 28 * 8 * 128 * 6),
        ("q8_0", "q8_0", 28 * 8 * 128 * 34 / 32 * 2),
        ("q4_0", "f32", 28 * 8 * 128 * (18 / 32 + 4)),
    ],
)
def test_bytes_per_row(k: str, v: str, expected: float) -> None:
    assert cache_layout(qwen3_0_6b(), k, v).row_bytes() == expected


def test_types_that_cannot_be_used() -> None:
    with pytest.raises(OrthrusError, match="-ctv bf16: expected one of f32, f16, q8_0, q4_0"):
        cache_layout(model_shape(), "f16", "bf16")
    with pytest.raises(OrthrusError, match="-ctk q8_0: needs a head size that is a multiple of 32"):
        cache_layout(model_shape(head_dim=48), "q8_0", "f16")
    assert cache_layout(model_shape(head_dim=48), "f16", "f32").words == "f16/f32"


def test_a_cache_larger_than_memory_shows_the_arithmetic() -> None:
    with pytest.raises(OrthrusError) as caught:
        GgmlCache(load_library().api, cache_layout(qwen3_0_6b(), "f16", "f16"), 1 << 30, 128)
    message = str(caught.value)
    assert "\n" not in message
    pattern = (
        r"28 layers x 8 key/value heads x 128 elements x 4 bytes \(f16/f16\) x 1073741952 rows"
        r" = ([\d.]+) GiB, this machine has ([\d.]+) GiB"
    )
    found = re.search(pattern, message)
    assert found is not None
    assert float(found[1]) == pytest.approx(28 * 8 * 128 * 4 * 1073741952 / 2**30, abs=0.1)
    assert float(found[1]) > float(found[2])


def test_a_refused_mapping_is_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OrthrusError, match="does not fit: 2 layers x 2 key/value heads x 64"):
        small_cache()


@pytest.mark.parametrize("capacity", [0, -5])
def test_a_context_needs_tokens(capacity: int) -> None:
    with pytest.raises(OrthrusError, match=f"a context of {capacity} tokens"):
        small_cache(capacity)


def test_it_frees_itself() -> None:
    cache = small_cache()
    gone = weakref.ref(cache)
    finalizer = cache._finalizer
    del cache
    gc.collect()
    assert gone() is None
    assert not finalizer.alive


def test_closing_twice_is_harmless() -> None:
    cache = small_cache()
    assert not cache.closed
    cache.hold(2, tree_layout([-1, 0], 0))
    cache.close()
    cache.close()
    assert cache.closed
    with pytest.raises(ValueError, match="no AR rows are pending"):
        cache.commit([0, 1])
