"""orthrus-server under load: what it does to memory, to others, and what is answered.

    python tests/bench/server_load.py MODEL.gguf [--seconds 60] [--scale 1.0] [--stages aborts]

Starts a server with a key, a queue of 64 and a folder for slots, and runs one stage of trouble
after another, first small ones for warmth. All the while a client of its own streams answers, and
what it waits for its next piece at most is a column. Ends with one table, and with exit code 1 if
anything was not as it has to be: an unexpected status, a stall above the bound, memory
that stays, a file outside the folder. Linux only: memory is read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

KEY = "a key of this test"

#: Seconds that a running answer may wait for its next piece: what the scheduler gives prompts in
#: one pass, and as much again for everything else.
BOUND = 0.5

#: What memory may differ by once it is over.
SHARE = 0.05


@dataclass
class Load:
    """A server process, and what was seen of it."""

    port: int
    pid: int
    chance: random.Random
    statuses: Counter[int] = field(default_factory=Counter)
    longest: float = 0.0

    @property
    def memory(self) -> float:
        """MiB that are resident."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise ValueError("the process has ended")

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def send(self, data: bytes) -> int | None:
        """The status of the answer to these bytes, which is read; None if there is none."""
        reader, writer = await self.open()
        try:
            writer.write(data)
            head = await asyncio.wait_for(reader.readline(), 120)
            await asyncio.wait_for(reader.read(), 120)
        except (OSError, asyncio.TimeoutError):
            return None
        finally:
            writer.close()
        words = head.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else None

    async def post(self, path: str, body: Any, key: str = KEY) -> int | None:
        """The status of an answer, which is counted."""
        status = await self.send(request(path, body, key))
        self.statuses[status or 0] += 1
        return status


def request(path: str, body: Any, key: str = KEY) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


def generation(tokens: int, prompt: str = "import os\n", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, **more}


async def bystander(load: Load, over: asyncio.Event) -> None:
    """Streams one answer after another, and notes the longest wait within one."""
    while not over.is_set():
        reader, writer = await load.open()
        writer.write(request("/completion", generation(200, "class A:\n", stream=True)))
        if b" 200 " not in await reader.readline():
            writer.close()  # the queue is full
            await asyncio.sleep(0.05)
            continue
        last: float | None = None
        async for line in reader:
            if line.startswith(b"data: "):
                now = time.perf_counter()
                if last is not None:
                    load.longest = max(load.longest, now - last)
                last = now
        writer.close()


# --- stages: each returns the statuses that are fine, besides 200 ---


async def connections(load: Load, scale: float) -> set[int]:
    """1,000 connections at once, then a request on each."""
    pairs = [await load.open() for _ in range(int(1000 * scale))]
    for _, writer in pairs:
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    for reader, writer in pairs:
        words = (await asyncio.wait_for(reader.readline(), 60)).split()
        load.statuses[int(words[1]) if words else 0] += 1
        writer.close()
    return set()


async def crowd(load: Load, scale: float) -> set[int]:
    """1,000 generations at once: the queue holds 64 of them."""
    body = generation(4)
    await asyncio.gather(*(load.post("/completion", body) for _ in range(int(1000 * scale))))
    assert scale < 1 or load.statuses[429] > 100, load.statuses
    return {429}


async def slow_readers(load: Load, scale: float) -> set[int]:
    """Clients that ask for streams and read nothing of them, for a while."""
    pairs = []
    for _ in range(int(60 * scale)):
        reader, writer = await asyncio.open_connection("127.0.0.1", load.port, limit=1024)
        writer.write(request("/completion", generation(400, stream=True, n_probs=5)))
        pairs.append((reader, writer))
    await asyncio.sleep(8 * scale)
    for reader, writer in pairs:
        words = (await asyncio.wait_for(reader.readline(), 60)).split()
        load.statuses[int(words[1]) if words else 0] += 1
        writer.transport.abort()
    return {429}


