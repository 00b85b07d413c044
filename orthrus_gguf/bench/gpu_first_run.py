"""The first run on a GPU: what is worth knowing, the most valuable first; one table at the end.

    python3 -m orthrus_gguf.bench.gpu_first_run [--budget 600] [--folder .cache/gpu]
    python3 -m orthrus_gguf.bench.gpu_first_run --cpu        the logic, without a GPU

Run it in a checkout, with the Python that has torch and triton; beside them it needs numpy and one
pure-Python wheel, gguf (pip install gguf; without a network, --no-deps and the wheel's file).

Every stage is a process of its own with a time limit, so that a crash, a hang or a sticky CUDA
error costs that stage alone. What it prints goes to FOLDER/STAGE.log; what it has found is in the
table, however it ended. --budget drops the last stages until the rest fits. The table is also
FOLDER/summary.md, and all checks and figures FOLDER/STAGE.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orthrus_gguf.bench.gpu_processes import ROOT, Files, Made, Runner, end

#: The shape of the small hybrid: heads as large as real ones.
HYBRID = "qwen3.5-tiny-mtp"

#: Characters of the summary.
MOST = 10_000


@dataclass(frozen=True)
class Stage:
    """name: of `gpu_stage`. seconds: its limit. file: a large one that it needs. switch: an
    environment variable that is 1 in it."""

    name: str
    seconds: int
    file: str = ""
    switch: str = ""


STAGES = (
    Stage("environment", 75),
    Stage("demo", 130),
    Stage("generation", 120, file="model"),
    Stage("contexts", 80, file="model"),
    Stage("profile", 40, file="model"),
    Stage("checks", 120),
    Stage("drafter", 60),
    Stage("overlap", 120, file="model", switch="ORTHRUS_PDL"),
    Stage("tiles", 120, file="model"),
    Stage("sanitizer", 130),
    Stage("hybrid", 150, file="large-hybrid"),
)


@dataclass
class Outcome:
    """How a stage ended, and what it found until then."""

    stage: Stage
    state: str
    seconds: float = 0.0
    items: list[dict[str, Any]] = field(default_factory=list)
    note: str = ""

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [item for item in self.items if item.get("passed") is False]


def within(stages: Sequence[Stage], budget: float | None) -> list[Stage]:
    """The first stages whose limits fit into the budget (seconds)."""
    kept: list[Stage] = []
    for stage in stages:
        if budget is not None and sum(s.seconds for s in kept) + stage.seconds > budget:
            break
        kept.append(stage)
    return kept


def run_stage(
    runner: Runner, stage: Stage, limit: float, flags: Sequence[str], inject: str | None
) -> Outcome:
    """One stage, to its end or its limit."""
    items = runner.folder / f"{stage.name}.jsonl"
    items.unlink(missing_ok=True)
    words = ["orthrus_gguf.bench.gpu_stage", stage.name, "--items", str(items), *flags]
    words += ["--inject", inject] if inject else []
    began = time.monotonic()
    process = runner.start(stage.name, *words, switch=stage.switch)
    try:
        code = process.wait(timeout=limit)
        state = "ok" if code == 0 else "FAILED" if code == 1 else f"died (exit code {code})"
    except subprocess.TimeoutExpired:
        state = f"cut off after {limit:.0f} s"
    finally:
        end(process)
    found = list(read_items(items))
    outcome = Outcome(stage, state, time.monotonic() - began, found)
    if state != "ok" and not outcome.failed:
        outcome.state = "died" if state == "FAILED" else state  # an exception: its last line
        outcome.note = runner.last_line(stage.name)
    return outcome


def read_items(path: Path) -> Iterator[dict[str, Any]]:
    """Checks and figures of a stage, without lines that are damaged."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            item = json.loads(line)
        except ValueError:
            continue
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            yield item


def summary(outcomes: Sequence[Outcome], seconds: float, most: int = MOST) -> str:
    """All of it in less than `most` characters: stages, then what failed, then figures."""
    lines = [f"# First run: {seconds:.0f} s", "", "| stage | state | s | checks | note |"]
    lines.append("|---|---|--:|--:|---|")
    for one in outcomes:
        checks = [item for item in one.items if "passed" in item]
        good = len(checks) - len(one.failed)
        note = one.note.replace("|", "/")
        lines.append(
            f"| {one.stage.name} | {one.state} | {one.seconds:.0f} | {good} of {len(checks)} | "
            f"{note} |"
        )
    about = [item for one in outcomes[:1] for item in one.items if "passed" in item][:1]
    lines += ["", *(f"{item['name']}: {item.get('detail', '')}" for item in about)]
    for one in outcomes:
        lines += [
            f"- **{one.stage.name} FAILED** {item['name']}: {item.get('detail', '')}"[:400]
            for item in one.failed
        ]
        lines += [
            f"- {item['name']}: {item.get('detail', '')}"
            for item in one.items
            if item["name"].startswith(("graphs", "golden")) and item.get("passed")
        ]
    lines += ["", "| figure | value | note |", "|---|--:|---|"]
    figures = [item for one in outcomes for item in one.items if "value" in item]
    rows = [
        f"| {item['name']} | {item['value']:.4g} {item.get('unit', '')} | {item.get('note', '')} |"
        for item in figures
    ]
    text = "\n".join(lines)
    for number, row in enumerate(rows):
        if len(text) + len(row) > most - 200:
            text += f"\n\n{len(rows) - number} more figures are in the .jsonl files."
            break
        text += "\n" + row
    return text[: most - 1] + "\n"


