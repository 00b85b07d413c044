"""Device sampling in the interpreter: the tokens of `orthrus_gguf.sampling`, case by case."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from long_cases import mostly_slow
from numpy.typing import NDArray
from orthrus_kernels.sampling import plain as reference_sample
from orthrus_kernels.sampling import sample as device
from orthrus_kernels.sampling.sample import (
    MAX_TOP_K,
    RESULT,
    UNUSED,
    DrawKind,
    Draws,
    SampleScratch,
    draw,
    new_sample_scratch,
    pick,
)
from torch import Tensor

from orthrus_gguf.sampling import Choice, Sampler, SamplingSettings, gumbel_noise

CONTEXT = 300
DEFAULTS: dict[str, Any] = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}
OPEN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

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
    for plane in (scratch.masses, scratch.best, scratch.second, scratch.sums):
        plane.fill_(float("nan"))
    for plane in (scratch.extracted, scratch.top, scratch.tokens, scratch.second_tokens):
        plane.fill_(2**31 - 1)
    return scratch


@dataclass(frozen=True)
class Row:
    """One row to draw: its settings, its position, the tokens up to it, a mask."""

    settings: SamplingSettings
    position: int
    prefix: tuple[int, ...]
    allowed: NDArray[np.uint32] | None = None


def draws_of(rows: Sequence[Row], n_vocab: int) -> tuple[Draws, DrawKind]:
    """What the host says about the rows, and the modes and options that occur."""
    modes, numbers, integers, spans = [], [], [], []
    windows: list[int] = []
    bans: list[tuple[int, int]] = [(-1, 0)]
    words = -(-n_vocab // 32)
    masks = np.full((len(rows), words), 2**32 - 1, np.uint32)
    for index, row in enumerate(rows):
        s = row.settings
        modes.append(device.row_mode(s.temperature, s.top_k, n_vocab))
        numbers.append(
            device.row_numbers(
                s.temperature, s.top_p, s.min_p, s.repeat_penalty, s.frequency_penalty,
                s.presence_penalty,
            )
        )  # fmt: skip
        integers.append((device.signed(s.seed), device.kept_tokens(s.top_k, n_vocab)))
        last = len(row.prefix) if s.repeat_last_n < 0 else s.repeat_last_n
        window = row.prefix[max(0, len(row.prefix) - last) :] if s.penalizes else ()
        spans.append((len(windows), len(windows) + len(window)))
        windows += window
        bans += [(index, token) for token in s.banned]
        if row.allowed is not None:
            masks[index] = row.allowed
    kind = DrawKind(
        greedy=device.GREEDY in modes,
        extracted=device.EXTRACTED in modes,
        sorted=device.SORTED in modes,
        penalizes=bool(windows),
        bans=len(bans) > 1,
        masked=any(row.allowed is not None for row in rows),
    )
    first, stop = (torch.tensor(column, dtype=torch.int32) for column in zip(*spans, strict=True))
    draws = Draws(
        torch.tensor(modes, dtype=torch.int32),
        torch.tensor([row.position for row in rows], dtype=torch.int32),
        torch.tensor(numbers, dtype=torch.float64),
        torch.tensor(integers),
        torch.tensor([*windows, 0], dtype=torch.int32),
        first,
        stop,
        torch.tensor(bans, dtype=torch.int32),
        torch.from_numpy(masks.view(np.int32)),
    )
    return draws, kind


def drawn(
    logits: NDArray[np.float32],
    rows: Sequence[Row],
    *,
    kernels: Callable[..., None] = draw,
    **options: Any,
) -> Tensor:
    """Results of some rows, the scratch poisoned; options of the kind."""
    n_vocab = logits.shape[1]
    draws, kind = draws_of(rows, n_vocab)
    kind = dataclasses.replace(kind, **options)
    out = torch.full((len(rows), kind.columns), -7, dtype=torch.int32)
    kernels(torch.from_numpy(logits.copy()), draws, kind, poisoned_scratch(len(rows), n_vocab), out)
    return out


def choices(out: Tensor, top: int = 0) -> list[dict[str, Any]]:
    """Rows of results as names and numbers."""
    numbers = out.view(torch.float32)
    return [
        {
            "token": int(out[i, 0]),
            "second": int(out[i, 1]),
            "probability": float(numbers[i, 2]),
            "second_probability": float(numbers[i, 3]),
            "chosen": float(numbers[i, 4]),
            "top": out[i, RESULT : RESULT + top].tolist(),
            "logs": numbers[i, RESULT + top : RESULT + 2 * top].tolist(),
        }
        for i in range(len(out))
    ]


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


def rows_for(
    settings: dict[str, Any], seed: int, positions: NDArray[np.int32], history: NDArray[np.int32]
) -> list[Row]:
    chosen = SamplingSettings(**{**OPEN, **settings}, seed=seed)
    return [
        Row(chosen, int(position), tuple(history[: position + 1].tolist()))
        for position in positions
    ]


def wanted_choice(logits: NDArray[np.float32], row: Row, **options: Any) -> Choice | None:
    """What the numpy sampler draws; its prefix ends with the row's own token."""
    prefix = [0] * (row.position + 1 - len(row.prefix)) + list(row.prefix)
    return Sampler(row.settings).draw(logits, prefix, allowed=row.allowed, **options)


