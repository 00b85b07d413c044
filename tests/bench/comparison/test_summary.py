"""Sums, shares and speed-ups of turns that were made by hand, worked out by hand."""

from __future__ import annotations

import pytest
from comparison_turns import DRAFTED, TURNS, turn

from orthrus_gguf.bench.comparison.summary import (
    Activity,
    Speedup,
    Summary,
    activity,
    observed_costs,
    summarize,
)
from orthrus_gguf.bench.comparison.tables import as_json, markdown
from orthrus_gguf.drafting.cycle import Pass


def of(strategy: str, domain: str | None = None) -> Summary:
    (found,) = [s for s in summarize(TURNS) if (s.strategy, s.domain) == (strategy, domain)]
    return found


def test_order() -> None:
    names = [(s.domain, s.strategy) for s in summarize(TURNS)]
    assert names == [(d, s) for d in (None, "code", "list") for s in ("ar", "two-pass@2")]


def test_figures() -> None:
    found = of("two-pass@2")
    assert found.tokens == 24
    assert found.seconds == 8
    assert found.tokens_per_second == 3
    assert found.statistics.tokens_per_cycle == 2
    assert found.statistics.tokens_per_forward == 28 / (4 * 6)
    assert found.statistics.offered == (12, 8)
    assert found.statistics.confirmed == (8, 4)
    ar = of("ar", "list")
    assert ar.tokens_per_second == 12 / 5
    assert ar.statistics.tokens_per_forward == 1
    assert ar.statistics.acceptance is None


def test_speedups() -> None:
    overall = of("two-pass@2").speedup
    # All: 8 s both. code: 3 s against 4 s; list: 5 s against 4 s. Rounds: 4 against 3, 4 against 5.
    assert overall == Speedup(1.0, 0.75, 1.25, (4 / 3, 0.8))
    assert overall.noise == pytest.approx((4 / 3 - 0.8) / 2)
    code = of("two-pass@2", "code").speedup
    assert code == Speedup(0.75, 0.75, 0.75, (0.5, 1.0))
    assert of("ar").speedup == Speedup(1, 1, 1, (1, 1))
    assert Speedup(1, 1, 1, (1.2,)).noise is None


def test_shares_of_time() -> None:
    shares = of("two-pass@2").shares
    seconds = {kind: 8 * share for kind, share in shares.items()}
    assert seconds[Activity.DRAFT] == pytest.approx(4 * 0.3)
    assert seconds[Activity.VERIFY] == pytest.approx(4 * 0.6)
    assert seconds[Activity.FUSED] == pytest.approx(4 * 0.5)
    assert seconds[Activity.PLAIN] == 0
    assert seconds[Activity.HOST] == pytest.approx(8 - 4 * 1.4)
    assert of("ar").shares[Activity.PLAIN] == pytest.approx(2.4 / 8)


def test_what_a_pass_is_for() -> None:
    kinds = {
        (1, 0): Activity.PLAIN,
        (2, 0): Activity.VERIFY,
        (0, 1): Activity.DRAFT,
        (1, 8): Activity.FUSED,
    }
    for (ar_rows, diffusion_rows), kind in kinds.items():
        assert activity(Pass(ar_rows, diffusion_rows, 5, 1.0)) is kind


def test_observed_costs() -> None:
    one, draft, verify, fused = observed_costs(TURNS)
    assert [(c.ar_rows, c.diffusion_rows) for c in (one, draft, verify, fused)] == [
        *((1, 0), (0, 3), (3, 0), (2, 4)),
    ]
    assert (one.count, draft.count, fused.count) == (24, 8, 4)
    assert draft.quartiles == pytest.approx((100, 150, 200))
    assert draft.context == 11.5
    assert fused.quartiles == pytest.approx((500, 500, 500))


def test_a_prompt_that_ends_at_once_has_no_speed() -> None:
    turns = [turn("ar", "code 1", 0.0, []), turn("fused@2x1", "code 1", 0.0, [])]
    for summary in summarize(turns):
        assert (summary.tokens_per_second, summary.speedup) == (None, None)
    assert "| ar | – | – | – | – | – | 1.00 | – |" in markdown(turns)
    both = [*turns, turn("ar", "code 2", 2.0, DRAFTED), turn("fused@2x1", "code 2", 1.0, DRAFTED)]
    assert [s.speedup and s.speedup.ratio for s in summarize(both)] == [1, 2] * 2


def test_tables() -> None:
    text = markdown(TURNS)
    assert "| two-pass@2 | 3.0 | 1.00 | 0.75–1.25 | ± 0.27 | 2.00 | 1.17 | 60 % |" in text
    assert "| two-pass@2 | 3.0 · 0.75× (0.75–0.75) | 3.0 · 1.25× (1.25–1.25) |" in text
    assert "| two-pass@2 | 2.00 · 1.17 | 2.00 · 1.17 |" in text
    assert "| strategy | 1 | 2 |\n|---|--:|--:|\n| two-pass@2 | 67 % | 50 % |" in text
    assert "| two-pass@2 | 0 % | 15 % | 30 % | 25 % | 30 % |" in text
    for table in text.split("\n\n"):
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1
    assert "No strategy has verified a draft." in markdown(TURNS[1:3])


def test_json() -> None:
    report = as_json(TURNS)
    assert report["same_text"] is True
    assert [len(report[key]) for key in ("summaries", "turns", "passes")] == [6, 8, 4]
    summary = report["summaries"][1]
    assert (summary["strategy"], summary["domain"], summary["seconds"]) == ("two-pass@2", None, 8)
    assert list(summary["shares"]) == ["plain", "draft", "verify", "fused", "host"]
    assert sum(summary["shares"].values()) == pytest.approx(1)
    assert report["turns"][0]["widths"] == [2, 2, 1]
    assert report["turns"][0]["accepted"] == [2, 0, 1]
    assert report["turns"][0]["sources"] == ["block", "block", "lookup"]
    assert report["turns"][1]["sources"] == [None] * 6
    assert summary["stats"]["sources"] == {
        "block": {"cycles": 8, "drafted": 16, "accepted": 8},
        "lookup": {"cycles": 4, "drafted": 4, "accepted": 4},
    }
