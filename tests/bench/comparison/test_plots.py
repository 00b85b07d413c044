"""Pictures show the figures of the turns, and are PNG."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

import pytest
from comparison_turns import TURNS, cycle, turn
from matplotlib.colors import to_hex

from orthrus_gguf.auto.costs import CostCurve
from orthrus_gguf.bench.comparison import plots
from orthrus_gguf.bench.comparison.summary import summarize
from orthrus_gguf.drafting.block import BLOCK
from orthrus_gguf.drafting.draft import Source
from orthrus_gguf.drafting.lookup import LOOKUP

CURVE = CostCurve((1, 4), (0.1, 0.2), 10, (0.0, 0.0), 4, 0.3, 0.5)


def test_files(tmp_path: Path) -> None:
    paths = plots.draw_all(tmp_path, "toy", TURNS, CURVE)
    assert sorted(path.name for path in paths) == [
        *("acceptance.png", "costs.png", "speed.png", "widths.png"),
    ]
    for path in paths:
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 900
        assert height > 300


def test_acceptance() -> None:
    (line,) = plots.acceptance("", summarize(TURNS)).axes[0].lines  # plain decoding has no drafts
    assert line.get_label() == "two-pass@2"
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == pytest.approx([100 * 8 / 12, 50])


def test_speed() -> None:
    upper, lower = plots.speed("", summarize(TURNS)).axes
    heights = [[bar.get_height() for bar in group] for group in upper.containers]
    assert heights == [[4, 12 / 5, 3], [3, 3, 3]]  # code, list, all prompts
    assert [label.get_text() for label in upper.get_xticklabels()] == [
        "code",
        "list",
        "all prompts",
    ]
    ratios = [[bar.get_height() for bar in group] for group in lower.containers]
    assert ratios == [[1, 1, 1], [0.75, 1.25, 1]]
    assert [tuple(line.get_ydata()) for line in lower.lines] == [
        *((0.75, 0.75), (1.25, 1.25), (0.75, 1.25), (1, 1)),
    ]


def test_costs() -> None:
    (axes,) = plots.costs("", TURNS, CURVE).axes
    curve, drafts = axes.lines
    assert list(curve.get_ydata())[:4] == pytest.approx([100, 100 + 100 / 3, 100 + 200 / 3, 200])
    assert curve.get_xdata()[-1] == 6  # the widest pass that ran
    assert drafts.get_ydata()[-1] == pytest.approx(300)
    assert drafts.get_xdata()[-1] == 4
    points = {
        c.get_label(): c.get_offsets().tolist() for c in axes.collections if len(c.get_offsets())
    }
    assert points["plain passes, median"] == [pytest.approx([1, 100])]
    assert points["draft passes, median"] == [pytest.approx([3, 150])]
    assert points["fused passes, median"] == [pytest.approx([6, 500])]


def test_widths() -> None:
    figure = plots.widths("", TURNS)
    (axes,) = figure.axes  # one panel: plain decoding has no widths
    drawn = [patch.get_data().values.tolist() for patch in axes.patches]
    assert drawn == [
        [2, 2, 0, 2, 2, 0],  # BLOCK, both prompts of the first round
        [0, 0, 1, 0, 0, 1],  # LOOKUP
        [2, 0, 1, 2, 0, 1],  # accepted
    ]
    colours = [to_hex(patch.get_facecolor()) for patch in axes.patches[:2]]
    assert colours == [BLOCK.colour.lower(), LOOKUP.colour.lower()]
    assert [text.get_text() for text in axes.texts] == ["code", "list"]
    assert legend(figure) == [BLOCK.words, LOOKUP.words, "accepted"]


def test_a_new_source_brings_its_words_and_its_colour() -> None:
    source = Source("oracle", "an oracle", "#123456", 0.9)
    turns = [turn("oracle", "code 1", 1.0, [cycle(1, 3, source=source)])]
    figure = plots.widths("", turns)
    patch, _ = figure.axes[0].patches
    assert patch.get_data().values.tolist() == [3]
    assert to_hex(patch.get_facecolor()) == "#123456"
    assert legend(figure) == ["an oracle", "accepted"]


def legend(figure: Any) -> list[str]:
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def test_nothing_to_draw(tmp_path: Path) -> None:
    """Plain decoding alone: no drafts, no widths."""
    turns = [turn for turn in TURNS if turn.entry == "ar"]
    assert len(plots.draw_all(tmp_path, "toy", turns, CostCurve((1,), (0.1,), 0, (0.0, 0.0)))) == 4


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plots.why_unusable() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plots.why_unusable() == (
        "matplotlib is not installed: pip install 'orthrus-gguf[bench]'"
    )
