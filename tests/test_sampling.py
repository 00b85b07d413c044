"""Sampling: known answers of the generator, exact distributions, llama.cpp's filter order."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from toy_model import ToyModel, ar_logits

from orthrus_gguf.decode import Plan, Strategy, decode, prefill
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.sampling import Sampler, SamplingSettings, gumbel_noise, philox4x32

ALL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


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
        counts[Sampler(settings).sample(logits, [1, 2, 3])] += 1
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom, p = 0.001


def support(logits: list[float], **settings: float) -> set[int]:
    """Tokens that are ever drawn at a temperature so high that all survivors are."""
    values = {**ALL, "temperature": 1e6, **settings}
    scores = np.array(logits, np.float32)
    drawn = (
        Sampler(SamplingSettings(seed=s, **values)).sample(scores, [])  # type: ignore[arg-type]
        for s in range(300)
    )
    return set(drawn)


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
        counts[Sampler(replace(settings, seed=seed)).sample(logits, prefix)] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    limits = {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}  # p = 0.001
    assert chi_square < limits[int(possible.sum()) - 1]


@pytest.mark.parametrize("strategy", ["two-pass", "fused"])
def test_frequencies_of_drafted_text(strategy: str) -> None:
    """Chi-square of whole sequences over 3,000 seeds: drafts leave the distribution alone.

    Three tokens out of four survivors each, drafted by a drafter that is right now and then.
    """
    settings = SamplingSettings(temperature=1.0, top_k=3, top_p=1.0, min_p=0.0)
    plan = Plan(Strategy(strategy), 2, 2)
    prompt, counts = [1, 2], Counter[tuple[int, ...]]()
    for seed in range(3000):
        model, sampler = ToyModel(), Sampler(replace(settings, seed=seed))
        cache = model.new_cache(64)
        tokens = [*prompt, sampler.sample(prefill(model, cache, prompt), prompt)]
        for _ in decode(model, cache, sampler, tokens, plan, 2):
            pass
        counts[tuple(tokens[2:])] += 1
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
        choice = sampler.choose(logits, [1, 2])
        assert choice is not None
        assert choice.token == sampler.sample(logits, [1, 2])
        banned = Sampler(replace(settings, banned=(choice.token,)))
        if choice.second_probability > 0:
            assert choice.second == banned.sample(logits, [1, 2])
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
    assert Sampler(SamplingSettings(temperature=0)).sample(scores, []) == 1


def test_filters_see_untempered_logits() -> None:
    """llama.cpp applies the temperature last: it does not change which tokens survive."""
    logits = list(np.log([0.6, 0.3, 0.1]))
    assert support(logits, top_p=0.85) == {0, 1}


def test_penalties() -> None:
    logits = np.array([2.0, 1.9, -1.0, -1.1], np.float32)

    def pick(prefix: list[int], **settings: float) -> int:
        chosen = SamplingSettings(temperature=0, **settings)  # type: ignore[arg-type]
        return Sampler(chosen).sample(logits, prefix)

    assert pick([0], repeat_penalty=1.1) == 1  # 2.0 / 1.1 < 1.9
    assert pick([0], repeat_penalty=1.04) == 0
    assert pick([0], presence_penalty=0.2) == 1
    assert pick([0, 0], frequency_penalty=0.06) == 1  # twice 0.06
    assert pick([0], frequency_penalty=0.06) == 0
    assert pick([0, 3, 3], repeat_penalty=2, repeat_last_n=2) == 0  # 0 is out of the window
    assert pick([0, 3, 3], repeat_penalty=2, repeat_last_n=-1) == 1
    assert pick([0], repeat_penalty=2, repeat_last_n=0) == 0
    negative = np.array([-1.0, -1.05], np.float32)
    assert Sampler(SamplingSettings(temperature=0, repeat_penalty=1.2)).sample(negative, [0]) == 1
    assert logits[0] == 2.0  # the model's logits are left alone


def test_banned_tokens_never_come() -> None:
    logits = np.array([9.0, 1.0, 0.0], np.float32)
    settings = SamplingSettings(temperature=0, banned=(0,))
    assert Sampler(settings).sample(logits, []) == 1
    assert logits[0] == 9.0


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(temperature: float, bad: float) -> None:
    logits = np.arange(5, dtype=np.float32)
    logits[1] = bad
    with pytest.raises(OrthrusError, match="logits at position 2 are not finite"):
        Sampler(SamplingSettings(temperature=temperature, top_k=2)).sample(logits, [1, 2])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -2),
        ("presence_penalty", float("inf")),
        ("seed", 2**64),
    ],
)
def test_settings_out_of_range(field: str, value: float) -> None:
    with pytest.raises(OrthrusError, match="--" + field.replace("_", "-")[:4]):
        SamplingSettings(**{field: value})  # type: ignore[arg-type]
