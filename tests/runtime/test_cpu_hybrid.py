"""DeltaNet layers on the native kernels: what only they have. (`test_hybrid.py` holds what they
share with the reference.)"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from cpu_models import append, back_to, kernels, loaded
from hf_hybrid import N_GREEDY, PROMPTS, TEXT, WIDE, write_hybrid
from hf_hybrid import weights as weights_of
from orthrus_converters.cli import main

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cache_layout import CACHE_TYPES
from orthrus_gguf.runtime.cpu import memory as native
from orthrus_gguf.runtime.cpu.buffers import buffer_bytes
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.cpu.state import PENDING_ROWS, HybridCpuCache
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.memory import cpu_memory
from orthrus_gguf.runtime.protocol import Checkpoint, Segment, ar_segment, path_to

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TOKENS: list[int] = np.random.default_rng(12).integers(0, 256, 150).tolist()

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`make(type, wide=..., **settings)`: the tiny hybrid, or one with wide heads."""
    folder = tmp_path_factory.mktemp("hybrids")

    def make(weights: str, *, wide: bool = False, **settings: Any) -> Any:
        path = folder / f"{weights}-{wide}.gguf"
        if not path.exists():
            own = WIDE if wide else {}
            source = write_hybrid(folder / path.stem, TEXT | own, weights_of(own))
            assert main([str(source), str(path), "--type", weights]) == 0
        return loaded(path, **settings)

    return make


def in_passes(model: CpuModel, cuts: Sequence[int], tokens: Sequence[int]) -> Any:
    """Logits of tokens, cut into calls of so many rows."""
    cache, rows, start = model.new_cache(256), [], 0
    for count in cuts:
        rows.append(append(model, cache, tokens[start : start + count]))
        start += count
    assert start == len(tokens)
    return np.concatenate(rows)


CUTS = [(150,), (32, 33, 1, 84), (31, 2, 117), (64, 86), (3, 147)]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("weights", ["f32", "q8_0"])
def test_rows_do_not_depend_on_cuts_nor_threads(make: Make, weights: str, wide: bool) -> None:
    """Calls of rows that may be dropped one by one, and of more; passes of five; two threads."""
    with make(weights, wide=wide) as model:
        alone = in_passes(model, [1] * 150, TOKENS)
        assert np.abs(alone).max() > 3
        for cuts in CUTS:
            np.testing.assert_array_equal(in_passes(model, cuts, TOKENS), alone, str(cuts))
    for settings in ({"batch_rows": 5}, {"threads": 2}):
        with make(weights, wide=wide, **settings) as model:
            for cuts in CUTS[1:3]:
                np.testing.assert_array_equal(in_passes(model, cuts, TOKENS), alone, str(settings))


@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_every_cache_type(make: Make, kind: str) -> None:
    with make("f32", cache_type_k=kind, cache_type_v=kind) as model:
        alone = in_passes(model, [1] * 50, TOKENS[:50])
        np.testing.assert_array_equal(in_passes(model, (40, 10), TOKENS[:50]), alone)


def test_logits_and_greedy_tokens_are_hugging_faces(make: Make) -> None:
    logits = np.load(GOLDEN / "hybrid.npz")
    greedy = json.loads((GOLDEN / "hybrid.json").read_text())["greedy"]
    with make("f32", cache_type_k="f32", cache_type_v="f32") as model:
        for index, prompt in enumerate(PROMPTS):
            cache, expected = model.new_cache(64), logits[f"logits_{index}"]
            found = append(model, cache, prompt)
            np.testing.assert_allclose(found[-len(expected) :], expected, rtol=0, atol=1e-3)
            text: list[int] = []
            for _ in range(N_GREEDY):
                text.append(int(found[-1].argmax()))
                found = append(model, cache, text[-1:])
            assert text == greedy[index]


@pytest.mark.parametrize("first", [1, 2, 5])
def test_a_long_segment_stays_or_goes(make: Make, first: int) -> None:
    """One that nobody commits, of which no row stays, and that fails half-way leave no trace: the
    state from before it comes back, rows accepted before it included."""
    with make("f32", batch_rows=20) as model:
        expected = in_passes(model, [1] * 60, TOKENS[:60])
        cache = model.new_cache(256)
        append(model, cache, TOKENS[:first])
        long = ar_segment(cache, TOKENS[100:145], first)
        model.logits([long])
        with pytest.raises(ValueError, match="44 of 45 rows: of more than 32"):
            cache.commit(range(44))
        place = cache.checkpoint()
        model.logits([long])
        cache.commit([])
        run, passes = model._pool.run, []

        def fail(steps: Any) -> None:
            passes.append(steps)
            if len(passes) == 3:
                raise KeyboardInterrupt
            run(steps)

        model._pool.run = fail
        with pytest.raises(KeyboardInterrupt):
            model.logits([long])
        model._pool.run = run
        parts = cache.take(first)
        found = append(model, cache, TOKENS[first:60])
        np.testing.assert_array_equal(found, expected[first:])
        cache.restore(place)
        np.testing.assert_array_equal(append(model, cache, TOKENS[first:40]), expected[first:40])
        cache.put(parts, first)
        np.testing.assert_array_equal(append(model, cache, TOKENS[first:40]), expected[first:40])


