"""Sampling: known answers of the generator, exact distributions, llama.cpp's filter order."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_model import ToyModel, ar_logits

from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.sampling import (
    TILE,
    Sampler,
    SamplingSettings,
    _top_k,
    gumbel_noise,
    philox4x32,
)
from orthrus_gguf.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).resolve().parent / "golden"

ALL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def draw(sampler: Sampler, logits: np.ndarray, prefix: list[int]) -> int:
    choice = sampler.draw(logits, prefix)
    assert choice is not None
    return choice.token


def test_philox_known_answers() -> None:
    """Vectors of the Random123 distribution (kat_vectors, philox4x32-10)."""
    cases = [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF, 0xFFFFFFFF),
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, answer in cases:
        c0, c1, c2, c3 = (np.array([c], np.uint32) for c in counter)
        words = philox4x32((c0, c1, c2, c3), key)
        assert " ".join(f"{int(w[0]):08x}" for w in words) == answer


def test_noise_is_keyed_by_seed_position_and_token() -> None:
    tokens = np.arange(1000)
    base = gumbel_noise(7, 5, tokens)
    assert np.array_equal(gumbel_noise(7, 5, tokens[::-3]), base[::-3])
    for other in (gumbel_noise(8, 5, tokens), gumbel_noise(7 + 2**32, 5, tokens)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.1
    assert abs(np.corrcoef(base, gumbel_noise(7, 6, tokens))[0, 1]) < 0.1


def test_noise_is_gumbel_distributed() -> None:
    sample = np.sort(gumbel_noise(1, 2, np.arange(200_000)))
    cdf = np.exp(-np.exp(-sample))
    distance = np.abs(cdf - np.arange(1, sample.size + 1) / sample.size).max()
    assert distance < 1.95 / np.sqrt(sample.size)  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_the_softmax(temperature: float) -> None:
    """Chi-square over 20,000 seeds at one position."""
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0], np.float32)
    weights = np.exp(logits.astype(np.float64) / temperature)
    expected = 20_000 * weights / weights.sum()
    counts = np.zeros(6)
    for seed in range(20_000):
        settings = SamplingSettings(temperature=temperature, seed=seed, **ALL)  # type: ignore[arg-type]
        counts[draw(Sampler(settings), logits, [1, 2, 3])] += 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def support(logits: list[float], **settings: float) -> set[int]:
    """Tokens that are ever drawn at a temperature so high that all survivors are."""
    values = {**ALL, "temperature": 1e6, **settings}
    scores = np.array(logits, np.float32)
    samplers = (Sampler(SamplingSettings(seed=s, **values)) for s in range(300))  # type: ignore[arg-type]
    return {draw(sampler, scores, []) for sampler in samplers}


def softmax_of_survivors(
    logits: np.ndarray, prefix: list[int], settings: SamplingSettings
) -> np.ndarray:
    """Probabilities by the definitions of llama.cpp's documentation, one token at a time."""
    scores = {}
    for token, logit in enumerate(logits.astype(float)):
        count = prefix.count(token)
        if count:
            penalty = settings.repeat_penalty
            logit = logit * penalty if logit <= 0 else logit / penalty
            logit -= count * settings.frequency_penalty + settings.presence_penalty
        scores[token] = logit
    ranked = sorted(scores, key=lambda token: -scores[token])
    ranked = ranked[: settings.top_k or len(ranked)]
    weights = [math.exp(scores[token]) for token in ranked]
    mass, kept = 0.0, 0
    while kept < len(ranked) and mass < settings.top_p * sum(weights):
        mass, kept = mass + weights[kept], kept + 1
    ranked = [t for t in ranked[:kept] if weights[ranked.index(t)] >= settings.min_p * weights[0]]
    final = {token: math.exp(scores[token] / settings.temperature) for token in ranked}
    return np.array([final.get(token, 0.0) / sum(final.values()) for token in scores])


