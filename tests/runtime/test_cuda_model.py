"""The CUDA runtime's passes, on the kernels' stand-ins, against the reference runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from cuda_models import filled, stand_in
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray
from synthetic_model import model_shape, write_model

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.architectures import LLAMA, QWEN2, QWEN3, Architecture
from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda import runner
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.passes import cut, padded
from orthrus_gguf.runtime.protocol import (
    Cache,
    Draw,
    Model,
    Segment,
    ar_segment,
    diffusion_segment,
    path_to,
)
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.sampling import Sampler, SamplingSettings

MASK = 4095
TREE = (-1, 0, 0, 1, 2, 2)
DemoFile = Callable[..., Path]

#: Squared error over squared norm. fp16 rounds to 2^-11, so one rounding of every activation gives
#: (2^-11)^2 / 3 = 8e-8, and each of the four layers rounds a few times; int8 rows with a scale per
#: 32 round to about 1/254 of the largest, hence a hundred times that and more.
FP16, INT8 = 1e-6, 5e-4


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def demo(demo_file: DemoFile) -> Iterator[CudaModel]:
    with stand_in(demo_file("f16")) as model:
        yield model


def nmse(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 4000, count)]


def block_of(cache: Cache, *where: int, **more: Any) -> Segment:
    """Anchor, rows and start of a block."""
    anchor, rows, start = where
    return diffusion_segment(cache, anchor, MASK, rows, start, **more)


# --- the contract ---


def test_satisfies_the_protocols(demo: CudaModel) -> None:
    model: Model = demo
    cache: Cache = model.new_cache(8)
    assert (cache.length, cache.capacity) == (0, 8)
    assert "cuda" in model.description
    assert "F16 weights, f16/f16 cache" in model.description


@pytest.mark.parametrize(
    ("kind", "capability", "limit"),
    [("f16", 80, FP16), ("q8_0", 80, FP16), ("q8_0", 86, INT8), ("q4_k_m", 86, INT8)],
)
def test_logits_are_those_of_the_reference(
    demo_file: DemoFile, kind: str, capability: int, limit: float
) -> None:
    """A prompt pass, a short pass, one with two blocks of different starts, one row, a tree."""
    with ModelFile.open(demo_file(kind)) as file:
        reference = ReferenceModel(file)
    ids = tokens(90)

    def passes(cache: Cache) -> Iterator[list[Segment]]:
        yield [ar_segment(cache, ids[:70], 0)]
        yield [ar_segment(cache, ids[70:75], 70)]
        yield [
            ar_segment(cache, ids[75:80], 75, wanted=range(1, 3)),
            block_of(cache, ids[78], 16, 77),
            block_of(cache, 5, 15, 80, wanted=range(2, 9)),
        ]
        yield [ar_segment(cache, ids[80:81], 80)]
        yield [ar_segment(cache, ids[81:87], 81, parents=TREE)]
        yield [ar_segment(cache, ids[87:90], 84)]

    with stand_in(demo_file(kind), capability=capability) as model:
        cache, known = model.new_cache(128), reference.new_cache(128)
        for ours, theirs in zip(passes(cache), passes(known), strict=True):
            for rows, wanted in zip(model.logits(ours), reference.logits(theirs), strict=True):
                assert rows.shape == wanted.shape
                assert nmse(rows, wanted) < limit
            tree = ours[0].parents is not None
            kept = path_to(4, TREE) if tree else range(len(ours[0]))
            cache.commit(kept)
            known.commit(kept)


@pytest.mark.parametrize("base", [QWEN3, QWEN2, LLAMA], ids=lambda base: base.name)
@pytest.mark.parametrize(
    "rope",
    [
        Rope(1e4),
        Rope(1e6, factor=4.0, original_context=32, ext_factor=1.0),
        Rope(1e4, freq_factors=tuple(np.geomspace(1, 8, 32).astype(np.float32).tolist())),
    ],
    ids=["plain", "yarn", "llama3"],
)
def test_every_architecture(tmp_path: Path, base: Architecture, rope: Rope) -> None:
    """Rows of both views and taps, against the reference: random models, so that a bias left out
    or a pair turned wrongly shows at once."""
    path = tmp_path / "model.gguf"
    config = model_shape(rope=rope, tied=base is not LLAMA, architecture=base)
    write_model(load_library().api, path, config, lambda name: T.F16)
    with ModelFile.open(path) as file:
        assert file.config.architecture is base
        reference = ReferenceModel(file)
    ids = [int(token) for token in np.random.default_rng(5).integers(0, 300, 80)]
    taps = tuple(range(reference.config.n_layers + 2))

    def segments(cache: Cache, taps: tuple[int, ...]) -> list[Segment]:
        # Rows are wanted of the logits only: nothing says how to draw them.
        wanted = range(0) if taps else None
        block = diffusion_segment(cache, 7, 319, 16, 78, wanted=wanted)
        ar = ar_segment(cache, ids[70:], 70, wanted=wanted, taps=taps)
        return [ar, replace(block, taps=taps)]

    with stand_in(path) as model:
        cache, known = filled(model, ids[:70], 96), reference.new_cache(96)
        reference.logits([ar_segment(known, ids[:70], 0, wanted=range(0))])
        known.commit(range(70))
        for found, expected in zip(
            model.logits(segments(cache, ())), reference.logits(segments(known, ())), strict=True
        ):
            assert nmse(found, expected) < 10 * FP16  # random weights amplify
        for ours, theirs in zip(
            model.forward(segments(cache, taps)),
            reference.forward(segments(known, taps)),
            strict=True,
        ):
            assert ours.taps is not None
            assert theirs.taps is not None
            assert ours.taps.shape == theirs.taps.shape
            for plane, wanted in zip(ours.taps, theirs.taps, strict=True):
                assert nmse(plane, wanted) < 10 * FP16


def test_taps_of_prompts_trees_and_cut_segments(demo_file: DemoFile) -> None:
    """In the order of the segment's rows, whatever ran where."""
    ids, taps = tokens(100, 8), (0, 2, 4, 5)
    with stand_in(demo_file("f16")) as model, stand_in(demo_file("f16"), prompt_rows=16) as small:
        assert model.config.n_layers == 4
        found = []
        for one in (model, small):
            cache = one.new_cache(128)
            (choices,) = one.forward([ar_segment(cache, ids, 0, wanted=range(0), taps=taps)])
            assert choices.taps is not None
            assert choices.taps.shape == (4, 100, model.config.n_embd)
            found.append(choices.taps)
            cache.commit(range(100))
            tree = ar_segment(cache, ids[:6], 100, parents=TREE, wanted=range(0), taps=taps)
            (choices,) = one.forward([tree])
            assert choices.taps is not None
            for row in range(6):
                path = path_to(row, TREE)
                along = ar_segment(cache, [ids[i] for i in path], 100, wanted=range(0), taps=taps)
                (chain,) = one.forward([along])
                assert chain.taps is not None
                np.testing.assert_array_equal(choices.taps[:, row], chain.taps[:, -1])
        assert nmse(found[0], found[1]) < FP16


