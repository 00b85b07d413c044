"""Conversions that only move numbers (bf16 → BF16, F16) beside `cp` of the same checkpoint.

    PYTHONPATH=tests/helpers python tests/bench/copy_speed.py FOLDER [--layers N] [-r TURNS]

Makes FOLDER/checkpoint if it does not exist: N layers (470 MB each) in the shape of
Orthrus-Qwen3-8B with a tiny vocabulary, in bf16. Needs room for twice that. Every turn copies with
`cp` and `sync FILE`, then converts to BF16 and to F16, which ends with the data on the disk too.
Each is timed as a process; the conversions once more from inside, without Python's start and
imports. The order changes from turn to turn, and the ratio to `cp` is taken turn by turn. Prints a
markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from hf_checkpoint import CONFIG, shapes, tokenizer, write_json

TYPES = ("bf16", "f16")
INNER = """\
import sys, time
from orthrus_converters.cli import main
started = time.perf_counter()
code = main()
print(time.perf_counter() - started)
sys.exit(code)
"""


def write_checkpoint(folder: Path, n_layers: int) -> None:
    """Random bfloat16 weights of about the spread that trained ones have."""
    config: dict[str, Any] = CONFIG | {
        "hidden_size": 4096,
        "head_dim": 128,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": n_layers,
        "rms_norm_eps": 1e-6,
    }
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", tokenizer())
    header, end = {}, 0
    for name, shape in shapes(config).items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    values = np.random.default_rng(0).standard_normal(1 << 24).astype(np.float32) / 64
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while end > 0:
            end -= file.write(data[:end])


def seconds(command: list[str]) -> tuple[float, str]:
    """How long a command takes, and what it printed."""
    started = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("-r", "--turns", type=int, default=5)
    args = parser.parse_args()
    checkpoint, output = args.folder / "checkpoint", args.folder / "output"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, args.layers)
    weights = checkpoint / "model.safetensors"
    copy = ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(weights), str(output)]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ("cp", *TYPES)}
    for turn in range(args.turns + 1):
        for name in random.sample(list(taken), len(taken)):
            inside = 0.0
            if name == "cp":
                whole, _ = seconds(copy)
            else:
                convert = [sys.executable, "-c", INNER, str(checkpoint), str(output)]
                whole, printed = seconds([*convert, "--type", name])
                inside = float(printed.split()[-1])
            output.unlink()
            os.sync()  # a disk that is told of the deletion keeps others waiting
            if turn:  # the first turn brings the source into the page cache
                taken[name].append((whole, inside or whole))
    gigabytes = weights.stat().st_size / 1e9
    print(f"{gigabytes:.2f} GB, {args.turns} turns\n")
    print("| | process, s | range | of cp's speed | without start-up |\n|---|--:|--:|--:|--:|")
    for name, values in taken.items():
        wholes = [pair[0] for pair in values]
        ratios = [
            [cp[0] / pair[i] for cp, pair in zip(taken["cp"], values, strict=True)] for i in (0, 1)
        ]
        cells = " | ".join(f"{100 * statistics.median(column):.0f} %" for column in ratios)
        print(
            f"| {name} | {statistics.median(wholes):.2f} | {min(wholes):.2f}–{max(wholes):.2f} |"
            f" {cells} |"
        )


if __name__ == "__main__":
    main()