def prepare(runner: Runner, options: argparse.Namespace, stages: Sequence[Stage]) -> Files:
    """Small models now; those that are timed in the background. stages: what is to run."""
    folder, models = runner.folder, ROOT / "models"
    small = [
        Made("demo", folder / "demo.gguf", (str(models / "tiny-orthrus-stdlib"),), "f16"),
        Made("drafter", folder / "drafter.gguf", (str(models / "tiny-dflash-stdlib"),), "f16"),
        Made("hybrid", folder / "hybrid.gguf", ("--synthetic", HYBRID), "q4_k_m"),
    ]
    large = [
        Made("model", options.model, ("--synthetic", options.shape), options.type),
        Made("large-hybrid", options.hybrid, ("--synthetic", options.hybrid_shape), options.type),
    ]
    needed = {stage.name for stage in stages} | {stage.file for stage in stages}
    small = [one for one in small if one.name in needed or (stages and one.name == "demo")]
    large = [one for one in large if one.name in needed and not options.cpu]
    files = Files(runner, small, large)
    for name, why in files.failed.items():
        print(f"{name}.gguf was not made: {why}", flush=True)
    return files


def run(options: argparse.Namespace, stages: Sequence[Stage]) -> list[Outcome]:
    """All stages in order; a line as each ends."""
    runner = Runner(options.folder, cpu=options.cpu)
    began = time.monotonic()
    kept = within(stages, options.budget)
    files = prepare(runner, options, kept)
    flags = [f"--{name}={runner.folder / name}.gguf" for name in ("demo", "drafter", "hybrid")]
    flags += ["--model", str(options.model), "--large-hybrid", str(options.hybrid)]
    flags += ["--cpu"] if options.cpu else []
    outcomes = []
    try:
        for stage in stages:
            left: float = stage.seconds
            if options.budget is not None:
                left = min(left, options.budget - (time.monotonic() - began))
            if stage not in kept or left < 5:
                outcomes.append(Outcome(stage, "dropped", note="no time left in --budget"))
                continue
            if stage.file and (lacks := files.lacks(stage.file, left)):
                outcomes.append(Outcome(stage, lacks[0], note=f"no {stage.file}: {lacks[1]}"))
                continue
            print(f"{time.monotonic() - began:.0f} s: {stage.name}", flush=True)
            outcome = run_stage(runner, stage, left, flags, options.inject.get(stage.name))
            print(f"   {outcome.state} {outcome.note}", flush=True)
            outcomes.append(outcome)
            text = summary(outcomes, time.monotonic() - began)
            (options.folder / "summary.md").write_text(text, encoding="utf-8")
    finally:
        files.close()
    return outcomes


def missing() -> str | None:
    """What this Python lacks."""
    for name, remedy in (
        ("torch", "run this with the Python that has PyTorch"),
        ("triton", "pip install triton"),
        ("numpy", "pip install numpy"),
        ("gguf", "pip install gguf (pure Python)"),
    ):
        if importlib.util.find_spec(name) is None:
            return f"{sys.executable} has no {name}: {remedy}"
    return None


def _injections(text: str) -> Mapping[str, str]:
    return dict(part.split("=") for part in text.split(","))


def _limits(text: str) -> Mapping[str, int]:
    return {name: int(seconds) for name, seconds in _injections(text).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table last; exit code 1 if anything but dropping happened."""
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(prog="python3 -m orthrus_gguf.bench.gpu_first_run")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="drop the last stages")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache/gpu")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=names,
                        help=f"of {', '.join(names)} (default: all)")  # fmt: skip
    parser.add_argument("--shape", default="qwen3-8b", help="of the model that is timed")
    parser.add_argument("--hybrid-shape", default="qwen3.5-4b-mtp", help="of the hybrid")
    parser.add_argument("--type", default="q4_k_m", help="of their weights")
    parser.add_argument("--limits", type=_limits, default={}, metavar="STAGE=SECONDS,…",
                        help="other limits of stages")  # fmt: skip
    parser.add_argument("--cpu", action="store_true", help="the logic, on stand-ins, without a GPU")
    parser.add_argument("--inject", type=_injections, default={}, metavar="STAGE=KIND,…",
                        help="raise, hang or garbage in a stage: to test this command")  # fmt: skip
    options = parser.parse_args(arguments)
    lacking = missing()
    if lacking is not None:
        print(f"gpu_first_run: {lacking}", file=sys.stderr)
        return 1
    options.folder = options.folder.resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    options.model = options.folder / f"{options.shape}-{options.type}.gguf"
    options.hybrid = options.folder / f"{options.hybrid_shape}-{options.type}.gguf"
    if options.cpu:
        options.model, options.hybrid = (options.folder / f"{n}.gguf" for n in ("demo", "hybrid"))
    began = time.monotonic()
    stages = [
        replace(stage, seconds=options.limits.get(stage.name, stage.seconds))
        for stage in STAGES
        if stage.name in options.stages
    ]
    outcomes = run(options, stages)
    text = summary(outcomes, time.monotonic() - began)
    (options.folder / "summary.md").write_text(text, encoding="utf-8")
    print("\n" + text, end="", flush=True)
    return int(any(outcome.state not in ("ok", "dropped") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
