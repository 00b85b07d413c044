"""Run a tiny MTP block with the real kernels in Triton's interpreter; print JSON.

    TRITON_INTERPRET=1 python cuda_mtp_interpreted.py FILE CAPABILITY

Squared error over squared norm against the stand-ins: of keys and values of committed rows, learned
in two passes, and of the probabilities that chains of two lengths have in one pass; and what those
draw, with either kernels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cuda_models import FakeGraphs
from mtp_models import stand_in_mtp
from orthrus_kernels.attention.kv_cache import dequantize_planes

from orthrus_gguf.runtime.cuda.kernels import STAND_INS, TRITON, Kernels
from orthrus_gguf.runtime.protocol import Draw, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

GREEDY = Sampler(SamplingSettings(temperature=0))


def results(path: str, capability: int, kernels: Kernels) -> dict[str, Any]:
    """By name."""
    settings: Any = {"kernels": kernels, "capability": capability}
    with stand_in_mtp(Path(path), ids=100, capture=FakeGraphs(), **settings) as model:
        network, found, rng = model._network, {}, np.random.default_rng(0)
        hidden = rng.standard_normal((1, 3, network.config.n_embd), np.float32)
        caches = [network.new_cache(16) for _ in range(2)]
        network.inject(caches[0], [5, 9], hidden[:, :2])
        network.inject(caches[0], [2], hidden[:, 2:])
        network.inject(caches[1], [7], hidden[:, :1])
        for name, planes in zip(("keys", "values"), caches[0].rows.planes, strict=True):
            found[name] = dequantize_planes(planes.layer(0))[:, :3].double().numpy()
        draw = Draw(GREEDY, [5, 9, 2, 11], detail=True)
        chains = network.forward(
            [
                diffusion_segment(cache, 11, 0, length, cache.length, draw=draw)
                for cache, length in zip(caches, (2, 1), strict=True)
            ]
        )
        drawn = [choice for chain in chains for choice in chain if choice]
        found["probabilities"] = np.array([choice.probability for choice in drawn])
        return {**found, "tokens": [(choice.token, choice.second) for choice in drawn]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[1], int(sys.argv[2])
    found, expected = (results(*words, kernels) for kernels in (TRITON, STAND_INS))
    names = ("keys", "values", "probabilities")
    errors = {
        name: float(((found[name] - expected[name]) ** 2).sum() / (expected[name] ** 2).sum())
        for name in names
    }
    print(json.dumps({**errors, "tokens": [found["tokens"], expected["tokens"]]}))
