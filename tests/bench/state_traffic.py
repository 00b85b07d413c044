"""The recurrence of a hybrid's DeltaNet layers alone, beside what its bytes take to move.

    python tests/bench/state_traffic.py [--shape qwen3.5-0.8b] [-r TURNS]

One thread, through ctypes, no model: for 1 and 8 rows, all DeltaNet layers in turn apply as many
accepted rows to their state (read and written once) and scan the rows of the pass. The floor is the
same states read and written in place by NumPy (`x *= 1`), and the records and rows to look back on
copied. Fastest of the runs of a turn, then the median of the turns.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import numpy as np
from orthrus_cpu_kernels import library as k
from orthrus_cpu_kernels.library import LANES, Step, load

from orthrus_gguf.model.shapes import HYBRID_SHAPES
from orthrus_gguf.runtime.cache_layout import cache_layout, spare_rows
from orthrus_gguf.runtime.cpu.state import HybridCpuCache, StateLayout, tile_columns
from orthrus_gguf.runtime.recurrent import BACK

ROWS = (1, 8)


def fastest(work: Callable[[], None], seconds: float = 0.3) -> float:
    """The fastest of the runs that fit into a moment, in seconds."""
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        before = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - before)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(HYBRID_SHAPES), default="qwen3.5-0.8b")
    parser.add_argument("-r", "--turns", type=int, default=7)
    args = parser.parse_args()
    config, kernels = HYBRID_SHAPES[args.shape], load()
    hybrid, layout = config.hybrid, StateLayout.of(config)
    assert hybrid is not None
    cache = HybridCpuCache(
        cache_layout(config, "f16", "f16"), 64, spare_rows(config), layout, kernels
    )
    rng = np.random.default_rng(0)
    cache.memory[...] = rng.standard_normal(cache.memory.shape) / 8
    gates = -(-hybrid.n_value_heads // LANES) * LANES
    cache.records[...] = 0.1 * rng.standard_normal(cache.records.shape)
    cache.records[..., -gates:] = 0.9  # decays: states stay what they are in size

    def recur(rows: int) -> Callable[[], None]:
        convolved = 0.1 * rng.standard_normal((rows, hybrid.channels + 2 * gates))
        x, y = convolved.astype(np.float32), np.zeros((rows, hybrid.inner), np.float32)
        x[:, -2 * gates : -gates] = 0.9
        row, run = np.zeros(rows, k.STATE_ROW), np.zeros(1, k.RUN)
        row["record"], row["follows"] = BACK + rows + np.arange(rows), 1
        apply = np.arange(BACK, BACK + rows, dtype=np.int32)
        run["count"], run["applied"], run["apply"] = rows, rows, apply.ctypes.data
        step = Step(op=k.RECUR, tasks=hybrid.inner // tile_columns(hybrid), x=x.ctypes.data)
        step.n_head, step.n_head_kv = hybrid.n_value_heads, hybrid.n_key_heads
        step.head_dim, step.run, step.state_row = (
            *(hybrid.head_dim, run.ctypes.data, row.ctypes.data),
        )
        step.x_stride, step.y, step.y_stride = x.shape[1], y.ctypes.data, y.shape[1]
        places = [cache.states[layer:].ctypes.data for layer in range(layout.n_layers)]
        held = x, y, row, run, apply

        def work() -> None:
            for place in places:
                step.state = place
                kernels.library.orthrus_run_here(ctypes.addressof(step))
            assert held

        return work

    def floor(rows: int) -> Callable[[], None]:
        used = cache.records[:, : BACK + 2 * rows]
        to = np.empty_like(used)

        def work() -> None:
            np.multiply(cache.memory, np.float32(1), out=cache.memory)
            np.copyto(to, used)

        return work

    works = {(rows, name): f(rows) for rows in ROWS for name, f in
             (("scan", recur), ("floor", floor))}  # fmt: skip
    times: dict[tuple[int, str], list[float]] = {case: [] for case in works}
    for _ in range(args.turns):
        for case, work in works.items():
            times[case].append(fastest(work))
    print(f"{config.name}: state {cache.memory.nbytes / 2**20:.1f} MiB\n")
    print(
        "| rows | bytes | recurrence | GB/s | floor | beside the floor |\n|--:|--:|--:|--:|--:|--:|"
    )
    for rows in ROWS:
        moved = 2 * cache.memory.nbytes + 4 * layout.n_layers * (BACK + 2 * rows) * layout.record
        scan, least = times[rows, "scan"], times[rows, "floor"]
        ratio = statistics.median(a / b for a, b in zip(scan, least, strict=True))
        mine, its = statistics.median(scan), statistics.median(least)
        print(
            f"| {rows} | {moved / 2**20:.1f} MiB | {1e3 * mine:.2f} ms | {moved / mine / 1e9:.1f}"
            f" | {1e3 * its:.2f} ms | {ratio:.2f} |"
        )
    assert np.isfinite(cache.memory).all()


if __name__ == "__main__":
    main()
