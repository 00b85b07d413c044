"""The CUDA runtime's passes, on the kernels' stand-ins, against the reference runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from cuda_models import stand_in
from gguf import GGMLQuantizationType as T
from numpy.typing import NDArray
from synthetic_model import model_shape, write_model

from orthrus_gguf.decode import Plan, Strategy, decode, prefill
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda import fused_pass
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.passes import cut
from orthrus_gguf.runtime.protocol import Cache, Model, Segment, ar_segment, diffusion_segment
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.sampling import Sampler, SamplingSettings

MASK = 4095
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


# --- the contract ---


def test_satisfies_the_protocols(demo: CudaModel) -> None:
    model: Model = demo
    cache = model.new_cache(8)
    assert isinstance(cache, Cache)
    assert "cuda" in model.description
    assert "F16 weights, f16/f16 cache" in model.description


@pytest.mark.parametrize(
    ("kind", "capability", "limit"),
    [("f16", 80, FP16), ("q8_0", 80, FP16), ("q8_0", 86, INT8), ("q4_k_m", 86, INT8)],
)
def test_logits_are_those_of_the_reference(
    demo_file: DemoFile, kind: str, capability: int, limit: float
) -> None:
    """A prompt pass, a short pass, one with two blocks of different starts, one row."""
    with ModelFile.open(demo_file(kind)) as file:
        reference = ReferenceModel(file)
    ids = tokens(90)
    passes = [
        [ar_segment(ids[:70], 0)],
        [ar_segment(ids[70:75], 70)],
        [
            ar_segment(ids[75:80], 75, wanted=range(1, 3)),
            diffusion_segment(ids[78], MASK, 16, 77),
            diffusion_segment(5, MASK, 15, 80, wanted=range(2, 9)),
        ],
        [ar_segment(ids[80:81], 80)],
    ]
    with stand_in(demo_file(kind), capability=capability) as model:
        cache, known = model.new_cache(128), reference.new_cache(128)
        for segments in passes:
            found = [rows.copy() for rows in model.forward(segments, cache)]
            for rows, wanted in zip(found, reference.forward(segments, known), strict=True):
                assert rows.shape == wanted.shape
                assert nmse(rows, wanted) < limit


@pytest.mark.parametrize(("type_k", "type_v"), [("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0")])
def test_rows_do_not_depend_on_their_company(demo_file: DemoFile, type_k: str, type_v: str) -> None:
    ids = tokens(30, 1)
    with stand_in(demo_file("q8_0"), cache_type_k=type_k, cache_type_v=type_v) as model:
        whole = model.forward([ar_segment(ids, 0)], model.new_cache(40))[0].copy()
        for size in (1, 7):
            cache, rows = model.new_cache(64), []
            for start in range(0, len(ids), size):
                segments = [ar_segment(ids[start : start + size], start)]
                if start >= 4:
                    segments.append(diffusion_segment(ids[3], MASK, 9, start - 3))
                rows.append(model.forward(segments, cache)[0].copy())
            np.testing.assert_array_equal(np.concatenate(rows), whole)


def test_blocks_leave_no_trace_and_fit_anywhere(demo: CudaModel) -> None:
    """Also at the very end of the context, and in more than one pass."""
    ids = tokens(20, 2)
    cache = demo.new_cache(20)
    demo.forward([ar_segment(ids, 0)], cache)
    blocks = [diffusion_segment(5 + i, MASK, 16, 20 - i) for i in range(9)]
    together = [rows.copy() for rows in demo.forward(blocks, cache)]
    assert cache.length == 20
    roomy = demo.new_cache(64)
    demo.forward([ar_segment(ids, 0)], roomy)
    for block, rows in zip(blocks, together, strict=True):
        (alone,) = demo.forward([block], roomy)
        assert nmse(rows, alone) < 1e-10


def test_only_wanted_rows_are_returned(demo: CudaModel) -> None:
    ids = tokens(80, 3)
    full = demo.forward([ar_segment(ids, 0)], demo.new_cache(96))[0].copy()
    for wanted in (range(0), range(79, 80), range(3, 70)):
        cache = demo.new_cache(96)
        (rows,) = demo.forward([ar_segment(ids, 0, wanted=wanted)], cache)
        assert cache.length == 80
        np.testing.assert_array_equal(rows, full[wanted.start : wanted.stop])


def test_prompts_of_small_batches_are_row_invariant(demo_file: DemoFile) -> None:
    """With 64 rows per prompt pass nothing goes through the dense products."""
    ids = tokens(150, 4)
    with stand_in(demo_file("f16"), prompt_rows=64) as model:
        whole = model.forward([ar_segment(ids, 0)], model.new_cache(150))[0].copy()
        cache = model.new_cache(150)
        model.forward([ar_segment(ids[:140], 0, wanted=range(0))], cache)
        (last,) = model.forward([ar_segment(ids[140:], 140)], cache)
        np.testing.assert_array_equal(last, whole[140:])


@pytest.mark.parametrize("failing", ["attention", "matmul"])
def test_a_failed_pass_leaves_the_cache_as_it_was(
    demo_file: DemoFile, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(demo_file("f16"), prompt_rows=8) as model:
        cache = model.new_cache(64)
        model.forward([ar_segment(range(5), 0)], cache)
        kernels = model.machine.kernels
        real, calls = getattr(kernels, failing), []

        def interrupted(*arguments: object) -> object:
            calls.append(arguments)
            if len(calls) == 12:
                raise KeyboardInterrupt
            return real(*arguments)

        object.__setattr__(kernels, failing, interrupted)
        try:
            with pytest.raises(KeyboardInterrupt):
                model.forward([ar_segment(range(40), 5)], cache)
        finally:
            object.__setattr__(kernels, failing, real)
        assert cache.length == 5


# --- decoding through forward() ---


def test_golden_tokens_and_cycles(demo: CudaModel, golden: dict[str, Any]) -> None:
    """The host's loop on this runtime; the stepper's golden cases are in test_cuda_stepper.py."""
    greedy = Sampler(SamplingSettings(temperature=0))
    for number in (0, 11):
        case = golden["cases"][number]
        prompt, n = case["prompt_ids"], case["n_new"]
        cache = demo.new_cache(len(prompt) + n)
        ids = [*prompt, greedy.sample(prefill(demo, cache, prompt), prompt)]
        plan = Plan(Strategy.TWO_PASS, 15)
        cycles = list(decode(demo, cache, greedy, ids, plan, n - 1))
        assert ids[len(prompt) :] == case["output_ids"]
        assert [cycle.start for cycle in cycles] == case["cycle_starts"]


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
    segments: list[list[Segment]] = [
        [ar_segment(ids[:70], 0)],
        [ar_segment(ids[70:], 70), diffusion_segment(7, 319, 16, 78)],
    ]
    for capability in (80, 86):
        with stand_in(path, capability=capability) as model:
            cache, known = model.new_cache(80), reference.new_cache(80)
            for wanted in segments:
                pairs = zip(
                    model.forward(wanted, cache), reference.forward(wanted, known), strict=True
                )
                # Random weights amplify: ten times what the trained model shows.
                assert all(nmse(found, expected) < 10 * INT8 for found, expected in pairs)


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
        [ar_segment([1], 1)],
        [ar_segment(list(range(9)), 0)],
        [diffusion_segment(1, 2, 4, 1)],
        [diffusion_segment(1, 2, 80, 0)],
    ):
        with pytest.raises(ValueError, match=r"segment|cache|rows|pass"):
            demo.forward(segments, cache)
    for token in (-1, 4096):
        with pytest.raises(OrthrusError, match=f"token {token} is outside the vocabulary"):
            demo.forward([ar_segment([1, token], 0)], cache)
    assert cache.length == 0


def test_trees_are_refused(demo: CudaModel) -> None:
    cache = demo.new_cache(8)
    with pytest.raises(ValueError, match="no ancestor masks"):
        demo.forward([ar_segment([1, 2, 3], 0, parents=(-1, 0, 0))], cache)


def test_closed_models_and_caches(demo_file: DemoFile) -> None:
    with stand_in(demo_file("f16")) as model:
        cache = model.new_cache(8)
        cache.close()
        with pytest.raises(ValueError, match="closed"):
            model.forward([ar_segment([1], 0)], cache)
        cache = model.new_cache(8)
    with pytest.raises(OrthrusError, match="the model is closed"):
        model.forward([ar_segment([1], 0)], cache)


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
    with stand_in(demo_file("f16")) as model:
        cache = model.new_cache(32)
        expected = model.forward([ar_segment(range(9), 0)], cache)[0].copy()
        cache.truncate(0)
        product = fused_pass.PassRunner.product

        def leaky(self: Any, x: Any, weights: Any, out: Any) -> None:
            product(self, x, weights, out)
            out *= 1 + 1e-6 * out.shape[1]  # depends on the company

        monkeypatch.setattr(fused_pass.PassRunner, "product", leaky)
        with pytest.raises(AssertionError, match=r"row 0 of a pass of 9 rows .* other bits"):
            model.forward([ar_segment(range(9), 0)], cache)
    monkeypatch.undo()
    with stand_in(demo_file("f16")) as model:
        found = model.forward([ar_segment(range(9), 0)], model.new_cache(32))[0]
        np.testing.assert_array_equal(found, expected)


# --- passes ---


def test_how_passes_are_cut() -> None:
    long = ar_segment(range(150), 0)
    block = diffusion_segment(1, 2, 30, 150)
    idle = diffusion_segment(1, 2, 30, 150, wanted=range(0))

    def sizes(segments: list[Segment], prompt: int) -> list[list[int]]:
        return [[piece.count for piece in pieces] for pieces in cut(segments, prompt, 64)]

    assert sizes([long], 512) == [[150]]
    assert sizes([long, block], 512) == [[150], [30]]  # a prompt pass has no blocks
    assert sizes([long, block, idle, block], 64) == [[64], [64], [22, 30], [30]]
    assert sizes([block, block, block], 64) == [[30, 30], [30]]
    assert sizes([idle], 64) == []
