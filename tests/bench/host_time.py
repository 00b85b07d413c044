"""Host time per cycle beside its passes, and what drawing takes within them, by strategy.

    python tests/bench/host_time.py MODEL.gguf [--heads FILE] [--runtime cpu] [--threads 1]
    python tests/bench/host_time.py --toy

*Host* is the time from one cycle to the next less that of `Model.forward`: proposing, choosing,
shaping, committing, learning. *Drawing* is `Sampler.draw`, which runtimes whose logits are on the
host call within a pass. Lowest tenth, median and 95 % over all cycles, in microseconds, as a
Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.auto.calibration import measure
from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.auto.costs import RunningCosts
from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.sampling import Choice, Sampler, SamplingSettings
from orthrus_gguf.text.tokenizer import load_tokenizer

PLANS = (
    *("ar", "ar+lookup", "two-pass@7", "two-pass@7+lookup+tail", "two-pass@7+tree=16"),
    *("fused@7x3", "fused@7x3+lookup+tail", "auto"),
)

TEXT = "def main(argv=None):\n    parser = argparse.ArgumentParser(\n"


class TimedSampler(Sampler):
    """Adds up what drawing takes."""

    seconds = 0.0

    def draw(
        self,
        logits: NDArray[np.float32],
        prefix: Sequence[int],
        *,
        detail: bool = False,
        top: int = 0,
        allowed: NDArray[np.uint32] | None = None,
    ) -> Choice | None:
        before = time.perf_counter()
        choice = super().draw(logits, prefix, detail=detail, top=top, allowed=allowed)
        self.seconds += time.perf_counter() - before
        return choice


@dataclass(frozen=True)
class Times:
    """Of one cycle, in seconds."""

    host: float
    drawing: float
    passes: float
    drafted: bool


def times(
    model: Model, policy: Policy, prompt: list[int], settings: SamplingSettings, n: int
) -> list[Times]:
    """One entry per cycle of `n` tokens."""
    cache = model.new_cache(len(prompt) + n + 64)
    sampler = TimedSampler(settings)
    sequence = TokenSequence(model.config, cache, sampler, list(prompt))
    drive(model, prefill(sequence))
    found = []
    cycles: Iterator[Cycle] = decode(model, sequence, policy, n)
    drawn, before = sampler.seconds, time.perf_counter()
    for cycle in cycles:
        now = time.perf_counter()
        passes = sum(done.seconds for done in cycle.passes)
        drafted = bool(cycle.drafts) or len(cycle.passes) > 1
        found.append(Times(now - before - passes, sampler.seconds - drawn, passes, drafted))
        drawn, before = sampler.seconds, time.perf_counter()
    return found


def policy_of(name: str, model: Model) -> Policy:
    if name == "auto":
        return Controller(RunningCosts(measure(model)), model.config.block_size)
    return FixedPolicy(parse(name), model.config)


def row(name: str, found: Sequence[Times]) -> str:
    cells = [name, str(len(found)), f"{100 * sum(t.drafted for t in found) / len(found):.0f} %"]
    for values in ([t.host for t in found], [t.drawing for t in found], [t.passes for t in found]):
        ordered = sorted(values)
        low, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.95))
        cells += [f"{1e6 * value:.0f}" for value in (low, statistics.median(ordered), high)]
    return "| " + " | ".join(cells) + " |"


@contextmanager
def opened(options: argparse.Namespace) -> Iterator[tuple[Any, list[int]]]:
    """A model and a prompt for it."""
    if options.toy:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "helpers"))
        from toy_model import ToyModel, greedy_continuation

        def drafter(prefix: Sequence[int], rows: int) -> list[int]:
            right = greedy_continuation(prefix, rows)
            good = len(prefix) % (rows + 1)
            return right[:good] + [(token + 1) % 63 for token in right[good:]]

        yield ToyModel(drafter, sureness=4.0), [1, 2, 3]
        return
    with ModelFile.open(options.model, options.heads) as file:
        tokenizer = load_tokenizer(file.metadata, path=options.model, n_vocab=file.config.n_vocab)
        model = load_model(file, RuntimeSettings(RuntimeName(options.runtime), options.threads))
        yield model, tokenizer.encode(TEXT)
        model.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", nargs="?", type=Path, help="a GGUF file with diffusion heads")
    parser.add_argument("--heads", type=Path)
    parser.add_argument("--toy", action="store_true", help="the toy model of the tests instead")
    parser.add_argument("--runtime", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=200, help="per run (default 200)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--strategies", default=",".join(PLANS))
    options = parser.parse_args()
    if options.toy == (options.model is not None):
        parser.error("name either a model or --toy")
    kinds = [f"10 % | {kind} µs | 95 %" for kind in ("host", "drawing", "passes")]
    print(f"| strategy | cycles | drafted | {' | '.join(kinds)} |\n|---|" + "---:|" * 11)
    with opened(options) as (model, prompt):
        for name in options.strategies.split(","):
            found: list[Times] = []
            policy = policy_of(name, model)
            for seed in range(options.runs):
                settings = SamplingSettings(temperature=options.temperature, seed=seed)
                found += times(
                    model, policy, prompt[seed % len(prompt) :], settings, options.tokens
                )
            print(row(name, found), flush=True)


if __name__ == "__main__":
    main()
