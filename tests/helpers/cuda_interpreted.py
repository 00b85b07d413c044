"""Decode a tiny model with the real kernels in Triton's interpreter; print JSON.

    TRITON_INTERPRET=1 python cuda_interpreted.py FILE CAPABILITY [RUN ...]

RUN: one of RUNS.
A process of its own: the interpreter has to be chosen before triton is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from cuda_models import FakeGraphs, filled, generate
from numpy.typing import NDArray

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.kernels import STAND_INS, TRITON, Kernels
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import Draw, ar_segment, diffusion_segment, path_to
from orthrus_gguf.sampling import Sampler, SamplingSettings

PROMPT = [5, 9, 2]
TREE = (-1, 0, 0, 1, 2, 2)
GREEDY = SamplingSettings(temperature=0)
SAMPLED = SamplingSettings(temperature=0.9, seed=11, top_k=4, repeat_penalty=1.1)
RUNS = {
    "ar": ("ar", GREEDY),
    "two-pass": ("two-pass@3", GREEDY),
    "fused": ("fused@2x2", GREEDY),
    "tree": ("two-pass@2+tree=3", GREEDY),
    "sampled": ("two-pass@3", SAMPLED),
}


@contextmanager
def loaded(path: str, capability: int, kernels: Kernels) -> Iterator[CudaModel]:
    with (
        ModelFile.open(path) as file,
        CudaModel.load(
            file, device="cpu", kernels=kernels, capability=capability, cache_type_k="q8_0",
            capture=FakeGraphs(),
        ) as model,
    ):  # fmt: skip
        yield model


def outputs(path: str, capability: int, kernels: Kernels, runs: Sequence[str]) -> dict[str, Any]:
    """Four tokens for every run; and what one pass says of three sequences, rows drawn in every
    way, before and behind a committed path of a tree."""
    with loaded(path, capability, kernels) as model:
        found: dict[str, Any] = {
            name: generate(model, PROMPT, RUNS[name][1], RUNS[name][0], 4)[0] for name in runs
        }
        caches = [filled(model, PROMPT * n, 32) for n in (1, 2, 3)]
        rows = []
        for start in (3, 6):
            history = PROMPT * 4
            asked = [
                ar_segment(
                    caches[0], [5, 1, 2, 3, 4, 6], caches[0].length, parents=TREE,
                    draw=Draw(Sampler(SAMPLED), history, top=2),
                ),
                ar_segment(
                    caches[1], [5, 9], caches[1].length, draw=Draw(Sampler(GREEDY), history)
                ),
                diffusion_segment(
                    caches[2], 5, 63, 4, start, draw=Draw(Sampler(GREEDY), history, detail=True)
                ),
            ]  # fmt: skip
            found_here = model.forward(asked)
            rows += [[c and (c.token, c.second) for c in choices] for choices in found_here]
            caches[0].commit(path_to(4, TREE))
            caches[1].commit(range(2))
        return {**found, "company": rows}


def error(path: str, capability: int) -> float:
    """Squared error over squared norm of the logits of mixed passes, against the stand-ins."""
    results: list[NDArray[np.float32]] = []
    for kernels in (TRITON, STAND_INS):
        with loaded(path, capability, kernels) as model:
            cache = model.new_cache(16)
            segments = [ar_segment(cache, PROMPT, 0), diffusion_segment(cache, 7, 63, 4, 2)]
            parts = model.logits(segments)
            cache.commit(range(3))
            parts += model.logits([ar_segment(cache, [1, 2, 3, 4, 5, 6], 3, parents=TREE)])
            cache.commit(path_to(5, TREE))
            parts += model.logits([ar_segment(cache, [7, 8], 6)])
            results.append(np.concatenate(parts))
    found, expected = results
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


if __name__ == "__main__":
    torch.set_num_threads(1)
    file, card, wanted = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    print(
        json.dumps(
            {
                "kernels": outputs(file, card, TRITON, wanted),
                "stand-ins": outputs(file, card, STAND_INS, wanted),
                "error": error(file, card),
            }
        )
    )
