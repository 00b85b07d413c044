"""Log probabilities against stock llama.cpp (the `xllamacpp` wheel), another build of another ggml.

Random models, so that every part matters: a wrong RoPE constant shows at once.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import xllamacpp
from synthetic_model import TypeRule, model_shape, q4_k_m, uniform, write_model

from orthrus_gguf.config import ModelConfig, Rope
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model_file import ModelFile
from orthrus_gguf.runtime.ggml import GgmlModel
from orthrus_gguf.segments import ar_segment

TYPES = gguf.GGMLQuantizationType
PROMPT: list[int] = np.random.default_rng(5).integers(0, 300, 90).tolist()
TOP = 20

PLAIN = model_shape(block_size=None)
YARN = model_shape(block_size=None, rope=Rope(10000.0, 4.0, 1024, 1.0))
LOPSIDED = model_shape(block_size=None, n_head=6, n_head_kv=3, head_dim=96, tied=False)


def stock_logprobs(path: Path) -> dict[int, float]:
    """The TOP most likely next tokens after PROMPT, with their log probabilities."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 256, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": PROMPT, "n_predict": 1, "temperature": 0, "n_probs": TOP, "cache_prompt": False}
    )
    (entry,) = answer["choices"][0]["logprobs"]["content"]
    return {top["id"]: top["logprob"] for top in entry["top_logprobs"]}


@pytest.mark.parametrize(
    ("config", "rule", "tolerance"),
    [
        (PLAIN, uniform(TYPES.F32), 3e-3),
        (YARN, uniform(TYPES.F32), 3e-3),
        (LOPSIDED, uniform(TYPES.F32), 3e-3),
        (PLAIN, uniform(TYPES.F16), 0.01),
        (YARN, uniform(TYPES.Q8_0), 0.05),
        (PLAIN, q4_k_m(2), 0.1),
    ],
    ids=["f32", "f32-yarn", "f32-lopsided", "f16", "q8_0-yarn", "q4_k_m"],
)
def test_logprobs(tmp_path: Path, config: ModelConfig, rule: TypeRule, tolerance: float) -> None:
    path = tmp_path / "model.gguf"
    write_model(load_library().api, path, config, rule)
    expected = stock_logprobs(path)
    assert len(expected) == TOP
    with (
        ModelFile.open(path) as file,
        GgmlModel.load(file, threads=1, cache_type_k="f32", cache_type_v="f32") as model,
    ):
        last = range(len(PROMPT) - 1, len(PROMPT))
        (logits,) = model.forward([ar_segment(PROMPT, 0, wanted=last)], model.new_cache(128))
        logprobs = logits[0] - np.logaddexp.reduce(logits[0].astype(np.float64))
    for token, logprob in expected.items():
        assert logprobs[token] == pytest.approx(logprob, abs=tolerance)
