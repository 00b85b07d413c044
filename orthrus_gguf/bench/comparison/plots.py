"""Pictures of comparisons and trainings. Needs matplotlib, which the `bench` extra brings."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthrus_gguf.auto.costs import CostCurve
from orthrus_gguf.bench.comparison.runner import Turn
from orthrus_gguf.bench.comparison.summary import (
    BASELINE,
    Activity,
    Summary,
    activity,
    add_up,
    observed_costs,
    summarize,
)
from orthrus_gguf.drafting.cycle import Pass
from orthrus_gguf.drafting.draft import Source

#: Colours that stay apart for every kind of colour vision (Okabe and Ito), and the baseline's.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY = "#888888"
MARKERS = "osD^vP*X"

PASS_COLOURS = {
    Activity.PLAIN: GREY,
    Activity.DRAFT: COLOURS[1],
    Activity.VERIFY: COLOURS[0],
    Activity.FUSED: COLOURS[2],
}

INSTALL = "pip install 'orthrus-gguf[bench]'"


def why_unusable() -> str | None:
    """What keeps this module from drawing, and what to do; None if nothing does."""
    if importlib.util.find_spec("matplotlib") is None:
        return f"matplotlib is not installed: {INSTALL}"
    return None


def draw_all(folder: Path, title: str, turns: Sequence[Turn], curve: CostCurve) -> list[Path]:
    """Write every picture into `folder`, which must exist; returns their paths.

    title: model and machine. curve: what the controller believes that passes cost.
    """
    summaries = summarize(turns)
    return [
        _save(folder / "acceptance.png", acceptance(title, summaries)),
        _save(folder / "speed.png", speed(title, summaries)),
        _save(folder / "costs.png", costs(title, turns, curve)),
        _save(folder / "widths.png", widths(title, turns)),
    ]


def acceptance(title: str, summaries: Sequence[Summary]) -> Any:
    """Share of drafts accepted at each position, per strategy, on all prompts."""
    figure, axes = _figure(title, 8, 5)
    shown = [s for s in summaries if s.domain is None and s.statistics.offered]
    styles = _styles(summaries)
    for number, summary in enumerate(shown):
        shares = summary.statistics.acceptance_by_position
        axes.plot(
            range(1, len(shares) + 1),
            [100 * share for share in shares],
            color=styles[summary.strategy],
            marker=MARKERS[number % len(MARKERS)],
            markersize=4,
            label=summary.strategy,
        )
    axes.set(xlabel="position in the draft", ylabel="accepted, % of the drafts that are so long")
    axes.set_ylim(0, 102)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if shown:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def speed(title: str, summaries: Sequence[Summary]) -> Any:
    """Tokens per second of every strategy by domain, and beneath, against plain decoding."""
    domains = list(dict.fromkeys(s.domain for s in summaries))
    domains = [*domains[1:], domains[0]]  # overall comes last
    styles = _styles(summaries)
    width = 0.8 / len(styles)
    figure, (upper, lower) = _figure(title, 11, 7, rows=2)
    for number, (name, colour) in enumerate(styles.items()):
        ours = {s.domain: s for s in summaries if s.strategy == name}
        at = [i + (number - (len(styles) - 1) / 2) * width for i in range(len(domains))]
        heights = [ours[domain].tokens_per_second or 0.0 for domain in domains]
        upper.bar(at, heights, width, color=colour, label=name)
        ratios = [ours[domain].speedup for domain in domains]
        lower.bar(at, [s.ratio if s else 0.0 for s in ratios], width, color=colour)
        for x, speedup in zip(at, ratios, strict=True):
            if speedup is not None and name != BASELINE:
                lower.plot([x, x], [speedup.lowest, speedup.highest], color="black", lw=0.8)
    lower.axhline(1, color="black", lw=0.8, linestyle=":")
    for axes in (upper, lower):
        axes.set_xticks(range(len(domains)), [domain or "all prompts" for domain in domains])
    upper.set(ylabel="tokens per second")
    lower.set(ylabel="× ar (lines: range of the prompts)")
    figure.legend(frameon=False, ncols=min(len(styles), 4), loc="outside lower center")
    return figure


def costs(title: str, turns: Sequence[Turn], curve: CostCurve) -> Any:
    """Milliseconds of passes by their rows: the controller's curve, and what was observed."""
    figure, axes = _figure(title, 8, 5)
    observed = observed_costs(turns)
    widest = max((cost.ar_rows + cost.diffusion_rows for cost in observed), default=1)
    context = _mean([cost.context for cost in observed], [cost.count for cost in observed])
    rows = range(1, widest + 1)
    line = [1e3 * curve.at(n, 0, round(context)) for n in rows]
    axes.plot(rows, line, color="black", label=f"measured curve, context {context:.0f}")
    if curve.draft_rows:
        drafts = [cost.diffusion_rows for cost in observed if not cost.ar_rows]
        rows = range(1, max(*drafts, curve.draft_rows, 2) + 1)
        line = [1e3 * curve.at(0, n, round(context)) for n in rows]
        axes.plot(rows, line, color="black", linestyle=":", label="same, draft passes")
    most = max((cost.count for cost in observed), default=1)
    for kind, colour in PASS_COLOURS.items():
        group = [c for c in observed if activity(Pass(c.ar_rows, c.diffusion_rows, 0, 0)) is kind]
        if not group:
            continue
        at = [cost.ar_rows + cost.diffusion_rows for cost in group]
        middles = [cost.quartiles[1] for cost in group]
        sizes = [8 + 60 * cost.count / most for cost in group]
        axes.scatter(at, middles, sizes, color=colour, alpha=0.7, label=f"{kind.value}, median")
        axes.vlines(
            at, [c.quartiles[0] for c in group], [c.quartiles[2] for c in group], color=colour, lw=1
        )
    axes.set(xlabel="rows of the pass", ylabel="milliseconds (lines: quartiles)")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.legend(frameon=False)
    return figure


