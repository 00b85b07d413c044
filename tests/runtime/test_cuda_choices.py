"""What the CUDA runtime draws (on stand-ins), against the host's sampler on the same logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from cuda_models import filled, stand_in
from numpy.typing import NDArray

from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.protocol import (
    Choices,
    Draw,
    Segment,
    View,
    ar_segment,
    diffusion_segment,
    path_to,
)
from orthrus_gguf.sampling import Sampler, SamplingSettings

MASK = 4095
TREE = (-1, 0, 0, 1, 2, 2, 3)
PENALTIES: dict[str, Any] = {
    "repeat_penalty": 1.3,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.2,
}

SETTINGS = {
    "greedy": SamplingSettings(temperature=0),
    "defaults": SamplingSettings(seed=5),
    "all of the vocabulary": SamplingSettings(temperature=1.2, top_k=0, top_p=0.95, seed=2**64 - 3),
    "penalties": SamplingSettings(seed=1, repeat_last_n=3, **PENALTIES),
    "penalties of the whole text": SamplingSettings(temperature=0, repeat_last_n=-1, **PENALTIES),
    "banned": SamplingSettings(temperature=0, banned=(5, 77, 4000)),
}


@pytest.fixture(scope="module")
def demo(demo_file: Callable[..., Path]) -> Iterator[CudaModel]:
    torch.set_num_threads(1)
    with stand_in(demo_file("f16")) as model:
        yield model


def prefix_of(segment: Segment, row: int) -> list[int]:
    """Tokens up to and including a row's own. Of a block: up to its anchor, then what may be."""
    draw = segment.draw
    assert draw is not None
    known = [*draw.history[: segment.start + 1 - len(draw.ahead)], *draw.ahead]
    if segment.view is View.DIFFUSION:
        return known + [0] * row
    path = range(row + 1) if segment.parents is None else path_to(row, segment.parents)
    return known + [segment.tokens[i] for i in path][1:]


def assert_drawn(model: CudaModel, segments: Sequence[Segment]) -> list[Choices]:
    """All wanted rows of one pass are what the host draws of their logits."""
    logits = model.logits(segments)
    found = model.forward(segments)
    for segment, rows, choices in zip(segments, logits, found, strict=True):
        draw = segment.draw
        assert len(choices) == len(segment.wanted) == len(rows)
        if draw is None:
            continue
        for i, row in enumerate(segment.wanted):
            prefix = prefix_of(segment, row)
            if segment.view is View.DIFFUSION and draw.sampler.settings.penalizes:
                # The device does not know what the rows before draw: the window ends with the
                # anchor, but the noise is that of the row's position.
                prefix = shifted(prefix, row)
            wanted = draw.sampler.draw(
                rows[i],
                prefix,
                detail=draw.detail,
                top=draw.top,
                allowed=None if draw.allowed is None else draw.allowed[i],
            )
            choice = choices[i]
            assert wanted is not None
            assert choice is not None
            assert choice.token == wanted.token, (row, draw.sampler.settings)
            assert choice.second == wanted.second
            assert choice.probability == pytest.approx(wanted.probability, rel=2e-5, nan_ok=True)
            assert choice.second_probability == pytest.approx(
                wanted.second_probability, rel=2e-5, abs=1e-12, nan_ok=True
            )
            assert (choice.logprobs is None) == (wanted.logprobs is None)
            if choice.logprobs is not None and wanted.logprobs is not None:
                assert choice.logprobs.chosen == pytest.approx(wanted.logprobs.chosen, abs=2e-6)
                for ours, theirs in zip(choice.logprobs.top, wanted.logprobs.top, strict=True):
                    assert ours[0] == theirs[0]
                    assert ours[1] == pytest.approx(theirs[1], abs=2e-6)
    return found


class Shifted(list[int]):
    """A prefix whose end looks like that of a shorter one."""

    def __init__(self, known: list[int], length: int) -> None:
        super().__init__(known)
        self._length = length

    def __len__(self) -> int:
        return self._length


def shifted(prefix: list[int], row: int) -> Shifted:
    return Shifted(prefix[: len(prefix) - row], len(prefix))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("detail", [False, True])