@pytest.mark.parametrize("seed", range(4))
def test_any_way_to_a_text(make: Make, seed: int) -> None:
    """Drafts and trees, right and wrong, prompts, checkpoints, in the company of other texts: the
    logits of what stays are those of the text alone."""
    rng = np.random.default_rng(seed)
    with make("f32", batch_rows=int(rng.choice([7, 64]))) as model:
        expected = in_passes(model, [1] * 150, TOKENS)
        caches, longest = [model.new_cache(2000) for _ in range(3)], 0
        for _ in range(40):
            segments, paths = [], []
            for cache in caches:
                if rng.random() < 0.15:
                    cache.restore(cache.checkpoint(int(rng.integers(cache.length + 1))))
                if rng.random() < 0.15:
                    cache.checkpoint()
                segment, path = a_step(cache, rng)
                segments.append(segment)
                paths.append(path)
            for segment, path, logits in zip(segments, paths, model.logits(segments), strict=True):
                start, cache = segment.start, cast(HybridCpuCache, segment.cache)
                np.testing.assert_array_equal(logits[path], expected[start : start + len(path)])
                few = len(segment) <= PENDING_ROWS and rng.random() < 0.3
                cache.commit(path[: int(rng.integers(len(path)))] if few else path)
                longest = max(longest, cache.length)
        assert longest > 100


def a_step(cache: HybridCpuCache, rng: np.random.Generator) -> tuple[Segment, list[int]]:
    """A segment behind what a cache holds of TOKENS, and those of its rows that are right."""
    start, kind = cache.length, rng.choice(["prompt", "chain", "tree"])
    if start > 100:
        cache.restore(cache.checkpoint(0))
        start, kind = 0, "prompt"
    if kind == "prompt":
        count = int(rng.integers(1, 48))
        return ar_segment(cache, TOKENS[start : start + count], start), list(range(count))
    right = int(rng.integers(1, 9))
    if kind == "chain":
        wrong = [7] * int(rng.integers(0, 6))
        rows = [*TOKENS[start : start + right], *wrong]
        return ar_segment(cache, rows, start), list(range(right))
    # A tree: each new row hangs on any row; one way through it is the text.
    parents, tokens, way = [-1], [TOKENS[start]], [0]
    for row in range(1, int(rng.integers(2, 14))):
        if len(way) < right and rng.random() < 0.5:
            parents.append(way[-1])
            tokens.append(TOKENS[start + len(way)])
            way.append(row)
        else:
            parents.append(int(rng.integers(0, row)))
            tokens.append(int(rng.integers(0, 256)))
    assert path_to(way[-1], parents) == way
    return ar_segment(cache, tokens, start, parents=parents), way


def test_a_tree_too_large(make: Make) -> None:
    with make("f32") as model:
        cache = model.new_cache(256)
        parents = (-1, *[0] * 40)
        assert cache.fit(parents) <= PENDING_ROWS
        chain = tuple(range(-1, 40))
        assert cache.fit(chain) == PENDING_ROWS
        with pytest.raises(ValueError, match="a tree of 41 rows: at most 32"):
            model.logits([ar_segment(cache, TOKENS[:41], 0, parents=chain)])


def test_memory_is_what_is_said(make: Make) -> None:
    with make("f32") as model:
        cache = model.new_cache(100)
        held = [cache.keys, cache.values, cache.memory, cache.saved, cache.records]
        layout = model._layout
        said = native.cache_bytes(model.config, layout, 100)
        assert said == sum(part.nbytes for part in held)
        state = model.config.hybrid.state_bytes(model.config.n_layers)
        assert sum(part.nbytes for part in cache.take(0)[2:]) == state
        b, rows = model._buffers, model._buffers.rows
        own = [b.x, b.picked, b.normed, b.qkv, b.convolved, b.mixed, b.gated, b.other, b.logits]
        own += [*b.q, b.row, b.group, b.index, b.state_row, b.run, b.caches, b.states]
        assert buffer_bytes(kernels(), model.config, rows) == sum(part.nbytes for part in own)


def test_weights_take_what_is_said(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    assert main([str(write_hybrid(tmp_path / "tiny")), str(path), "--type", "q8_0"]) == 0
    with ModelFile.open(path) as file, loaded(path) as model:
        memory = cpu_memory(file.config, file.tensors, "f16", "f16", kernels())
        assert memory.runtime == "cpu"
        w = model._weights
        vectors = [w.output_norm]
        for layer in w.layers:
            vectors += [layer.attn_norm, layer.ffn_norm]
            for net in layer.delta_net.values():
                vectors += [net.conv, net.a[:4], net.dt[:4], net.norm]
            for a in layer.attention.values():
                vectors += [norm for norm in (a.q_norm, a.k_norm) if norm is not None]
        said = sum(memory.weight(info) for info in file.tensors.values())
        assert said == w._block.nbytes + sum(one.nbytes for one in vectors)


def test_where_hybrids_run(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    assert main([str(write_hybrid(tmp_path / "tiny")), str(path), "--type", "f32"]) == 0
    with ModelFile.open(path) as file:
        model = load_model(file, RuntimeSettings(RuntimeName.CPU, threads=1))
        assert isinstance(model, CpuModel)
        model.close()
        with pytest.raises(OrthrusError, match="do not run on --runtime ggml yet; use --runtime"):
            load_model(file, RuntimeSettings(RuntimeName.GGML))
        monkeypatch.setenv("ORTHRUS_CPU_ISA", "nothing")
        with pytest.raises(OrthrusError, match=r"need the native kernels.*; or use --runtime ref"):
            load_model(file, RuntimeSettings(RuntimeName.CPU))


def test_checkpoint_of_a_closed_or_other_place(make: Make) -> None:
    with make("f32") as model:
        cache = model.new_cache(64)
        append(model, cache, TOKENS[:10])
        with pytest.raises(ValueError, match="no checkpoint at 5"):
            cache.restore(Checkpoint(5))
        back_to(cache, 0)
        cache.close()
        assert cache.closed
        with pytest.raises(ValueError, match="closed"):
            model.logits([ar_segment(cache, [1], 0)])
