"""Device sampling in the interpreter: the tokens of `orthrus_gguf.sampling`, case by case."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from orthrus_kernels.sampling import plain as reference_sample
from orthrus_kernels.sampling import sample as device
from orthrus_kernels.sampling.sample import (
    MAX_TOP_K,
    SampleScratch,
    new_sample_scratch,
    pick,
    sample,
    sampling_parameters,
)

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.sampling import Sampler, SamplingSettings, gumbel_noise

CONTEXT = 300
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
OPEN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

#: name → (settings, vocabulary, rows).
CASES: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama.cpp's defaults": (DEFAULTS, 257, 256),
    "qwen's": ({"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}, 257, 256),
    "no filter": (OPEN | {"temperature": 1.5}, 257, 256),
    "top-p alone": (OPEN | {"top_p": 0.7}, 257, 256),
    "min-p alone": (OPEN | {"temperature": 2.0, "min_p": 0.1}, 257, 128),
    "narrow top-k": (OPEN | {"top_k": 1}, 257, 64),
    "widest extraction": (OPEN | {"top_k": MAX_TOP_K, "top_p": 0.99}, 300, 32),
    "sorted top-k": (OPEN | {"top_k": MAX_TOP_K + 1, "top_p": 0.9}, 300, 128),
    "top-k above the vocabulary": (OPEN | {"top_k": 500, "min_p": 0.02}, 100, 40),
    "penalties": (
        DEFAULTS
        | {"repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": -0.4}
        | {"repeat_last_n": 64},
        257,
        192,
    ),
    "penalties of the whole context": (
        OPEN | {"repeat_penalty": 1.1, "frequency_penalty": 0.01, "repeat_last_n": -1},
        257,
        64,
    ),
    "short window": (DEFAULTS | {"presence_penalty": 1.0, "repeat_last_n": 3}, 257, 64),
    "banned": (DEFAULTS | {"top_k": 3, "banned": (0, 5, 256)}, 257, 64),
    "greedy": ({"temperature": 0.0}, 257, 256),
    "greedy, penalties": (
        {"temperature": 0.0, "repeat_penalty": 1.5, "repeat_last_n": 32, "banned": (7,)},
        257,
        128,
    ),
    "several sorted tiles": (OPEN | {"top_p": 0.98}, 2500, 32),
}


def poisoned_scratch(rows: int, n_vocab: int) -> SampleScratch:
    scratch = new_sample_scratch(rows, n_vocab, "cpu")
    for plane in (scratch.masses, scratch.best):
        plane.fill_(float("nan"))
    for plane in (scratch.extracted, scratch.top, scratch.tokens):
        plane.fill_(2**31 - 1)
    return scratch


def problem(
    rng: np.random.Generator, rows: int, n_vocab: int
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]:
    """Logits of mixed sharpness, a third of them with many draws; positions; a history."""
    logits = rng.standard_normal((rows, n_vocab)) * rng.choice([0.5, 2, 6], (rows, 1))
    logits[::3] = np.round(logits[::3])
    logits[1::7, ::2] *= -0.0  # both zeros, which are equal
    positions = rng.integers(0, CONTEXT - 1, rows)
    history = rng.integers(0, min(40, n_vocab), CONTEXT)
    return logits.astype(np.float32), positions.astype(np.int32), history.astype(np.int32)


@pytest.mark.parametrize("name", CASES)
def test_tokens_of_the_numpy_sampler(name: str) -> None:
    """Rows of eight seeds, at many positions; the seeds use all 64 bits."""
    settings, n_vocab, rows = CASES[name]
    rng = np.random.default_rng(sum(name.encode()))
    scratch = poisoned_scratch(rows // 8, n_vocab)
    for seed in [0, 2**64 - 1, *(int(s) for s in rng.integers(0, 2**64, 6, dtype=np.uint64))]:
        logits, positions, history = problem(rng, rows // 8, n_vocab)
        parameters = sampling_parameters(n_vocab, "cpu", seed=seed, **settings)
        found = torch.full((rows // 8,), -7, dtype=torch.int32)
        sample(
            torch.from_numpy(logits.copy()),
            torch.from_numpy(positions),
            torch.from_numpy(history),
            parameters,
            scratch,
            found,
        )
        sampler = Sampler(SamplingSettings(**{**OPEN, **settings}, seed=seed))
        wanted = [
            sampler.sample(row, history[: position + 1].tolist())
            for row, position in zip(logits, positions, strict=True)
        ]
        assert found.tolist() == wanted


@pytest.mark.parametrize(
    "settings", [DEFAULTS | {"top_k": 12}, {"temperature": 0.0}], ids=["seeded", "greedy"]
)
def test_several_tiles(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """A vocabulary of several tiles gives what one tile gives, and so does each row alone."""
    logits, positions, history = problem(np.random.default_rng(5), 12, 500)
    parameters = sampling_parameters(500, "cpu", seed=3, **settings)
    results = []
    for tile in (512, 128):
        monkeypatch.setattr(device, "EXTRACT_TILE", tile)
        monkeypatch.setattr(device, "SORTED_TILE", 16)
        found = torch.full((12,), -7, dtype=torch.int32)
        copy = torch.from_numpy(logits.copy())
        at, before = torch.from_numpy(positions), torch.from_numpy(history)
        sample(copy, at, before, parameters, poisoned_scratch(12, 500), found)
        results.append(found)
    assert torch.equal(*results)
    alone = torch.zeros(1, dtype=torch.int32)
    one = torch.from_numpy(logits[9:10].copy()), torch.from_numpy(positions[9:10])
    sample(*one, torch.from_numpy(history), parameters, poisoned_scratch(1, 500), alone)
    assert alone[0] == results[0][9]


@pytest.mark.parametrize("top_k", [0, 8])
def test_top_p_stops_at_the_mass_exactly(top_k: int) -> None:
    """Of eight equal scores, four make half of the mass: the lowest ids stay, no fifth one."""
    rows = 64
    settings: dict[str, Any] = OPEN | {"top_k": top_k, "top_p": 0.5}
    positions, history = torch.arange(rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    found = torch.zeros(rows, dtype=torch.int32)
    logits = torch.full((rows, 8), -1.5)
    scratch = poisoned_scratch(rows, 8)
    sample(logits, positions, history, sampling_parameters(8, "cpu", **settings), scratch, found)
    sampler = Sampler(SamplingSettings(**settings))
    row = np.full(8, -1.5, np.float32)
    assert found.tolist() == [sampler.sample(row, [0] * (i + 1)) for i in range(rows)]
    assert set(found.tolist()) == {0, 1, 2, 3}


def test_reference_agrees() -> None:
    """The torch reference draws the numpy sampler's tokens, and its noise to the last bits."""
    tokens = np.arange(5000)
    ours = reference_sample.gumbel_noise(2**63 + 5 - 2**64, 77, torch.from_numpy(tokens))
    np.testing.assert_allclose(ours.numpy(), gumbel_noise(2**63 + 5, 77, tokens), atol=1e-12)
    for name in ("penalties", "sorted top-k", "banned", "greedy, penalties"):
        settings, n_vocab, _ = CASES[name]
        logits, positions, history = problem(np.random.default_rng(1), 100, n_vocab)
        found = torch.zeros(100, dtype=torch.int32)
        copy = torch.from_numpy(logits.copy())
        at, before = torch.from_numpy(positions), torch.from_numpy(history)
        parameters = sampling_parameters(n_vocab, "cpu", seed=9, **settings)
        scratch = poisoned_scratch(1, n_vocab)
        reference_sample.sample(copy, at, before, parameters, scratch, found)
        sampler = Sampler(SamplingSettings(**{**OPEN, **settings}, seed=9))
        wanted = [
            sampler.sample(row, history[: position + 1].tolist())
            for row, position in zip(logits, positions, strict=True)
        ]
        assert found.tolist() == wanted


