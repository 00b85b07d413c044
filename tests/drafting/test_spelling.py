"""Spellings of strategies: every variant can be named, and nothing else."""

from __future__ import annotations

import pytest

from orthrus_gguf.drafting import registry
from orthrus_gguf.drafting.lookup import LookupDrafter
from orthrus_gguf.drafting.plan import NAMES, Plan, Strategy, options_of, parse, parse_all
from orthrus_gguf.errors import OrthrusError


@pytest.fixture(autouse=True)
def _only_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the drafters that plans name, so that a new one changes nothing here."""
    kinds = {n: kind for n, kind in registry.KINDS.items() if n == "lookup" or not kind.optional}
    monkeypatch.setattr(registry, "KINDS", kinds)


def every_plan() -> list[Plan]:
    """Every strategy, with each option that it has a use for, and with all of them."""
    found = []
    for name in NAMES:
        options = [o.replace("=N", "=0.5" if "cut" in o else "=9") for o in options_of(parse(name))]
        shapes = ["", "@3"] if name in ("two-pass", "fused") else [""]
        shapes += ["@x2", "@3x2"] if name == "fused" else []
        for shape in shapes:
            chosen = ["", *(f"+{option}" for option in options), "".join(f"+{o}" for o in options)]
            found += [parse(name + shape + text) for text in chosen]
    return found


def test_the_canonical_spelling_means_the_same() -> None:
    plans = every_plan()
    assert len({plan.text for plan in plans}) == len(set(plans)) >= 25
    for plan in plans:
        assert parse(plan.text) == plan
    assert parse_all(" AR , Two-Pass@3+tail+lookup") == [
        Plan(Strategy.AR),
        Plan(Strategy.TWO_PASS, 3, also=("lookup",), tail=True),
    ]


def test_a_drafter_is_spelt_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.KINDS, "oracle", registry.Kind(LookupDrafter, words="the future"))
    assert parse("fused@3+oracle+lookup").also == ("lookup", "oracle")
    assert parse("auto+no-oracle") == Plan(None, also=("oracle",))
    with pytest.raises(OrthrusError, match=r"ar takes \+lookup, \+oracle, not \+tail"):
        parse("ar+tail")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "strategy '': expected NAME"),
        ("ar,,auto", "strategy '': expected NAME"),
        ("tree", "expected NAME.*one of auto, ar, two-pass, fused"),
        ("two-pass@", "expected NAME"),
        ("two-pass@x", "expected NAME"),
        ("two-pass@3x", "expected NAME"),
        ("two-pass@-3", "expected NAME"),
        ("two-pass@" + "9" * 5000, "expected NAME"),
        ("two-pass+tree=" + "9" * 5000, "expected a number"),
        ("two-pass@3 ", None),
        ("ar@3", "plain decoding has no width; leave @3 out"),
        ("auto@3x2", "auto chooses widths itself; leave @3x2 out"),
        ("two-pass@3x2", "only fused passes carry blocks; leave x2 out"),
        ("fused@0", "at least 1"),
        ("fused@3x0", "at least 1"),
        ("fused+cut", r"fused takes \+lookup, \+tail, \+cut=N, not \+cut"),
        ("fused+tail=3", r"fused takes .* not \+tail=3"),
        ("fused+tree=3", r"fused takes .* not \+tree=3"),
        ("two-pass+tree=x", "expected a number of at least 1"),
        ("two-pass+tree=0", "expected a number of at least 1"),
        ("fused+", r"fused takes .* not \+$"),
        ("ar+tail", r"ar takes \+lookup, not \+tail"),
        ("ar+cut=0.5", r"ar takes \+lookup, not \+cut=0.5"),
        ("auto+lookup", r"auto takes \+no-lookup, not \+lookup"),
        ("fused+no-lookup", r"fused takes .* not \+no-lookup"),
        ("fused+cut=1", "expected a probability"),
        ("fused+cut=nan", "expected a probability"),
        ("fused+cut=", "expected a probability"),
    ],
)
def test_what_is_no_spelling(text: str, message: str | None) -> None:
    if message is None:
        parse_all(text)
        return
    with pytest.raises(OrthrusError, match=message) as caught:
        parse_all(text)
    assert "\n" not in str(caught.value)
