"""The reference runtime against the official implementation, and its own invariants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orthrus_gguf.decode import Cycle, Plan, Strategy, decode, plan_for, prefill
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment
from orthrus_gguf.runtime.reference import ReferenceModel, rope_frequencies
from orthrus_gguf.sampling import Sampler, SamplingSettings

DemoFile = Callable[..., Path]
GREEDY = Sampler(SamplingSettings(temperature=0))


@pytest.fixture(scope="module", params=["single", "split"])
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


def generate(
    model: ReferenceModel, prompt: list[int], plan: Plan, n: int
) -> tuple[list[int], list[Cycle]]:
    cache = model.new_cache(len(prompt) + n)
    tokens = [*prompt, GREEDY.sample(prefill(model, cache, prompt), prompt)]
    cycles = list(decode(model, cache, GREEDY, tokens, plan, n - 1))
    return tokens[len(prompt) :], cycles


@pytest.mark.parametrize("number", range(3))
def test_logits_equal_the_official_ones(
    model: ReferenceModel, golden: dict[str, Any], golden_logits: dict[str, Any], number: int
) -> None:
    case = golden["cases"][number]
    prompt = case["prompt_ids"]
    cache = model.new_cache(64)
    config = model.config
    assert config.mask_token is not None
    assert config.block_size is not None

    (prefill_logits,) = model.forward([ar_segment(prompt, 0)], cache)
    anchor = int(prefill_logits[-1].argmax())
    block = diffusion_segment(anchor, config.mask_token, config.block_size, len(prompt))
    (block_logits,) = model.forward([block], cache)
    (verify_logits,) = model.forward([ar_segment([anchor, *case["drafts"][0]], len(prompt))], cache)
    for name, logits in (
        ("prefill", prefill_logits),
        ("first_block_diffusion", block_logits),
        ("first_verify", verify_logits),
    ):
        np.testing.assert_allclose(
            logits, golden_logits[f"case{number}_{name}_logits"], rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("number", range(12))
def test_tokens_and_acceptance_equal_the_official_ones(
    model: ReferenceModel, golden: dict[str, Any], number: int
) -> None:
    case = golden["cases"][number]
    n = case["n_new"]
    output, cycles = generate(
        model, case["prompt_ids"], plan_for(model, Strategy.TWO_PASS, None), n
    )
    assert output == case["output_ids"]
    assert [cycle.start for cycle in cycles] == case["cycle_starts"]
    # Near the end our blocks are a row shorter: the token that verification adds needs no draft.
    end = len(case["prompt_ids"]) + n
    for cycle, drafts in zip(cycles, case["drafts"], strict=True):
        if cycle.start + len(drafts) + 1 < end:
            assert list(cycle.drafts) == drafts
    assert generate(model, case["prompt_ids"], Plan(Strategy.AR, 0), n)[0] == case["ar_output_ids"]


def test_rows_do_not_depend_on_their_company(model: ReferenceModel) -> None:
    tokens = list(range(100, 117))
    together = model.new_cache(32)
    (alone_rows,) = model.forward([ar_segment(tokens, 0)], together)
    for size in (1, 2, 3, 7):
        cache, rows = model.new_cache(32), []
        for start in range(0, len(tokens), size):
            part = tokens[start : start + size]
            rows.append(model.forward([ar_segment(part, start)], cache)[0])
        assert np.array_equal(np.concatenate(rows), alone_rows)


def test_a_pass_of_several_segments_equals_passes_of_one(model: ReferenceModel) -> None:
    """Verify rows and blocks that see a part of them: the blocks find the very same cache."""
    mask = model.config.mask_token
    assert mask is not None
    prompt, rows = [5, 6, 7, 8], [9, 10, 11]
    cache = model.new_cache(32)
    model.forward([ar_segment(prompt, 0)], cache)
    segments = [
        ar_segment(rows, 4, wanted=range(1, 3)),
        diffusion_segment(10, mask, 6, 5, wanted=range(4)),
        diffusion_segment(12, mask, 5, 7),
    ]
    fused = model.forward(segments, cache)
    assert [len(logits) for logits in fused] == [2, 4, 5]

    cache.truncate(4)
    (verify,) = model.forward([ar_segment(rows, 4)], cache)
    assert np.array_equal(fused[0], verify[1:])
    cache.truncate(5)
    (first,) = model.forward([diffusion_segment(10, mask, 6, 5)], cache)
    assert np.array_equal(fused[1], first[:4])
    model.forward([ar_segment(rows[1:], 5)], cache)
    assert np.array_equal(fused[2], model.forward(segments[2:], cache)[0])
    assert cache.length == 7  # blocks leave nothing behind


def test_what_a_pass_must_not_do(model: ReferenceModel) -> None:
    cache = model.new_cache(8)
    for segments in (
        [],
        [ar_segment([1], 1)],
        [ar_segment(list(range(9)), 0)],
        [diffusion_segment(1, 2, 4, 1)],
        [diffusion_segment(1, 2, 4, 0), ar_segment([1], 0)],
    ):
        with pytest.raises(ValueError, match=r"segment|cache|rows|pass"):
            model.forward(segments, cache)
    assert cache.length == 0


def test_a_cache_beyond_memory_is_refused(model: ReferenceModel) -> None:
    with pytest.raises(OrthrusError, match=r"needs .* GiB of key/value cache"):
        model.new_cache(1 << 45)


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
