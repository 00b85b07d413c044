"""Diffusion heads of a hybrid: blocks against both views in numpy (`orthrus_hybrid.py`), alone and
beside AR rows, and the text, which they do not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from orthrus_hybrid import BLOCK, MASK, NumpyHybrid, heads_model
from timeless import Timeless
from toy_model import ToyTokenizer

from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.engine import Generation, Session
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.request import Request, Result
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Model, Segment, ar_segment, diffusion_segment
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.together import Together

RUNTIMES = (RuntimeName.REFERENCE, RuntimeName.CPU)
CUDA = pytest.param(
    RuntimeName.CUDA, marks=pytest.mark.skipif(not find_spec("triton"), reason="without triton")
)
F32: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}
TEXT: list[int] = np.random.default_rng(7).integers(0, 256, 60).tolist()
PROMPTS: list[list[int]] = [[101], [130, 244], [92, 170, 241]]
PROMPTS.append(np.random.default_rng(3).integers(0, 256, 21).tolist())
TOKENS, CAPACITY = 12, 160
PLANS = (
    *("two-pass", "two-pass@3+lookup", "two-pass@4+tree=6", "fused", "fused@2x2+tail"),
    "auto",
)


class Endless(ToyTokenizer):
    """No token ends the text, and none has any."""

    eog: frozenset[int] = frozenset()

    def token_bytes(self, id: int) -> bytes:
        return b""

    def is_special(self, id: int) -> bool:
        return False


ENDLESS: Any = Endless()


@contextmanager
def loaded(
    path: Path, runtime: RuntimeName, *, mtp: bool = False, **settings: Any
) -> Iterator[Model]:
    """mtp: with the block that the file holds beside it. Of the CUDA runtime, the stand-ins, in
    float16."""
    if runtime is RuntimeName.CUDA:
        from cuda_models import FakeGraphs, small_heads, stand_in

        with small_heads(), stand_in(path, capture=FakeGraphs()) as found:
            yield found
        return
    with ExitStack() as stack:
        file = stack.enter_context(ModelFile.open(path))
        beside = MtpFile.inside(file) if mtp else None
        asked = RuntimeSettings(runtime, threads=1, **settings)
        yield stack.enter_context(closing(load_model(file, asked, drafter=beside)))


@pytest.fixture(scope="module", params=[*RUNTIMES, CUDA])
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    """In float32 all through."""
    with loaded(heads_model(), request.param, **F32) as found:
        yield found


@pytest.fixture(
    scope="module",
    params=[pytest.param(RuntimeName.REFERENCE, marks=pytest.mark.slow), RuntimeName.CPU],
)
def decoder(request: pytest.FixtureRequest) -> Iterator[Model]:
    """The same, for whole texts."""
    with loaded(heads_model(), request.param, **F32) as found:
        yield found


@pytest.fixture(scope="module")
def oracle() -> NumpyHybrid:
    return NumpyHybrid()


def filled(model: Model, tokens: Sequence[int], cuts: Sequence[int] = ()) -> Any:
    """A cache of these tokens, which came in pieces."""
    cache, start = model.new_cache(CAPACITY), 0
    for stop in (*cuts, len(tokens)):
        if stop > start:
            model.logits([ar_segment(cache, tokens[start:stop], start, wanted=range(0))])
            cache.commit(range(stop - start))
            start = stop
    return cache


def block(cache: Any, anchor: int, start: int) -> Segment:
    return diffusion_segment(cache, anchor, MASK, BLOCK, start)


def rounding(model: Model) -> float:
    """How far logits may be from those of the oracle."""
    return 5e-3 if "cuda" in model.description else 1e-4


def alone(model: Model, tokens: Sequence[int], anchor: int) -> NDArray[np.float32]:
    return model.logits([block(filled(model, tokens), anchor, len(tokens))])[0]


# --- blocks ---


@pytest.mark.parametrize("length", [0, 1, 2, 3, 20, 60])
def test_both_views(model: Model, oracle: NumpyHybrid, length: int) -> None:
    """The rows of a text, and of blocks behind it: of one that came in pieces too, and again."""
    rows, known = oracle.read(TEXT[:length])
    expected = oracle.block(known, length, 7)
    if length:
        cache = model.new_cache(CAPACITY)
        (found,) = model.logits([ar_segment(cache, TEXT[:length], 0)])
        np.testing.assert_allclose(found, rows, rtol=0, atol=rounding(model))
    for cuts in ((), (1, 3, 4, 40)):
        cache = filled(model, TEXT[:length], [cut for cut in cuts if cut < length])
        for _ in range(2):
            (found,) = model.logits([block(cache, 7, length)])
            np.testing.assert_allclose(found, expected, rtol=0, atol=rounding(model))


def test_a_pass_that_verifies_and_drafts(model: Model, oracle: NumpyHybrid) -> None:
    """Blocks for every number of accepted drafts ride with the rows that are verified: each is what
    it would be alone, to the bit, and so is what follows, however many stay."""
    start, rows = 5, TEXT[5:9]
    each = [alone(model, TEXT[: start + j], 30 + j) for j in range(len(rows) + 1)]
    expected, _ = oracle.read(TEXT[:12])
    for accepted in (0, 1, 4):
        cache = filled(model, TEXT[:start], [4])
        blocks = [block(cache, 30 + j, start + j) for j in range(len(rows) + 1)]
        _, *found = model.logits([ar_segment(cache, rows, start), *blocks])
        cache.commit(range(accepted))
        np.testing.assert_array_equal(found, each)
        stop = start + accepted  # the state lags behind here: accepted rows are not part of it yet
        (again,) = model.logits([block(cache, 30 + accepted, stop)])
        np.testing.assert_array_equal(again, found[accepted])
        (after,) = model.logits([ar_segment(cache, TEXT[stop:12], stop)])
        np.testing.assert_allclose(after, expected[stop:], rtol=0, atol=rounding(model))


def test_blocks_leave_no_trace(model: Model) -> None:
    first = filled(model, TEXT[:20])
    model.logits([block(first, 3, 20), block(first, 9, 20)])
    second = filled(model, TEXT[:20])
    for cache in (first, second):
        cache.checkpoint()
    after = [model.logits([ar_segment(cache, TEXT[20:30], 20)])[0] for cache in (first, second)]
    np.testing.assert_array_equal(after[0], after[1])


def test_company(model: Model) -> None:
    """Rows and blocks of three texts in one pass."""
    texts, segments = (TEXT[:5], TEXT[7:30], TEXT[2:3]), []
    caches = [filled(model, text) for text in texts]
    for cache, text in zip(caches, texts, strict=True):
        segments += [ar_segment(cache, [5, 6], len(text)), block(cache, 8, len(text) + 1)]
    found = model.logits(segments[::2] + segments[1::2])
    for text, logits in zip(texts, found[3:], strict=True):
        np.testing.assert_array_equal(logits, alone(model, [*text, 5], 8))


def test_behind_a_long_prompt(model: Model) -> None:
    """More rows than a cache keeps apart: a block behind them may share their pass, and one at a
    place in between has no state to begin from."""
    cache = model.new_cache(CAPACITY)
    _, found = model.logits([ar_segment(cache, TEXT[:50], 0), block(cache, 7, 50)])
    np.testing.assert_array_equal(found, alone(model, TEXT[:50], 7))
    cache.commit(range(50))
    with pytest.raises(ValueError, match="no state at 49: 50 rows are committed"):
        model.logits([block(cache, 7, 49)])
    (found,) = model.logits([block(cache, 7, 50)])
    np.testing.assert_array_equal(found, alone(model, TEXT[:50], 7))


def test_the_kernels_need_the_end_of_a_long_prompt() -> None:
    with loaded(heads_model(), RuntimeName.CPU, **F32) as model:
        cache = model.new_cache(CAPACITY)
        with pytest.raises(ValueError, match="no state at 40"):
            model.logits([ar_segment(cache, TEXT[:50], 0), block(cache, 7, 40)])
        (found,) = model.logits([block(cache, 7, 0)])
        np.testing.assert_array_equal(found, alone(model, [], 7))


@pytest.mark.parametrize(("kind", "bound"), [("q8_0", 1e-3), ("q4_k_m", 1e-2)])
def test_quantized(kind: str, bound: float) -> None:
    """The kernels' draft view is the reference's of the same file, but for the rounding of
    activations (mean square error over mean square)."""
    with (
        loaded(heads_model(kind), RuntimeName.REFERENCE) as reference,
        loaded(heads_model(kind), RuntimeName.CPU) as model,
    ):
        for length in (3, 40):
            expected, found = (alone(m, TEXT[:length], 7) for m in (reference, model))
            assert np.mean((found - expected) ** 2) < bound * np.mean(expected**2)


# --- the text ---


def finished(generation: Generation) -> Result:
    for _ in generation:
        pass
    return generation.result


def request(model: Model, plan: str, prompt: Sequence[int], seed: int = 0) -> Request:
    """Greedy for seed 0. `auto` sees a machine where rows are cheap, so that it drafts."""
    sampling = SamplingSettings(temperature=0.7 if seed else 0, seed=seed)
    policy: Policy = Timeless(0.01, model.config.block_size)
    if plan != "auto":
        policy = FixedPolicy(parse(plan), model.config)
    return Request(tuple(prompt), sampling, policy, max_tokens=TOKENS)


def drafted(result: Result) -> int:
    """Accepted tokens of the heads."""
    sources = result.statistics.sources
    return sum(right for source, _, _, right in sources if source.name != "lookup")


def test_the_text_is_that_of_plain_decoding(decoder: Model) -> None:
    """Prompts and seeds, each plan on one session that goes on from pair to pair."""
    sessions = {plan: Session(decoder, ENDLESS, CAPACITY) for plan in ("ar", *PLANS)}
    accepted = dict.fromkeys(PLANS, 0)
    for seed, prompt in ((0, PROMPTS[3]), (6, PROMPTS[1]), (0, PROMPTS[0])):
        plain = finished(sessions["ar"].generate(request(decoder, "ar", prompt, seed)))
        for plan in PLANS:
            found = finished(sessions[plan].generate(request(decoder, plan, prompt, seed)))
            assert found.output == plain.output, (plan, seed, prompt)
            accepted[plan] += drafted(found)
    assert min(accepted.values()) > 1, list(accepted.items())


@pytest.mark.skipif(not find_spec("triton"), reason="without triton")
def test_every_cycle_on_a_gpus_stand_ins() -> None:
    """Drafts and accepted counts of the CPU's kernels, cycle by cycle, and the text, launched and
    replayed."""
    with (
        loaded(heads_model(), RuntimeName.CPU, **F32) as expected,
        loaded(heads_model(), RuntimeName.CUDA) as model,
    ):
        plain = finished(Session(model, ENDLESS, 99).generate(request(model, "ar", PROMPTS[2])))
        for plan in ("two-pass@4+tree=6", "fused", "fused@2x2+tail"):
            theirs, ours = (
                finished(Session(one, ENDLESS, 99).generate(request(one, plan, PROMPTS[2])))
                for one in (expected, model)
            )
            assert ours.output == theirs.output == plain.output
            for found, wanted in zip(ours.cycles, theirs.cycles, strict=True):
                assert found.draft.tokens == wanted.draft.tokens
                assert found.accepted == wanted.accepted
            assert drafted(ours) > 0
        assert model.graphs.captured > 2  # type: ignore[attr-defined]


def test_side_by_side(decoder: Model) -> None:
    plans = ("two-pass", "fused", "ar", "fused@3")
    plain = [
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
    assert [g.result.output for g in running] == [result.output for result in plain]
    assert drafted(running[1].result) > 0


def test_heads_beside_an_mtp_block() -> None:
    """Both draft, each where it is asked to."""
    with loaded(heads_model(mtp=True), RuntimeName.CPU, mtp=True) as model:
        plain = finished(Session(model, ENDLESS, 99).generate(request(model, "ar", PROMPTS[3])))
        for plan, name in (("two-pass", "block"), ("fused", "carried"), ("two-pass@2+mtp", "mtp")):
            session = Session(model, ENDLESS, 99)
            found = finished(session.generate(request(model, plan, PROMPTS[3])))
            assert found.output == plain.output
            assert any(s.name.startswith(name) for s, *_ in found.statistics.sources), plan
