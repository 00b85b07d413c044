"""The ggml runtime against numpy float64, the official outputs, and its own contract."""

from __future__ import annotations

import gc
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy_qwen3 import NumpyQwen3
from synthetic_model import model_shape, uniform, write_model

from orthrus_gguf.config import ModelConfig, Rope
from orthrus_gguf.decode import Plan, Strategy, decode, prefill
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model_file import ModelFile
from orthrus_gguf.runtime.ggml import GgmlModel
from orthrus_gguf.sampling import Sampler, SamplingSettings
from orthrus_gguf.segments import Cache, Model, ar_segment, diffusion_segment

DemoFile = Callable[..., Path]
TYPES = gguf.GGMLQuantizationType
GREEDY = Sampler(SamplingSettings(temperature=0))

#: llama.cpp allows each quantized product 5e-4 (test-backend-ops); two layers are many in a row.
MAX_NMSE = 2e-3


@contextmanager
def loaded(path: Path, **settings: Any) -> Iterator[GgmlModel]:
    with ModelFile.open(path) as file, GgmlModel.load(file, threads=1, **settings) as model:
        yield model


@pytest.fixture(scope="module")
def demo(demo_file: DemoFile) -> Iterator[GgmlModel]:
    with loaded(demo_file("f32"), cache_type_k="f32", cache_type_v="f32") as model:
        yield model


def small_file(
    folder: Path, qtype: gguf.GGMLQuantizationType, config: ModelConfig | None = None
) -> Path:
    path = folder / f"{qtype.name}.gguf"
    write_model(load_library().api, path, config or model_shape(), uniform(qtype))
    return path


def nmse(found: Any, expected: Any) -> float:
    return float(np.square(found - expected).sum() / np.square(expected).sum())


# --- the official implementation ---


@pytest.mark.parametrize("number", range(3))
def test_logits_equal_the_official_ones(
    demo: GgmlModel, golden: dict[str, Any], golden_logits: dict[str, Any], number: int
) -> None:
    case = golden["cases"][number]
    prompt, start = case["prompt_ids"], len(case["prompt_ids"])
    anchor, mask = case["output_ids"][0], demo.config.mask_token
    assert mask is not None
    cache = demo.new_cache(start + 32)
    runs = {
        "prefill": ar_segment(prompt, 0),
        "first_block_diffusion": diffusion_segment(anchor, mask, 16, start),
        "first_verify": ar_segment([anchor, *case["drafts"][0]], start),
    }
    for name, segment in runs.items():
        (logits,) = demo.forward([segment], cache)
        expected = golden_logits[f"case{number}_{name}_logits"]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("type_name", ["f32", "f16"])
def test_tokens_equal_the_official_ones(
    demo_file: DemoFile, golden: dict[str, Any], type_name: str
) -> None:
    """Every golden prompt, decoded in two passes per cycle: same tokens, same acceptance."""
    with loaded(demo_file(type_name)) as model:
        for case in golden["cases"]:
            prompt, n_new = case["prompt_ids"], case["n_new"]
            cache = model.new_cache(len(prompt) + n_new)
            tokens = [*prompt, GREEDY.sample(prefill(model, cache, prompt), prompt)]
            cycles = list(
                decode(model, cache, GREEDY, tokens, Plan(Strategy.TWO_PASS, 15), n_new - 1)
            )
            assert tokens[len(prompt) :] == case["output_ids"]
            assert [cycle.start for cycle in cycles] == case["cycle_starts"]


# --- numpy ---


