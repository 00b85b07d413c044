"""What rows cost on a CPU: passes of 1 to 64 rows on our two CPU runtimes, turn by turn.

    python tests/bench/cpu_rows.py MODEL.gguf [-t THREADS] [--contexts 64 4096] [-r TURNS]

Prints a markdown table: milliseconds of a pass (the fastest of a turn, then the median of the
turns), beside a pass of one row, and the aggregate rate of several conversations that decode in one
pass beside one alone. Only ratios of one run mean something on a shared machine.
"""

from __future__ import annotations

import argparse
import statistics
import time

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Draw, Model, Segment, ar_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

ROWS = (1, 2, 4, 8, 16, 32, 64)
SEQUENCES = (1, 2, 4)


def segment(model: Model, rows: int, context: int, capacity: int) -> Segment:
    """A verify pass of `rows` rows on a cache that counts as holding `context`."""
    cache = model.new_cache(capacity)
    cache.assume(context)
    draw = Draw(Sampler(SamplingSettings(temperature=0)), [0] * (context + 1))
    return ar_segment(cache, [0] * rows, context, draw=draw)


def fastest(model: Model, segments: list[Segment], seconds: float = 0.2) -> float:
    """The fastest of the passes that fit into a moment, of three at least, in seconds."""
    best, began, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - began < seconds:
        before = time.perf_counter()
        model.forward(segments)
        best = min(best, time.perf_counter() - before)
        runs += 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-r", "--turns", type=int, default=5)
    parser.add_argument("--contexts", type=int, nargs="+", default=[64])
    parser.add_argument("--runtimes", nargs="+", default=["cpu", "ggml"])
    args = parser.parse_args()
    capacity = max(args.contexts) + max(ROWS) + 8
    with ModelFile.open(args.model) as file:
        models = {
            name: load_model(file, RuntimeSettings(RuntimeName(name), threads=args.threads))
            for name in args.runtimes
        }
        cases = {
            (name, context, rows): [segment(model, rows, context, capacity)]
            for name, model in models.items()
            for context in args.contexts
            for rows in ROWS
        }
        several = {
            (name, n): [segment(model, 1, 64, capacity) for _ in range(n)]
            for name, model in models.items()
            for n in SEQUENCES
        }
        times: dict[tuple[str, int, int], list[float]] = {case: [] for case in cases}
        together: dict[tuple[str, int], list[float]] = {case: [] for case in several}
        for _ in range(args.turns):
            for case, segments in cases.items():
                times[case].append(fastest(models[case[0]], segments))
            for pair, segments in several.items():
                together[pair].append(fastest(models[pair[0]], segments))
        for model in models.values():
            print(f"- {model.description}")
        print("\n| runtime | context |" + "".join(f" {rows} |" for rows in ROWS))
        print("|---|--:|" + "--:|" * len(ROWS))
        for name in models:
            for context in args.contexts:
                one = times[name, context, 1]
                row = []
                for rows in ROWS:
                    mine = times[name, context, rows]
                    ratio = statistics.median(a / b for a, b in zip(mine, one, strict=True))
                    row.append(f" {1e3 * statistics.median(mine):.2f} ms (×{ratio:.2f}) |")
                print(f"| {name} | {context} |" + "".join(row))
        print("\n| conversations in a pass | " + " | ".join(map(str, SEQUENCES)) + " |")
        print("|---|" + "--:|" * len(SEQUENCES))
        for name in models:
            one = together[name, 1]
            gains = [
                statistics.median(n * b / a for a, b in zip(together[name, n], one, strict=True))
                for n in SEQUENCES
            ]
            print(
                f"| {name}, tokens per second beside one |"
                + "".join(f" {g:.2f} × |" for g in gains)
            )
        for model in models.values():
            model.close()


if __name__ == "__main__":
    main()
