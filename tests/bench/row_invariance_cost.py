"""What row invariance costs in matrix products: rows apart, as the runtime does, or together.

    python tests/bench/row_invariance_cost.py

128 rows times a [3072, 1024] matrix on one thread, medians of 7. "Together" lets ggml choose any
kernel that it has for many rows.
"""

from __future__ import annotations

import statistics
import time

import gguf
import numpy as np

from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.ggml.quantize import quantize
from orthrus_gguf.ggml.tensors import Scratch, multiply_rows

OUTPUTS, COLUMNS, ROWS, REPETITIONS = 3072, 1024, 128, 7
TYPES = gguf.GGMLQuantizationType


def seconds(api: Ggml, qtype: gguf.GGMLQuantizationType, *, together: bool) -> float:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((OUTPUTS, COLUMNS)).astype(np.float32)
    times = []
    with Scratch(api, threads=1, reference=not together) as scratch:
        if qtype is TYPES.F16:
            w = scratch.tensor(weights.astype(np.float16))
        else:
            w = scratch.tensor(quantize(api, weights, qtype), qtype, (OUTPUTS, COLUMNS))
        x = scratch.tensor(rng.standard_normal((ROWS, COLUMNS)).astype(np.float32))
        if together:
            y = api.mul_mat(scratch.context, w, x)
        else:
            y = multiply_rows(api, scratch.context, w, x, COLUMNS, ROWS)
        for _ in range(REPETITIONS):
            start = time.perf_counter()
            scratch.compute(y, (ROWS, OUTPUTS))
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    library = load_library()
    print("| type | rows apart, ms | together, ms | apart / together |\n|---|--:|--:|--:|")
    for qtype in (TYPES.Q4_K, TYPES.Q6_K, TYPES.Q8_0, TYPES.Q4_0, TYPES.F16, TYPES.F32):
        apart = seconds(library.api, qtype, together=False)
        together = seconds(library.api, qtype, together=True)
        ratio = apart / together
        print(f"| {qtype.name} | {apart * 1e3:.1f} | {together * 1e3:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