@pytest.mark.parametrize("yarn", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_numpys(tmp_path: Path, yarn: bool, tied: bool) -> None:
    """F32 all through: AR rows, then two blocks that see different parts of the cache."""
    rope = Rope(10000.0, 4.0, 1024, 1.0) if yarn else Rope(1e6)
    config = model_shape(rope=rope, tied=tied, n_head=6, n_head_kv=2, head_dim=48)
    path = small_file(tmp_path, TYPES.F32, config)
    tokens = np.random.default_rng(3).integers(0, 300, 70).tolist()
    with loaded(path, cache_type_k="f32", cache_type_v="f32") as model:
        oracle = NumpyQwen3(ModelFile.open(path))
        cache = model.new_cache(128)
        segments = [
            ar_segment(tokens, 0),
            diffusion_segment(7, 319, 9, 70),
            diffusion_segment(8, 319, 5, 40),
        ]
        ar, whole, early = model.forward(segments, cache)
        assert nmse(ar, oracle.ar(tokens)) < 1e-10
        assert nmse(whole, oracle.block(tokens, [7] + [319] * 8)) < 1e-10
        assert nmse(early, oracle.block(tokens[:40], [8] + [319] * 4)) < 1e-10


@pytest.mark.parametrize("qtype", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
@pytest.mark.parametrize("cache_types", [("f16", "f16"), ("q8_0", "q8_0")])
def test_quantized_logits_are_close_to_numpys(
    tmp_path: Path, qtype: str, cache_types: tuple[str, str]
) -> None:
    """The same weights dequantized: what remains is int8 activations and the cache's rounding."""
    path = small_file(tmp_path, gguf.GGMLQuantizationType[qtype])
    tokens = np.random.default_rng(4).integers(0, 300, 40).tolist()
    with loaded(path, cache_type_k=cache_types[0], cache_type_v=cache_types[1]) as model:
        oracle = NumpyQwen3(ModelFile.open(path))
        cache = model.new_cache(64)
        ar, block = model.forward([ar_segment(tokens, 0), diffusion_segment(7, 319, 9, 40)], cache)
        assert nmse(ar, oracle.ar(tokens)) < MAX_NMSE
        assert nmse(block, oracle.block(tokens, [7] + [319] * 8)) < MAX_NMSE


def test_norms_of_other_types_and_files_of_small_alignment(tmp_path: Path) -> None:
    """What ggml would not take as it lies is copied, with the same result to the bit."""
    source = small_file(tmp_path, TYPES.Q8_0)
    plain = tmp_path / "plain.gguf"
    rewrite(source, plain, norm_type=np.float32)
    with loaded(plain) as model:
        assert model._weights.copied_bytes == 0
        expected = model.forward([ar_segment(range(20), 0)], model.new_cache(32))[0].copy()
    fully_copied = []
    for padding in (8, 16, 24, 32):  # one of the four happens to be aligned to 32
        other = tmp_path / f"other-{padding}.gguf"
        rewrite(source, other, norm_type=np.float16, alignment=8, padding=padding)
        with loaded(other) as model:
            fully_copied.append(model._weights.copied_bytes > 100_000)
            found = model.forward([ar_segment(range(20), 0)], model.new_cache(32))[0]
            np.testing.assert_array_equal(found, expected)
    assert sum(fully_copied) == 3


def rewrite(
    source: Path,
    target: Path,
    *,
    norm_type: type[np.floating[Any]],
    alignment: int = 32,
    padding: int = 8,
) -> None:
    """The same model, its norms rounded to F16 and stored as `norm_type`, aligned differently."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "orthrus")
    writer.add_custom_alignment(alignment)
    writer.add_description("x" * padding)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind, *rest = field.types
            sub_type = rest[0] if rest else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data.astype(np.float16).astype(norm_type))
        else:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- the contract ---


def test_satisfies_the_protocols(demo: GgmlModel) -> None:
    model: Model = demo
    cache = model.new_cache(8)
    assert isinstance(cache, Cache)
    assert "ggml" in model.description
    assert "F32 weights" in model.description


def test_only_wanted_rows_are_returned(demo: GgmlModel) -> None:
    tokens = list(range(50, 80))
    full = demo.forward([ar_segment(tokens, 0)], demo.new_cache(64))[0].copy()
    for wanted in (range(0), range(29, 30), range(3, 17)):
        cache = demo.new_cache(64)
        (rows,) = demo.forward([ar_segment(tokens, 0, wanted=wanted)], cache)
        assert cache.length == 30
        np.testing.assert_array_equal(rows, full[wanted.start : wanted.stop])
        (following,) = demo.forward([ar_segment([9], 30)], cache)
        assert following.shape == (1, demo.config.n_vocab)


def test_wanted_rows_of_mixed_segments(demo: GgmlModel) -> None:
    cache = demo.new_cache(64)
    segments = [
        ar_segment(range(10), 0, wanted=range(4, 6)),
        diffusion_segment(3, 4095, 8, 10, wanted=range(0)),
        diffusion_segment(3, 4095, 8, 10, wanted=range(1, 8)),
    ]
    shapes = [rows.shape[0] for rows in demo.forward(segments, cache)]
    assert shapes == [2, 0, 7]


def test_blocks_leave_no_trace(demo: GgmlModel) -> None:
    tokens = list(range(100, 130))
    clean = demo.new_cache(64)
    expected = demo.forward([ar_segment(tokens, 0)], clean)[0].copy()
    cache = demo.new_cache(64)
    rows = []
    for i in range(0, 30, 5):
        (block,) = demo.forward([diffusion_segment(tokens[i], 4095, 16, i)], cache)
        assert cache.length == i
        assert block.shape[0] == 16
        rows.append(demo.forward([ar_segment(tokens[i : i + 5], i)], cache)[0].copy())
    np.testing.assert_array_equal(np.concatenate(rows), expected)


def test_a_block_at_the_end_of_the_context(demo: GgmlModel) -> None:
    cache = demo.new_cache(20)
    demo.forward([ar_segment(range(20), 0)], cache)
    (rows,) = demo.forward([diffusion_segment(5, 4095, 16, 20)], cache)
    roomy = demo.new_cache(64)
    demo.forward([ar_segment(range(20), 0)], roomy)
    expected = demo.forward([diffusion_segment(5, 4095, 16, 20)], roomy)[0]
    np.testing.assert_array_equal(rows, expected)


def test_more_blocks_than_one_pass_holds(demo: GgmlModel) -> None:
    """20 blocks of 16 rows: several passes, each block as if alone."""
    cache = demo.new_cache(64)
    demo.forward([ar_segment(range(30), 0)], cache)
    blocks = [diffusion_segment(5 + i, 4095, 16, 30 - i) for i in range(20)]
    together = [rows.copy() for rows in demo.forward(blocks, cache)]
    for block, rows in zip(blocks, together, strict=True):
        # Not to the bit: its rows lie elsewhere in the cache, so they are summed in other lanes.
        (alone,) = demo.forward([block], cache)
        np.testing.assert_allclose(rows, alone, rtol=0, atol=1e-4)


def test_truncated_rows_are_forgotten(demo: GgmlModel) -> None:
    cache = demo.new_cache(64)
    demo.forward([ar_segment(range(10), 0)], cache)
    expected = demo.forward([ar_segment([11, 12], 10)], cache)[0].copy()
    cache.truncate(10)
    demo.forward([ar_segment(range(200, 230), 10)], cache)
    cache.truncate(10)
    found = demo.forward([ar_segment([11, 12], 10)], cache)[0]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("cache_type_v", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("poison", [np.inf, np.nan, 3e38])
def test_wild_drafts_never_reach_ar_rows(tmp_path: Path, poison: float, cache_type_v: str) -> None:
    """Blocks with infinite keys and values leave those in rows that AR rows must not feel."""
    path = small_file(tmp_path, TYPES.F32)
    with ModelFile.open(path) as file, path.open("r+b") as raw:
        for name in ("attn_k_diff", "attn_v_diff", "attn_k_norm_diff"):
            info = file.tensors[f"blk.0.{name}.weight"]
            raw.seek(info.offset)
            raw.write(np.full(info.n_bytes // 4, poison, np.float32).tobytes())
    with loaded(path, cache_type_v=cache_type_v) as model:
        tokens = list(range(40, 60))
        expected = model.forward([ar_segment(tokens, 0)], model.new_cache(64))[0].copy()
        cache = model.new_cache(64)
        model.forward([ar_segment(tokens[:10], 0)], cache)
        model.forward([diffusion_segment(5, 319, 16, 10)], cache)
        segments = [ar_segment(tokens[10:], 10), diffusion_segment(5, 319, 16, 12)]
        found = model.forward(segments, cache)[0]
        np.testing.assert_array_equal(found, expected[10:])


def test_interrupted_prompts_leave_the_cache_as_it_was(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(demo_file("f32"), batch_rows=8) as model:
        cache = model.new_cache(64)
        model.forward([ar_segment(range(5), 0)], cache)
        compute, calls = model._api.backend_graph_compute, []

        def interrupted(backend: int, graph: int) -> int:
            calls.append(graph)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return int(compute(backend, graph))

        monkeypatch.setattr(model._api, "backend_graph_compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.forward([ar_segment(range(40), 5)], cache)
        assert cache.length == 5


# --- errors ---


def test_tokens_outside_the_vocabulary(demo: GgmlModel) -> None:
    for token in (-1, 4096, 1 << 40):
        with pytest.raises(OrthrusError, match=f"token {token} is outside the vocabulary of 4096"):
            demo.forward([ar_segment([1, token, 2], 0)], demo.new_cache(8))


def test_blocks_need_heads(tmp_path: Path) -> None:
    path = small_file(tmp_path, TYPES.F32, model_shape(block_size=None))
    with loaded(path) as model:
        cache = model.new_cache(32)
        model.forward([ar_segment([1, 2], 0)], cache)
        with pytest.raises(OrthrusError, match="has no diffusion heads"):
            model.forward([diffusion_segment(1, 2, 4, 2)], cache)


def test_misuse_is_a_value_error(demo: GgmlModel, demo_file: DemoFile) -> None:
    cache = demo.new_cache(8)
    with pytest.raises(ValueError, match="has room for 8"):
        demo.forward([ar_segment(range(9), 0)], cache)
    with pytest.raises(ValueError, match="block of 129 rows"):
        demo.forward([diffusion_segment(1, 2, 129, 0)], cache)
    cache.close()
    with pytest.raises(ValueError, match="closed"):
        demo.forward([ar_segment([1], 0)], cache)
    with loaded(demo_file("f32")) as other, pytest.raises(ValueError, match="another model"):
        other.forward([ar_segment([1], 0)], demo.new_cache(8))


def test_a_closed_model_says_so(demo_file: DemoFile) -> None:
    with loaded(demo_file("f32")) as model:
        cache = model.new_cache(8)
    model.close()
    with pytest.raises(OrthrusError, match="closed"):
        model.forward([ar_segment([1], 0)], cache)
    with pytest.raises(OrthrusError, match="closed"):
        model.new_cache(8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 0}, "--threads 0"),
        ({"threads": 1000}, "--threads 1000"),
        ({"batch_rows": 0}, "-b 0"),
        ({"cache_type_k": "q5_0"}, "-ctk q5_0: expected one of f32, f16, q8_0, q4_0"),
    ],
)
def test_impossible_settings(demo_file: DemoFile, settings: dict[str, Any], message: str) -> None:
    with ModelFile.open(demo_file("f32")) as file, pytest.raises(OrthrusError, match=message):
        GgmlModel.load(file, **settings)


# --- resources ---


def test_two_models_share_the_threads_from_two_python_threads(demo_file: DemoFile) -> None:
    expected: list[Any] = []
    with loaded(demo_file("f32")) as first, loaded(demo_file("q8_0")) as second:
        models = (first, second)
        assert first._pool is second._pool
        segment = ar_segment(range(30), 0)
        expected = [model.forward([segment], model.new_cache(32))[0].copy() for model in models]
        failures: list[int] = []

        def work(number: int) -> None:
            for _ in range(20):
                found = models[number].forward([segment], models[number].new_cache(32))[0]
                if not np.array_equal(found, expected[number]):
                    failures.append(number)

        workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures


def test_threads_do_not_change_the_result(demo_file: DemoFile) -> None:
    results = []
    for threads in (1, 2, 3):
        with (
            ModelFile.open(demo_file("q8_0")) as file,
            GgmlModel.load(file, threads=threads) as model,
        ):
            segments = [ar_segment(range(20), 0), diffusion_segment(3, 4095, 16, 15)]
            results.append([a.copy() for a in model.forward(segments, model.new_cache(64))])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_loading_and_closing_leaks_nothing(demo_file: DemoFile) -> None:
    def once() -> None:
        with loaded(demo_file("f16")) as model:
            cache = model.new_cache(256)
            model.forward([ar_segment(range(40), 0)], cache)
            model.forward([diffusion_segment(3, 4095, 16, 40)], cache)

    for _ in range(5):
        once()
    gc.collect()
    before = resident_bytes()
    for _ in range(30):
        once()
    gc.collect()
    assert resident_bytes() - before < 4 << 20  # one model is 9 MB, its cache 1 MB


def resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak, which cannot shrink but must not grow either
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return pages * resource.getpagesize()