@pytest.mark.parametrize("settings", [DEFAULTS, OPEN, {"temperature": 0.0}])
def test_no_finite_logits(settings: dict[str, Any]) -> None:
    """Where the numpy sampler gives up, the device says -1; other rows do not notice.

    The device also gives up on a NaN that the numpy sampler's filters happen to drop.
    """
    logits = np.zeros((5, 200), np.float32)
    logits[0] = -np.inf
    logits[1, 3] = np.nan
    logits[2, 199] = np.inf
    logits[3] = np.nan
    logits[4, 9] = 60
    for row in logits[[0, 2]]:
        with pytest.raises(OrthrusError), np.errstate(all="ignore"):
            Sampler(SamplingSettings(**{**OPEN, **settings})).sample(row, [1])
    found = torch.zeros(5, dtype=torch.int32)
    zeros = torch.zeros(5, dtype=torch.int32)
    parameters = sampling_parameters(200, "cpu", **settings)
    with np.errstate(all="ignore"):
        sample(torch.from_numpy(logits), zeros, zeros, parameters, poisoned_scratch(5, 200), found)
    assert found.tolist() == [-1, -1, -1, -1, 9]


def test_pick_takes_tiles_in_any_layout() -> None:
    best = torch.tensor([[1.0, 5.0, 5.0], [2.0, float("-inf"), 2.0], [1, float("nan"), 0]])
    tokens = torch.tensor([[0, 9, 4], [8, 1, 7], [0, 1, 2]], dtype=torch.int32)
    for layout in (best, best.T.contiguous().T, best.double()):
        for implementation in (pick, reference_sample.pick):
            out = torch.zeros(3, dtype=torch.int32)
            implementation(layout, tokens, out)
            assert out.tolist() == [4, 7, -1]
