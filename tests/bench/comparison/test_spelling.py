"""Spellings of strategies: every variant can be named, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from toy_model import BLOCK, ToyCache, ToyModel

from orthrus_gguf.bench.comparison.spelling import Entry, entries, parse, parse_all, spread
from orthrus_gguf.decode import Plan, Policy, Strategy
from orthrus_gguf.drafting.policy import FUSED_BLOCKS, FixedPolicy
from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError

AR, TWO_PASS, FUSED = Strategy


class Auto(FixedPolicy):
    """Stands for a controller."""

    def __init__(self, lookup: bool) -> None:
        super().__init__(Plan(AR, 0, lookup=lookup))


class ChainCache(ToyCache):
    """Of a runtime that verifies no trees."""

    fit_tree = keep_path = None  # type: ignore[assignment]


class ChainModel(ToyModel):
    def new_cache(self, capacity: int) -> ToyCache:
        return ChainCache(capacity)


def made(
    text: str, *, widths: tuple[int, ...] = (), heads: bool = True, trees: bool = True
) -> list[Entry]:
    tokenizer: Any = None
    model = (ToyModel if trees else ChainModel)(heads=heads)
    session = Session(model, tokenizer, 64)
    return entries(spread(parse_all(text), widths), session, Auto)


@pytest.mark.parametrize(
    ("text", "name", "plan"),
    [
        ("ar", "ar", Plan(AR, 0)),
        ("ar+lookup", "ar+lookup", Plan(AR, 0, lookup=True)),
        ("two-pass", f"two-pass@{BLOCK - 1}", Plan(TWO_PASS, BLOCK - 1)),
        ("two-pass@3", "two-pass@3", Plan(TWO_PASS, 3)),
        (" Two-Pass@3+tail+lookup", "two-pass@3+lookup+tail", Plan(TWO_PASS, 3, 0, True, True)),
        ("two-pass@3+cut=.25", "two-pass@3+cut=0.25", Plan(TWO_PASS, 3, cut=0.25)),
        ("two-pass+tree=5", "two-pass@7+tree=5", Plan(TWO_PASS, 7, tree=5)),
        ("fused", f"fused@{BLOCK - 1}x{FUSED_BLOCKS}", Plan(FUSED, BLOCK - 1, FUSED_BLOCKS)),
        ("fused@5x1", "fused@5x1", Plan(FUSED, 5, 1)),
        ("fused@x2", f"fused@{BLOCK - 1}x2", Plan(FUSED, BLOCK - 1, 2)),
        (f"fused@{BLOCK}+tail", f"fused@{BLOCK}x3+tail", Plan(FUSED, BLOCK, 3, tail=True)),
    ],
)
def test_plans(text: str, name: str, plan: Plan) -> None:
    first, *others = made(text)
    assert first == Entry("ar", Plan(AR, 0)), "plain decoding always takes part, and comes first"
    found = others[0] if others else first
    assert found == Entry(name, plan)
    assert made(name)[-1] == found, "the full spelling means the same"


def test_controllers_are_made_one_per_entry() -> None:
    plain, learns, simple = made("auto,auto+no-lookup,auto")
    assert (plain.name, learns.name, simple.name) == ("ar", "auto", "auto+no-lookup")
    policies: list[Plan | Policy] = [learns.policy, simple.policy]
    assert [isinstance(p, Auto) and p.lookup for p in policies] == [True, False]


def test_widths_go_to_those_that_name_none() -> None:
    names = [entry.name for entry in made("two-pass,fused@4,auto,fused@x2+tail", widths=(3, 7))]
    assert names == [
        *("ar", "two-pass@3", "two-pass@7", "fused@4x3"),
        *("auto", "fused@3x2+tail", "fused@7x2+tail"),
    ]


def test_entries_are_not_repeated() -> None:
    assert [e.name for e in made(f"two-pass,ar,two-pass@{BLOCK - 1}")] == ["ar", "two-pass@7"]


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


def test_what_the_model_cannot_do() -> None:
    with pytest.raises(OrthrusError, match=r"'fused@9': the width must lie in 1\.\.8"):
        made("fused@9")
    with pytest.raises(OrthrusError, match="'two-pass': toy has no diffusion heads"):
        made("two-pass", heads=False)
    with pytest.raises(OrthrusError, match=r"toy verifies chains only; leave \+tree=3 out"):
        made("two-pass+tree=3", trees=False)
    assert [e.name for e in made("ar+lookup,auto", heads=False)] == ["ar", "ar+lookup", "auto"]
    with pytest.raises(OrthrusError, match="--widths: every strategy named"):
        spread([parse("auto"), parse("fused@3")], (3,))
