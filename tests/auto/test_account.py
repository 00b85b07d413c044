"""Time lost to drafts: what is charged, and by which estimate of plain decoding."""

from __future__ import annotations

import pytest

from orthrus_gguf.auto.account import HELD_UP, LOSS_CREDIT, LOSS_SHARE, RECENT, Account, Unverified
from orthrus_gguf.drafting.cycle import Cycle, Pass
from orthrus_gguf.drafting.draft import Draft
from orthrus_gguf.drafting.lookup import LOOKUP


def drafted(tokens: int, seconds: float) -> Cycle:
    draft = Draft(LOOKUP, (5,) * 8, (0.5,) * 8)
    passes = (Pass(9, 0, 64, seconds),)
    return Cycle(0, draft.tokens, tokens - 1, (5,) * tokens, draft, passes, seconds=seconds)


def plain(seconds: float) -> Cycle:
    return Cycle(0, (), 0, (5,), passes=(Pass(1, 0, 64, seconds),), seconds=seconds)


def test_plain_decoding_loses_nothing() -> None:
    account = Account()
    for _ in range(100):
        account.add(plain(1.0), 1.0, 1.0)
    assert account.credit(1.0) == pytest.approx(LOSS_CREDIT + 100 * LOSS_SHARE)


def test_gains_and_losses_are_counted() -> None:
    account = Account()
    account.add(drafted(6, 2.0), 2.0, 1.0)
    account.add(drafted(1, 2.0), 2.0, 1.0)
    assert account.credit(1.0) == pytest.approx(LOSS_CREDIT + 4 * LOSS_SHARE + 4 - 1)


def test_what_the_host_takes_is_part_of_plain_decoding() -> None:
    account = Account()
    for _ in range(200):
        account.add_plain(plain(1.2), 1.0)
    assert account.host == pytest.approx(0.2)
    before = account.credit(1.0)
    account.add(drafted(5, 6.0), 5.8, 1.0)
    assert account.credit(1.0) - before == pytest.approx(6 * LOSS_SHARE)


def test_a_debt_is_judged_by_what_plain_decoding_turns_out_to_take() -> None:
    """Drafts that ran when single rows were thought to be quick, and were not."""
    account = Account()
    for _ in range(4):
        account.add(drafted(2, 3.0), 3.0, 1.0)
    assert account.credit(1.0) < 0 < account.credit(1.5)


def test_what_is_long_ago_stays_as_it_was_judged() -> None:
    account = Account()
    for _ in range(400):
        account.add(drafted(2, 2.0), 2.0, 1.0)
    gained = account.credit(2.0) - account.credit(1.0) - LOSS_CREDIT
    assert gained == pytest.approx(2 / (1 - RECENT), rel=0.01), "of twenty cycles, not of all"


def test_a_pass_that_was_held_up_is_charged_only_if_the_one_before_was_too() -> None:
    def after(*seconds: float) -> float:
        account = Account()
        for taken in seconds:
            account.add(drafted(1, taken), 2.0, 1.0)
        return account.credit(1.0) - LOSS_SHARE * account.elapsed - LOSS_CREDIT

    assert after(2.0, 9.0) == pytest.approx(-1 - (HELD_UP * 2 - 1))
    assert after(2.0, 9.0, 9.0) == pytest.approx(-1 - (HELD_UP * 2 - 1) - 8)
    assert after(9.0) == pytest.approx(-8), "nothing speaks for what was expected yet"


def in_debt() -> Account:
    account = Account()
    for _ in range(8):
        account.add(drafted(1, 3.0), 3.0, 1.0)
    assert account.credit(1.0) < -10
    return account


def test_drafts_that_would_have_won_repay_a_debt() -> None:
    account = in_debt()
    for _ in range(4):
        account.add_unverified(6, 2.0, 1.0)
    assert account.credit(1.0) > 0
    for _ in range(30):
        account.add_unverified(6, 2.0, 1.0)
    assert account.credit(1.0) == pytest.approx(LOSS_CREDIT), "a debt, and no more"
    assert account.forgiven == pytest.approx(8 * (3 - 1) - LOSS_SHARE * account.elapsed)


def test_drafts_that_would_have_won_now_and_then_do_not() -> None:
    account = in_debt()
    before = account.credit(1.0)
    for _ in range(50):
        account.add_unverified(1, 2.0, 1.0)
        account.add_unverified(2, 2.0, 1.0)
    assert account.credit(1.0) == before


def test_nor_do_those_whose_passes_take_longer_than_expected() -> None:
    account = Account()
    for _ in range(12):
        account.add(drafted(1, 10.0), 2.0, 1.0)
    before = account.credit(1.0)
    for _ in range(50):
        account.add_unverified(4, 2.0, 1.0)
    assert account.credit(1.0) == before


@pytest.mark.parametrize(
    ("came", "brought"),
    [
        ([(1,), (2,), (9,)], [None, None, 3]),
        ([(1, 2), (3, 4)], [None, 4]),
        ([(9,)], [1]),
        ([(1,), (2,), (3,), (9,)], [None, None, None, 4]),
    ],
)
def test_the_text_tells_what_a_draft_would_have_brought(
    came: list[tuple[int, ...]], brought: list[int | None]
) -> None:
    watched, at = Unverified(10, (1, 2, 3), 2.0), 10
    found = []
    for tokens in came:
        found.append(watched.brought(Cycle(at, (), 0, tokens)))
        at += len(tokens)
    assert found == brought


def test_a_text_that_goes_on_elsewhere_tells_nothing() -> None:
    assert Unverified(10, (1, 2, 3), 2.0).brought(Cycle(20, (), 0, (1,))) == 0