def test_chains_blocks_and_trees(demo: CudaModel, name: str, detail: bool) -> None:
    history = [5, 77, 5, 9, 4000, 9, 9, 12, 13]
    sampler = Sampler(SETTINGS[name])
    cache = filled(demo, history[:-1], 40)
    plain = Draw(sampler, history, detail=detail)
    chain = ar_segment(cache, [13, 5, 9, 5], 8, draw=plain)
    # The history may be longer than the segment needs, and what is ahead may not be in it yet.
    ahead = Draw(sampler, [*history, 999], (5, 9), detail=True)
    block = diffusion_segment(cache, 9, MASK, 7, 10, wanted=range(1, 7), draw=ahead)
    assert_drawn(demo, [chain, block])
    tree = ar_segment(cache, [13, 5, 9, 5, 77, 6, 5], 8, parents=TREE, draw=plain)
    assert_drawn(demo, [tree])
    assert_drawn(demo, [ar_segment(cache, range(20, 28), 8, wanted=range(3, 7), draw=plain)])


def test_prompts(demo: CudaModel) -> None:
    """The last row of a prompt that went through the dense products; and all rows of one."""
    ids = [int(token) for token in np.random.default_rng(3).integers(0, 4000, 90)]
    draw = Draw(Sampler(SETTINGS["penalties"]), ids[:1], top=3)
    last = ar_segment(demo.new_cache(90), ids, 0, wanted=range(89, 90), draw=draw)
    assert_drawn(demo, [last])
    whole = ar_segment(demo.new_cache(90), ids, 0, draw=draw)
    (choices,) = demo.forward([whole])
    assert len(choices) == 90
    assert all(choice is not None for choice in choices)


def test_several_sequences_of_different_settings(demo: CudaModel) -> None:
    """One pass, and each row is drawn by its own sequence's settings, details and masks."""
    rng = np.random.default_rng(0)
    segments = []
    for number, settings in enumerate(SETTINGS.values()):
        history = [int(token) for token in rng.integers(0, 50, 6 + number)]
        cache = filled(demo, history[:-1], 40)
        allowed: NDArray[np.uint32] | None = None
        if number % 2:
            allowed = rng.integers(0, 2**32, (3, 128), dtype=np.uint32)
        draw = Draw(
            Sampler(settings), history, detail=number in (1, 2), top=2 * number, allowed=allowed
        )
        tokens = [history[-1], 7, 9]
        segments.append(ar_segment(cache, tokens, len(history) - 1, draw=draw))
        if number == 3:
            block = Draw(Sampler(settings), history, detail=True)
            segments.append(
                diffusion_segment(cache, tokens[0], MASK, 5, len(history) - 1, draw=block)
            )
    found = assert_drawn(demo, segments)
    for segment, choices in zip(segments, found, strict=True):
        (alone,) = demo.forward([segment])[-1:]
        if segment.view is View.AR:
            assert [c and c.token for c in alone] == [c and c.token for c in choices]


def test_a_mask_that_allows_one_token(demo: CudaModel) -> None:
    allowed = np.zeros((2, 128), np.uint32)
    allowed[0, 77 // 32] = 1 << (77 % 32)
    for settings in SETTINGS.values():
        if settings.banned:
            continue
        draw = Draw(Sampler(settings), [1, 2], detail=True, allowed=allowed)
        cache = filled(demo, [1], 8)
        (choices,) = demo.forward([ar_segment(cache, [2, 3], 1, draw=draw)])
        assert choices[0] is not None
        assert choices[0].token == 77
        assert choices[0].probability == pytest.approx(1)
        assert choices[1] is None, "no token is allowed"


def test_rows_without_finite_logits(demo_file: Callable[..., Path]) -> None:
    with stand_in(demo_file("f16")) as model:
        with torch.inference_mode():
            model.runner.weights.output_norm.fill_(float("nan"))
        for settings in SETTINGS.values():
            for detail in (False, True):
                draw = Draw(Sampler(settings), [1], detail=detail)
                (choices,) = model.forward([ar_segment(model.new_cache(4), [1, 2], 0, draw=draw)])
                assert choices.rows == (None, None)
