"""DeltaNet layers on every runtime that has them: bits depend on the text alone, not on how it
came."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_models import kernels
from hf_hybrid import N_GREEDY, PROMPTS, VOCAB, write_hybrid
from mtp_models import stock_model
from numpy.typing import NDArray
from orthrus_converters.cli import main

from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.drafter import Drafter, Results
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy, Plan, Strategy
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.sequence import Constraint, TokenSequence
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.engine import Session
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.request import Request, Result
from orthrus_gguf.runtime.checkpoints import KEPT
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.protocol import Checkpoint, ar_segment, path_to
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.tokenizer import load_tokenizer

AnyModel = Any  # runtimes that are not installed cannot be named here

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "hybrid.json"
TEXT: list[int] = np.random.default_rng(11).integers(0, 256, 24).tolist()
TREE = (-1, 0, 0, 1, 2, 2)


#: Stand-ins for a GPU's kernels are slow: theirs is a model of half as many layers.
RUNTIMES = ("reference", "cpu", "cuda")


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, runtime: str) -> Path:
    if runtime == "cuda":
        return stock_model()
    folder = write_hybrid(tmp_path_factory.mktemp("hybrid") / "tiny")
    file = folder.with_suffix(".gguf")
    assert main([str(folder), str(file), "--type", "f32"]) == 0
    return file


@pytest.fixture(scope="module")
def model(path: Path, runtime: str) -> Iterator[AnyModel]:
    torch.set_num_threads(1)
    if runtime == "cuda":
        pytest.importorskip("triton")
        from cuda_models import FakeGraphs, small_heads, stand_in

        with small_heads(), stand_in(path, capture=FakeGraphs()) as found:
            yield found
        return
    with ModelFile.open(path) as file:
        if runtime == "reference":
            yield ReferenceModel(file)
            return
        with CpuModel.load(file, kernels(), threads=1) as model:
            yield model


@pytest.fixture(scope="module")
def expected(model: AnyModel) -> NDArray[np.float32]:
    """Logits of all rows of TEXT, run one by one."""
    cache = model.new_cache(64)
    rows = []
    for token in TEXT:
        rows.append(run(model, cache, [token]))
        cache.commit([0])
    return np.concatenate(rows)


def run(
    model: AnyModel,
    cache: Any,
    tokens: Sequence[int],
    tree: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    found: list[NDArray[np.float32]] = model.logits(
        [ar_segment(cache, tokens, cache.length, parents=tree)]
    )
    return found[0]


def filled(model: AnyModel, tokens: Sequence[int], capacity: int = 64) -> Any:
    cache = model.new_cache(capacity)
    run(model, cache, tokens)
    cache.commit(range(len(tokens)))
    return cache


@pytest.mark.parametrize("cuts", [(24,), (1, 23), (2, 1, 21), (3, 4, 17), (5, 5, 5, 9)], ids=str)
def test_cuts_of_the_prompt(
    model: AnyModel, expected: NDArray[np.float32], cuts: tuple[int, ...]
) -> None:
    cache, rows, start = model.new_cache(64), [], 0
    for count in cuts:
        rows.append(run(model, cache, TEXT[start : start + count]))
        cache.commit(range(count))
        start += count
    np.testing.assert_array_equal(np.concatenate(rows), expected)


@pytest.mark.parametrize("prompt", [1, 2, 3, 10])
@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_accepted_and_refused_drafts(
    model: AnyModel, expected: NDArray[np.float32], prompt: int, accepted: int
) -> None:
    """A pass of drafts, some of them right, then passes without any, and with some again."""
    cache = filled(model, TEXT[:prompt])
    right = TEXT[prompt : prompt + 1 + accepted]
    logits = run(model, cache, right + [7] * (3 - accepted))
    np.testing.assert_array_equal(logits[: len(right)], expected[prompt:][: len(right)])
    cache.commit(range(len(right)))
    for _ in range(2):
        start = cache.length
        np.testing.assert_array_equal(run(model, cache, [TEXT[start]])[0], expected[start])
        cache.commit([0])
    start = cache.length
    np.testing.assert_array_equal(run(model, cache, TEXT[start:])[-1], expected[-1])


def test_nothing_committed(model: AnyModel, expected: NDArray[np.float32]) -> None:
    """A pass that nobody commits, one of which no row stays, and one that fails leave no trace."""
    cache = filled(model, TEXT[:10])
    run(model, cache, [1, 2, 3])
    run(model, cache, [4, 5])
    cache.commit([])
    with pytest.raises(ValueError, match="rows are pending"):
        cache.commit([])
    with pytest.raises(ValueError, match="start"):
        model.logits([ar_segment(cache, [1], 3)])
    np.testing.assert_array_equal(run(model, cache, TEXT[10:]), expected[10:])


def test_trees(model: AnyModel) -> None:
    """Every row of a tree is what its path is as a text, and so is what follows each."""
    tokens = [20, 21, 22, 23, 24, 25]
    for row in range(len(TREE)):
        cache, way = filled(model, TEXT[:10]), path_to(row, TREE)
        logits = run(model, cache, tokens, TREE)
        along = filled(model, TEXT[:10])
        texts = [tokens[i] for i in way]
        np.testing.assert_array_equal(logits[way], run(model, along, texts))
        cache.commit(way)
        along.commit(range(len(way)))
        np.testing.assert_array_equal(run(model, cache, [9]), run(model, along, [9]))


def test_company(model: AnyModel, expected: NDArray[np.float32]) -> None:
    one, other = filled(model, TEXT[:10]), filled(model, TEXT[:3])
    found, more = model.logits([ar_segment(one, TEXT[10:], 10), ar_segment(other, TEXT[3:9], 3)])
    np.testing.assert_array_equal(found, expected[10:])
    np.testing.assert_array_equal(more, expected[3:9])


def test_checkpoints(model: AnyModel, expected: NDArray[np.float32]) -> None:
    """Back to places that were asked for and to the beginning, and nowhere else."""
    cache = filled(model, TEXT[:8])
    place = cache.checkpoint()
    assert place == Checkpoint(8)
    run(model, cache, TEXT[8:20])
    cache.commit(range(12))
    assert cache.checkpoint(20).length == 20
    assert cache.checkpoint(19) == cache.checkpoint(8) == place
    assert cache.checkpoint(7).length == 0
    with pytest.raises(ValueError, match="no checkpoint at 15"):
        cache.restore(Checkpoint(15))
    for _ in range(2):  # what a checkpoint holds is not used up
        cache.restore(place)
        assert cache.length == 8
        np.testing.assert_array_equal(run(model, cache, TEXT[8:]), expected[8:])
        cache.commit(range(5))
    cache.restore(cache.checkpoint(0))
    np.testing.assert_array_equal(run(model, cache, TEXT), expected)


def test_checkpoints_are_made_and_forgotten(
    model: AnyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orthrus_gguf.runtime.checkpoints.CHECKPOINT_ROWS", 4)
    monkeypatch.setattr("orthrus_gguf.runtime.checkpoints.KEPT", 3)
    assert KEPT > 3
    cache = model.new_cache(64)
    for token in TEXT[:21]:
        run(model, cache, [token])
        cache.commit([0])
    assert [cache.checkpoint(n).length for n in (21, 20, 19, 15, 11)] == [21, 20, 16, 12, 0]
    monkeypatch.setattr("orthrus_gguf.runtime.checkpoints.KEPT_BYTES", 1)
    cache.checkpoint()
    assert [cache.checkpoint(n).length for n in (21, 20, 19)] == [21, 20, 0]


def test_taken_and_put(model: AnyModel, runtime: str, expected: NDArray[np.float32]) -> None:
    cache = filled(model, TEXT[:8])
    if runtime == "cuda":
        pytest.skip("caches of the cuda runtime stay where they are")
    cache.checkpoint()
    run(model, cache, TEXT[8:12])
    cache.commit(range(4))
    other = filled(model, [1, 2, 3])
    for rows in (12, 8, 0):
        other.put(cache.take(rows), rows)
        assert other.length == other.checkpoint(rows).length == rows
        np.testing.assert_array_equal(run(model, other, TEXT[rows:]), expected[rows:])
    with pytest.raises(ValueError, match="no checkpoint at 9"):
        cache.take(9)
    parts = cache.take(12)
    with pytest.raises(ValueError, match="not 12 rows of this model"):
        other.put([*parts[:3], parts[3][:-1]], 12)
    with pytest.raises(ValueError, match="not 12 rows of this model"):
        other.put(parts[:2], 12)


SPOILT = Source("spoilt", "spoilt in places", "#000000", 0.5)


class SpoiltDrafter:
    """Knows what comes, and spoils some token in two of three drafts."""

    taps = ()

    def __init__(self, prompt: int, answer: Sequence[int], seed: int, width: int = 4) -> None:
        self._prompt, self._answer, self._width = prompt, answer, width
        self._rng, self._right = random.Random(seed), 0.3 ** (1 / width)

    def propose(self, tokens: Sequence[int], room: int) -> Sequence[Draft]:
        known = self._answer[len(tokens) - self._prompt :][: min(room, self._width)]
        drafted = [t if self._rng.random() < self._right else (t + 1) % 256 for t in known]
        return (Draft(SPOILT, tuple(drafted), (0.5,) * len(drafted)),) if drafted else ()

    def committed(self, tokens: Sequence[int], cycle: Cycle | None, results: Results) -> None:
        """Nothing to learn."""


class SpoiltPolicy(FixedPolicy):
    """Plain decoding with such drafts."""

    def __init__(self, model: AnyModel, drafter: SpoiltDrafter) -> None:
        super().__init__(PLAIN, model.config)
        self._drafter = drafter

    def drafters(self, sequence: TokenSequence) -> list[Drafter]:
        return [self._drafter]


@pytest.fixture
def session(path: Path, model: AnyModel) -> Session:
    with ModelFile.open(path) as file:
        tokenizer = load_tokenizer(file.metadata, path=path, n_vocab=file.config.n_vocab)
    return Session(model, tokenizer, 256)


def answer(
    session: Session,
    prompt: Sequence[int],
    settings: SamplingSettings,
    policy: Policy | None = None,
    *,
    constraint: Constraint | None = None,
    n: int = N_GREEDY,
) -> Result:
    policy = policy or FixedPolicy(PLAIN, session.model.config)
    request = Request(tuple(prompt), settings, policy, n, constraint=constraint)
    generation = session.generate(request)
    "".join(generation)
    return generation.result


@pytest.mark.parametrize("seed", [None, 1])
def test_text_under_drafts(
    session: Session, model: AnyModel, runtime: str, seed: int | None
) -> None:
    """Greedy, which are the golden tokens, and sampled; in one session that goes back and on."""
    settings = SamplingSettings(temperature=0 if seed is None else 0.8, seed=seed or 0)
    greedy = json.loads(GOLDEN.read_text())["greedy"]
    accepted = refused = 0
    numbers = range(5) if runtime != "cuda" else [3] if seed else [4]
    for index in numbers:
        prompt = PROMPTS[index]
        text = answer(session, prompt, settings).output
        if seed is None and runtime != "cuda":
            assert list(text) == greedy[index]
        for again in range(2):
            drafter = SpoiltDrafter(len(prompt), text, again)
            result = answer(session, prompt, settings, SpoiltPolicy(model, drafter))
            assert result.output == text
            accepted += sum(cycle.accepted for cycle in result.cycles)
            refused += sum(len(cycle.drafts) - cycle.accepted for cycle in result.cycles)
    assert min(accepted, refused) > 4 * len(numbers)


def test_text_under_drafts_of_any_width(session: Session, model: AnyModel) -> None:
    """More than a cache keeps apart are cut."""
    settings = SamplingSettings(temperature=0)
    text = answer(session, TEXT, settings, n=64).output
    drafter = SpoiltDrafter(len(TEXT), text, 0, width=60)
    result = answer(session, TEXT, settings, SpoiltPolicy(model, drafter), n=64)
    assert result.output == text
    most = model.new_cache(64).fit(range(-1, 59))
    assert max(cycle.accepted for cycle in result.cycles) >= min(most, 32) - 1
    assert any(cycle.accepted < len(cycle.drafts) for cycle in result.cycles)


def few(tokens: Sequence[int], tree: Tree) -> NDArray[np.uint32]:
    """A constraint to three tokens, so that texts repeat themselves."""
    masks = np.zeros((1 + len(tree.tokens), -(-VOCAB // 32)), np.uint32)
    masks[:, 2] = 0b1110  # 65, 66, 67
    return masks


@pytest.mark.parametrize("seed", [None, 1])
def test_text_under_lookups(
    session: Session, model: AnyModel, runtime: str, seed: int | None
) -> None:
    settings = SamplingSettings(temperature=0 if seed is None else 0.8, seed=seed or 0)
    lookup = FixedPolicy(Plan(Strategy.AR, also=("lookup",)), model.config)
    accepted = refused = 0
    prompts = PROMPTS[2:3] if runtime == "cuda" else PROMPTS[1:4]
    for prompt in prompts:
        text = answer(session, prompt, settings, constraint=few, n=32)
        assert set(text.output) <= {65, 66, 67}
        assert len(text.output) == 32
        found = answer(session, prompt, settings, lookup, constraint=few, n=32)
        assert found.output == text.output
        accepted += sum(cycle.accepted for cycle in found.cycles)
        refused += sum(len(cycle.drafts) - cycle.accepted for cycle in found.cycles)
    assert accepted > 3 * len(prompts)
    # The most likely ones of the smaller model never change.
    assert refused > 3 * len(prompts) or (runtime == "cuda" and seed is None)


def test_a_conversation_goes_on_from_the_prompts_end(session: Session) -> None:
    """Its second turn processes the rows behind the first prompt, whatever the answer was; a new
    one begins from nothing."""
    settings = SamplingSettings(temperature=0)
    first = answer(session, TEXT, settings)
    changed = [*TEXT, *first.output[:3], 5, 6, 7]
    assert session.prepare(changed) == len(TEXT)
    found = answer(session, changed, settings)
    assert session.prepare([1, 2, 3]) == 0
    assert answer(session, changed, settings).output == found.output
