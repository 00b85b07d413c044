"""Write the synthetic Qwen3-0.6B-shaped Q4_K_M file of BENCHMARKS.md: random weights, real shape.

PYTHONPATH=tests/helpers python tests/bench/synthetic_0_6b.py OUT.gguf [--heads]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from synthetic_model import q4_k_m, qwen3_0_6b, write_model

from orthrus_gguf.ggml.library import load_library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, metavar="OUT.gguf")
    parser.add_argument("--heads", action="store_true", help="an orthrus model, not a plain qwen3")
    args = parser.parse_args()
    config = qwen3_0_6b(32 if args.heads else None)
    write_model(load_library().api, args.output, config, q4_k_m(config.n_layers))


if __name__ == "__main__":
    main()
