"""Two checkouts turn by turn: is the newer one as fast?

    python tests/bench/before_after.py OLD NEW [FILE.gguf ...] [-t THREADS] [-r ROUNDS]

OLD and NEW are folders with a checkout each; only the commands of either are used, with the Python
that runs this. Without files, the demo model is measured (converted by OLD, so that both read the
same bytes). Every round runs both checkouts, and who begins changes from round to round; a ratio is
taken within a round, so that a machine that drifts does so for both. Ratios are old time over new
time: above 1 the new one is faster. Prints a markdown table per file.

Measured: `orthrus-bench` (prompt, generation, passes), and the wall time of `orthrus-run` for one
token (start) and its tokens per second with default sampling, by its own clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEMO = "models/tiny-orthrus-stdlib"
ROWS = "1,2,4,8,16,32"

#: Test → milliseconds.
Times = dict[str, float]


@dataclass(frozen=True)
class Checkout:
    """cache: a cache folder of its own, so that remembered costs are not shared."""

    folder: Path
    cache: Path

    def run(self, module: str, *words: str) -> str:
        """What a command prints. Raises CalledProcessError, its stderr shown."""
        paths = [self.folder, self.folder / "converters", self.folder / "kernels"]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "XDG_CACHE_HOME": str(self.cache),
        }
        # An installed package has its bytecode; compiling it anew would be most of a start.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [sys.executable, "-m", module, *words]
        done = subprocess.run(
            command, env=environment, cwd=self.cache, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            done.check_returncode()
        return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.gguf")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-p", "--n-prompt", type=int, default=256)
    parser.add_argument("-n", "--n-gen", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3, help="within a round")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="every figure of every round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        old, new = (
            Checkout(folder.resolve(), _folder(Path(scratch) / name))
            for name, folder in (("old", args.old), ("new", args.new))
        )
        files = [path.resolve() for path in args.files]
        if not files:
            files = [Path(scratch) / "demo.gguf"]
            old.run("orthrus_converters", str(old.folder / DEMO), str(files[0]), "--type", "f16")
        found = {}
        for path in files:
            rounds = measure((old, new), path, args)
            found[path.name] = rounds
            print(table(path.name, args, rounds), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def measure(
    pair: tuple[Checkout, Checkout], path: Path, args: argparse.Namespace
) -> list[tuple[Times, Times]]:
    """Per round, the times of the old and of the new checkout. A round before does not count: it
    fills the page cache."""
    rounds = []
    for number in range(args.rounds + 1):
        times: dict[Checkout, Times] = {}
        for checkout in pair if number % 2 else pair[::-1]:
            times[checkout] = one_round(checkout, path, args)
        print(f"{path.name}: round {number} of {args.rounds}", file=sys.stderr, flush=True)
        if number:
            rounds.append((times[pair[0]], times[pair[1]]))
    return rounds


def one_round(checkout: Checkout, path: Path, args: argparse.Namespace) -> Times:
    """Milliseconds by test: of the whole test where it is one of `orthrus-bench`."""
    threads = ("-t", str(args.threads), "--runtime", "cpu")
    counts = ("-p", str(args.n_prompt), "-n", str(args.n_gen), "--rows", ROWS)
    bench = checkout.run(
        "orthrus_gguf.cli.bench",
        *(str(path), *threads, *counts, "-r", str(args.repetitions), "-o", "json"),
    )
    times = {test["test"]: float(test["ms"]) for test in json.loads(bench)["tests"]}
    prompt = (str(path), *threads, "--raw", "-p", "def", "--strategy", "ar")
    began = time.perf_counter()
    checkout.run("orthrus_gguf.cli.run", *prompt, "-n", "1", "--temp", "0", "--no-perf")
    times["start to exit, 1 token"] = 1e3 * (time.perf_counter() - began)
    sampled = checkout.run(
        "orthrus_gguf.cli.run",
        *(*prompt, "-n", str(args.n_gen + 1), "--seed", "1", "--ignore-eos", "--json"),
    )
    per_second = json.loads(sampled)["timings"]["generation_tokens_per_second"]
    times["default sampling, per token"] = 1e3 / per_second
    return times


def table(name: str, args: argparse.Namespace, rounds: Sequence[tuple[Times, Times]]) -> str:
    lines = [
        f"{name}, {args.threads} thread{'s' * (args.threads > 1)}, {len(rounds)} rounds of"
        f" {args.repetitions}: medians, and old time over new time within rounds",
        "",
        "| test | old ms | new ms | old / new | range | fastest rounds |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [f"| {test} | {_row(test, rounds)} |" for test in rounds[0][0]]
    return "\n".join(lines) + "\n"


def _row(test: str, rounds: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]) -> str:
    old, new = ([times[side][test] for times in rounds] for side in (0, 1))
    ratios = [before / after for before, after in zip(old, new, strict=True)]
    middle = statistics.median(ratios)
    return (
        f"{statistics.median(old):.3g} | {statistics.median(new):.3g} | {middle:.3f} |"
        f" {min(ratios):.3f}–{max(ratios):.3f} | {min(old) / min(new):.3f}"
    )


if __name__ == "__main__":
    main()
