"""A comparison as markdown tables, and as plain JSON types."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from orthrus_gguf.bench.comparison.runner import Turn
from orthrus_gguf.bench.comparison.summary import (
    BASELINE,
    Activity,
    Speedup,
    Summary,
    observed_costs,
    summarize,
)

#: Positions of a draft that the acceptance table shows.
POSITIONS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)

NOTES = """\
tokens/s: generation alone, without the prompt. × ar: seconds of plain decoding on the same prompts
over seconds of the strategy; prompts: its range over single prompts; rounds: half its range over
rounds. tokens/cycle: accepted drafts + 1. tokens/forward: output tokens over all passes, the
prompt's counted as one. accepted: share of all verified drafts. The text of all strategies is the
same, token by token."""


def markdown(turns: Sequence[Turn]) -> str:
    """Tables: overall, by domain, acceptance by position, shares of time."""
    summaries = summarize(turns)
    overall = [s for s in summaries if s.domain is None]
    parts = [
        _overall(overall),
        _by_domain("tokens/s, and × ar (range of prompts)", summaries, _speed),
        _by_domain("tokens per cycle, and per forward", summaries, _yield),
        _acceptance(overall),
        _shares(overall),
        NOTES,
    ]
    return "\n\n".join(parts) + "\n"


def as_json(turns: Sequence[Turn]) -> dict[str, Any]:
    """Summaries, turns and observed passes."""
    return {
        "same_text": True,  # or the comparison would have ended
        "summaries": [_summary_json(summary) for summary in summarize(turns)],
        "turns": [_turn_json(turn) for turn in turns],
        "passes": [asdict(cost) for cost in observed_costs(turns)],
    }


def _overall(summaries: Sequence[Summary]) -> str:
    head = ("strategy", "tokens/s", "× ar", "prompts", "rounds", "tokens/cycle", "tokens/forward")
    rows = []
    for s in summaries:
        speedup = s.speedup if s.strategy != BASELINE else None
        rows.append(
            (
                s.strategy,
                _number(s.tokens_per_second, 1),
                _number(speedup.ratio if speedup else None, 2),
                _range(speedup),
                "–" if speedup is None or speedup.noise is None else f"± {speedup.noise:.2f}",
                _number(s.statistics.tokens_per_cycle, 2),
                _number(s.statistics.tokens_per_forward, 2),
                _percent(s.statistics.acceptance),
            )
        )
    return _table("All prompts", (*head, "accepted"), rows)


def _by_domain(title: str, summaries: Sequence[Summary], cell: Callable[[Summary], str]) -> str:
    domains = list(dict.fromkeys(s.domain for s in summaries if s.domain is not None))
    cells: dict[str, list[str]] = {}
    for s in summaries:
        if s.domain is not None:
            cells.setdefault(s.strategy, []).append(cell(s))
    return _table(title, ("strategy", *domains), [(name, *row) for name, row in cells.items()])


def _speed(summary: Summary) -> str:
    speed, speedup = _number(summary.tokens_per_second, 1), summary.speedup
    if speedup is None or summary.strategy == BASELINE:
        return speed
    return f"{speed} · {speedup.ratio:.2f}× ({_range(speedup)})"


def _yield(summary: Summary) -> str:
    counts = summary.statistics
    return f"{_number(counts.tokens_per_cycle, 2)} · {_number(counts.tokens_per_forward, 2)}"


def _acceptance(summaries: Sequence[Summary]) -> str:
    widest = max(len(s.statistics.offered) for s in summaries)
    positions = [position for position in POSITIONS if position <= widest]
    if not positions:
        return "No strategy has verified a draft."
    rows = []
    for s in summaries:
        shares = s.statistics.acceptance_by_position
        if shares:
            cells = [_percent(shares[p - 1] if p <= len(shares) else None) for p in positions]
            rows.append((s.strategy, *cells))
    title = "Accepted at each position of a draft, of the drafts that are so long"
    return _table(title, ("strategy", *map(str, positions)), rows)


def _shares(summaries: Sequence[Summary]) -> str:
    head = ("strategy", *(kind.value for kind in Activity))
    rows = [(s.strategy, *(_percent(s.shares[kind]) for kind in Activity)) for s in summaries]
    return _table("Where the time goes", head, rows)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, figures to the right."""
    rule = "|".join(["---", *["--:"] * (len(head) - 1)])
    lines = [f"**{title}**", "", f"| {' | '.join(head)} |", f"|{rule}|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _range(speedup: Speedup | None) -> str:
    return "–" if speedup is None else f"{speedup.lowest:.2f}–{speedup.highest:.2f}"


def _summary_json(summary: Summary) -> dict[str, Any]:
    speedup = summary.speedup
    return {
        "strategy": summary.strategy,
        "domain": summary.domain,
        "tokens_per_second": summary.tokens_per_second,
        "generated_tokens": summary.tokens,
        "seconds": summary.seconds,
        "speedup": None if speedup is None else {**asdict(speedup), "noise": speedup.noise},
        "shares": _names(summary.shares),
        "stats": summary.statistics.to_json(),
    }


def _turn_json(turn: Turn) -> dict[str, Any]:
    result = turn.result
    return {
        "strategy": turn.entry,
        "prompt": turn.prompt.name,
        "domain": turn.prompt.domain,
        "round": turn.round,
        "prompt_tokens": len(turn.prompt.tokens),
        "generated_tokens": result.timings.generated_tokens,
        "seconds": result.timings.generation,
        "finish_reason": result.finish_reason,
        "widths": [len(cycle.drafts) for cycle in result.cycles],
        "accepted": [cycle.accepted for cycle in result.cycles],
        "sources": [c.source.name if c.source else None for c in result.cycles],
    }


def _names(shares: Mapping[Activity, float]) -> dict[str, float]:
    return {kind.value.removesuffix(" passes"): value for kind, value in shares.items()}