@pytest.mark.parametrize(("type_k", "type_v"), [("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0")])
def test_rows_do_not_depend_on_their_company(demo_file: DemoFile, type_k: str, type_v: str) -> None:
    ids = tokens(30, 1)
    with stand_in(demo_file("q8_0"), cache_type_k=type_k, cache_type_v=type_v) as model:
        (whole,) = model.logits([ar_segment(model.new_cache(40), ids, 0)])
        for size in (1, 7):
            cache, other, rows = model.new_cache(64), filled(model, ids[::-1], 50), []
            for start in range(0, len(ids), size):
                part = ids[start : start + size]
                segments = [
                    ar_segment(other, part[::-1], 30),
                    ar_segment(cache, part, start),
                    block_of(other, 3, 5, 31),
                ]
                if start >= 4:
                    segments.append(block_of(cache, ids[3], 9, start - 3))
                rows.append(model.logits(segments)[1])
                cache.commit(range(len(part)))
            np.testing.assert_array_equal(np.concatenate(rows), whole)


def test_blocks_leave_no_trace_and_fit_anywhere(demo: CudaModel) -> None:
    """Also at the very end of the context, and in more than one pass."""
    ids = tokens(20, 2)
    cache = filled(demo, ids, 20)
    blocks = [block_of(cache, 5 + i, 16, 20 - i) for i in range(9)]
    together = demo.logits(blocks)
    assert cache.length == 20
    roomy = filled(demo, ids, 64)
    for block, rows in zip(blocks, together, strict=True):
        (alone,) = demo.logits([replace(block, cache=roomy)])
        assert nmse(rows, alone) < 1e-10


