"""Threads, memory, and ends of all sorts, on the native runtime."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_models import append, cache_of, kernels, loaded
from orthrus_cpu_kernels.library import ISA, Kernels, built, open_object

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.cpu import model as model_module
from orthrus_gguf.runtime.cpu.steps import Builder
from orthrus_gguf.runtime.protocol import Segment, Threaded, View, ar_segment, diffusion_segment

DemoFile = Callable[..., Path]


# --- lists of steps ---


def test_a_shape_is_built_once(demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    builder = Builder

    def counted(*args: Any) -> Any:
        built.append(args)
        return builder(*args)

    monkeypatch.setattr(model_module, "Builder", counted)
    with loaded(demo_file("f16")) as model:
        cache = model.new_cache(64)
        for _ in range(10):
            append(model, cache, [1, 2, 3])
        assert len(built) == 1
        model.logits([ar_segment(cache, [1, 2, 3], 30, wanted=range(1))])
        model.logits([ar_segment(cache, [1, 2], 30)])
        model.logits([diffusion_segment(cache, 1, 4095, 3, 30)])
        assert len(built) == 4
        other = model.new_cache(64)
        for _ in range(3):
            append(model, cache, [1, 2], ar_segment(other, [5], other.length))
            other.commit([0])
        assert len(built) == 5
        taps = Segment(cache, View.AR, (1, 2), cache.length, range(0), taps=(1,))
        model.forward([taps])
        model.forward([taps])
        assert len(built) == 6


@pytest.mark.parametrize("limit", [1, 2])
def test_results_outlive_evictions_and_growth(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(model_module, "SHAPES", limit)
    with loaded(demo_file("f32")) as model:
        cache = model.new_cache(400)
        expected: dict[int, Any] = {}
        for rows in (1, 2, 40, 1, 300, 2, 40, 300, 1):  # 300: a star, more than a pass holds
            parents = None if rows < 300 else (-1, *[0] * 299)
            tokens = [i % 4000 for i in range(rows)]
            if parents is not None:
                rows = cache.fit(parents)
                tokens, parents = tokens[:rows], parents[:rows]
            (found,) = model.logits([ar_segment(cache, tokens, 0, parents=parents)])
            np.testing.assert_array_equal(found, expected.setdefault(rows, found))
            assert len(model._shapes) <= limit


# --- threads ---


def test_calls_of_two_python_threads_wait_and_models_do_not(demo_file: DemoFile) -> None:
    with loaded(demo_file("f32"), threads=2) as first, loaded(demo_file("q8_0")) as second:
        models = (first, second)
        expected = [append(model, model.new_cache(32), range(30)) for model in models]
        failures: list[int] = []

        def work(number: int) -> None:
            for _ in range(10):
                found = append(models[number], models[number].new_cache(32), range(30))
                if not np.array_equal(found, expected[number]):
                    failures.append(number)

        workers = [threading.Thread(target=work, args=(number,)) for number in (0, 1, 0, 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failures
        # One model is held up; the other runs all the same.
        with first._lock:
            np.testing.assert_array_equal(
                append(second, second.new_cache(32), range(30)), expected[1]
            )


def test_threads_do_not_change_the_result(demo_file: DemoFile) -> None:
    results = []
    for threads in (1, 2, 3, 8):
        with loaded(demo_file("q8_0"), threads=threads) as model:
            cache = model.new_cache(64)
            segments = [
                ar_segment(cache, range(20), 0),
                diffusion_segment(cache, 3, 4095, 16, 15),
                ar_segment(model.new_cache(64), range(3), 0),
            ]
            results.append(model.logits(segments))
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_instruction_sets_do_not_change_the_result(demo_file: DemoFile) -> None:
    results = {}
    for name in built():
        own = open_object(kernels().path.with_name(f"{name}.so"))
        if isinstance(own, Kernels):
            with loaded(demo_file("q4_k_m"), kernels=own) as model:
                assert own.isa in model.description
                cache = model.new_cache(64)
                block = diffusion_segment(cache, 3, 4095, 16, 15)
                results[name] = model.logits([ar_segment(cache, range(20), 0), block])
    assert "portable" in results
    for found in results.values():
        for logits, expected in zip(found, results["portable"], strict=True):
            np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("kind", ["q4_k_m", "q8_0"])
def test_instruction_sets_do_not_change_the_text(demo_file: DemoFile, kind: str) -> None:
    """The command, with the object that $ORTHRUS_CPU_ISA names."""
    texts = {}
    words = [
        "-p",
        "def read(self, size=-1):",
        "-n",
        "16",
        "-t",
        "1",
        "--temp",
        "0.7",
        "--seed",
        "5",
    ]
    for name in built():
        if not isinstance(open_object(kernels().path.with_name(f"{name}.so")), Kernels):
            continue
        command = [sys.executable, "-m", "orthrus_gguf.cli.run", str(demo_file(kind)), *words]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), ISA: name}
        strategy = ["--strategy", "fused" if name == "portable" else "two-pass"]
        done = subprocess.run([*command, *strategy], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        texts[name] = done.stdout
    assert len(texts["portable"]) > 20
    assert set(texts.values()) == {texts["portable"]}


# --- memory ---


def test_loading_and_closing_leaks_nothing(demo_file: DemoFile) -> None:
    def once() -> None:
        with loaded(demo_file("f16"), threads=2) as model:
            cache = cache_of(model, range(40), 256)
            model.logits([diffusion_segment(cache, 3, 4095, 16, 40)])

    for _ in range(3):
        once()
    gc.collect()
    before = resident_bytes()
    for _ in range(15):
        once()
    gc.collect()
    assert resident_bytes() - before < 8 << 20  # one model is 9 MB and some, its cache 1 MB


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_cache_outlives_its_model(demo_file: DemoFile) -> None:
    with loaded(demo_file("f32")) as model:
        cache = cache_of(model, range(5), 64)
    del model
    gc.collect()
    cache.restore(cache.checkpoint(3))
    cache.close()
    assert cache.closed


# --- ends ---

SCRIPT = """
import os, signal, sys, threading, time
from orthrus_cpu_kernels.library import load
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.protocol import ar_segment