def token_of(choice: Choice | None) -> int:
    return -1 if choice is None else choice.token


@pytest.mark.parametrize("share", mostly_slow([24], [8]))
@pytest.mark.parametrize("name", CASES)
def test_tokens_of_the_numpy_sampler(name: str, share: int) -> None:
    """Rows of three seeds, at many positions; the seeds use all 64 bits."""
    settings, n_vocab, rows = CASES[name]
    rng = np.random.default_rng(sum(name.encode()))
    for seed in [0, 2**64 - 1, int(rng.integers(0, 2**64, dtype=np.uint64))]:
        logits, positions, history = problem(rng, -(-rows // share), n_vocab)
        asked = rows_for(settings, seed, positions, history)
        found = drawn(logits, asked)[:, 0].tolist()
        wanted = [token_of(wanted_choice(*pair)) for pair in zip(logits, asked, strict=True)]
        assert found == wanted


def mixed_rows(rng: np.random.Generator, n_vocab: int) -> tuple[NDArray[np.float32], list[Row]]:
    """Two rows of every case that this vocabulary allows, in one pass; some with masks."""
    rows: list[Row] = []
    for number, (settings, _, _) in enumerate(CASES.values()):
        _, positions, history = problem(rng, 2, n_vocab)
        rows += rows_for(settings, 7 + number, positions, history)
    for index in range(0, len(rows), 5):
        allowed = rng.integers(0, 2**32, -(-n_vocab // 32), dtype=np.uint32)
        rows[index] = dataclasses.replace(rows[index], allowed=allowed)
    return problem(rng, len(rows), n_vocab)[0], rows


@pytest.mark.parametrize("kernels", [draw, reference_sample.draw], ids=["kernels", "reference"])
def test_rows_of_any_settings_share_a_pass(kernels: Callable[..., None]) -> None:
    """Greedy, extracted and sorted rows with penalties, bans and masks of their own: each draws
    what it draws alone, which is what the numpy sampler draws."""
    logits, rows = mixed_rows(np.random.default_rng(11), 300)
    together = drawn(logits, rows, kernels=kernels)[:, 0].tolist()
    assert together == [token_of(wanted_choice(*pair)) for pair in zip(logits, rows, strict=True)]
    for index in range(0, len(rows), 3):
        alone = drawn(logits[index : index + 1], rows[index : index + 1], kernels=kernels)
        assert alone[0, 0] == together[index]


@pytest.mark.parametrize("kernels", [draw, reference_sample.draw], ids=["kernels", "reference"])
@pytest.mark.parametrize("n_vocab", [300, 2500])
def test_probabilities_and_runners_up(kernels: Callable[..., None], n_vocab: int) -> None:
    """`Choice` in detail, and log-probabilities of the raw logits, as the host has them."""
    top = 7
    logits, rows = mixed_rows(np.random.default_rng(n_vocab), n_vocab)
    out = drawn(logits, rows, kernels=kernels, detail=True, top=top)
    for row, numbers, found in zip(rows, logits, choices(out, top), strict=True):
        wanted = wanted_choice(numbers, row, detail=True, top=top)
        assert wanted is not None
        assert wanted.logprobs is not None
        assert found["token"] == wanted.token
        assert found["probability"] == pytest.approx(wanted.probability, rel=2e-5)
        assert found["second_probability"] == pytest.approx(
            wanted.second_probability, rel=2e-5, abs=1e-12
        )
        assert found["second"] == wanted.second
        assert found["chosen"] == pytest.approx(wanted.logprobs.chosen, abs=2e-6)
        assert found["top"] == [token for token, _ in wanted.logprobs.top]
        assert found["logs"] == pytest.approx([log for _, log in wanted.logprobs.top], abs=2e-6)


@pytest.mark.parametrize(
    "settings", [DEFAULTS | {"top_k": 12}, {"temperature": 0.0}], ids=["seeded", "greedy"]
)
def test_several_tiles(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """A vocabulary of several tiles gives what one tile gives, and so does each row alone."""
    logits, positions, history = problem(np.random.default_rng(5), 4, 500)
    rows = rows_for(settings, 3, positions, history)
    results = []
    for tile in (512, 128):
        monkeypatch.setattr(device, "EXTRACT_TILE", tile)
        monkeypatch.setattr(device, "SORTED_TILE", 16)
        results.append(drawn(logits, rows, detail=True, top=5))
    same, scale = choices(results[0], 5), choices(results[1], 5)
    for one, other in zip(same, scale, strict=True):
        assert (one["token"], one["second"], one["top"]) == (
            other["token"], other["second"], other["top"],
        )  # fmt: skip
        assert one["probability"] == pytest.approx(other["probability"], rel=1e-6)
    alone = drawn(logits[3:4], rows[3:4], detail=True, top=5)
    assert torch.equal(alone[0], results[1][3])


@pytest.mark.parametrize("top_k", [0, 8])
def test_top_p_stops_at_the_mass_exactly(top_k: int) -> None:
    """Of eight equal scores, four make half of the mass: the lowest ids stay, no fifth one."""
    count = 64
    settings = SamplingSettings(**OPEN | {"top_k": top_k, "top_p": 0.5})
    rows = [Row(settings, position, (0,)) for position in range(count)]
    logits = np.full((count, 8), -1.5, np.float32)
    found = drawn(logits, rows)[:, 0].tolist()
    assert found == [token_of(wanted_choice(*pair)) for pair in zip(logits, rows, strict=True)]
    assert set(found) == {0, 1, 2, 3}


def test_reference_agrees() -> None:
    """The torch reference draws the numpy sampler's tokens, and its noise to the last bits."""
    tokens = np.arange(5000)
    ours = reference_sample.gumbel_noise(2**63 + 5 - 2**64, 77, torch.from_numpy(tokens))
    np.testing.assert_allclose(ours.numpy(), gumbel_noise(2**63 + 5, 77, tokens), atol=1e-12)
    for name in ("penalties", "sorted top-k", "banned", "greedy, penalties"):
        settings, n_vocab, _ = CASES[name]
        logits, positions, history = problem(np.random.default_rng(1), 100, n_vocab)
        rows = rows_for(settings, 9, positions, history)
        found = drawn(logits, rows, kernels=reference_sample.draw)[:, 0].tolist()
        assert found == [token_of(wanted_choice(*pair)) for pair in zip(logits, rows, strict=True)]


@pytest.mark.parametrize("kernels", [draw, reference_sample.draw], ids=["kernels", "reference"])
@pytest.mark.parametrize("settings", [DEFAULTS, OPEN, {"temperature": 0.0}])
def test_no_finite_logits(settings: dict[str, Any], kernels: Callable[..., None]) -> None:
    """Where the numpy sampler gives up, the device says -1; other rows do not notice.

    The device also gives up on a NaN that the numpy sampler's filters happen to drop.
    """
    logits = np.zeros((6, 200), np.float32)
    logits[0] = -np.inf
    logits[1, 3] = np.nan
    logits[2, 199] = np.inf
    logits[3] = np.nan
    logits[4, 9] = 60
    rows = [Row(SamplingSettings(**{**OPEN, **settings}), 0, (1,))] * 5
    rows.append(dataclasses.replace(rows[0], allowed=np.zeros(7, np.uint32)))  # nothing allowed
    for index in (0, 2, 5):
        with np.errstate(all="ignore"):
            assert wanted_choice(logits[index], rows[index]) is None
    with np.errstate(all="ignore"):
        found = drawn(logits, rows, kernels=kernels, detail=True, top=2)
    assert found[:, 0].tolist() == [-1, -1, -1, -1, 9, -1]


@pytest.mark.parametrize("kernels", [draw, reference_sample.draw], ids=["kernels", "reference"])
def test_rows_that_are_not_drawn(kernels: Callable[..., None]) -> None:
    """Rows that fill up a bucket say -1, whatever lies there."""
    logits, rows = mixed_rows(np.random.default_rng(2), 300)
    draws, kind = draws_of(rows, 300)
    draws.modes[1::2] = UNUSED
    out = torch.full((len(rows), kind.columns), -7, dtype=torch.int32)
    given = torch.from_numpy(logits.copy())
    given[1] = float("nan")
    kernels(given, draws, kind, poisoned_scratch(len(rows), 300), out)
    whole = drawn(logits, rows, kernels=kernels)[:, 0]
    assert out[1::2, 0].tolist() == [-1] * len(out[1::2])
    assert torch.equal(out[0::2, 0], whole[0::2])


@pytest.mark.parametrize("kernels", [pick, reference_sample.pick], ids=["kernels", "reference"])
def test_pick(kernels: Callable[..., None]) -> None:
    """Three tiles of four rows: the runner-up may stand beside the best or in another tile, the
    lower token wins a draw, and what is not finite is no choice."""
    inf = math.inf
    best = torch.tensor([[1.0, 5.0, 5.0], [2.0, -inf, 1.5], [3.0, 1.0, 0.0], [1.0, inf, 0.0]])
    second = torch.tensor([[0.0, 4.0, 5.0], [1.75, -inf, 0.0], [-inf, 1.0, 0.0], [0.0, 0.0, 0.0]])
    sums = torch.tensor([[2.0, 1.5, 2.5], [1.0, 0.0, 1.0], [1.0, 2.0, 1.0], [1.0, inf, 1.0]])
    tokens = torch.tensor([[0, 9, 4], [3, 5, 8], [2, 4, 8], [0, 4, 8]], dtype=torch.int32)
    others = torch.tensor([[1, 8, 7], [0, 4, 9], [2, 5, 9], [1, 5, 9]], dtype=torch.int32)
    out = torch.full((4, 6), -7, dtype=torch.int32)
    values = torch.stack([best.T, second.T, sums.T])
    kernels(values, torch.stack([tokens.T, others.T]), out)
    assert out[:, 0].tolist() == [4, 3, 2, -1]
    assert out[:3, 1].tolist() == [7, 0, 4]
    found = out[:3, 2:4].view(torch.float32).double()
    total = torch.tensor(
        [4 + 2 * math.exp(-4), 1 + math.exp(-0.5), 1 + 2 * math.exp(-2) + math.exp(-3)]
    )
    torch.testing.assert_close(found[:, 0], 1 / total.double(), rtol=1e-6, atol=0)
    ratio = torch.tensor([1.0, math.exp(-0.25), math.exp(-2)]).double()
    torch.testing.assert_close(found[:, 1] / found[:, 0], ratio, rtol=1e-6, atol=0)
    assert out[:, 4:].tolist() == [[-7, -7]] * 4
