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
from ggml_models import TYPES, loaded, small_file
from synthetic_model import model_shape

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.ggml import graph_pool
from orthrus_gguf.runtime.ggml.graph import OTHER_TENSORS, TENSORS_PER_LAYER, Shape, build_graph
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment

DemoFile = Callable[..., Path]


# --- graphs ---


def test_a_shape_is_built_once(demo_file: DemoFile) -> None:
    with loaded(demo_file("f16")) as model:
        cache = model.new_cache(64)
        for start in range(0, 30, 3):
            model.forward([ar_segment([1, 2, 3], start)], cache)
        assert model._graphs.built == 1
        model.forward([ar_segment([1, 2, 3], 30, wanted=range(1))], cache)
        model.forward([ar_segment([1, 2], 33)], cache)
        model.forward([diffusion_segment(1, 4095, 3, 35)], cache)
        assert model._graphs.built == 4


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
            cache.truncate(0)
            found = model.forward([ar_segment(range(rows), 0)], cache)[0].copy()
            np.testing.assert_array_equal(found, expected.setdefault(rows, found))
            sizes.append(model._graphs.buffer_bytes)
        assert sizes == sorted(sizes)
        assert sizes[-1] > sizes[0]


def test_graphs_of_dropped_caches_are_freed(demo_file: DemoFile) -> None:
    with loaded(demo_file("f32")) as model:
        for _ in range(3):
            model.forward([ar_segment([1], 0)], model.new_cache(8))
            gc.collect()
        model.forward([ar_segment([1], 0)], model.new_cache(8))
        assert len(model._graphs._graphs) <= 2


@pytest.mark.parametrize("cache_type_v", ["f16", "q8_0"])
def test_headers_leave_room_in_their_context(tmp_path: Path, cache_type_v: str) -> None:
    """ggml aborts when a context is full, so the largest graph must stay well below."""
    path = small_file(tmp_path, TYPES.F32, model_shape(n_layers=5, tied=False))
    with loaded(path, cache_type_v=cache_type_v) as model:
        api = model._api
        graph = build_graph(
            api, model.config, model._weights, model.new_cache(64), Shape(3, 5, 2, 64)
        )
        tensors = TENSORS_PER_LAYER * 5 + OTHER_TENSORS
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
        segment = ar_segment(range(30), 0)
        expected = [model.forward([segment], model.new_cache(32))[0].copy() for model in models]
        failures: list[int] = []

        def work(number: int) -> None:
            for _ in range(20):
                found = models[number].forward([segment], models[number].new_cache(32))[0]
                if not np.array_equal(found, expected[number]):
                    failures.append(number)

        workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
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
            segments = [ar_segment(range(20), 0), diffusion_segment(3, 4095, 16, 15)]
            results.append([a.copy() for a in model.forward(segments, model.new_cache(64))])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_loading_and_closing_leaks_nothing(demo_file: DemoFile) -> None:
    def once() -> None:
        with loaded(demo_file("f16")) as model:
            cache = model.new_cache(256)
            model.forward([ar_segment(range(40), 0)], cache)
            model.forward([diffusion_segment(3, 4095, 16, 40)], cache)

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