@pytest.mark.parametrize(
    "flags",
    [
        {**ALL},
        {**ALL, "top_k": 4},
        {**ALL, "top_p": 0.8},
        {**ALL, "min_p": 0.2},
        {**ALL, "repeat_penalty": 1.8},
        {**ALL, "presence_penalty": 0.7, "frequency_penalty": 0.4},
        {"top_k": 6, "top_p": 0.9, "min_p": 0.05, "repeat_penalty": 1.3, "presence_penalty": 0.3},
    ],
    ids=str,
)
def test_frequencies_with_filters_and_penalties(flags: dict[str, float]) -> None:
    """Chi-square over 10,000 seeds, against probabilities worked out token by token."""
    logits = np.array([2.0, 1.5, 1.0, 0.6, 0.0, -0.5, -1.0, -2.0], np.float32)
    prefix = [0, 3, 0, 7, 4]
    settings = SamplingSettings(temperature=1.1, **flags)  # type: ignore[arg-type]
    expected = 10_000 * softmax_of_survivors(logits, prefix, settings)
    counts = np.zeros(8)
    for seed in range(10_000):
        counts[draw(Sampler(replace(settings, seed=seed)), logits, prefix)] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    limits = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}  # p = 0.001
    assert chi_square < limits[int(possible.sum()) - 1]


@pytest.mark.parametrize("plan", ["two-pass@2", "fused@2x2", "two-pass@2+tree=5"])
def test_frequencies_of_drafted_text(plan: str) -> None:
    """Chi-square of whole sequences over 3,000 seeds: drafts leave the distribution alone.

    Three tokens out of four survivors each, drafted by a drafter that is right now and then.
    """
    settings = SamplingSettings(temperature=1.0, top_k=3, top_p=1.0, min_p=0.0)
    prompt, counts = [1, 2], Counter[tuple[int, ...]]()
    for seed in range(3000):
        model = ToyModel()
        sequence = model.sequence(prompt, replace(settings, seed=seed))
        drive(model, prefill(sequence))
        for _ in decode(model, sequence, FixedPolicy(parse(plan), model.config), 2):
            pass
        counts[tuple(sequence.tokens[2:])] += 1
    expected: dict[tuple[int, ...], float] = {(): 3000.0}
    for _ in range(3):
        expected = {
            (*found, int(token)): weight * p
            for found, weight in expected.items()
            for token, p in enumerate(
                softmax_of_survivors(ar_logits([*prompt, *found]), [*prompt, *found], settings)
            )
            if p > 0
        }
    assert set(counts) <= set(expected)
    # Sequences too rare for the test are taken together.
    rare = [found for found, weight in expected.items() if weight < 5]
    chi_square = sum(
        (counts[found] - weight) ** 2 / weight for found, weight in expected.items() if weight >= 5
    )
    if rare:
        weight = sum(expected[found] for found in rare)
        chi_square += (sum(counts[found] for found in rare) - weight) ** 2 / weight
    degrees = len(expected) - len(rare) + bool(rare) - 1
    assert chi_square < degrees + 3.3 * math.sqrt(2 * degrees) + 6  # about p = 0.0005


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_choice_begins_with_the_sampled_token(temperature: float) -> None:
    """And its second is what would be sampled if the first were banned."""
    for seed in range(50):
        settings = SamplingSettings(temperature=temperature, seed=seed, **ALL)  # type: ignore[arg-type]
        logits = ar_logits([seed])
        sampler = Sampler(settings)
        choice = sampler.draw(logits, [1, 2], detail=True)
        assert choice is not None
        assert choice.token == draw(sampler, logits, [1, 2])
        banned = Sampler(replace(settings, banned=(choice.token,)))
        if choice.second_probability > 0:
            assert choice.second == draw(banned, logits, [1, 2])
        assert 1 >= choice.probability >= choice.second_probability >= 0


def test_filters() -> None:
    logits = list(np.log([0.4, 0.3, 0.15, 0.1, 0.05]))
    assert support(logits) == {0, 1, 2, 3, 4}
    assert support(logits, top_k=2) == {0, 1}
    assert support(logits, top_p=0.69) == {0, 1}
    assert support(logits, top_p=0.71) == {0, 1, 2}
    assert support(logits, top_p=1e-9) == {0}
    assert support(logits, min_p=0.3) == {0, 1, 2}
    # top-p counts the mass of what top-k left: 0.4 of 0.7 is enough for 0.55
    assert support(logits, top_k=2, top_p=0.55) == {0}


def test_ties_go_to_the_lowest_ids() -> None:
    assert support([1.0, 1.0, 1.0, 1.0], top_k=2) == {0, 1}
    assert support([0.0, 1.0, 1.0, 1.0], top_p=0.5) == {1, 2}
    scores = np.array([0, 3, 3], np.float32)
    assert draw(Sampler(SamplingSettings(temperature=0)), scores, []) == 1


def test_filters_see_untempered_logits() -> None:
    """llama.cpp applies the temperature last: it does not change which tokens survive."""
    logits = list(np.log([0.6, 0.3, 0.1]))
    assert support(logits, top_p=0.85) == {0, 1}


