"""Graphs, memory and threads of the ggml runtime."""

from __future__ import annotations

import gc
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ggml_models import TYPES, append, loaded, small_file
from synthetic_model import model_shape

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.ggml import graph_pool
from orthrus_gguf.runtime.ggml.graph import build_graph, tensor_count
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.ggml.shape import Shape, Share
from orthrus_gguf.runtime.protocol import Segment, View, ar_segment, diffusion_segment

DemoFile = Callable[..., Path]


# --- graphs ---


def test_a_shape_is_built_once(demo_file: DemoFile) -> None:
    with loaded(demo_file("f16")) as model:
        cache = model.new_cache(64)
        for _ in range(10):
            append(model, cache, [1, 2, 3])
        assert model._graphs.built == 1
        model.logits([ar_segment(cache, [1, 2, 3], 30, wanted=range(1))])
        model.logits([ar_segment(cache, [1, 2], 30)])
        model.logits([diffusion_segment(cache, 1, 4095, 3, 30)])
        assert model._graphs.built == 4
        other = model.new_cache(64)
        for _ in range(3):
            company = ar_segment(other, [5], other.length)
            append(model, cache, [1, 2], company)
            other.commit([0])
        assert model._graphs.built == 5
        taps = Segment(cache, View.AR, (1, 2), cache.length, range(0), taps=(1,))
        model.forward([taps])
        model.forward([taps])
        assert model._graphs.built == 6


@pytest.mark.parametrize("limit", [1, 2, 48])
def test_results_outlive_evictions_and_growth(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Graphs that lose their memory to a larger one, or their place to a newer one, come back."""
    monkeypatch.setattr(graph_pool, "MAX_GRAPHS", limit)
    with loaded(demo_file("f32")) as model:
        cache = model.new_cache(200)
        expected: dict[int, Any] = {}
        sizes = []
        for rows in (1, 2, 40, 1, 2, 120, 40, 2, 1):
            (found,) = model.logits([ar_segment(cache, range(rows), 0)])
            np.testing.assert_array_equal(found, expected.setdefault(rows, found))
            sizes.append(model._graphs.buffer_bytes)
            assert len(model._graphs._graphs) <= limit
        assert sizes == sorted(sizes)
        assert sizes[-1] > sizes[0]


def test_graphs_of_dropped_caches_are_freed(demo_file: DemoFile) -> None:
    with loaded(demo_file("f32")) as model:
        stays = model.new_cache(8)
        for _ in range(3):
            gone = model.new_cache(8)
            model.logits([ar_segment(gone, [1], 0)])
            model.logits([ar_segment(gone, [1], 0), ar_segment(stays, [1], 0)])
            del gone
            gc.collect()
        model.logits([ar_segment(stays, [1], 0)])
        assert [len(shape.shares) for shape in model._graphs._graphs] == [1]
        assert next(iter(model._graphs._graphs)).shares[0].cache == stays.serial


@pytest.mark.parametrize("sequences", [1, 2, 7])
@pytest.mark.parametrize("cache_type_v", ["f16", "q8_0"])
def test_headers_leave_room_in_their_context(
    tmp_path: Path, cache_type_v: str, sequences: int
) -> None:
    """ggml aborts when a context is full, so the largest graph must stay well below."""
    path = small_file(tmp_path, TYPES.F32, model_shape(n_layers=5, tied=False))
    with loaded(path, cache_type_v=cache_type_v) as model:
        api, caches = model._api, [model.new_cache(64) for _ in range(sequences)]
        for rows in ((3, 5, 64), (8, 0, 64, 32)):  # a chain and a block, or a tree
            shares = tuple(Share(cache.serial, *rows) for cache in caches)
            shape = Shape(shares, 2, tuple(range(7)))
            graph = build_graph(api, model.config, model._weights, caches, shape)
            tensors = tensor_count(5, shape)
            headers = api.graph_overhead_custom(tensors, False)
            used = (api.used_mem(graph.context) - headers) / api.tensor_overhead()
            assert used < 0.85 * tensors
            assert api.graph_n_nodes(graph.graph) < 0.85 * tensors
            api.free(graph.context)


# --- resources ---


def test_two_models_share_the_threads_from_two_python_threads(demo_file: DemoFile) -> None:
    expected: list[Any] = []
    with loaded(demo_file("f32")) as first, loaded(demo_file("q8_0")) as second:
        models = (first, second)
        assert first._pool is second._pool
        expected = [append(model, model.new_cache(32), range(30)) for model in models]
        failures: list[int] = []

        def work(number: int) -> None:
            for _ in range(20):
                found = append(models[number], models[number].new_cache(32), range(30))
                if not np.array_equal(found, expected[number]):
                    failures.append(number)

        workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1, 0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures


def test_threads_do_not_change_the_result(demo_file: DemoFile) -> None:
    results = []
    for threads in (1, 2, 3):
        with (
            ModelFile.open(demo_file("q8_0")) as file,
            GgmlModel.load(file, threads=threads) as model,
        ):
            cache = model.new_cache(64)
            segments = [
                ar_segment(cache, range(20), 0),
                diffusion_segment(cache, 3, 4095, 16, 15),
                ar_segment(model.new_cache(64), range(3), 0),
            ]
            results.append(model.logits(segments))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_loading_and_closing_leaks_nothing(demo_file: DemoFile) -> None:
    def once() -> None:
        with loaded(demo_file("f16")) as model:
            cache = model.new_cache(256)
            append(model, cache, range(40))
            model.logits([diffusion_segment(cache, 3, 4095, 16, 40)])

    for _ in range(5):
        once()
    gc.collect()
    before = resident_bytes()
    for _ in range(30):
        once()
    gc.collect()
    assert resident_bytes() - before < 4 << 20  # one model is 9 MB, its cache 1 MB


def resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak, which cannot shrink but must not grow either
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()
