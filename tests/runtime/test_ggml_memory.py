"""The memory that is predicted for ggml, against what it takes."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
from synthetic_model import model_shape, uniform
from synthetic_model import write_model as write_synthetic

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cache_layout import BATCH_ROWS, cache_layout, cache_rows, spare_rows
from orthrus_gguf.runtime.ggml import cache as runtime_cache
from orthrus_gguf.runtime.ggml import memory
from orthrus_gguf.runtime.ggml import model as runtime_model
from orthrus_gguf.runtime.ggml.cache_layout import ar_rows
from orthrus_gguf.runtime.ggml.shape import Shape, Share

TYPES = gguf.GGMLQuantizationType

SHAPES = [
    model_shape(n_layers=3, n_head=4, n_head_kv=2, head_dim=64),
    model_shape(n_layers=2, n_embd=512, n_ff=1536, n_head=16, n_head_kv=1, head_dim=96),
    model_shape(n_layers=2, block_size=None, n_vocab=4000),
    model_shape(n_layers=2, block_size=200),
]
CACHES = [("f16", "f16"), ("f32", "f16"), ("q8_0", "q8_0"), ("q4_0", "f32"), ("f16", "q4_0")]


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("names", CACHES)
@pytest.mark.parametrize("context", [1, 64, 1000, 4096])
def test_the_cache_takes_what_is_said(
    config: ModelConfig, names: tuple[str, str], context: int
) -> None:
    """Byte for byte what ggml's cache reserves."""
    layout = cache_layout(config, *names)
    rows = cache_rows(context, spare_rows(config))
    with runtime_cache._reserve(layout, context, rows) as reserved:
        assert memory.cache_bytes(config, layout, context) == len(reserved)
    assert (
        0
        <= memory.cache_bytes(config, layout, context) - context * layout.row_bytes()
        <= ((max(128, config.block_size or 0) + 64) * layout.row_bytes() + 64 * config.n_layers)
    )


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("names", [("f16", "f16"), ("q8_0", "q8_0")])
def test_buffers_bound_what_graphs_take(
    tmp_path: Path, config: ModelConfig, names: tuple[str, str]
) -> None:
    """ggml's own allocator on real graphs: never above the estimate, and not far below."""
    path, context = tmp_path / "model.gguf", 4096
    write_synthetic(load_library().api, path, config, uniform(TYPES.Q8_0))
    layout = cache_layout(config, *names)
    block = config.block_size or 1
    with ExitStack() as stack:
        file = stack.enter_context(ModelFile.open(path))
        model = stack.enter_context(
            runtime_model.GgmlModel.load(
                file, threads=1, cache_type_k=names[0], cache_type_v=names[1]
            )
        )
        cache = model.new_cache(context)
        assert cache.rows == cache_rows(context, spare_rows(config))
        worst = 0
        for columns in (512, 1024, 2048, cache.rows):
            rows = ar_rows(config, layout, columns, BATCH_ROWS)
            passes = [(rows, 0, 1), (block, 0, block)]
            if config.has_heads:
                passes += [(0, block, block), (block, block, 2 * block)]
                passes += [(block // 2, block, block + 1)]
            for ar, diffusion, wanted in passes:
                share = Share(cache.serial, ar, diffusion, columns)
                model._graphs.get([cache], Shape((share,), wanted))
                before = worst
                worst = model._graphs.buffer_bytes
                if worst > before:
                    bound = memory.graph_bytes(config, layout, ar, diffusion, columns, wanted)
                    assert bound / 1.35 < worst <= bound
        assert worst <= memory.buffer_bytes(config, layout, context) < 2 * worst


def test_buffers_grow_with_the_context() -> None:
    """But for the prompt's rows, which shrink in steps as the scores of each grow."""
    for names in CACHES:
        layout = cache_layout(SHAPES[0], *names)
        sizes = [memory.buffer_bytes(SHAPES[0], layout, 1 << power) for power in range(20)]
        assert all(later > 0.95 * sooner for sooner, later in pairwise(sizes))
        assert sizes[-1] > 3 * sizes[0]