def test_penalties() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)

    def pick(prefix: list[int], **settings: float) -> int:
        chosen = SamplingSettings(temperature=0, **settings)  # type: ignore[arg-type]
        return draw(Sampler(chosen), logits, prefix)

    assert pick([0], repeat_penalty=1.1) == 1  # 2.0 / 1.1 < 1.9
    assert pick([0], repeat_penalty=1.04) == 0
    assert pick([0], presence_penalty=0.2) == 1
    assert pick([0, 0], frequency_penalty=0.06) == 1  # twice 0.06
    assert pick([0], frequency_penalty=0.06) == 0
    assert pick([0, 3, 3], repeat_penalty=2, repeat_last_n=2) == 0  # 0 is out of the window
    assert pick([0, 3, 3], repeat_penalty=2, repeat_last_n=-1) == 1
    assert pick([0], repeat_penalty=2, repeat_last_n=0) == 0
    negative = np.array([-1.0, -1.05], np.float32)
    penalized = SamplingSettings(temperature=0, repeat_penalty=1.2)
    assert draw(Sampler(penalized), negative, [0]) == 1
    assert logits[0] == 2.0  # the model's logits are left alone


def test_banned_tokens_never_come() -> None:
    logits = np.array([9.0, 1.0, 0.0], np.float32)
    settings = SamplingSettings(temperature=0, banned=(0,))
    assert draw(Sampler(settings), logits, []) == 1
    assert logits[0] == 9.0


@pytest.mark.parametrize("detail", [False, True])
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_is_drawn_from_logits_that_are_not_finite(
    temperature: float, bad: float, detail: bool
) -> None:
    """Wherever the number is. (That it ends decoding in one line is tested with the loop.)"""
    sampler = Sampler(SamplingSettings(temperature=temperature, top_k=2))
    for place in range(5):
        logits = np.arange(5, dtype=np.float32)
        logits[place] = bad
        assert sampler.draw(logits, [1, 2], detail=detail, top=2) is None
    assert sampler.draw(np.full(5, -np.inf, np.float32), [1, 2]) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("inf")),
        ("top_p", float("nan")),
        ("min_p", float("nan")),
        ("repeat_penalty", 0.0),
        ("repeat_penalty", 1e-30),
        ("repeat_penalty", 1e30),
        ("repeat_last_n", -2),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", -1e39),
        ("seed", 2**64),
    ],
)
def test_settings_out_of_range(field: str, value: float) -> None:
    with pytest.raises(OrthrusError, match=f"^{field}: expected .*, found "):
        SamplingSettings(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"top_p": 0.0}, {"top_k": 1, "top_p": 1.0}),
        ({"top_p": -3.0, "top_k": 5}, {"top_k": 1, "top_p": 1.0}),
        ({"min_p": 1.5}, {"min_p": 1.0}),
        ({"temperature": 5e-324}, {"temperature": 0.0}),
        ({"temperature": -1.0}, {"temperature": 0.0}),
    ],
    ids=str,
)
def test_what_extremes_come_to(given: dict[str, Any], meant: dict[str, Any]) -> None:
    """Said here once, for all that computes: none of them divides by nothing or keeps nothing."""
    assert SamplingSettings(**given) == SamplingSettings(**meant)


@pytest.mark.parametrize(
    "flags",
    [
        {"top_p": 0.0},
        {"top_p": 1e-300},
        {"min_p": 2.0},
        {"min_p": 1e-320, "top_p": 0.0},
        {"temperature": 1e-10},
        {"temperature": 1e-45},
        {"repeat_penalty": 1e6, "repeat_last_n": -1},
        {"repeat_penalty": 1e-6},
        {"presence_penalty": 1e6, "frequency_penalty": 1e6},
        {"presence_penalty": -1e6, "frequency_penalty": -1e6},
        {"temperature": 1e300},
    ],
    ids=str,
)
def test_extremes_draw_a_token(flags: dict[str, Any]) -> None:
    """With the largest logits that a model may be thought to have; the weights are never blamed."""
    logits = np.array([-1e4, 3.0, 1e4, 2.0, 0.0], np.float32)
    choice = Sampler(SamplingSettings(seed=5, **flags)).draw(logits, [2, 0, 2], detail=True)
    assert choice is not None
    assert 0 <= choice.probability <= 1
    if not any("penalty" in name for name in flags) and flags.get("temperature", 0) < 1:
        assert choice.token == 2


# --- the mask and the log-probabilities ---


