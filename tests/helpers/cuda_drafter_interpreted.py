"""Run a tiny drafter's network with the real kernels in Triton's interpreter; print JSON.

    TRITON_INTERPRET=1 python cuda_drafter_interpreted.py FILE DRAFTER CAPABILITY

Squared error over squared norm against the stand-ins: of keys and values that are made of taps, and
of the logits of a block.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from numpy.typing import NDArray
from orthrus_kernels.attention.kv_cache import dequantize_planes

from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.drafter import CudaNetwork
from orthrus_gguf.runtime.cuda.kernels import STAND_INS, TRITON, Kernels
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import diffusion_segment


def results(
    path: str, drafter: str, capability: int, kernels: Kernels
) -> dict[str, NDArray[np.floating]]:
    """By name. Two rows, then one, then a block that sees them."""
    with (
        ModelFile.open(path) as file,
        DrafterFile.open(drafter, file.config, file.metadata) as beside,
        CudaModel.load(
            file, device="cpu", kernels=kernels, capability=capability, cache_type_k="q8_0",
            drafter=beside,
        ) as model,
    ):  # fmt: skip
        network = CudaNetwork.load_for(beside, model)
        cache, rng, found = network.new_cache(16), np.random.default_rng(0), {}
        shape = (len(network.taps), 3, network.config.n_embd)
        taps = (50 * rng.standard_normal(shape)).astype(np.float32)
        network.inject(cache, [0, 0], taps[:, :2])
        network.inject(cache, [0], taps[:, 2:])
        assert cache.length == 3
        for name, planes in zip(("keys", "values"), cache.planes or (), strict=True):
            found[name] = dequantize_planes(planes.layer(0))[:, :3].double().numpy()
        (found["block"],) = network.logits([diffusion_segment(cache, 7, 63, 4, 3)])
        return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    words = sys.argv[1], sys.argv[2], int(sys.argv[3])
    found, expected = (results(*words, kernels) for kernels in (TRITON, STAND_INS))
    errors = {
        name: float(((found[name] - wanted) ** 2).sum() / (wanted**2).sum())
        for name, wanted in expected.items()
    }
    print(json.dumps(errors))