def widths(title: str, turns: Sequence[Turn]) -> Any:
    """Width of every cycle of the first round in its order, coloured by where drafts came from."""
    first = [turn for turn in turns if turn.round == 0]
    sources = [source for source, *_ in add_up([t.result.statistics for t in first]).sources]
    names = [
        name
        for name in dict.fromkeys(turn.entry for turn in first)
        if any(c.drafts for turn in first if turn.entry == name for c in turn.result.cycles)
    ]
    figure, panels = _figure(title, 10, 1.6 + 1.7 * max(len(names), 1), rows=max(len(names), 1))
    for name, axes in zip(names, panels, strict=False):
        _timeline(axes, [turn for turn in first if turn.entry == name], sources)
        axes.set_ylabel(f"{name}\nwidth", fontsize=8)
    panels[-1].set_xlabel("cycle")
    figure.legend(
        handles=_source_handles(sources),
        frameon=False,
        ncols=3,
        loc="outside lower center",
        fontsize=8,
    )
    return figure


def draw_training(path: Path, title: str, report: Mapping[str, Any]) -> Path:
    """Write what a training came to (`orthrus-train`'s report): its losses, the acceptance of each
    draft position, and what `auto` gains by kind of text and hardware. Returns the path."""
    figure, (top, middle, bottom) = _figure(title, 8, 9, rows=3)
    losses = report["losses"]
    steps = range(1, len(losses) + 1)
    recent = [losses[max(0, step - 20) : step] for step in steps]
    top.plot(steps, losses, color=GREY, lw=0.5, label="loss")
    top.plot(
        steps, [sum(part) / len(part) for part in recent], color=COLOURS[0], label="mean of 20"
    )
    top.set(xlabel="step", ylabel="loss")
    shares = report["decoded"]["by_position"]
    middle.plot(range(1, len(shares) + 1), [100 * s for s in shares], color=COLOURS[0], marker="o")
    middle.set(xlabel="position in the draft", ylabel="accepted, % of those offered")
    middle.set_ylim(0, 102)
    middle.xaxis.get_major_locator().set_params(integer=True)
    _gains(bottom, report["gains"])
    figure.legend(frameon=False, ncols=2, loc="outside lower center")
    return _save(path, figure)


def _gains(axes: Any, gains: Mapping[str, Mapping[str, float]]) -> None:
    """`auto` beside plain decoding: kinds of text across, a bar for each piece of hardware."""
    kinds = list(dict.fromkeys(kind for found in gains.values() for kind in found))
    width = 0.8 / max(len(gains), 1)
    for number, (name, found) in enumerate(gains.items()):
        at = [i + (number - (len(gains) - 1) / 2) * width for i in range(len(kinds))]
        colour = COLOURS[number % len(COLOURS)]
        axes.bar(at, [found[kind] for kind in kinds], width, color=colour, label=name)
    axes.axhline(1, color="black", lw=0.8, linestyle=":")
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(ylabel="auto × ar, simulated")


def _timeline(axes: Any, turns: Sequence[Turn], sources: Sequence[Source]) -> None:
    """One strategy: the width of each cycle, and in black, how much of it was accepted."""
    cycles = [cycle for turn in turns for cycle in turn.result.cycles]
    for source in sources:
        heights = [len(cycle.drafts) if cycle.source == source else 0 for cycle in cycles]
        axes.stairs(heights, fill=True, color=source.colour)
    axes.stairs([cycle.accepted for cycle in cycles], fill=True, color="black", alpha=0.65)
    end = 0
    for i, turn in enumerate(turns):
        if i and turn.prompt.domain != turns[i - 1].prompt.domain:
            axes.axvline(end, color=GREY, linewidth=0.8, linestyle="--")
        if not i or turn.prompt.domain != turns[i - 1].prompt.domain:
            axes.text(end, 1.02, turn.prompt.domain, transform=axes.get_xaxis_transform(), size=8)
        end += len(turn.result.cycles)
    axes.set_xlim(0, max(len(cycles), 1))
    axes.set_ylim(bottom=0)
    axes.yaxis.get_major_locator().set_params(integer=True)


def _source_handles(sources: Sequence[Source]) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=source.colour, linewidth=3, label=source.words) for source in sources
    ]
    return [*handles, Line2D([], [], color="black", linewidth=3, label="accepted")]


def _styles(summaries: Sequence[Summary]) -> dict[str, str]:
    """Strategy → colour."""
    names = dict.fromkeys(s.strategy for s in summaries)
    others = [name for name in names if name != BASELINE]
    return {BASELINE: GREY} | {n: COLOURS[i % len(COLOURS)] for i, n in enumerate(others)}


def _figure(title: str, width: float, height: float, rows: int | None = None) -> tuple[Any, Any]:
    """A figure with one set of axes, or a list of `rows` of them."""
    # Imported here: everything but pictures works without it. No pyplot: it keeps global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=9)
    panels = figure.subplots(rows or 1, squeeze=False)[:, 0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels[0] if rows is None else list(panels)


def _save(path: Path, figure: Any) -> Path:
    figure.savefig(path)
    return path


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0
