"""Host time per token of `Sampler.draw` by settings, on a large vocabulary.

    python tests/bench/draw_time.py [--vocab 151936] [--draws 300]

Logits are normal with a few high ones, as a model's are. Lowest tenth, median and 95 %, in
microseconds, as a Markdown table. (It also runs on the sampler before choices, whose methods were
`sample` and `choose`: put that checkout first on PYTHONPATH.)
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from orthrus_gguf.sampling import Sampler, SamplingSettings

SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "default": {},
    "default, repeat penalty 1.1": {"repeat_penalty": 1.1},
    "top-k off": {"top_k": 0},
    "temperature alone": {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
}


def methods(sampler: Any) -> dict[str, Callable[[Any, list[int]], Any]]:
    if hasattr(sampler, "draw"):
        return {
            "token": lambda logits, prefix: sampler.draw(logits, prefix),
            "detail": lambda logits, prefix: sampler.draw(logits, prefix, detail=True),
        }
    return {"token": sampler.sample, "detail": sampler.choose}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--draws", type=int, default=300)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    rows = rng.normal(0, 2, (16, options.vocab)).astype(np.float32)
    for row in rows:
        row[rng.integers(0, options.vocab, 20)] += 12 * rng.random(20, np.float32)
    prefix = rng.integers(0, options.vocab, 500).tolist()
    print("| settings | asked for | 10 % | median µs | 95 % |\n|---|---|---:|---:|---:|")
    for name, flags in SETTINGS.items():
        sampler = Sampler(SamplingSettings(seed=1, **flags))  # type: ignore[arg-type]
        for what, method in methods(sampler).items():
            seconds = []
            for i in range(options.draws):
                before = time.perf_counter()
                method(rows[i % len(rows)], prefix)
                seconds.append(time.perf_counter() - before)
            seconds.sort()
            low, high = (seconds[int(share * (len(seconds) - 1))] for share in (0.1, 0.95))
            figures = [f"{1e6 * value:.0f}" for value in (low, statistics.median(seconds), high)]
            print(f"| {name} | {what} | {' | '.join(figures)} |")


if __name__ == "__main__":
    main()
