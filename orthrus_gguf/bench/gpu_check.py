"""Checks and figures of the whole runtime on a GPU: one command, one table.

    python -m orthrus_gguf.bench.gpu_check --demo DEMO.gguf [MODEL.gguf ...]
    python -m orthrus_gguf.bench.gpu_check --demo DEMO.gguf --cpu      the logic, no GPU

DEMO.gguf is the converted demo checkpoint (`--type f16` keeps it exact), whose golden outputs are
checked; every further file is timed, after the checks and only if they hold. The result is printed
and written to --folder as runtime_check.md and runtime_check.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from orthrus_kernels.attention.kv_cache import FORMATS
from orthrus_kernels.tools.gpu_check import Check, Figure

from orthrus_gguf.bench.gpu_figures import figures
from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import Segment, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

GOLDEN = Path("tests/golden/tiny-orthrus-stdlib.json")

#: Rows of the caches: the longest golden prompt and its continuation fit.
CAPACITY = 256

#: Logits of the demo model in fp16 differ from float32 by up to this: a smaller lead is a tie.
TIE = 0.02

GREEDY = SamplingSettings(temperature=0)

#: A tree of drafts: two first choices, and what may follow each.
TREE = (-1, 0, 0, 1, 1, 2, 5, 5)


@dataclass(frozen=True)
class Extent:
    """How much is checked. cases: golden prompts; pairs: of prompt and seed; tokens: of each."""

    cases: int
    pairs: int
    tokens: int
    rows: int


FULL = Extent(cases=12, pairs=510, tokens=32, rows=64)
SMALL = Extent(cases=1, pairs=3, tokens=10, rows=9)


def checks(
    demo: Path, golden: dict[str, Any], device: str | None, extent: Extent
) -> Iterator[Check]:
    """Everything that the runtime promises about text, on the demo model."""
    cases = golden["cases"][: extent.cases]
    with ModelFile.open(demo) as file:
        for kind in FORMATS:
            with CudaModel.load(file, device=device, cache_type_k=kind, cache_type_v=kind) as model:
                if kind == "f16":
                    yield from _golden(model, cases, extent)
                yield _row_invariance(model, extent.rows, kind)
                yield _company(model, kind)
                pairs = -(-extent.pairs // len(FORMATS))
                yield _strategies(model, golden["cases"], pairs, extent.tokens, kind)
                yield _graphs(model, kind)


def generate(
    model: CudaModel,
    cache: CudaCache,
    prompt: Sequence[int],
    settings: SamplingSettings,
    plan: str,
    n: int,
) -> tuple[list[int], list[Cycle]]:
    """`n` tokens, and their cycles; `plan` is spelt.

    cache: emptied first. One for many calls, so that their passes run as graphs.
    """
    cache.restore(cache.checkpoint(0))
    sequence = TokenSequence(model.config, cache, Sampler(settings), list(prompt))
    policy = FixedPolicy(parse(plan), model.config)
    drive(model, prefill(sequence))
    cycles = list(decode(model, sequence, policy, n - 1))
    return sequence.tokens[len(prompt) :], cycles


def _golden(model: CudaModel, cases: list[dict[str, Any]], extent: Extent) -> Iterator[Check]:
    ties: list[str] = []
    wrong: list[str] = []
    starts = 0
    cache = model.new_cache(CAPACITY)
    for number, case in enumerate(cases):
        prompt, wanted = case["prompt_ids"], case["output_ids"]
        found, cycles = generate(model, cache, prompt, GREEDY, "two-pass", case["n_new"])
        starts += [cycle.start for cycle in cycles] == case["cycle_starts"]
        if found != wanted:
            at = next(
                i for i, pair in enumerate(zip(found, wanted, strict=True)) if len({*pair}) > 1
            )
            lead = _lead(model, [*prompt, *wanted[:at]], found[at], wanted[at])
            text = f"case {number}, token {at}: {found[at]} before {wanted[at]} by {lead:.4f}"
            (ties if lead < TIE else wrong).append(text)
    equal = len(cases) - len(ties) - len(wrong)
    detail = f"{equal} of {len(cases)} equal; near ties: {'; '.join(ties) or 'none'}"
    yield Check("golden tokens", not wrong, "; ".join([detail, *wrong]))
    # A near tie in a draft moves a start: reported, and wrong only if it is the rule.
    yield Check("golden cycles", 2 * starts >= len(cases), f"{starts} of {len(cases)} equal")


def _lead(model: CudaModel, prefix: Sequence[int], first: int, second: int) -> float:
    """By how much the logit of `first` exceeds that of `second` after `prefix`."""
    last = range(len(prefix) - 1, len(prefix))
    segment = ar_segment(model.new_cache(len(prefix)), prefix, 0, wanted=last)
    (logits,) = model.logits([segment])
    return float(logits[0, first] - logits[0, second])


def _row_invariance(model: CudaModel, rows: int, kind: str) -> Check:
    """Logits of a pass of many rows against the same rows in passes of 1 and 3, to the bit."""
    tokens = [int(token) for token in np.random.default_rng(0).integers(0, 4000, rows)]
    (together,) = model.logits([ar_segment(model.new_cache(rows), tokens, 0)])
    differing = []
    for size in (1, 3):
        cache, parts = model.new_cache(rows + 300), []
        for start in range(0, rows, size):
            part = tokens[start : start + size]
            parts += model.logits([ar_segment(cache, part, start)])
            cache.commit(range(len(part)))
        same = np.concatenate(parts).view(np.uint32) == together.view(np.uint32)
        differing += [f"row {row} (by {size})" for row in np.flatnonzero(~same.all(axis=1))]
    detail = "; ".join(differing[:4]) or f"{rows} rows at once, by 1 and by 3"
    return Check(f"rows bit for bit, {kind} cache", not differing, detail)


def _company(model: CudaModel, kind: str) -> Check:
    """Four sequences in one pass, one of them a tree and one with a block, against each alone."""
    tokens = [int(token) for token in np.random.default_rng(1).integers(0, 4000, 100)]
    segments: list[Segment] = []
    for number, length in enumerate((20, 63, 100, 5)):
        cache = model.new_cache(length + 40 + 8 * number)
        model.logits([ar_segment(cache, tokens[:length], 0, wanted=range(0))])
        cache.commit(range(length))
        parents = TREE if number == 2 else None
        segments.append(ar_segment(cache, tokens[: len(TREE)], length, parents=parents))
        if number == 1:
            mask = model.config.mask_token or 0
            segments.append(diffusion_segment(cache, tokens[1], mask, 8, length + 2))
    wrong = []
    for segment, found in zip(segments, model.logits(segments), strict=True):
        own = [other for other in segments if other.cache is segment.cache]
        alone = model.logits(own)[own.index(segment)]
        if not np.array_equal(found.view(np.uint32), alone.view(np.uint32)):
            wrong.append(f"{segment.view.value} rows behind {segment.cache.length}")
    detail = "; ".join(wrong) or "four sequences, a tree and a block among them"
    return Check(f"company bit for bit, {kind} cache", not wrong, detail)


def _graphs(model: CudaModel, kind: str) -> Check:
    """Whether passes were captured: running launch by launch gives the same text, slowly."""
    graphs = model.graphs
    passed = not graphs.failed and (graphs.captured > 0 or not model.machine.is_cuda)
    detail = f"{graphs.captured} captured, {graphs.failed} failed"
    return Check(f"graphs, {kind} cache", passed, detail)


def _strategies(
    model: CudaModel, cases: list[dict[str, Any]], pairs: int, n: int, kind: str
) -> Check:
    """AR against two-pass, fused and trees, widths 1 .. block size in turn, greedy and sampled."""
    block = model.config.block_size or 2
    differing, accepted = [], 0
    cache = model.new_cache(CAPACITY)
    for number in range(pairs):
        prompt = cases[number % len(cases)]["prompt_ids"]
        settings = GREEDY if number < len(cases) else SamplingSettings(seed=number)
        expected, _ = generate(model, cache, prompt, settings, "ar", n)
        width = 1 + number % block
        for plan in (
            f"two-pass@{width}",
            f"fused@{max(1, block - width)}x{1 + number % 3}",
            f"two-pass@{width}+tree={width + 3}",
        ):
            found, cycles = generate(model, cache, prompt, settings, plan, n)
            accepted += sum(cycle.accepted for cycle in cycles)
            if found != expected:
                differing.append(f"prompt {number % len(cases)}, seed {number}, {plan}")
    detail = "; ".join(differing[:3]) or f"{pairs} prompt and seed pairs, {accepted} accepted"
    passed = not differing and accepted > 0
    return Check(f"ar = two-pass = fused = tree, {kind} cache", passed, detail)


def report(device: str, found: Sequence[Check], measured: Sequence[Figure], timed: bool) -> str:
    """One table, in Markdown. Without a GPU the figures' names show that their code ran."""
    lines = [
        f"# Runtime on {device}, torch {torch.__version__}, triton {triton.__version__}",
        "",
        "| what | value | unit | note |",
        "|---|---|---|---|",
        *(f"| {c.name} | {'ok' if c.passed else '**FAILED**'} | | {c.detail} |" for c in found),
    ]
    for figure in measured:
        value, note = (f"{figure.value:.4g}", figure.note) if timed else ("–", "not measured")
        lines.append(f"| {figure.name} | {value} | {figure.unit} | {note} |")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print, write; exit code 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m orthrus_gguf.bench.gpu_check")
    parser.add_argument("models", nargs="*", type=Path, help="files to time")
    parser.add_argument("--demo", type=Path, required=True, help="the converted demo checkpoint")
    parser.add_argument("--golden", type=Path, default=GOLDEN)
    parser.add_argument("--device", help="cuda:N (default: cuda:0)")
    parser.add_argument("--cpu", action="store_true", help="run the logic on the stand-ins")
    parser.add_argument("--pairs", type=int, help=f"pairs to compare (default: {FULL.pairs})")
    parser.add_argument("--folder", type=Path, default=Path("."))
    options = parser.parse_args(arguments)
    device = "cpu" if options.cpu else options.device
    extent = SMALL if options.cpu else FULL
    if options.pairs is not None:
        extent = Extent(extent.cases, options.pairs, extent.tokens, extent.rows)
    golden = json.loads(options.golden.read_text())
    found: list[Check] = []
    measured: list[Figure] = []
    try:
        for check in checks(options.demo, golden, device, extent):
            print("ok    " if check.passed else "FAILED", check.name, check.detail, flush=True)
            found.append(check)
        passed = all(check.passed for check in found)
        for path in options.models if passed else ():
            for figure in figures(path, device):
                shown = "" if options.cpu else f": {figure.value:.4g} {figure.unit} {figure.note}"
                print(figure.name + shown, flush=True)
                measured.append(figure)
    except OrthrusError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    name = "the CPU stand-ins" if options.cpu else torch.cuda.get_device_name(options.device)
    text = report(name, found, measured, timed=not options.cpu)
    print("\n" + text)
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / "runtime_check.md").write_text(text)
    data = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "checks": [asdict(check) for check in found],
        "figures": [] if options.cpu else [asdict(figure) for figure in measured],
    }
    (options.folder / "runtime_check.json").write_text(json.dumps(data, indent=1))
    if not passed:
        print("gpu_check: a check failed, so nothing was timed", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
