"""Two checkouts turn by turn: from the start of `orthrus-run` to the first token, and to its exit.

    python tests/bench/first_token.py OLD NEW FILE.gguf [-r ROUNDS]

OLD and NEW are folders with a checkout each, the kernels built. A chat message is answered with one
token. Prints seconds (median, least and most) and the median of old over new within rounds;
processor time is of the process and of the one that renders its template.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIGURES = ("first token", "exit", "processor time")
QUESTION = ("-p", "Why is the sky blue?", "-n", "1", "--temp", "0")


def one(folder: Path, file: Path, cache: str) -> tuple[float, ...]:
    """Seconds of one start, as `FIGURES` names them."""
    paths = [folder, folder / "converters", folder / "kernels"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "XDG_CACHE_HOME": cache,
    }
    # An installed package has its bytecode; compiling it anew would be most of a start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "orthrus_gguf.cli.run", str(file), *QUESTION],
        env=environment,
        cwd=cache,  # Python looks there first
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    first = time.perf_counter() - began
    process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    ended = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    if process.returncode:
        raise SystemExit(f"{folder}: exit code {process.returncode}")
    return first, ended, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("-r", "--rounds", type=int, default=15)
    args = parser.parse_args()
    pair = args.old.resolve(), args.new.resolve()
    rounds = []
    with tempfile.TemporaryDirectory() as cache:
        for number in range(args.rounds + 1):
            order = pair if number % 2 else pair[::-1]
            times = {folder: one(folder, args.file.resolve(), cache) for folder in order}
            if number:  # the first fills caches, and measures what passes cost
                rounds.append([times[folder] for folder in pair])
    for place, name in enumerate(FIGURES):
        old, new = ([times[side][place] for times in rounds] for side in (0, 1))
        ratio = statistics.median(before / after for before, after in zip(old, new, strict=True))
        shown = (f"{statistics.median(s):.3f} ({min(s):.3f}-{max(s):.3f})" for s in (old, new))
        print(f"{name}: {' -> '.join(shown)} s, old/new {ratio:.2f}")


if __name__ == "__main__":
    main()
