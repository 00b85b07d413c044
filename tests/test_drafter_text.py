"""The text never depends on a drafter: every plan, tree and cache type, side by side, on sessions
that go on, and with a drafter whose weights are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from drafters import drafter_file, loaded_pair
from same_text import ENDLESS, PAUSING, check_pairs, check_side_by_side, finished
from same_text import request as asked_of

from orthrus_gguf.engine import Session
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName

DemoFile = Callable[..., Path]
GOLDEN = Path(__file__).resolve().parent / "golden" / "dflash.json"
PROMPTS: list[list[int]] = [case["prompt_ids"] for case in json.loads(GOLDEN.read_text())["cases"]]
TOKENS = 32

#: Plans for a stock model with a drafter, and such as heads beside it allow.
PLANS = (
    "two-pass",
    "two-pass@1",
    "two-pass@4+tail",
    "two-pass@7+tree=16",
    "two-pass@3+tree=5+lookup",
    "two-pass+cut=0.3",
    "ar+dflash+lookup",
    "auto",
)
WITH_HEADS = (
    "two-pass@5+dflash",
    "fused@4x2+dflash+lookup+tail",
    "two-pass@7+dflash+tree=24",
    "auto",
)


def damaged(folder: Path) -> Path:
    """The drafter with random bits in place of half of its matrices' numbers, some of them not
    finite."""
    source = drafter_file()
    data = bytearray(source.read_bytes())
    rng = np.random.default_rng(0)
    values = np.frombuffer(data, np.uint32)[len(data) // 16 :]
    at = rng.integers(0, len(values), len(values) // 2)
    values[at] = rng.integers(0, 2**32, len(at), np.uint32)
    path = folder / "damaged.gguf"
    path.write_bytes(data)
    return path


@contextmanager
def beside(target: Path, drafter: Path, cache_type: str = "f16") -> Iterator[ModelWithDrafter]:
    types = {"cache_type_k": cache_type, "cache_type_v": cache_type}
    with loaded_pair(target, drafter, RuntimeName.CPU, **types) as model:
        yield model


def check(model: ModelWithDrafter, plans: Sequence[str], seeds: Sequence[int]) -> dict[str, int]:
    """All prompts with these seeds; accepted drafts of DFlash, by plan."""
    return check_pairs(model, plans, PROMPTS, seeds, TOKENS)


def request(model: ModelWithDrafter, plan: str, prompt: Sequence[int], seed: int) -> Request:
    return asked_of(model, plan, prompt, seed, TOKENS)


def assert_they_drafted(accepted: dict[str, int], pairs: int) -> None:
    assert all(right > 2 * pairs for right in accepted.values()), accepted


def test_plans(demo_file: DemoFile) -> None:
    """Eight prompts, two seeds."""
    with beside(demo_file("f32", split=True), drafter_file()) as model:
        assert_they_drafted(check(model, PLANS, (0, 1)), 16)


def test_beside_heads(demo_file: DemoFile) -> None:
    with beside(demo_file("f32"), drafter_file("q8_0")) as model:
        accepted = check(model, WITH_HEADS, (0,))
    assert_they_drafted({p: n for p, n in accepted.items() if p != "auto"}, 8)


def test_rows_move_with_what_the_drafter_knows(demo_file: DemoFile) -> None:
    """A session that got the rows of another one drafts from the first cycle on, and computes none
    of them again; where the other had not followed all of them, only what is missing."""
    with beside(demo_file("f32", split=True), drafter_file()) as model:
        for plan, known in (("two-pass", None), ("ar", 0)):
            first, second, alone = (Session(model, ENDLESS, 128) for _ in range(3))
            for session in (first, alone):
                finished(session.generate(request(model, plan, PROMPTS[0], 0)))
            turn = (*first.held, 7, 9)
            rows = first.take(first.held)
            assert rows.drafted == (len(first.held) if known is None else known)
            second.put(rows)
            asked = request(model, "two-pass", turn, 0)
            found = finished(second.generate(asked))
            expected = finished(alone.generate(request(model, "two-pass", turn, 0)))
            assert found.output == expected.output
            assert found.statistics.sources == expected.statistics.sources
            assert found.statistics.cached_tokens == rows.drafted
            # Rows of another length are refused, and what was held stays.
            held = second.held
            with pytest.raises(ValueError, match="rows"):
                second.put(rows._replace(drafted=rows.drafted + 1, tokens=turn))
            assert second.held == held


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
def test_small_caches(demo_file: DemoFile, cache_type: str) -> None:
    plans = ("two-pass", "two-pass@7+tree=16")
    with beside(demo_file("q8_0", split=True), drafter_file("q4_k_m"), cache_type) as model:
        assert_they_drafted(check(model, plans, (0, 2)), 16)


def test_a_damaged_drafter_costs_no_text(demo_file: DemoFile, tmp_path: Path) -> None:
    with beside(demo_file("f32", split=True), damaged(tmp_path)) as model:
        accepted = check(model, PLANS, (0, 3))
    assert max(accepted.values()) < 16


def test_side_by_side(demo_file: DemoFile) -> None:
    with beside(demo_file("f32", split=True), drafter_file()) as model:
        check_side_by_side(model, [*PLANS, PAUSING], PROMPTS, TOKENS)


def test_a_conversation_keeps_what_the_drafter_knows(demo_file: DemoFile) -> None:
    """Turn by turn on one session: only new rows are told, and the drafts are those of a session
    that starts afresh. After a turn without the drafter, the rows that it missed run again."""
    with beside(demo_file("f32", split=True), drafter_file()) as model:
        session, prompt, told = Session(model, ENDLESS, 256), list(PROMPTS[4]), 0
        for plan in ("two-pass", "two-pass", "ar", "two-pass"):
            result = finished(session.generate(request(model, plan, prompt, 0)))
            fresh = Session(model, ENDLESS, 256)
            again = finished(fresh.generate(request(model, plan, prompt, 0)))
            assert result.output == again.output
            assert [c.accepted for c in result.cycles] == [c.accepted for c in again.cycles]
            if plan == "two-pass":
                assert result.statistics.cached_tokens == told
                told = len(prompt) + TOKENS - 1
            prompt += [*result.output, *PROMPTS[0]]


@pytest.mark.slow
@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("drafter", ["f32", "q4_k_m", "damaged"])
def test_every_plan_on_many_seeds(
    demo_file: DemoFile, tmp_path: Path, cache_type: str, drafter: str
) -> None:
    """Eight prompts and six seeds for each of the twelve: 576 pairs."""
    path = damaged(tmp_path) if drafter == "damaged" else drafter_file(drafter)
    with beside(demo_file("q8_0"), path, cache_type) as model:
        accepted = check(model, (*WITH_HEADS, "ar+dflash", "two-pass@7+dflash+tree=16"), range(6))
    if drafter != "damaged":
        del accepted["auto"]
        assert_they_drafted(accepted, 48)


@pytest.mark.slow
@pytest.mark.parametrize("cache_type", ["f32", "f16", "q8_0", "q4_0"])
def test_stock_models_on_many_seeds(demo_file: DemoFile, cache_type: str) -> None:
    """Eight prompts and five seeds for each of the four: 160 pairs."""
    with beside(demo_file("q8_0", split=True), drafter_file("q8_0"), cache_type) as model:
        assert_they_drafted(check(model, PLANS, range(5)), 40)
