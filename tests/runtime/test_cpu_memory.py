"""The memory that is predicted for the native kernels, against what they take: byte for byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from cpu_models import kernels, loaded, small_file
from synthetic_model import model_shape

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import block_config
from orthrus_gguf.model.shapes import HYBRID_SHAPES
from orthrus_gguf.runtime.cache_layout import BATCH_ROWS, CACHE_TYPES, cache_layout, spare_rows
from orthrus_gguf.runtime.cpu import memory
from orthrus_gguf.runtime.cpu.buffers import Buffers
from orthrus_gguf.runtime.cpu.buffers import buffer_bytes as bytes_of_rows
from orthrus_gguf.runtime.cpu.cache import CpuCache
from orthrus_gguf.runtime.cpu.state import RECORDS, HybridCpuCache, StateLayout

SHAPES = [
    model_shape(n_layers=3, n_head=4, n_head_kv=2, head_dim=64),
    model_shape(n_layers=2, n_embd=512, n_ff=1536, n_head=16, n_head_kv=1, head_dim=96),
    model_shape(n_layers=2, block_size=None, n_vocab=4001),
    model_shape(n_layers=2, block_size=200),
]


@pytest.mark.parametrize("config", SHAPES)
@pytest.mark.parametrize("k", CACHE_TYPES)
@pytest.mark.parametrize("context", [1, 17, 64, 1000])
def test_the_cache_takes_what_is_said(config: ModelConfig, k: str, context: int) -> None:
    for v in CACHE_TYPES:
        layout = cache_layout(config, k, v)
        cache = CpuCache(layout, context, spare_rows(config))
        said = memory.cache_bytes(config, layout, context)
        assert cache.keys.nbytes + cache.values.nbytes == said
        most = (max(128, config.block_size or 0) + 96) * layout.row_bytes()
        assert 0 <= said - context * layout.row_bytes() <= most


@pytest.mark.parametrize(
    ("name", "state", "window", "record", "token", "block"),
    [
        ("0.8b", 18, 1.3, 0.70, 12, 2),
        ("2b", 18, 1.3, 0.70, 12, 2),
        ("4b", 48, 2.3, 1.31, 32, 4),
        ("9b", 48, 2.3, 1.31, 32, 4),
        ("27b", 144, 5.6, 3.38, 64, 4),
    ],
)
def test_a_sequence_of_a_hybrid(
    name: str, state: int, window: float, record: float, token: int, block: int
) -> None:
    """Released shapes: MiB of state, of what the convolution looks back on (kept in a checkpoint)
    and of a row's record; KiB of keys and values per token in f16, the model's and its MTP
    block's."""
    config = HYBRID_SHAPES["qwen3.5-9b" if name == "27b" else f"qwen3.5-{name}"]
    assert config.hybrid is not None
    if name == "27b":
        more = replace(config.hybrid, n_value_heads=48)
        config = replace(config, n_layers=64, n_head=24, hybrid=more)
    layout, sizes = cache_layout(config, "f16", "f16"), StateLayout.of(config)
    cache = HybridCpuCache(layout, 1024, spare_rows(config), sizes, kernels())
    assert cache.memory.nbytes == cache.saved.nbytes == state << 20
    assert (sizes.kept_bytes - cache.memory.nbytes) / 2**20 == pytest.approx(window, abs=0.05)
    assert cache.records.nbytes / RECORDS / 2**20 == pytest.approx(record, abs=0.01)
    assert layout.row_bytes() == token << 10
    assert cache_layout(block_config(config), "f16", "f16").row_bytes() == block << 10
    own = (cache.memory, cache.saved, cache.records, cache.keys, cache.values)
    assert sum(part.nbytes for part in own) == memory.cache_bytes(config, layout, 1024)
    cache.close()


@pytest.mark.parametrize("config", SHAPES)
def test_buffers_take_what_is_said(config: ModelConfig) -> None:
    rows = BATCH_ROWS + spare_rows(config)
    arrays = [a for a in vars(Buffers(kernels(), config, rows)).values() if hasattr(a, "nbytes")]
    quantized = Buffers(kernels(), config, rows).q
    taken = sum(array.nbytes for array in (*arrays, *quantized))
    assert taken == bytes_of_rows(kernels(), config, rows)
    said = [memory.buffer_bytes(kernels(), config, threads) for threads in (1, 2)]
    assert taken < said[0] < said[1] < 2 * taken


@pytest.mark.parametrize("qtype", ["F32", "Q8_0", "Q4_K", "Q6_K"])
def test_weights_take_what_is_said(tmp_path: Path, qtype: str) -> None:
    """And little more than in the file: a twelfth, for whole panels and scales of whole bytes."""
    path = small_file(tmp_path, gguf.GGMLQuantizationType[qtype])
    with ModelFile.open(path) as file, loaded(path) as model:
        matrices = [info for info in file.tensors.values() if len(info.shape) > 1]
        said = sum(memory.weight_bytes(kernels(), file.config, info) for info in matrices)
        assert model._weights._block.nbytes == said
        assert said <= 1.084 * sum(info.n_bytes for info in matrices)
        norms = [info for info in file.tensors.values() if len(info.shape) == 1]
        assert all(
            memory.weight_bytes(kernels(), file.config, info) == info.n_bytes for info in norms
        )


def test_a_cache_larger_than_memory_shows_the_arithmetic() -> None:
    config = model_shape()
    with pytest.raises(OrthrusError) as caught:
        CpuCache(cache_layout(config, "f16", "q8_0"), 1 << 36, 128)
    message = str(caught.value)
    assert "\n" not in message
    assert "2 layers x 2 key/value heads x 64 elements x 3.0625 bytes (f16/q8_0) x" in message
    assert "choose a smaller one with -c" in message


@pytest.mark.parametrize("capacity", [0, -5])
def test_a_context_needs_tokens(capacity: int) -> None:
    with pytest.raises(OrthrusError, match=f"a context of {capacity} tokens"):
        CpuCache(cache_layout(model_shape(), "f16", "f16"), capacity, 128)


def test_new_memory_holds_zeros() -> None:
    """Hidden columns are multiplied with weights of zero."""
    for k in CACHE_TYPES:
        cache = CpuCache(cache_layout(model_shape(), k, k), 100, 128)
        assert not np.frombuffer(cache.keys.tobytes(), np.uint8).any()
        assert not cache.values.any()
