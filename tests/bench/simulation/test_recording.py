"""Recordings on disk, and those that are made up from published acceptance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from orthrus_gguf.bench.simulation.acceptance_tables import TABLES
from orthrus_gguf.bench.simulation.hardware import FlatCosts
from orthrus_gguf.bench.simulation.recording import COLUMNS, Recording, load
from orthrus_gguf.bench.simulation.replay import ReplayModel, VirtualClock
from orthrus_gguf.bench.simulation.strategies import Simulator, run
from orthrus_gguf.bench.simulation.synthetic import MIXED, synthesize
from orthrus_gguf.drafting.plan import FixedPolicy, Plan, Strategy, prior_acceptance
from orthrus_gguf.errors import OrthrusError


@pytest.fixture(scope="module")
def made() -> Recording:
    return synthesize("qwen3-8b", TABLES["qwen3-8b"], 3)


def test_they_survive_the_disk(made: Recording, tmp_path: Path) -> None:
    path = tmp_path / "made.npz"
    made.save(path)
    again = load(path)
    assert again.origin == made.origin
    assert not again.origin.real
    assert again.block_size == made.block_size == 32
    assert len(again.texts) == len(made.texts)
    for a, b in zip(again.texts, made.texts, strict=True):
        assert (a.domain, a.prompt, a.output) == (b.domain, b.prompt, b.output)
        assert a.blocks.keys() == b.blocks.keys()
        assert all(np.array_equal(a.blocks[rows], b.blocks[rows]) for rows in a.blocks)


def test_what_a_drafter_drafted_survives_too(tmp_path: Path) -> None:
    made = synthesize("x", TABLES["dflash-qwen3-4b"], 0)
    made.save(tmp_path / "made.npz")
    again = load(tmp_path / "made.npz")
    assert (again.block_size, again.drafter_block) == (None, 16)
    assert list(tmp_path.iterdir()) == [tmp_path / "made.npz"]
    for a, b in zip(again.texts, made.texts, strict=True):
        assert not a.blocks
        assert a.drafter is not None
        assert b.drafter is not None
        assert a.drafter.shape == (len(a.output) - 1, 15, COLUMNS)
        assert np.array_equal(a.drafter, b.drafter)
    for lacks in ({"drafter_block": None}, {"drafter_block": 17}):
        damage(tmp_path / "made.npz", tmp_path / "bad.npz", **lacks)
        with pytest.raises(OrthrusError, match=r"bad\.npz: not a recording"):
            load(tmp_path / "bad.npz")


def test_version_1_is_read(made: Recording, tmp_path: Path) -> None:
    """It knew nothing of drafters."""
    made.save(tmp_path / "made.npz")
    damage(tmp_path / "made.npz", tmp_path / "old.npz", version=1, drafter_block=...)
    again = load(tmp_path / "old.npz")
    assert (again.block_size, again.drafter_block) == (32, None)


def damage(source: Path, target: Path, **changes: object) -> None:
    """A recording with another header: `...` leaves a key out."""
    with np.load(source) as arrays:
        header = {**json.loads(str(arrays["header"])), **changes}
        header = {key: value for key, value in header.items() if value is not ...}
        rest = {name: arrays[name] for name in arrays if name != "header"}
        np.savez(target, header=np.array(json.dumps(header)), **rest)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"no archive",
        lambda data: data[:1000],
        lambda data: data[: len(data) // 2] + bytes(len(data) // 2),
    ],
)
def test_damaged_files_are_one_line(made: Recording, tmp_path: Path, damage: object) -> None:
    path = tmp_path / "made.npz"
    made.save(path)
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OrthrusError, match=r"made\.npz: not a recording"):
        load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, header=np.array('{"format": "orthrus-recording", "version": 99}'))
    with pytest.raises(OrthrusError, match="version 99, expected 2"):
        load(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive at all")
    for name, message in (
        ("array.npy", "not a recording"),
        ("text.npz", "not a recording"),
        ("none.npz", "no such file"),
    ):
        with pytest.raises(OrthrusError, match=message) as error:
            load(tmp_path / name)
        assert "pickle" not in str(error.value)  # NumPy's words


@pytest.mark.parametrize("seed", [0, 3])
def test_acceptance_is_as_published(seed: int) -> None:
    """Two passes at full width, through the decode loop; ends of texts cost a little. (Tables of
    drafters beside stock models: `test_drafters_beside_stock_models`.)"""
    for name, table in TABLES.items():
        if table.network:
            continue
        recording = synthesize(name, table, seed)
        domains = recording.domains()
        assert {*domains} - {MIXED} == {*table.tokens_per_cycle}
        for domain, published in table.tokens_per_cycle.items():
            clock = VirtualClock()
            model = ReplayModel(FlatCosts(), clock, table.block_size)
            policy = FixedPolicy(Plan(Strategy.TWO_PASS, table.block_size - 1), model.config)
            outcome = run(model, clock, domain, domains[domain], "two-pass", policy)
            assert outcome.statistics.tokens_per_cycle == pytest.approx(published, rel=0.06)


@pytest.mark.parametrize("name", [name for name, table in TABLES.items() if table.by_position])
def test_acceptance_by_position_is_as_published(name: str) -> None:
    table = TABLES[name]
    plan = Plan(Strategy.TWO_PASS, table.block_size - 1)
    _, outcome = Simulator(synthesize("x", table, 1), FlatCosts()).outcomes([plan])
    assert outcome.statistics.cycles > 500
    shares = outcome.statistics.acceptance_by_position
    (published,) = table.by_position.values()
    assert shares[: len(published)] == pytest.approx(published, abs=0.015)
    assert list(shares) == sorted(shares, reverse=True)


def test_confidence_means_what_policies_take_it_for(made: Recording) -> None:
    """Of the first rows with like confidence, the share that `prior_acceptance` says is right."""
    sure, right = [], []
    for text in made.texts:
        first = text.blocks[32][:, 0]
        sure.append(first[:, 1])
        right.append(first[:, 0] == np.array(text.output[1:]))
    confidence, correct = np.concatenate(sure), np.concatenate(right)
    for low in (0.05, 0.3, 0.6, 0.85):
        chosen = (confidence >= low) & (confidence < low + 0.1)
        assert chosen.sum() > 200
        assert correct[chosen].mean() == pytest.approx(prior_acceptance(low + 0.05), abs=0.07)


def test_seeds_matter_and_repeat() -> None:
    table = TABLES["qwen3-4b"]
    a, b, c = (synthesize("x", table, seed) for seed in (1, 1, 2))
    assert a.texts[0].output == b.texts[0].output != c.texts[0].output
    assert np.array_equal(a.texts[0].blocks[32], b.texts[0].blocks[32])
