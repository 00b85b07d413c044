"""Our server beside llama-server (that of the `xllamacpp` wheel): several conversations at once,
what a long prompt adds to answers under way, and what a grammar costs.

    python tests/bench/server_figures.py BASE.gguf [-t THREADS] [-r TURNS] [--conversations 1 2 4 8]

Both serve the same file from processes of their own and get the same requests, turn by turn,
through the same client; drafts are off unless --strategy says otherwise. Prints markdown: medians
of the turns. Only ratios of one run mean something on a shared machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

#: llama-server in a process of its own: it ends with its standard input.
STOCK = """\
import sys, xllamacpp
path, port, threads, slots, n_ctx = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.port, params.verbosity = path, port, 0
params.n_ctx, params.n_parallel, params.n_gpu_layers = n_ctx * slots, slots, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
sys.stdin.read()
"""

SCHEMA = {"type": "array", "items": {"type": "string"}, "minItems": 400}
WORDS = ("the", "quick", "brown", "fox", "reads", "one", "more", "book", "about", "far", "ships")


@dataclass
class Told:
    """An answer: when its pieces came (seconds since the request), and how many tokens it had."""

    times: list[float] = field(default_factory=list)
    tokens: int = 0
    generation: float = 0.0  # seconds, as the server reports them


@dataclass(frozen=True)
class Server:
    name: str
    port: int
    temperature: float

    def ask(
        self, prompt: str, tokens: int, heard: Callable[[], None] | None = None, **more: Any
    ) -> Told:
        """A streamed answer. heard: is called with each piece."""
        body = {"prompt": prompt, "n_predict": tokens, "stream": True, "seed": 1}
        body |= {"cache_prompt": False, "ignore_eos": True, "temperature": self.temperature}
        body |= more
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        told, began = Told(), time.perf_counter()
        connection.request(
            "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("content"):
                told.times.append(time.perf_counter() - began)
                if heard is not None:
                    heard()
            if event.get("stop"):
                told.tokens = event["timings"]["predicted_n"]
                told.generation = event["timings"]["predicted_ms"] / 1e3
        connection.close()
        return told


def text(tokens: int, number: int) -> str:
    """About so many tokens, which begin like no other text."""
    return f"{number} " + " ".join(WORDS[(i * 7 + number) % len(WORDS)] for i in range(tokens))


@contextmanager
def served(name: str, args: argparse.Namespace, slots: int) -> Iterator[Server]:
    """A server process, from the time on when it answers."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = int(found.getsockname()[1])
    words: list[object] = [sys.executable]
    if name == "llama-server":
        words += ["-c", STOCK, args.model, port, args.threads, slots, args.ctx]
    else:
        words += ["-m", "orthrus_gguf.cli.server", args.model, "--port", port, "-np", slots]
        words += ["-c", args.ctx, "-t", args.threads, "--strategy", args.strategy]
    process = subprocess.Popen(
        list(map(str, words)),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while True:
            assert process.poll() is None, f"{name} does not start"
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield Server(name, port, args.temperature)
    finally:
        process.kill()
        process.wait()


def together(
    args: argparse.Namespace, count: int, server: Server, turn: int
) -> tuple[float, float]:
    """So many conversations that begin at once: the median time to the first piece in seconds, and
    tokens per second of all of them, prompts included."""
    prompts = [text(args.prompt, 1000 * turn + 100 * count + i) for i in range(count)]
    began = time.perf_counter()
    with ThreadPoolExecutor(count) as threads:
        told = list(threads.map(lambda prompt: server.ask(prompt, args.tokens), prompts))
    seconds = time.perf_counter() - began
    return median(one.times[0] for one in told), sum(one.tokens for one in told) / seconds


def disturbed(args: argparse.Namespace, server: Server, turn: int) -> tuple[float, float, float]:
    """An answer under way while a long prompt comes: the median time between pieces before, the
    longest one after, and the long prompt's time to its first piece; seconds."""
    arrived = threading.Semaphore(0)
    with ThreadPoolExecutor(2) as threads:
        answer = threads.submit(server.ask, text(20, turn), args.tokens * 3, arrived.release)
        for _ in range(args.tokens // 2):
            arrived.acquire()
        long = threads.submit(server.ask, text(args.long, 50 + turn), 1)
        first = long.result().times
        times = answer.result().times
    gaps = [after - before for before, after in pairwise(times)]
    return median(gaps[: args.tokens // 2 - 1]), max(gaps[args.tokens // 2 - 1 :]), first[0]


def constrained(args: argparse.Namespace, server: Server, turn: int) -> tuple[float, float]:
    """Seconds per token of a free answer, and of one under a JSON schema."""
    found, bound = [], {"json_schema": SCHEMA, "ignore_eos": False}
    changes: tuple[dict[str, Any], ...] = ({}, bound)
    for more in changes:
        told = server.ask(text(20, 80 + turn), args.tokens, **more)
        found.append(told.generation / max(told.tokens - 1, 1))
    return found[0], found[1]


Row = dict[str, list[tuple[float, ...]]]


def measure(
    servers: list[Server], turns: int, what: Callable[[Server, int], tuple[float, ...]]
) -> Row:
    """What each server takes in each turn; who begins changes."""
    found: Row = {server.name: [] for server in servers}
    for turn in range(turns):
        for server in servers if turn % 2 == 0 else servers[::-1]:
            found[server.name].append(what(server, turn))
    return found


def column(row: Row, server: Server, place: int, scale: float = 1.0) -> str:
    return f"{median(found[place] for found in row[server.name]) * scale:.4g}"


def ratio(row: Row, servers: list[Server], place: int) -> str:
    """Of the first server to the second within turns: the median, and the range."""
    ours, theirs = (row[server.name] for server in servers)
    found = sorted(a[place] / b[place] for a, b in zip(ours, theirs, strict=True))
    return f"{median(found):.2f} ({found[0]:.2f}–{found[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("-r", "--turns", type=int, default=3)
    parser.add_argument("-n", "--tokens", type=int, default=48)
    parser.add_argument("-p", "--prompt", type=int, default=64)
    parser.add_argument("-c", "--ctx", type=int, default=2048)
    parser.add_argument("--long", type=int, default=1000)
    parser.add_argument("--conversations", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="random weights say nothing when greedy"
    )
    parser.add_argument("--strategy", default="ar")
    parser.add_argument("--skip", nargs="*", default=[], choices=["long", "schema"])
    args = parser.parse_args()
    slots = max([*args.conversations, 2])
    with ExitStack() as stack:
        names = ("orthrus-server", "llama-server")
        servers = [stack.enter_context(served(name, args, slots)) for name in names]
        for server in servers:
            server.ask(text(8, 1), 4)
        print(f"{args.model}, {args.threads} threads, {args.turns} turns, {' · '.join(names)}\n")
        print("| conversations | first token, ms | ratio | all tokens per second | ratio |")
        print("|--:|--:|--:|--:|--:|")
        for count in args.conversations:
            row = measure(servers, args.turns, partial(together, args, count))
            first, rate = (
                " · ".join(column(row, server, place, scale) for server in servers)
                for place, scale in ((0, 1e3), (1, 1))
            )
            ratios = [ratio(row, servers, place) for place in (0, 1)]
            print(f"| {count} | {first} | {ratios[0]} | {rate} | {ratios[1]} |")
        if "long" not in args.skip:
            row = measure(servers, args.turns, partial(disturbed, args))
            print(f"\nan answer beside a prompt of {args.long} words, ms:")
            for server in servers:
                before, most, first = (column(row, server, place, 1e3) for place in range(3))
                print(
                    f"{server.name}: {before} between pieces, {most} at most, {first} to its first"
                )
        if "schema" not in args.skip:
            row = measure(servers, args.turns, partial(constrained, args))
            print("\nms per token, free and under a JSON schema:")
            for server in servers:
                print(
                    f"{server.name}: {column(row, server, 0, 1e3)}, {column(row, server, 1, 1e3)}"
                )


if __name__ == "__main__":
    main()
