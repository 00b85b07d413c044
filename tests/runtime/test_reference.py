"""The reference runtime against the official implementation, and its own invariants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import (
    Draw,
    Segment,
    ar_segment,
    diffusion_segment,
)
from orthrus_gguf.runtime.reference import ReferenceModel, rope_frequencies
from orthrus_gguf.runtime.reference_cache import ReferenceCache
from orthrus_gguf.sampling import Sampler, SamplingSettings

DemoFile = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
GREEDY = Sampler(SamplingSettings(temperature=0))


@pytest.fixture(scope="module", params=["single", pytest.param("split", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, demo_file: DemoFile) -> Iterator[ReferenceModel]:
    """The F32 demo model, from one file and from a base with its heads beside it."""
    torch.set_num_threads(1)
    if request.param == "single":
        file = ModelFile.open(demo_file("f32"))
    else:
        base = demo_file("f32", split=True)
        file = ModelFile.open(base, base.with_name(base.stem + "-heads.gguf"))
    with file:
        yield ReferenceModel(file)


def block_of(model: ReferenceModel, cache: ReferenceCache, *where: int, **more: Any) -> Segment:
    """A diffusion block: anchor, rows and start."""
    assert model.config.mask_token is not None
    anchor, rows, start = where
    return diffusion_segment(cache, anchor, model.config.mask_token, rows, start, **more)


@pytest.mark.parametrize("number", range(3))
def test_logits_equal_the_official_ones(
    model: ReferenceModel, golden: dict[str, Any], golden_logits: dict[str, Any], number: int
) -> None:
    case = golden["cases"][number]
    prompt = case["prompt_ids"]
    cache = model.new_cache(64)
    assert model.config.block_size is not None

    (prefill_logits,) = model.logits([ar_segment(cache, prompt, 0)])
    cache.commit(range(len(prompt)))
    anchor = int(prefill_logits[-1].argmax())
    block = block_of(model, cache, anchor, model.config.block_size, len(prompt))
    (block_logits,) = model.logits([block])
    verified = ar_segment(cache, [anchor, *case["drafts"][0]], len(prompt))
    (verify_logits,) = model.logits([verified])
    for name, logits in (
        ("prefill", prefill_logits),
        ("first_block_diffusion", block_logits),
        ("first_verify", verify_logits),
    ):
        np.testing.assert_allclose(
            logits, golden_logits[f"case{number}_{name}_logits"], rtol=0, atol=1e-3
        )


def official_loop(
    model: ReferenceModel, prompt: list[int], n_new: int
) -> tuple[list[int], list[int], list[list[int]]]:
    """The published loop, written down once more, over choices: (output, starts, drafts)."""
    assert model.config.block_size is not None
    end, tokens = len(prompt) + n_new, list(prompt)
    draw = Draw(GREEDY, tokens)
    cache = model.new_cache(end + model.config.block_size)
    last = range(len(prompt) - 1, len(prompt))
    (choices,) = model.forward([ar_segment(cache, prompt, 0, wanted=last, draw=draw)])
    cache.commit(range(len(prompt)))
    assert choices[0] is not None
    tokens.append(choices[0].token)
    starts, all_drafts = [], []
    while len(tokens) < end:
        start = len(tokens) - 1
        rows = min(model.config.block_size, end - start)
        (block,) = model.forward([block_of(model, cache, tokens[-1], rows, start, draw=draw)])
        drafts = [choice.token for choice in block if choice is not None][: rows - 1]
        (choices,) = model.forward([ar_segment(cache, [tokens[-1], *drafts], start, draw=draw)])
        verified = [choice.token for choice in choices if choice is not None]
        assert verified[:-1] == drafts[: len(verified) - 1], "drawn as long as they follow"
        cache.commit(range(len(verified)))
        tokens += verified
        starts.append(start)
        all_drafts.append(drafts)
    return tokens[len(prompt) : end], starts, all_drafts


@pytest.mark.parametrize("number", range(12))
def test_tokens_drafts_and_acceptance_equal_the_official_ones(
    model: ReferenceModel, golden: dict[str, Any], number: int
) -> None:
    case = golden["cases"][number]
    output, starts, drafts = official_loop(model, case["prompt_ids"], case["n_new"])
    assert output == case["output_ids"] == case["ar_output_ids"]
    assert starts == case["cycle_starts"]
    assert drafts == case["drafts"]


@pytest.mark.parametrize("number", range(12))
def test_the_decode_loop_gives_the_official_cycles(
    model: ReferenceModel, golden: dict[str, Any], number: int
) -> None:
    case = golden["cases"][number]
    n = case["n_new"]
    output, cycles = decoded(model, case["prompt_ids"], "two-pass", n)
    assert output == case["output_ids"]
    assert [cycle.start for cycle in cycles] == case["cycle_starts"]
    # Near the end our blocks are a row shorter: the token that verification adds needs no draft.
    end = len(case["prompt_ids"]) + n
    for cycle, drafts in zip(cycles, case["drafts"], strict=True):
        if cycle.start + len(drafts) + 1 < end:
            assert list(cycle.drafts) == drafts
    assert decoded(model, case["prompt_ids"], "ar", n)[0] == case["ar_output_ids"]


def decoded(
    model: ReferenceModel, prompt: list[int], plan: str, n: int
) -> tuple[list[int], list[Cycle]]:
    """Greedy tokens after a prompt, and the cycles that found them."""
    cache = model.new_cache(len(prompt) + n)
    sequence = TokenSequence(model.config, cache, GREEDY, list(prompt))
    drive(model, prefill(sequence))
    policy = FixedPolicy(parse(plan), model.config)
    cycles = list(decode(model, sequence, policy, n - 1))
    return sequence.tokens[len(prompt) :], cycles


def test_taps_are_the_official_models_hidden_states(model: ReferenceModel) -> None:
    """Of a prompt, and of the rows of a verify pass that stay (tests/golden/README.md)."""
    golden = dict(np.load(ROOT / "tests/golden/tiny-orthrus-stdlib-taps.npz"))
    n_layers = model.config.n_layers
    for case in ("case2", "case5"):
        tokens = golden[f"{case}_tokens"].tolist()
        prompt, kept = golden[f"{case}_prompt_taps"], golden[f"{case}_kept_taps"]
        n, m = prompt.shape[1], kept.shape[1]
        cache = model.new_cache(64)
        first = ar_segment(cache, tokens[:n], 0, wanted=range(0), taps=(1, 3))
        (choices,) = model.forward([first])
        assert choices.taps is not None
        np.testing.assert_allclose(choices.taps, prompt, rtol=0, atol=1e-4)
        cache.commit(range(n))
        verify = ar_segment(
            cache, tokens[n:], n, taps=(3, n_layers + 1, 1), draw=Draw(GREEDY, tokens)
        )
        (choices,) = model.forward([verify])
        assert choices.taps is not None
        np.testing.assert_allclose(choices.taps[[2, 0], :m], kept, rtol=0, atol=1e-4)
        (logits,) = model.logits([verify])
        normed = torch.from_numpy(choices.taps[1])
        np.testing.assert_allclose(normed @ model.output.T, logits, rtol=0, atol=1e-4)


def test_yarn_frequencies() -> None:
    """Against the YaRN paper's definition (arXiv 2309.00071, section 3.2), written out per pair."""
    rope = Rope(1e6, factor=4.0, original_context=32768, ext_factor=1.0)
    frequencies, scale = rope_frequencies(rope, 128)
    assert scale == pytest.approx(0.1 * np.log(4) + 1)
    plain = 1e6 ** (-np.arange(64) / 64)
    turns = 32768 * plain / (2 * np.pi)
    got = frequencies.numpy()
    np.testing.assert_allclose(got[turns > 34], plain[turns > 34])
    np.testing.assert_allclose(got[turns < 0.9], plain[turns < 0.9] / 4)
    between = got[(turns < 30) & (turns > 1.1)] / plain[(turns < 30) & (turns > 1.1)]
    assert np.all(np.diff(between) < 0)
    assert np.all((between > 0.25) & (between < 1))
    default, one = rope_frequencies(Rope(1e6), 128)
    np.testing.assert_allclose(default.numpy(), plain)
    assert one == 1