def mask_of(size: int, allowed: set[int]) -> np.ndarray:
    """Token v in bit v % 32 of word v // 32, spelled out."""
    words = [0] * -(-size // 32)
    for token in allowed:
        words[token // 32] |= 1 << token % 32
    return np.array(words, np.uint32)


@pytest.mark.parametrize("size", [5, 31, 32, 33, 64, 70, 1000])
@pytest.mark.parametrize("flags", [{"temperature": 0.0}, {}, {"temperature": 2.0, **ALL}], ids=str)
def test_masked_draws_are_those_of_a_vocabulary_without_the_others(
    size: int, flags: dict[str, float]
) -> None:
    """As if all other logits were -inf."""
    rng = np.random.default_rng(size)
    for seed in range(40):
        logits = rng.normal(0, 4, size).astype(np.float32)
        allowed = set(rng.choice(size, rng.integers(1, size + 1), replace=False).tolist())
        without = logits.copy()
        without[[v for v in range(size) if v not in allowed]] = -np.inf
        sampler = Sampler(SamplingSettings(seed=seed, **flags))  # type: ignore[arg-type]
        found = sampler.draw(logits, [1], detail=True, allowed=mask_of(size, allowed))
        assert found == sampler.draw(without, [1], detail=True)
        assert found is not None
        assert found.token in allowed
        everything = sampler.draw(logits, [1], allowed=mask_of(size, set(range(size))))
        assert everything is not None
        assert everything.token == draw(sampler, logits, [1])
        assert sampler.draw(logits, [1], allowed=mask_of(size, set())) is None
        (only, *_) = allowed
        forced = sampler.draw(logits, [1], detail=True, allowed=mask_of(size, {only}))
        assert forced is not None
        assert (forced.token, forced.probability) == (only, 1.0)


@pytest.mark.parametrize(
    "flags",
    [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.7, **ALL},
        {"repeat_penalty": 1.5, "presence_penalty": 1.0, "top_k": 3},
        {"banned": (0, 1, 2, 3)},
    ],
    ids=str,
)
def test_log_probabilities_are_of_the_raw_logits(flags: dict[str, float]) -> None:
    """Softmax before penalties, bans, masks, filters and temperature, whatever was drawn."""
    rng = np.random.default_rng(0)
    for seed in range(30):
        logits = rng.normal(0, 3, 200).astype(np.float32)
        logits[rng.integers(0, 200, 5)] = logits.max()  # ties: the lower id first
        sampler = Sampler(SamplingSettings(seed=seed, **flags))  # type: ignore[arg-type]
        allowed = mask_of(200, set(range(seed, 200)))
        choice = sampler.draw(logits, [5, 7, 5], top=6, allowed=allowed)
        plain = sampler.draw(logits, [5, 7, 5], allowed=allowed)
        assert choice is not None
        assert plain is not None
        assert choice.token == plain.token
        assert plain.logprobs is None
        assert choice.logprobs is not None
        logs = logits - np.log(np.exp(logits.astype(np.float64)).sum())
        best = sorted(range(200), key=lambda v: (-logits[v], v))[:6]
        assert [v for v, _ in choice.logprobs.top] == best
        assert [p for _, p in choice.logprobs.top] == pytest.approx(logs[best].tolist(), abs=1e-9)
        assert choice.logprobs.chosen == pytest.approx(logs[choice.token], abs=1e-9)


def test_log_probabilities_of_more_than_there_are_are_all() -> None:
    choice = Sampler(SamplingSettings(temperature=0)).draw(np.zeros(3, np.float32), [], top=99)
    assert choice is not None
    assert choice.logprobs is not None
    assert [v for v, _ in choice.logprobs.top] == [0, 1, 2]
    assert [p for _, p in choice.logprobs.top] == pytest.approx([-math.log(3)] * 3)


def test_detail_changes_nothing_but_what_is_said() -> None:
    for seed in range(20):
        sampler = Sampler(SamplingSettings(seed=seed))
        logits = ar_logits([seed, 1])
        sure = sampler.draw(logits, [3], detail=True)
        assert sure is not None
        plain = sampler.draw(logits, [3])
        assert plain is not None
        assert plain.token == sure.token
        assert math.isnan(plain.probability)
        assert math.isnan(plain.second_probability)
        assert plain.second == -1


# --- the k largest, by the maxima of tiles ---


def k_largest(scores: np.ndarray, k: int) -> list[int]:
    """By sorting all: at the threshold the lowest ids win."""
    order = sorted(range(scores.size), key=lambda v: (-scores[v], v))
    return sorted(order[:k]) if 0 < k < scores.size else list(range(scores.size))


SIZES = [1, 2, *(n * TILE + d for n in (1, 2, 3, 4, 9, 40) for d in (-1, 0, 1, 60))]


@pytest.mark.parametrize("size", SIZES)
def test_the_k_largest(size: int) -> None:
    """Distinct scores, many ties, few finite ones, all equal, and the best ones in a few tiles or
    in the last, incomplete one."""
    rng = np.random.default_rng(size)
    distinct = rng.permutation(size).astype(np.float32)
    ties = rng.integers(0, 4, size).astype(np.float32)
    sparse = np.full(size, -np.inf, np.float32)
    sparse[rng.integers(0, size, 5)] = rng.integers(0, 2, 5)
    at_the_end, at_the_start = distinct.copy(), distinct.copy()
    at_the_end[-30:] += size
    at_the_start[:100] += size
    level = np.zeros(size, np.float32)
    kinds = [distinct, ties, sparse, at_the_end, at_the_start, level, np.full(size, -np.inf)]
    counts = {-1, 0, 1, 2, 3, 5, 38, 40, 41, TILE, TILE + 1, size // TILE, size - 1, size, size + 5}
    for scores in kinds:
        for k in sorted(counts):
            found = _top_k(scores.astype(np.float32), k)
            assert found.tolist() == k_largest(scores, k), k


# --- same seed, same text as ever ---


def fixed_logits(size: int, case: int) -> np.ndarray:
    """Logits from integers alone, in 4001 steps: with ties."""
    places = np.arange(size, dtype=np.uint64) + np.uint64(case * 1_000_003)
    mixed = places * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    return ((mixed % np.uint64(4001)).astype(np.float32) - 2000) / 160  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def frozen() -> dict[str, Any]:
    """What the sampler of commit ec6b9f6 drew and wrote (tests/golden/README.md)."""
    data: dict[str, Any] = json.loads((GOLDEN / "sampling.json").read_text())
    return data


def test_the_same_seeds_draw_the_same_tokens_as_ever(frozen: dict[str, Any]) -> None:
    """12 settings, 8 sizes of vocabulary, 10 seeds: tokens, runners-up and probabilities."""
    checked = 0
    for run in frozen["runs"]:
        for size, choices in run["choices"].items():
            for case, (seed, frozen_choice) in enumerate(
                zip(frozen["seeds"], choices, strict=True)
            ):
                logits = fixed_logits(int(size), case)
                best = np.argsort(-logits, kind="stable")[:4].tolist()
                prefix = [best[i % 4] if i % 2 else i * 37 % int(size) for i in range(case * 3)]
                flags = dict(run["settings"])
                if "banned" in flags:
                    flags["banned"] = tuple(v for v in flags["banned"] if v < int(size))
                sampler = Sampler(SamplingSettings(seed=seed, **flags))
                choice = sampler.draw(logits, prefix, detail=True)
                assert choice is not None
                token, second, probability, runner_up = frozen_choice
                assert choice.token == draw(sampler, logits, prefix) == token
                assert choice.second == second
                assert choice.probability == pytest.approx(probability, rel=1e-5)
                assert choice.second_probability == pytest.approx(runner_up, rel=1e-5)
                checked += 1
    assert checked == 12 * 8 * 10


@pytest.mark.parametrize("runtime", ["reference", "ggml", "cpu"])
def test_the_same_seeds_write_the_same_text_as_ever(
    runtime: str, frozen: dict[str, Any], golden: dict[str, Any], demo_file: Callable[..., Path]
) -> None:
    """36 runs of 24 tokens on the demo model (a third of them on the slow runtime): plainly, and
    with drafts of every kind."""
    torch.set_num_threads(1)
    plans = itertools.cycle(["ar", "two-pass@7+tree=9", "fused@5x3+lookup+tail"])
    with ModelFile.open(demo_file("f32")) as file:
        tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
        model = load_model(file, RuntimeSettings(RuntimeName(runtime), threads=1))
        session = Session(model, tokenizer, 256)
        runs = frozen["texts"][:: 3 if runtime == "reference" else 1]
        for run, plan in zip(runs, plans, strict=False):
            prompt = tuple(golden["cases"][run["case"]]["prompt_ids"])
            settings = SamplingSettings(seed=run["seed"], **run["settings"])
            policy = FixedPolicy(parse(plan), model.config)
            generation = session.generate(Request(prompt, settings, policy, max_tokens=24))
            for _ in generation:
                pass
            assert list(generation.result.output) == run["output"], (plan, run)
        model.close()