async def half_open(load: Load, scale: float) -> set[int]:
    """Heads and bodies that never end, while others are served."""
    whole = request("/completion", generation(4))
    writers = []
    for index in range(int(400 * scale)):
        _, writer = await load.open()
        writer.write(whole[: [1, 20, len(whole) // 2, len(whole) - 1][index % 4]])
        writers.append(writer)
    for _ in range(20):
        await load.post("/completion", generation(4))
        await asyncio.sleep(0.1 * scale)
    for writer in writers:
        writer.transport.abort()
    return set()


@cache
def large_requests(scale: float) -> list[bytes]:
    """Bodies of 10 and 40 MB, which are too large, and of 1 MB, which are not: prompts, messages,
    depths. Made once: who makes them does not hear the bystander's answers."""
    sizes = [int(10e6 * scale), 1_000_000]
    found: list[tuple[str, Any]] = [("/completion", b" " * int((40 << 20) * scale))]
    for size in sizes:
        chat = {"messages": [{"role": "user", "content": "a " * (size // 2)}]}
        found += [
            ("/completion", generation(4, "import os\n" * (size // 11))),
            ("/v1/chat/completions", chat),
            ("/completion", b"[" * size),
            ("/completion", {"prompt": [1] * (size // 3)}),
            ("/tokenize", {"content": "x" * (size - 100)}),
        ]
    return [request(path, body) for path, body in found]


async def large(load: Load, scale: float) -> set[int]:
    """Two of each at once."""
    for data in large_requests(scale):
        for status in await asyncio.gather(load.send(data), load.send(data)):
            load.statuses[status or 0] += 1
    return {400, 413}


async def invalid(load: Load, scale: float) -> set[int]:
    """JSON that is none, or not what is expected."""
    good = json.dumps(generation(4)).encode()
    for _ in range(int(500 * scale)):
        data = bytearray(good)
        for _ in range(load.chance.randint(1, 4)):
            data[load.chance.randrange(len(data))] = load.chance.randrange(256)
        path = load.chance.choice(["/completion", "/v1/chat/completions", "/v1/messages"])
        await load.post(path, bytes(data))
    return {400}


async def aborts(load: Load, scale: float) -> set[int]:
    """100 clients a second that leave in the middle."""

    async def leave(delay: float) -> None:
        with suppress(OSError):
            _, writer = await load.open()
            body = generation(300, "import os\n" * load.chance.randint(1, 40), stream=delay < 0.03)
            writer.write(request("/completion", body))
            await asyncio.sleep(delay)
            writer.transport.abort()

    began, tasks = time.monotonic(), []
    for number in range(int(100 * load_seconds * scale)):
        await asyncio.sleep(max(0, began + number / 100 - time.monotonic()))
        tasks.append(asyncio.ensure_future(leave(load.chance.random() * 0.06)))
    await asyncio.gather(*tasks)
    return set()


async def fuzz(load: Load, scale: float) -> set[int]:
    """Paths, headers and names of slots from random bytes."""
    chance = load.chance
    for index in range(int(600 * scale)):
        noise = bytes(chance.randrange(1, 256) for _ in range(chance.randint(1, 40)))
        if index % 3 == 0:
            data = b"GET /" + noise.replace(b"\n", b"") + b" HTTP/1.1\r\nHost: x\r\n"
            data += b"Connection: close\r\n\r\n"
        elif index % 3 == 1:
            data = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Api-Key: "
            data += noise + b"\r\n\r\n"
        else:
            up = chance.choice(["../", "..%2f", "/", "\\", "~/", "a/../../", "\0"])
            name = up * chance.randint(0, 3) + noise.decode("latin-1")
            data = request(
                f"/slots/0?action={chance.choice(['save', 'restore'])}", {"filename": name}
            )
        load.statuses[await load.send(data) or 400] += 1
    for key in ("", "a key", KEY + " ", KEY.upper(), "é"):
        assert await load.post("/completion", generation(1), key.rstrip(" ") or "x") in (401, 200)
    return {400, 401, 404, 405}


Stage = Callable[[Load, float], Awaitable[set[int]]]
STAGES: tuple[Stage, ...] = (
    connections,
    crowd,
    slow_readers,
    half_open,
    large,
    invalid,
    aborts,
    fuzz,
)
load_seconds = 60.0


async def idle(load: Load) -> None:
    """Until nobody is served."""
    for _ in range(600):
        reader, writer = await load.open()
        head = f"GET /slots HTTP/1.1\r\nHost: x\r\nX-Api-Key: {KEY}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode())
        answer = await reader.read()
        writer.close()
        if b'"is_processing":true' not in answer:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("somebody is still served")


async def run(load: Load, scale: float, stages: Sequence[Stage]) -> list[str]:
    """These stages, after small ones of all; returns what is wrong."""
    problems = []
    for stage in STAGES:
        await stage(load, 0.1 * scale)
    # What the allocator keeps once it has been so large, and caches that are full.
    for stage in (large, crowd, large):
        await stage(load, scale)
    full = [f"{slot} " + "import os\n" * 2600 for slot in range(4)]
    await asyncio.gather(*(load.post("/completion", generation(64, text)) for text in full))
    await idle(load)
    await asyncio.sleep(2)
    first = load.memory
    print(f"memory before: {first:.1f} MiB\n")
    print("| stage | seconds | statuses | longest wait of another, ms | memory, MiB |")
    print("|---|--:|---|--:|--:|")
    for stage in stages:
        load.statuses.clear()
        load.longest = 0.0
        over, began = asyncio.Event(), time.monotonic()
        other = asyncio.ensure_future(bystander(load, over))
        fine = await stage(load, scale) | {200}
        seconds = time.monotonic() - began
        over.set()
        await asyncio.wait_for(other, 60)
        await idle(load)
        told = ", ".join(f"{count} × {status}" for status, count in sorted(load.statuses.items()))
        name = stage.__name__.replace("_", " ")
        print(f"| {name} | {seconds:.1f} | {told} | {load.longest * 1e3:.0f} | {load.memory:.1f} |")
        if unexpected := set(load.statuses) - fine:
            problems.append(f"{name}: statuses {sorted(unexpected)}")
        if load.longest > BOUND:
            problems.append(f"{name}: an answer waited {load.longest:.2f} s, more than {BOUND}")
    await asyncio.sleep(2)
    last = load.memory
    print(f"\nmemory after: {last:.1f} MiB, {last / first:.3f} of before")
    if abs(last / first - 1) > SHARE:
        problems.append(f"memory: {first:.1f} MiB before, {last:.1f} after")
    return problems


def main() -> int:
    global load_seconds
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--seconds", type=float, default=load_seconds, help="of aborts")
    parser.add_argument("--scale", type=float, default=1.0, help="of everything")
    names = [stage.__name__ for stage in STAGES]
    parser.add_argument("--stages", nargs="*", default=names, choices=names)
    args = parser.parse_args()
    load_seconds = args.seconds
    stages = [stage for stage in STAGES if stage.__name__ in args.stages]
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 65536), most))
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = int(found.getsockname()[1])
    home = Path(tempfile.mkdtemp())
    (home / "slots").mkdir()
    flags = [
        "-np",
        4,
        "-c",
        8192,
        "-cram",
        0,
        "-t",
        1,
        "-n",
        64,
        "--queue",
        64,
        "--metrics",
        "--api-key",
        KEY,
    ]
    words = [args.model, "--port", port, *flags, "--slot-save-path", home / "slots"]
    with (home / "log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "orthrus_gguf.cli.server", *map(str, words)],
            stdout=log,
            stderr=log,
            cwd=home,
            env={**os.environ, "HOME": str(home)},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (1024, most)),
        )
        try:
            load = Load(port, process.pid, random.Random(1))
            while True:
                with suppress(OSError):
                    if asyncio.run(load.post("/tokenize", {"content": "a"})) == 200:
                        break
                assert process.poll() is None, (home / "log").read_text()
                time.sleep(0.2)
            before = sorted(map(str, home.rglob("*")))
            problems = asyncio.run(run(load, args.scale, stages))
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        if "Traceback" in (said := log.read()):
            problems.append(f"the log: {said[-3000:]}")
    slots = str(home / "slots")
    strange = {p for p in map(str, home.rglob("*")) if not p.startswith(slots)} - set(before)
    problems += [
        f"written outside the folder: {path}" for path in sorted(strange) if "cache" not in path
    ]
    print("\n".join(["", *problems]) if problems else "\nall as it has to be")
    shutil.rmtree(home)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
