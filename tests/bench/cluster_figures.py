"""What Ray Serve costs: the time of its hop, and memory, beside orthrus-server with the same flags.

    python tests/bench/cluster_figures.py BASE.gguf [-t THREADS] [-r TURNS] [--replicas 2]

One client asks both turn by turn; drafts are off. Prints markdown: medians of the turns, and the
fastest, which other work on the machine disturbs least; and proportional memory (pages that several
processes share are counted once, in parts). Needs the extra `ray`; Linux only.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from http.client import HTTPConnection
from json import dumps
from pathlib import Path
from statistics import median

from server_figures import Server, measure, served, text

#: Pieces of a Ray process's title → what it is called in the table.
PROCESSES = {
    "ray::ServeReplica:default:Replica": "a replica",
    "ray::ServeReplica:default:Door": "the door",
    "ray::ProxyActor": "Ray Serve's proxy",
    "ray": "the rest of Ray",
}


@contextmanager
def cluster(args: argparse.Namespace) -> Iterator[Server]:
    """The application, with so many replicas, from the time on when all of them answer."""
    import ray
    from ray import serve

    from orthrus_gguf.cluster.app import build

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    ray.init(num_cpus=args.replicas, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": args.port})
        flags = {"c": args.ctx, "np": args.slots, "threads": args.threads, "strategy": "ar"}
        serve.run(build({"model": args.model, "replicas": args.replicas, **flags}))
        yield Server("Ray Serve", args.port, 0.0)
        serve.shutdown()
    finally:
        ray.shutdown()


def streamed(args: argparse.Namespace, server: Server, turn: int) -> tuple[float, ...]:
    """Seconds to the first piece, and between two of them."""
    times = server.ask(text(args.prompt, turn), args.tokens).times
    return times[0], (times[-1] - times[0]) / (len(times) - 1)


def small(server: Server, turn: int) -> tuple[float, ...]:
    """Seconds of a request that needs no model."""
    began = time.perf_counter()
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/tokenize", dumps({"content": "some words"}))
    assert connection.getresponse().read().startswith(b'{"tokens"')
    connection.close()
    return (time.perf_counter() - began,)


def processes(wanted: Callable[[str], str | None]) -> Mapping[str, list[float]]:
    """Proportional memory of processes in MiB, by what `wanted` calls their command lines."""
    found: dict[str, list[float]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = wanted((folder / "cmdline").read_text().replace("\0", " "))
            lines = (folder / "smaps_rollup").read_text().splitlines() if name else []
        except OSError:
            continue
        sizes = [int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")]
        if name and sizes:
            found.setdefault(name, []).append(sizes[0])
    return found


def of_ray(command: str) -> str | None:
    if "/ray/" not in command and not command.startswith("ray::"):
        return None
    return next((name for part, name in PROCESSES.items() if part in command), None)


def print_memory(own: Mapping[str, list[float]]) -> None:
    print("\n| processes | | MiB each | MiB |\n|---|--:|--:|--:|")
    for name, sizes in own.items():
        each = f"{min(sizes):.0f}–{max(sizes):.0f}" if len(sizes) > 1 else f"{sizes[0]:.0f}"
        print(f"| {name} | {len(sizes)} | {each} | {sum(sizes):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-r", "--turns", type=int, default=20)
    parser.add_argument("-n", "--tokens", type=int, default=32)
    parser.add_argument("-p", "--prompt", type=int, default=32)
    parser.add_argument("-c", "--ctx", type=int, default=2048)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8151)
    args = parser.parse_args()
    args.strategy, args.temperature = "ar", 0.0
    with ExitStack() as stack:
        alone = stack.enter_context(served("orthrus-server", args, args.slots))
        servers = [stack.enter_context(cluster(args)), alone]
        for turn in range(2 * args.replicas):
            for server in servers:
                server.ask(text(8, turn), 4)
        print(
            f"{args.model}, {args.threads} threads, {args.turns} turns, replicas: {args.replicas}"
        )
        heads = [f"{server.name}, {of}, ms" for of in ("median", "fastest") for server in servers]
        print(f"\n| | {' | '.join(heads)} |\n|---|--:|--:|--:|--:|")
        rows = (
            (("no model (`/tokenize`)",), measure(servers, 5 * args.turns, small)),
            (
                ("first piece", "between pieces"),
                measure(servers, args.turns, partial(streamed, args)),
            ),
        )
        for titles, row in rows:
            for place, title in enumerate(titles):
                cells = " | ".join(
                    f"{of(found[place] for found in row[server.name]) * 1e3:.2f}"
                    for of in (median, min)
                    for server in servers
                )
                print(f"| {title} | {cells} |")
        port = str(alone.port)
        print_memory(
            {
                **processes(lambda c: "orthrus-server" if f"--port {port} " in c else None),
                **processes(of_ray),
            }
        )


if __name__ == "__main__":
    main()
