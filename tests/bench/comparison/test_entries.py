"""What takes part in a comparison: plans with their defaults filled in, each a policy."""

from __future__ import annotations

import pytest
from toy_model import BLOCK, ToyModel, toy_config

from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.auto.costs import CostCurve, RunningCosts
from orthrus_gguf.bench.comparison.entries import Entry, default, entries, spread
from orthrus_gguf.drafting.draft import Draft
from orthrus_gguf.drafting.lookup import LOOKUP
from orthrus_gguf.drafting.plan import FUSED_BLOCKS, FixedPolicy, Plan, Strategy, parse, parse_all
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.sampling import SamplingSettings

AR, TWO_PASS, FUSED = Strategy


def costs() -> RunningCosts:
    """Rows are free."""
    return RunningCosts(CostCurve((1, 64), (0.1, 0.1), 0, (0.0, 0.0)))


def made(text: str, *, widths: tuple[int, ...] = (), heads: bool = True) -> list[Entry]:
    return entries(spread(parse_all(text), widths), toy_config(heads=heads), costs)


@pytest.mark.parametrize(
    ("text", "name", "plan"),
    [
        ("ar", "ar", Plan(AR)),
        ("ar+lookup", "ar+lookup", Plan(AR, also=("lookup",))),
        ("two-pass", f"two-pass@{BLOCK - 1}", Plan(TWO_PASS, BLOCK - 1)),
        ("two-pass@3", "two-pass@3", Plan(TWO_PASS, 3)),
        (
            " Two-Pass@3+tail+lookup",
            "two-pass@3+lookup+tail",
            Plan(TWO_PASS, 3, also=("lookup",), tail=True),
        ),
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
    assert (first.name, plan_of(first)) == ("ar", Plan(AR)), "plain decoding always comes first"
    found = others[0] if others else first
    assert (found.name, plan_of(found)) == (name, plan)
    again = made(name)[-1]
    assert (again.name, plan_of(again)) == (name, plan), "the full spelling means the same"


def plan_of(entry: Entry) -> Plan:
    assert isinstance(entry.policy, FixedPolicy)
    return entry.policy.plan


def test_controllers_are_made_one_per_entry() -> None:
    plain, learns, simple = made("auto,auto+no-lookup,auto")
    assert (plain.name, learns.name, simple.name) == ("ar", "auto", "auto+no-lookup")
    assert isinstance(learns.policy, Controller)
    assert isinstance(simple.policy, Controller)
    text = [1, 2, 3, 4, 1, 2, 3]
    sequence = ToyModel().sequence(text, SamplingSettings())
    for entry, looks_up in ((learns, True), (simple, False)):
        offers = [o for d in entry.policy.drafters(sequence) for o in d.propose(text, 4)]
        drafts = [offer.source for offer in offers if isinstance(offer, Draft)]
        assert drafts.count(LOOKUP) == looks_up


def test_widths_go_to_those_that_name_none() -> None:
    names = [entry.name for entry in made("two-pass,fused@4,auto,fused@x2+tail", widths=(3, 7))]
    assert names == [
        *("ar", "two-pass@3", "two-pass@7", "fused@4x3"),
        *("auto", "fused@3x2+tail", "fused@7x2+tail"),
    ]


def test_entries_are_not_repeated() -> None:
    assert [e.name for e in made(f"two-pass,ar,two-pass@{BLOCK - 1}")] == ["ar", "two-pass@7"]


def test_what_is_compared_by_default() -> None:
    assert [plan.text for plan in default(toy_config())] == ["ar", "two-pass", "fused", "auto"]
    assert [plan.text for plan in default(toy_config(heads=False))] == ["ar", "auto"]


def test_what_the_model_cannot_do() -> None:
    with pytest.raises(OrthrusError, match=r"'fused@9': the width must lie in 1\.\.8"):
        made("fused@9")
    with pytest.raises(OrthrusError, match="'two-pass': toy has no diffusion heads"):
        made("two-pass", heads=False)
    assert [e.name for e in made("ar+lookup,auto", heads=False)] == ["ar", "ar+lookup", "auto"]
    with pytest.raises(OrthrusError, match="--widths: every strategy named"):
        spread([parse("auto"), parse("fused@3")], (3,))
