"""Against stock llama.cpp (the `xllamacpp` wheel): its log probabilities, and its newer ggml.

Random models, so that every part matters: a wrong RoPE constant shows at once.
"""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import pytest
import xllamacpp
from ggml_models import append
from numpy.typing import NDArray
from stock import Stock
from synthetic_model import TypeRule, model_shape, q4_k_m, uniform, write_model

from orthrus_gguf.ggml import selftest
from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.ggml.library import Library, load_library
from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.ggml import model as model_module
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment

TYPES = gguf.GGMLQuantizationType
PROMPT: list[int] = np.random.default_rng(5).integers(0, 300, 90).tolist()
TOP = 50
PLAIN = model_shape(block_size=None)
YARN = model_shape(block_size=None, rope=Rope(10000.0, 4.0, 1024, 1.0))
LOPSIDED = model_shape(block_size=None, n_head=6, n_head_kv=3, head_dim=96, tied=False)


@pytest.mark.parametrize("cache_type", ["f32", "f16"])
@pytest.mark.parametrize(
    ("config", "rule"),
    [
        (PLAIN, uniform(TYPES.F32)),
        (YARN, uniform(TYPES.F32)),
        (LOPSIDED, uniform(TYPES.F32)),
        (PLAIN, uniform(TYPES.F16)),
        (YARN, uniform(TYPES.Q8_0)),
        (PLAIN, q4_k_m(2)),
    ],
    ids=["f32", "f32-yarn", "f32-lopsided", "f16", "q8_0-yarn", "q4_k_m"],
)
def test_logprobs(tmp_path: Path, config: ModelConfig, rule: TypeRule, cache_type: str) -> None:
    path = tmp_path / "model.gguf"
    write_model(load_library().api, path, config, rule)
    (entry,) = Stock(path, cache_type, 256).greedy(PROMPT, 1, TOP)
    expected = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
    assert len(expected) == TOP
    with (
        ModelFile.open(path) as file,
        GgmlModel.load(file, threads=1, cache_type_k=cache_type, cache_type_v=cache_type) as model,
    ):
        last = range(len(PROMPT) - 1, len(PROMPT))
        (logits,) = model.logits([ar_segment(model.new_cache(128), PROMPT, 0, wanted=last)])
        logprobs = logits[0] - np.logaddexp.reduce(logits[0].astype(np.float64))
    for token, logprob in expected.items():
        # An F32 sum that differs in its last bit may round to another F16 on its way.
        assert logprobs[token] == pytest.approx(logprob, abs=1e-4)


# --- its ggml, which has kernels for many rows at once ---


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> Library:
    """The ggml inside xllamacpp (0.26: tiled products, llamafile's, repacking), used by us."""
    path = Path(str(xllamacpp.xllamacpp.__file__))
    api = Ggml(ctypes.CDLL(str(path)))
    library = Library(api, api.version().decode(), path)
    monkeypatch.setattr(model_module, "load_library", lambda: library)
    return library


def test_a_newer_ggml_passes_the_self_test(newer: Library) -> None:
    assert newer.version != load_library().version
    assert selftest.failure(newer.api) is None


@pytest.mark.parametrize("weights", ["F32", "F16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_a_newer_ggml_keeps_rows_invariant(tmp_path: Path, newer: Library, weights: str) -> None:
    path = tmp_path / "model.gguf"
    rule = uniform(gguf.GGMLQuantizationType[weights])
    write_model(newer.api, path, model_shape(), rule)
    for cache_type, reference in product(("f16", "q8_0"), (True, False)):
        with (
            ModelFile.open(path) as file,
            GgmlModel.load(
                file, threads=1, cache_type_k=cache_type, cache_type_v=cache_type
            ) as model,
        ):
            # Even when told to use them: no kernel for many rows fits the way rows are laid out.
            newer.api.backend_cpu_set_use_ref(model._backend, reference)
            alone = rows_in_passes_of(model, 1)
            for rows in (2, 33, 90):
                np.testing.assert_array_equal(rows_in_passes_of(model, rows), alone)


def rows_in_passes_of(model: GgmlModel, rows: int) -> NDArray[np.float32]:
    """AR logits of PROMPT, `rows` rows per pass, each pass with a block behind them."""
    cache = model.new_cache(128)
    logits = []
    for i in range(0, len(PROMPT), rows):
        tokens = PROMPT[i : i + rows]
        block = diffusion_segment(cache, 5, 319, 16, i + len(tokens))
        logits.append(append(model, cache, tokens, block))
    return np.concatenate(logits)
