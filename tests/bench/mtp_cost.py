"""What MTP drafts cost on a CPU: a token of a chain, following the text, and whole cycles.

    python tests/bench/mtp_cost.py MODEL.gguf [-t THREADS] [-c CONTEXT] [-r TURNS] [--draft-ids N]

The model's file holds the block. Passes of one to nine rows, chains of one to eight tokens and what
the block must learn of committed rows run turn by turn, the fastest of each turn. Beside plain
decoding, as medians of the turns: what each takes in passes of one row; what a cycle of a chain
takes, when all of its tokens are accepted; and the acceptance of a token (given those before) from
which on a cycle pays. Only ratios of one run mean something on a shared machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Draw, ar_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

DEPTHS = (1, 2, 3, 4, 6, 8)


def break_even(cost: float, depth: int) -> float | None:
    """The acceptance p at which 1 + p + ... + p^depth tokens are worth `cost` plain passes."""
    low, high = 0.0, 1.0
    if depth + 1 < cost:
        return None
    for _ in range(40):
        p = (low + high) / 2
        low, high = (p, high) if sum(p**i for i in range(depth + 1)) < cost else (low, p)
    return high


def timed(work: Callable[[], object], runs: int = 3) -> float:
    """The fastest of a few runs, in seconds."""
    best = float("inf")
    for _ in range(runs):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


def cases(model: ModelWithDrafter, context: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    cache: Any = model.new_cache(context + 16)
    cache.assume(context)
    beside = model.new_draft_cache(context + 16)
    beside.assume(context)
    draw = Draw(Sampler(SamplingSettings(temperature=0)), [0] * (context + 1))
    tap = (model.config.n_layers + 1,)

    def verify(rows: int) -> Callable[[], object]:
        segment = ar_segment(cache, [0] * rows, context, draw=draw, taps=tap)
        return lambda: model.forward([segment])

    def draft(depth: int) -> Callable[[], object]:
        return lambda: model.forward([beside.segment(0, context, depth, draw)])

    def learn(rows: int) -> Callable[[], object]:
        hidden = np.ones((1, rows, model.config.n_embd), np.float32)

        def run() -> None:
            beside.follow([0] * (context + rows), context, hidden)
            beside.ready()
            beside.go_back(context)

        beside.checkpoint()
        return run

    found = {f"pass {rows}": verify(rows) for rows in (1, *(d + 1 for d in DEPTHS))}
    found |= {f"chain {depth}": draft(depth) for depth in DEPTHS}
    return found | {f"learn {rows}": learn(rows) for rows in (1, *(d + 1 for d in DEPTHS))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-c", "--context", type=int, default=64)
    parser.add_argument("-r", "--turns", type=int, default=5)
    parser.add_argument("--draft-ids", type=int, help="as orthrus-run takes it")
    args = parser.parse_args()
    with ExitStack() as stack:
        file = stack.enter_context(ModelFile.open(args.model))
        asked = RuntimeSettings(RuntimeName.CPU, threads=args.threads)
        block = MtpFile.inside(file)
        block.cut(args.draft_ids or block.ids)
        loaded = load_model(file, asked, drafter=block)
        model = stack.enter_context(closing(loaded))
        assert isinstance(model, ModelWithDrafter)
        work = cases(model, args.context)
        times: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(args.turns):
            for name, run in work.items():
                times[name].append(timed(run))
    one = times["pass 1"]
    share = {
        name: statistics.median(a / b for a, b in zip(found, one, strict=True))
        for name, found in times.items()
    }
    print(f"{args.model}: a pass of one row {1e3 * statistics.median(one):.1f} ms\n")
    print("| depth | verify | chain | learn | cycle | pays from |\n|--:|--:|--:|--:|--:|--:|")
    for depth in DEPTHS:
        parts = [share[f"{what} {n}"] for what, n in (("pass", depth + 1), ("chain", depth))]
        parts.append(share[f"learn {depth + 1}"])
        least = break_even(sum(parts), depth)
        pays = "never" if least is None else f"{100 * least:.0f} %"
        cells = [f"{part:.2f}" for part in (*parts, sum(parts))]
        print(f"| {depth} | {' | '.join(cells)} | {pays} |")


if __name__ == "__main__":
    main()
