"""Hidden states on the native kernels: the reference runtime's, and no effect on anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cpu_models import cache_of, loaded
from numpy.typing import NDArray

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.protocol import Draw, Segment, View, ar_segment
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.sampling import Sampler, SamplingSettings

DemoFile = Callable[..., Path]
PROMPT: list[int] = np.random.default_rng(2).integers(0, 4000, 90).tolist()
TREE = (-1, 0, 1, 0, 3, 3)
DRAW = Draw(Sampler(SamplingSettings(temperature=0)), PROMPT)


@pytest.fixture(scope="module")
def demo(demo_file: DemoFile) -> Iterator[CpuModel]:
    """The demo model in F32 all through."""
    with loaded(demo_file("f32"), cache_type_k="f32", cache_type_v="f32") as model:
        yield model


@pytest.fixture(scope="module")
def reference(demo_file: DemoFile) -> Iterator[ReferenceModel]:
    with ModelFile.open(demo_file("f32")) as file:
        yield ReferenceModel(file)


def all_taps(model: CpuModel | ReferenceModel) -> tuple[int, ...]:
    return tuple(range(model.config.n_layers + 2))


def segments(model: CpuModel | ReferenceModel, taps: tuple[int, ...]) -> list[Segment]:
    """A prompt cut in several passes, a tree of another sequence, and a block of a third."""
    caches = [model.new_cache(256) for _ in range(3)]
    for cache, count in zip(caches[1:], (70, 20), strict=True):
        model.forward([ar_segment(cache, PROMPT[:count], 0, wanted=range(0))])
        cache.commit(range(count))
    mask = model.config.mask_token
    assert mask is not None
    block = (PROMPT[20], *[mask] * 7)
    return [
        ar_segment(caches[0], PROMPT, 0, wanted=range(87, 90), draw=DRAW, taps=taps),
        ar_segment(caches[1], PROMPT[70:76], 70, parents=TREE, draw=DRAW, taps=taps[::-1]),
        Segment(caches[2], View.DIFFUSION, block, 20, range(0), taps=taps[1:2]),
    ]


def relative(found: NDArray[np.float32] | None, expected: NDArray[np.float32] | None) -> float:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    scale = np.abs(expected).max(axis=-1, keepdims=True)
    return float((np.abs(found - expected) / scale).max())


def test_they_equal_the_reference_runtimes(demo: CpuModel, reference: ReferenceModel) -> None:
    """All layers' inputs and both sides of the final norm; trees and blocks too."""
    taps = all_taps(demo)
    found, expected = (
        demo.forward(segments(demo, taps)),
        reference.forward(segments(reference, taps)),
    )
    shapes = [a.taps.shape for a in found if a.taps is not None]
    assert shapes == [(len(taps), 90, 256), (len(taps), 6, 256), (1, 8, 256)]
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours.taps, theirs.taps) < 1e-4
        tokens = [choice and choice.token for choice in theirs]
        assert [choice and choice.token for choice in ours] == tokens


def test_the_last_tap_times_the_output_weights_are_the_logits(
    demo: CpuModel, reference: ReferenceModel
) -> None:
    last = demo.config.n_layers + 1
    (segment, *_) = segments(demo, (last,))
    (choices,) = demo.forward([segment])
    (logits,) = demo.logits([segment])
    assert choices.taps is not None
    expected = choices.taps[0, 87:90] @ reference.output.numpy().T
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("taps", [(0,), (1,), (2, 0), (-2,), (-1,), (-1, -2, 0)], ids=str)
@pytest.mark.parametrize("wanted", [range(0), range(4, 6), range(6)], ids=str)
def test_asking_for_some_changes_nothing(
    demo: CpuModel, taps: tuple[int, ...], wanted: range
) -> None:
    """Neither the choices, nor the other taps, to the bit. Negative ones count from the end."""
    count = demo.config.n_layers + 2
    taps = tuple(tap % count for tap in taps)
    cache = cache_of(demo, PROMPT[:70], 128)

    def run(taps: tuple[int, ...]) -> tuple[object, NDArray[np.float32] | None]:
        segment = ar_segment(cache, PROMPT[70:76], 70, wanted=wanted, draw=DRAW, taps=taps)
        (choices,) = demo.forward([segment])
        return choices.rows, choices.taps

    everything = run(tuple(range(count)))
    plain, some = run(()), run(taps)
    assert plain[1] is None
    assert plain[0] == some[0] == everything[0]
    assert everything[1] is not None
    np.testing.assert_array_equal(some[1], everything[1][list(taps)])


def test_they_are_the_callers(demo: CpuModel) -> None:
    """The next pass, which uses the same memory, does not overwrite them."""
    cache = cache_of(demo, PROMPT[:70], 128)
    segment = ar_segment(cache, PROMPT[70:76], 70, wanted=range(0), taps=(0, 1, 2))
    (first,) = demo.forward([segment])
    assert first.taps is not None
    kept = first.taps.copy()
    demo.forward([ar_segment(cache, PROMPT[:6], 70, wanted=range(0), taps=(0, 1, 2))])
    np.testing.assert_array_equal(first.taps, kept)
