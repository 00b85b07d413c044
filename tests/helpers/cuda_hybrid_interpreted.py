"""Run a tiny hybrid with the real kernels in Triton's interpreter; print JSON.

    TRITON_INTERPRET=1 python cuda_hybrid_interpreted.py FILE

Squared error over squared norm of logits against the stand-ins, pass by pass: a prompt, drafts of
which some stay, a tree, what follows a path of it, and another sequence beside that; then blocks
behind accepted rows, one of them behind a row of its pass.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import torch
from cuda_models import FakeGraphs, small_heads
from numpy.typing import NDArray

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.kernels import STAND_INS, TRITON, Kernels
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment


def results(path: str, kernels: Kernels) -> list[NDArray[np.float32]]:
    """Logits of each pass."""
    with (
        ModelFile.open(path) as file,
        CudaModel.load(file, device="cpu", kernels=kernels, capture=FakeGraphs()) as model,
    ):
        cache, other, found = model.new_cache(32), model.new_cache(32), []
        for tokens, tree, kept in (
            ([5], None, [0]),
            ([9, 2, 7], None, [0, 1]),
            ([3, 4, 8], (-1, 0, 0), [0, 2]),
        ):
            found += model.logits([ar_segment(cache, tokens, cache.length, parents=tree)])
            cache.commit(kept)
        found += model.logits([ar_segment(cache, [6], 5), ar_segment(other, [11], 0)])
        cache.commit([0])
        mask = model.config.mask_token or 0
        blocks = [diffusion_segment(cache, 9, mask, 2, start) for start in (6, 7)]
        found += model.logits([ar_segment(cache, [9], 6), *blocks])
        return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with small_heads():
        found, expected = (results(sys.argv[1], kernels) for kernels in (TRITON, STAND_INS))
    pairs = zip(found, expected, strict=True)
    print(json.dumps([float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in pairs]))
