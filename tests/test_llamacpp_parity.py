"""Stock llama.cpp (the `xllamacpp` wheel) runs our split base and agrees on every greedy token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xllamacpp

from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.engine import Session
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.tokenizer import load_tokenizer

N = 64
MORE_PROMPTS = (
    "class Queue:\n    def put(self, item):\n",
    "def main(argv=None):\n    parser = argparse.ArgumentParser(",
    "import json\n\n\ndef load(path):\n    with open(path) as f:\n",
    "    for i in range(10):\n        print(",
    "while True:\n    line = f.readline()\n    if not",
    "#!/usr/bin/env python3\n",
    '    """Parse the given string.',
    "    def test_repr(self):\n",
    "x = [1, 2, 3]\ny = {",
    "except (OSError, ValueError) as e:\n",
    "from collections import ",
    "__all__ = [",
)


def llamacpp_tokens(base: Path, prompts: list[list[int]]) -> list[list[int]]:
    """N greedy tokens per prompt from stock llama.cpp: one thread, cache in f32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.verbosity = 512, 1, 0
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    outputs = []
    for prompt in prompts:
        answer = server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": N,
                "temperature": 0,
                "n_probs": 1,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        content = answer["choices"][0]["logprobs"]["content"]
        outputs.append([entry["id"] for entry in content])
    return outputs


@pytest.mark.parametrize("type_name", ["f32", pytest.param("f16", marks=pytest.mark.slow)])
def test_greedy_tokens_equal_stock_llamacpp(
    type_name: str, demo_file: Callable[..., Path], golden: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    base = demo_file(type_name, split=True)
    with ModelFile.open(base, base.with_name(base.stem + "-heads.gguf")) as file:
        tokenizer = load_tokenizer(file.metadata, path=base, n_vocab=file.config.n_vocab)
        model = ReferenceModel(file)
    session = Session(model, tokenizer, 512)
    sampling = SamplingSettings(temperature=0, banned=tuple(sorted(tokenizer.eog)))
    policy = FixedPolicy(parse("two-pass"), model.config)
    prompts = [case["prompt_ids"] for case in golden["cases"]]
    prompts += [tokenizer.encode(text) for text in MORE_PROMPTS]
    ours = []
    for prompt in prompts:
        generation = session.generate(Request(tuple(prompt), sampling, policy, max_tokens=N))
        list(generation)
        ours.append(list(generation.result.output))
    assert ours == llamacpp_tokens(base, prompts)
