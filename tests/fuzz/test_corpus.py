"""What fuzzing has found stays fixed: its inputs replayed, and a few fresh mutations."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from orthrus_gguf.gguf.cursor import Cursor
from tests.fuzz.conftest import Check
from tests.fuzz.document import parse
from tests.fuzz.mutations import mutate
from tests.fuzz.seeds import write_seeds

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*"))
USABLE = {"single.gguf", "base.gguf", "yarn.gguf", "sentencepiece.gguf", "heads.gguf"}
USABLE |= {"llama.gguf", "qwen2.gguf"}


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in CORPUS])
def test_replay(path: Path, checker: Check) -> None:
    """Each input once broke something, or is the smallest that fuzzing found for its refusal."""
    checker(path)


def test_seeds_are_valid(tmp_path: Path, checker: Check) -> None:
    """Mutations of broken files would test little. The parts put together give the same file."""
    folder = tmp_path / "seeds"
    folder.mkdir()
    for path in write_seeds(folder):
        assert checker(path) == ("used" if path.name in USABLE else "opened"), path.name
        content = path.read_bytes()
        document = parse(content)
        assert document is not None
        assert document.encode() == content


def test_mutations(tmp_path: Path, checker: Check) -> None:
    """A few hundred; `make fuzz` does a hundred thousand."""
    seeds = [path.read_bytes() for path in write_seeds(tmp_path)]
    rng = random.Random(0)
    path = tmp_path / "mutation.gguf"
    outcomes = []
    for _ in range(600):
        path.write_bytes(mutate(rng.choice(seeds), rng))
        outcomes.append(checker(path))
    # Neither so mild that all is well nor so wild that nothing gets past the header.
    assert {outcome: outcomes.count(outcome) > 20 for outcome in outcomes} == {
        "refused": True,
        "opened": True,
        "used": True,
    }


def test_what_is_no_orthrus_error_is_found(
    tmp_path: Path, checker: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The net has to hold: with a check of the reader gone, mutations must crash it."""

    def unchecked(self: Cursor, n_bytes: int, what: str) -> int:
        start = self.position
        self.position += n_bytes
        return start

    seeds = [path.read_bytes() for path in write_seeds(tmp_path)]
    rng = random.Random(0)
    path = tmp_path / "mutation.gguf"
    found: list[Any] = []
    monkeypatch.setattr(Cursor, "skip", unchecked)
    for _ in range(200):
        path.write_bytes(mutate(rng.choice(seeds), rng))
        try:
            checker(path)
        except Exception as error:
            found.append(error)
    assert found