def test_only_wanted_rows_are_returned(demo: CudaModel) -> None:
    ids = tokens(80, 3)
    (full,) = demo.logits([ar_segment(demo.new_cache(96), ids, 0)])
    for wanted in (range(0), range(79, 80), range(3, 70)):
        cache = demo.new_cache(96)
        (rows,) = demo.logits([ar_segment(cache, ids, 0, wanted=wanted)])
        cache.commit(range(80))
        np.testing.assert_array_equal(rows, full[wanted.start : wanted.stop])


def test_prompts_of_small_batches_are_row_invariant(demo_file: DemoFile) -> None:
    """With 64 rows per prompt pass nothing goes through the dense products."""
    ids = tokens(150, 4)
    with stand_in(demo_file("f16"), prompt_rows=64) as model:
        (whole,) = model.logits([ar_segment(model.new_cache(150), ids, 0)])
        cache = filled(model, ids[:140], 150)
        (last,) = model.logits([ar_segment(cache, ids[140:], 140)])
        np.testing.assert_array_equal(last, whole[140:])


@pytest.mark.parametrize("failing", ["attention", "matmul"])
def test_a_failed_pass_leaves_the_caches_as_they_were(
    demo_file: DemoFile, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(demo_file("f16"), prompt_rows=8) as model:
        caches = [filled(model, range(5), 64) for _ in range(2)]
        tree = ar_segment(caches[1], range(6), 5, parents=TREE, wanted=range(0))
        model.forward([tree])
        caches[1].commit(path_to(5, TREE))  # its keys are moved by the pass that fails
        kernels = model.machine.kernels
        real, calls = getattr(kernels, failing), []

        def interrupted(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) == 12:
                raise KeyboardInterrupt
            return real(*arguments)

        segments = [
            ar_segment(caches[0], range(40), 5, wanted=range(0)),
            ar_segment(caches[1], range(6), 8, parents=TREE, wanted=range(0)),
        ]
        object.__setattr__(kernels, failing, interrupted)
        try:
            with pytest.raises(KeyboardInterrupt):
                model.forward(segments)
        finally:
            object.__setattr__(kernels, failing, real)
        assert [cache.length for cache in caches] == [5, 8]
        for cache in caches:
            with pytest.raises(ValueError, match="no AR rows are pending"):
                cache.commit(range(1))
        plain = filled(model, [*range(5), *path_to(5, TREE)], 64)
        after, expected = (model.logits([ar_segment(c, [9], 8)])[0] for c in (caches[1], plain))
        np.testing.assert_array_equal(after, expected)


# --- types ---


def test_every_mix_of_types(tmp_path: Path) -> None:
    """Q, K and V of three types; gate and up of two; an F32 norm; a type without a kernel."""
    kinds = {
        "attn_q": T.Q4_K,
        "attn_k": T.Q6_K,
        "attn_v": T.Q8_0,
        "ffn_gate": T.Q5_K,
        "ffn_up": T.Q3_K,
        "ffn_down": T.IQ4_XS,
        "attn_output": T.Q4_1,
    }
    path = tmp_path / "mixed.gguf"

    def rule(name: str) -> T:
        part = name.split(".")[2].removesuffix("_diff") if name.startswith("blk") else name
        return kinds.get(part, T.Q6_K)

    config = model_shape(tied=False)
    write_model(load_library().api, path, config, rule)
    with ModelFile.open(path) as file:
        reference = ReferenceModel(file)
    ids = [int(token) for token in np.random.default_rng(5).integers(0, 300, 80)]

    def passes(cache: Cache) -> Iterator[list[Segment]]:
        yield [ar_segment(cache, ids[:70], 0)]
        yield [ar_segment(cache, ids[70:], 70), diffusion_segment(cache, 7, 319, 16, 78)]

    for capability in (80, 86):
        with stand_in(path, capability=capability) as model:
            cache, known = model.new_cache(80), reference.new_cache(80)
            for ours, theirs in zip(passes(cache), passes(known), strict=True):
                pairs = list(zip(model.logits(ours), reference.logits(theirs), strict=True))
                # Random weights amplify: ten times what the trained model shows.
                assert all(nmse(found, expected) < 10 * INT8 for found, expected in pairs)
                cache.commit(range(len(ours[0])))
                known.commit(range(len(ours[0])))


def test_types_without_a_kernel_are_reported(
    demo_file: DemoFile, caplog: pytest.LogCaptureFixture
) -> None:
    with stand_in(demo_file("f32")) as model:
        assert "F16 weights" in model.description
    (record,) = caplog.records
    assert "matrices of type F32 have no kernel: dequantized to F16" in record.message


def test_weights_beyond_f16(tmp_path: Path) -> None:
    path = tmp_path / "wild.gguf"
    write_model(load_library().api, path, model_shape(), lambda name: T.F32)
    with ModelFile.open(path) as file, path.open("r+b") as raw:
        raw.seek(file.tensors["blk.1.ffn_down.weight"].offset)
        raw.write(np.full(4, 1e6, np.float32).tobytes())
    with pytest.raises(OrthrusError, match=r"blk\.1\.ffn_down.*1e\+06, beyond F16"), stand_in(path):
        pass


# --- errors ---


def test_what_a_pass_must_not_do(demo: CudaModel) -> None:
    cache = demo.new_cache(8)
    for segments in (
        [],
        [ar_segment(cache, [1], 1)],
        [ar_segment(cache, list(range(9)), 0)],
        [block_of(cache, 1, 4, 1)],
        [block_of(cache, 1, 80, 0)],
        [ar_segment(cache, [1, 2], 0, wanted=range(0), taps=(6,))],
    ):
        with pytest.raises(ValueError, match=r"segment|cache|rows|pass|taps"):
            demo.logits(segments)
    for token in (-1, 4096):
        with pytest.raises(OrthrusError, match=f"token {token} is outside the vocabulary"):
            demo.logits([ar_segment(cache, [1, token], 0)])
    with pytest.raises(ValueError, match="does not say how to draw"):
        demo.forward([ar_segment(cache, [1], 0)])
    draw = Draw(Sampler(SamplingSettings()), [1], top=200)
    with pytest.raises(OrthrusError, match="reports at most 128"):
        demo.forward([ar_segment(cache, [1], 0, draw=draw)])
    assert cache.length == 0


def test_blocks_need_heads(tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    write_model(load_library().api, path, model_shape(block_size=None), lambda name: T.F16)
    with stand_in(path) as model:
        cache = model.new_cache(8)
        with pytest.raises(OrthrusError, match="has no diffusion heads; use --strategy ar"):
            model.logits([diffusion_segment(cache, 1, 319, 4, 0)])
        assert len(model.logits([ar_segment(cache, [1], 0)])[0]) == 1


def test_closed_models_and_caches(demo_file: DemoFile) -> None:
    with stand_in(demo_file("f16")) as model, stand_in(demo_file("f16")) as other:
        cache = model.new_cache(8)
        cache.close()
        with pytest.raises(ValueError, match="closed"):
            model.logits([ar_segment(cache, [1], 0)])
        cache = model.new_cache(8)
        with pytest.raises(ValueError, match="another model"):
            other.logits([ar_segment(cache, [1], 0)])
    with pytest.raises(OrthrusError, match="the model is closed"):
        model.logits([ar_segment(cache, [1], 0)])


def test_settings_that_cannot_be_used(demo_file: DemoFile) -> None:
    for settings, message in (
        ({"cache_type_k": "f32"}, "-ctk f32: the cuda runtime keeps its cache in f16, q8_0, q4_0"),
        ({"prompt_rows": 0}, "-b 0: expected at least 1 row"),
    ):
        with pytest.raises(OrthrusError, match=message), stand_in(demo_file("f16"), **settings):
            pass


def test_heads_without_a_kernel(tmp_path: Path) -> None:
    path = tmp_path / "narrow.gguf"
    write_model(load_library().api, path, model_shape(head_dim=32), lambda name: T.F16)
    with pytest.raises(OrthrusError, match="heads of 32 elements have no CUDA kernel"):  # noqa: SIM117
        with stand_in(path):
            pass


# --- the debug switch ---


def test_checked_rows(demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """ORTHRUS_CHECK_ROWS=1 is silent while rows are invariant, and notices when they are not."""
    monkeypatch.setenv("ORTHRUS_CHECK_ROWS", "1")

    def results(model: CudaModel) -> list[NDArray[np.float32]]:
        cache, other = model.new_cache(32), filled(model, range(20, 30), 40)
        found = model.logits(
            [
                ar_segment(other, range(6), 10, parents=TREE),
                ar_segment(cache, range(9), 0),
                block_of(cache, 3, 7, 9),
            ]
        )
        cache.commit(range(9))
        other.commit(path_to(4, TREE))
        return found + model.logits([ar_segment(other, [5, 6], 13), ar_segment(cache, [5], 9)])

    with stand_in(demo_file("f16")) as model:
        checked = results(model)
        product = runner.PassRunner.product

        def leaky(self: Any, x: Any, weights: Any, out: Any) -> None:
            product(self, x, weights, out)
            out *= 1 + 1e-6 * out.shape[1]  # depends on the company

        monkeypatch.setattr(runner.PassRunner, "product", leaky)
        with pytest.raises(AssertionError, match=r"row 0 of a pass of 16 rows .* other bits"):
            model.logits([ar_segment(model.new_cache(16), range(9), 0)])
    monkeypatch.undo()
    with stand_in(demo_file("f16")) as model:
        for found, expected in zip(results(model), checked, strict=True):
            np.testing.assert_array_equal(found, expected)


# --- passes ---


def test_how_passes_are_cut(demo: CudaModel) -> None:
    cache, other = demo.new_cache(512), demo.new_cache(512)
    long = ar_segment(cache, range(150), 0)
    block = block_of(cache, 1, 30, 150)
    idle = block_of(cache, 1, 30, 150, wanted=range(0))
    tree = ar_segment(other, range(6), 0, parents=TREE)

    def sizes(segments: list[Segment], prompt: int, draws: bool = False) -> list[list[int]]:
        passes = cut(segments, prompt, 64, draws=draws)
        return [[piece.count for piece in pieces] for pieces in passes]

    assert sizes([long], 512) == [[150]]
    assert sizes([long], 512, draws=True) == [[64], [64], [22]]  # all its rows are to be drawn
    assert sizes([long, block], 512) == [[150], [30]]  # a prompt pass has no blocks
    assert sizes([tree, long, block], 512) == [[6], [150], [30]]
    assert sizes([long, block, idle, block], 64) == [[64], [64], [22, 30], [30]]
    assert sizes([block, block, block], 64) == [[30, 30], [30]]
    assert sizes([tree, block, tree], 64) == [[6, 30, 6]]
    assert sizes([idle], 64) == []
    assert sizes([replace(idle, taps=(1,))], 64) == [[30]]


def test_rows_of_passes_are_padded_to_few_sizes() -> None:
    assert [padded(rows, 0, 64)[0] for rows in (1, 2, 3, 16, 17, 33, 64)] == [
        1, 2, 4, 16, 24, 48, 64,
    ]  # fmt: skip
    for ar in range(65):
        for blocks in range(65 - ar):
            if ar + blocks:
                sizes = padded(ar, blocks, 64)
                assert sizes[0] >= ar
                assert sizes[1] >= blocks
                assert sum(sizes) <= 64
                assert (sizes[1] == 0) == (blocks == 0)
