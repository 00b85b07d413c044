"""Decode a tiny model with the real kernels in Triton's interpreter; print JSON.

    TRITON_INTERPRET=1 python cuda_interpreted.py FILE CAPABILITY

A process of its own: the interpreter has to be chosen before triton is imported.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch

from orthrus_gguf.decode import prefill
from orthrus_gguf.drafting.policy import Plan, Strategy
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.decoding import decode_on_device
from orthrus_gguf.runtime.cuda.kernels import STAND_INS, TRITON, Kernels
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

PROMPT = [5, 9, 2]
SAMPLED = SamplingSettings(temperature=0.9, seed=11, top_k=4)
RUNS = {
    "ar": (Plan(Strategy.AR, 0), SamplingSettings(temperature=0)),
    "two-pass": (Plan(Strategy.TWO_PASS, 3), SamplingSettings(temperature=0)),
    "fused": (Plan(Strategy.FUSED, 2, 2), SamplingSettings(temperature=0)),
    "sampled": (Plan(Strategy.TWO_PASS, 3), SAMPLED),
}


def outputs(path: str, capability: int, kernels: Kernels) -> dict[str, list[int]]:
    """Five tokens for every run."""
    found = {}
    with (
        ModelFile.open(path) as file,
        CudaModel.load(
            file, device="cpu", kernels=kernels, capability=capability, cache_type_k="q8_0"
        ) as model,
    ):
        for name, (plan, settings) in RUNS.items():
            cache = model.new_cache(len(PROMPT) + 5)
            logits = prefill(model, cache, PROMPT)
            tokens = [*PROMPT, Sampler(settings).sample(logits, PROMPT)]
            list(decode_on_device(model, cache, settings, tokens, plan, 4))
            found[name] = tokens[len(PROMPT) :]
    return found


def error(path: str, capability: int) -> float:
    """Squared error over squared norm of the logits of one mixed pass, against the stand-ins."""
    results = []
    for kernels in (TRITON, STAND_INS):
        with (
            ModelFile.open(path) as file,
            CudaModel.load(file, device="cpu", kernels=kernels, capability=capability) as model,
        ):
            segments = [ar_segment(PROMPT, 0), diffusion_segment(7, 63, 4, 2)]
            results.append(np.concatenate(model.forward(segments, model.new_cache(16))))
    found, expected = results
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


if __name__ == "__main__":
    torch.set_num_threads(1)
    file, card = sys.argv[1], int(sys.argv[2])
    print(
        json.dumps(
            {
                "kernels": outputs(file, card, TRITON),
                "stand-ins": outputs(file, card, STAND_INS),
                "error": error(file, card),
            }
        )
    )
