"""DFlash drafters beside a hybrid: taps over both kinds of layers, drafts against the network in
numpy (`hybrid_dflash.py`), sliding windows, and the text, which they do not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_hybrid import PROMPTS as GOLDEN_PROMPTS
from hf_hybrid import write_hybrid
from hybrid_dflash import KINDS, NumpyDrafter, loaded_dflash
from mtp_cycles import CAPACITY, TOKENS, cycles_of
from numpy.typing import NDArray
from orthrus_converters.cli import main as convert
from timeless import Timeless
from toy_model import ToyTokenizer

from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.engine import Generation, Session
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.request import Request, Result
from orthrus_gguf.runtime.beside import DraftCache, ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Model, ar_segment, diffusion_segment
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.together import Together

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
GREEDY = SamplingSettings(temperature=0)
PROMPTS: list[list[int]] = [[101], [130, 244], [92, 170, 241]]
PROMPTS.append(np.random.default_rng(3).integers(0, 256, 21).tolist())
TREE = (-1, 0, 0, 1, 2, 2)
PLANS = ("two-pass", "two-pass@4+tree=6", "ar+dflash+lookup", "auto")
F32: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}
RUNTIMES = (RuntimeName.REFERENCE, RuntimeName.CPU)
WITHOUT = pytest.mark.skipif(not find_spec("triton"), reason="without triton")
CUDA = pytest.param(RuntimeName.CUDA, marks=WITHOUT)


class Endless(ToyTokenizer):
    """No token ends the text, and none has any."""

    eog: frozenset[int] = frozenset()

    def token_bytes(self, id: int) -> bytes:
        return b""

    def is_special(self, id: int) -> bool:
        return False


ENDLESS: Any = Endless()


def settings_of(runtime: RuntimeName) -> dict[str, Any]:
    """Caches in float32, where there are such."""
    return {} if runtime is RuntimeName.CUDA else F32


@pytest.fixture(scope="module", params=[*RUNTIMES, CUDA])
def model(request: pytest.FixtureRequest) -> Iterator[ModelWithDrafter]:
    """In float32 all through, beside a drafter with causal windows; on stand-ins for a GPU's
    kernels, with their halves."""
    with loaded_dflash(request.param, **settings_of(request.param)) as found:
        yield found


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(RuntimeName.REFERENCE, marks=pytest.mark.slow),
        RuntimeName.CPU,
        pytest.param(RuntimeName.CUDA, marks=[pytest.mark.slow, WITHOUT]),
    ],
)
def decoder(request: pytest.FixtureRequest) -> Iterator[ModelWithDrafter]:
    """The same, for whole texts."""
    with loaded_dflash(request.param, **settings_of(request.param)) as found:
        yield found


def near_ties(model: ModelWithDrafter) -> float:
    """How far apart two logits are that rounding may turn round."""
    return 0.01 if "cuda" in model.description else 1e-4


def finished(generation: Generation) -> Result:
    for _ in generation:
        pass
    return generation.result


def request(model: ModelWithDrafter, plan: str, prompt: Sequence[int], seed: int = 0) -> Request:
    """Greedy for seed 0. `auto` sees a machine where rows are cheap, so that it drafts."""
    sampling = GREEDY if seed == 0 else SamplingSettings(temperature=0.7, seed=seed)
    policy: Policy = Timeless(0.01, model.config.block_size)
    if plan != "auto":
        policy = FixedPolicy(parse(plan), model.config)
    return Request(tuple(prompt), sampling, policy, max_tokens=TOKENS)


def drafted(result: Result) -> int:
    """Accepted tokens of the drafter."""
    sources = result.statistics.sources
    return sum(right for source, _, _, right in sources if source.name == "dflash")


def taps_of(model: Model, tokens: Sequence[int], taps: tuple[int, ...]) -> NDArray[np.float32]:
    segment = ar_segment(model.new_cache(CAPACITY), tokens, 0, wanted=range(0), taps=taps)
    found = model.forward([segment])[0].taps
    assert found is not None
    return found


# --- taps ---


@pytest.fixture(scope="module")
def golden_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Model]]:
    """The hybrid of the goldens on both runtimes."""
    folder = write_hybrid(tmp_path_factory.mktemp("hybrid") / "tiny")
    path = folder.with_suffix(".gguf")
    assert convert([str(folder), str(path), "--type", "f32"]) == 0
    with ModelFile.open(path) as file:
        models = [load_model(file, RuntimeSettings(name, threads=1, **F32)) for name in RUNTIMES]
        yield models
        for model in models:
            model.close()


def test_taps_are_those_of_both_kinds_of_layers(golden_models: list[Model]) -> None:
    """Equal on both runtimes: of a prompt in several passes, and of a tree behind it. The last one
    times the output matrix is what Hugging Face computed."""
    logits = np.load(GOLDEN / "hybrid.npz")
    for index, prompt in enumerate(GOLDEN_PROMPTS):
        found: list[Any] = []
        for model in golden_models:
            taps = tuple(range(model.config.n_layers + 2))
            cache = model.new_cache(CAPACITY)
            chain = ar_segment(cache, prompt, 0, wanted=range(0), taps=taps)
            found.append([model.forward([chain])[0].taps])
            cache.commit(range(len(prompt)))
            rows = [20, 21, 22, 23, 24, 25]
            tree = ar_segment(
                cache, rows, len(prompt), wanted=range(0), parents=TREE, taps=taps[::-1]
            )
            found[-1].append(model.forward([tree])[0].taps)
        for expected, ours in zip(*found, strict=True):
            scale = np.abs(expected).max(axis=-1, keepdims=True)
            assert (np.abs(ours - expected) / scale).max() < 1e-4
        golden = logits[f"logits_{index}"]
        last = found[0][0][-1, -len(golden) :]
        output = golden_models[0].output.numpy()  # type: ignore[attr-defined]
        np.testing.assert_allclose(last @ output.T, golden, rtol=0, atol=1e-3)


def test_a_layers_taps_change_nothing(model: ModelWithDrafter) -> None:
    """Neither one another, nor what comes in pieces, to the bit on the native kernels."""
    count, prompt = model.config.n_layers + 2, PROMPTS[3]
    every = taps_of(model, prompt, tuple(range(count)))
    np.testing.assert_array_equal(taps_of(model, prompt, (3, 1, 4)), every[[3, 1, 4]])
    cache, parts = model.new_cache(CAPACITY), list[Any]()
    for first, stop in ((0, 2), (2, 3), (3, 21)):
        rows = prompt[first:stop]
        segment = ar_segment(cache, rows, first, wanted=range(0), taps=(1, 3, 4))
        parts.append(model.forward([segment])[0].taps)
        cache.commit(range(len(rows)))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), every[[1, 3, 4]])


# --- drafts ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("runtime", [*RUNTIMES, CUDA])
def test_blocks_are_the_networks(runtime: RuntimeName, kind: str) -> None:
    """Logits of whole blocks, behind fewer rows than a window has and behind more, up to several
    panels of the cache; in the company of another block."""
    text = np.random.default_rng(5).integers(0, 256, 70).tolist()
    with loaded_dflash(runtime, kind, **settings_of(runtime)) as model:
        taps = taps_of(model, text, model._network.taps)
        others = {name: NumpyDrafter(name) for name in KINDS}
        blocks, expected = [], []
        for length in (1, 2, 3, 12, 33, 69):
            beside = DraftCache(model._network, CAPACITY)
            beside.follow(text, 0, taps[:, :length])
            blocks.append(diffusion_segment(beside.ready(), text[length], 261, 8, length))
            told = taps[:, :length].astype(np.float64)
            expected.append({name: own.logits(told, text[length]) for name, own in others.items()})
        for found, right in zip(model._network.logits(blocks), expected, strict=True):  # type: ignore[attr-defined]
            if runtime is RuntimeName.CUDA:
                error = np.square(found - right[kind]).sum() / np.square(right[kind]).sum()
                assert error < 5e-4
            else:
                np.testing.assert_allclose(found, right[kind], rtol=0, atol=1e-3)
        for name in {*KINDS} - {kind}:  # which would show
            assert np.abs(found - right[name]).max() > 0.5


def test_every_cycle(model: ModelWithDrafter) -> None:
    """Drafts, and how many of them are right; and the text."""
    network, accepted, cycles = NumpyDrafter("causal"), 0, 0
    for prompt in PROMPTS:
        text, found = cycles_of(model, prompt, "two-pass")
        taps = taps_of(model, text, model._network.taps).astype(np.float64)
        for cycle in found:
            start = cycle.start
            logits, drafts = network.logits(taps[:, :start], text[start])[1:], cycle.draft.tokens
            drawn = logits[np.arange(len(drafts)), drafts]
            np.testing.assert_allclose(drawn, logits.max(1), rtol=0, atol=near_ties(model))
            right = [a == b for a, b in zip(drafts, text[start + 1 :], strict=False)]
            assert cycle.accepted == [*right, False].index(False) or cycle is found[-1]
        accepted += sum(cycle.accepted for cycle in found)
        cycles += len(found)
    assert accepted > 0.7 * cycles
    plain, _ = cycles_of(model, prompt, "ar")
    assert text[: len(plain)] == plain


@pytest.mark.parametrize("batch", [1, 3])
def test_prompts_in_pieces(decoder: ModelWithDrafter, batch: int) -> None:
    whole, pieces = (cycles_of(decoder, PROMPTS[3], "two-pass", batch=n)[1] for n in (512, batch))
    assert [c.draft.tokens for c in pieces] == [c.draft.tokens for c in whole]


# --- the text ---


def test_the_text_is_that_of_plain_decoding(decoder: ModelWithDrafter) -> None:
    """Prompts and seeds, each plan on one session that goes on from pair to pair."""
    sessions = {plan: Session(decoder, ENDLESS, CAPACITY) for plan in ("ar", *PLANS)}
    accepted = dict.fromkeys(PLANS, 0)
    pairs = [(0, PROMPTS[3]), (6, PROMPTS[1])]
    if "cuda" in decoder.description:  # slow stand-ins, whose rounding makes other texts
        pairs = [(0, PROMPTS[1])]
    for seed, prompt in pairs:
        plain = finished(sessions["ar"].generate(request(decoder, "ar", prompt, seed)))
        for plan in PLANS:
            found = finished(sessions[plan].generate(request(decoder, plan, prompt, seed)))
            assert found.output == plain.output, (plan, seed, prompt)
            accepted[plan] += drafted(found)
    assert min(accepted.values()) > 4, accepted


@pytest.mark.parametrize(("weights", "cache"), [("q8_0", "q8_0"), ("q4_k_m", "q4_0")])
def test_quantized(weights: str, cache: str) -> None:
    """On the native kernels: the text of plain decoding, and drafts nearly as often right."""
    types: dict[str, Any] = {"cache_type_k": cache, "cache_type_v": cache}
    accepted = cycles = 0
    with loaded_dflash(RuntimeName.CPU, "causal", weights, **types) as model:
        for prompt in PROMPTS:
            plain, _ = cycles_of(model, prompt, "ar", tokens=40)
            text, found = cycles_of(model, prompt, "two-pass", tokens=40)
            assert text[: len(plain)] == plain
            accepted += sum(cycle.accepted for cycle in found)
            cycles += len(found)
    assert accepted > 0.6 * cycles, (accepted, cycles)


def test_side_by_side(decoder: ModelWithDrafter) -> None:
    plans = ("two-pass", "two-pass@2", "ar", "ar+dflash")
    alone = [
        finished(Session(decoder, ENDLESS, 99).generate(request(decoder, "ar", p, i % 3)))
        for i, p in enumerate(PROMPTS)
    ]
    together, running = Together(decoder), []
    for i, prompt in enumerate(PROMPTS):
        session = Session(decoder, ENDLESS, 99)
        running.append(session.generate(request(decoder, plans[i], prompt, i % 3)))
        together.join(running[-1])
        together.step()
    while len(together):
        together.step()
    assert [g.result.output for g in running] == [result.output for result in alone]
    assert sum(drafted(generation.result) for generation in running) > 0


def test_it_goes_back_where_the_model_does(
    decoder: ModelWithDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edited end, and a turn that goes on: both caches from the last place that both know."""
    monkeypatch.setattr("orthrus_gguf.runtime.checkpoints.CHECKPOINT_ROWS", 6)
    session = Session(decoder, ENDLESS, 128)
    first = finished(session.generate(request(decoder, "two-pass", PROMPTS[2])))
    for prompt, places in (
        ([*PROMPTS[2], *first.output[:-3], 9, 8], range(3 + 6, 3 + TOKENS - 2)),
        ([*PROMPTS[2][:2], 9, 8], [0]),
    ):
        result = finished(session.generate(request(decoder, "two-pass", prompt)))
        again = finished(
            Session(decoder, ENDLESS, 128).generate(request(decoder, "two-pass", prompt))
        )
        assert result.output == again.output
        assert [c.draft.tokens for c in result.cycles] == [c.draft.tokens for c in again.cycles]
        assert result.statistics.cached_tokens in places