with ModelFile.open(sys.argv[1]) as file:
    model = CpuModel.load(file, load(), threads=2)

def run(rows=60):
    return model.logits([ar_segment(model.new_cache(64), range(rows), 0)])[0]

run(3)
"""


def ends(demo_file: DemoFile, body: str, *, code: int = 0) -> str:
    """Run SCRIPT and more in a process; what it prints. It must end by itself, soon."""
    command = [sys.executable, "-c", SCRIPT + body, str(demo_file("f32"))]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == code, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def there_are_kernels() -> None:
    kernels()


def test_a_process_ends_without_closing(demo_file: DemoFile) -> None:
    assert ends(demo_file, "print('end')") == "end\n"


def test_a_process_ends_while_another_thread_is_in_a_pass(demo_file: DemoFile) -> None:
    body = """
def work():
    while True:
        run()

threading.Thread(target=work, daemon=True).start()
time.sleep(0.3)
print('end')
"""
    assert ends(demo_file, body) == "end\n"


def test_ctrl_c_in_a_pass(demo_file: DemoFile) -> None:
    """Is noticed behind it; then the model works as before, and the process ends."""
    body = """
expected = run()
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        run()
except KeyboardInterrupt:
    print((run() == expected).all())
"""
    assert ends(demo_file, body) == "True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_is_told_and_ends(demo_file: DemoFile) -> None:
    """Threads do not follow into it: it gets an error instead of waiting for ever."""
    body = """
child = os.fork()
if not child:
    try:
        run()
    except OrthrusError as error:
        print(error, flush=True)
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(run()))
"""
    said = ends(demo_file, body)
    assert "loaded by another process" in said
    assert said.endswith("\n7 60\n")


def test_threads_that_cannot_be_had(demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels().library, "orthrus_pool_new", lambda threads: None)
    refused = pytest.raises(OrthrusError, match="cannot start 2 threads; use fewer with --threads")
    with refused, loaded(demo_file("f32"), threads=2):
        pass


def test_flushed_subnormals_change_nothing(demo_file: DemoFile) -> None:
    """Another library may have told this thread to take them for zeros."""
    with loaded(demo_file("f32")) as model:
        cache = model.new_cache(64)
        (expected,) = model.logits([ar_segment(cache, range(20), 0)])
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush them")
        try:
            (found,) = model.logits([ar_segment(cache, range(20), 0)])
            assert (torch.tensor([1e-40]) * 1.0).item() == 0, "still flushed here"
        finally:
            torch.set_flush_denormal(False)
        np.testing.assert_array_equal(found, expected)


def test_threads_can_change_between_passes(demo_file: DemoFile) -> None:
    with loaded(demo_file("f16"), threads=3, thread_counts=(3, 1)) as model:
        assert isinstance(model, Threaded)
        cache = cache_of(model, range(20), 64)
        wanted = model.logits([diffusion_segment(cache, 3, 4095, 16, 20)])[0]
        for count in (1, 2, 3):
            model.use_threads(count)
            assert f", {count} thread" in model.description
            found = model.logits([diffusion_segment(cache, 3, 4095, 16, 20)])[0]
            np.testing.assert_array_equal(found, wanted)
        with pytest.raises(OrthrusError, match="cannot start"):
            model.use_threads(0)
        assert ", 3 threads" in model.description


def test_assumed_rows_take_memory_like_others(demo_file: DemoFile) -> None:
    """Else passes at long contexts would be timed on a single page of zeros."""
    with loaded(demo_file("f16")) as model:
        cache = model.new_cache(40_000)
        n_bytes = cache.keys.nbytes + cache.values.nbytes
        before = resident_bytes()
        cache.assume(20_000)
        cache.assume(10_000)
        assert cache.length == 30_000
        assert resident_bytes() - before > 0.7 * n_bytes
        append(model, cache, [5])
        assert cache.length == 30_001
