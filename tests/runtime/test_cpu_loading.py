"""Weights of the native runtime come in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from cpu_models import append, kernels, loaded
from orthrus_cpu_kernels.library import steps_array

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cpu import weights
from orthrus_gguf.runtime.cpu.model import CpuModel
from orthrus_gguf.runtime.cpu.pool import Pool
from orthrus_gguf.runtime.protocol import Loading

DemoFile = Callable[..., Path]


class Gate:
    """Holds back what runs in the background behind its first part."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.done = threading.Event(), list[int]()
        release = weights._release

        def held(*args: object) -> None:
            self.done.append(len(self.done))
            assert self.open.wait(60)
            release(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(weights, "_release", held)
        monkeypatch.setattr(weights, "PART", 1)  # a part for every matrix


def test_a_pass_waits_for_weights(demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch) -> None:
    path = demo_file("f16")
    with loaded(path) as model:
        expected = append(model, model.new_cache(64), [1, 2, 3])
    gate = Gate(monkeypatch)
    found = []
    with ModelFile.open(path) as file:
        matrices = sum(len(info.shape) > 1 for info in file.tensors.values())
        model = CpuModel.load(file, kernels(), threads=2)
    with model:
        assert isinstance(model, Loading)
        cache = model.new_cache(64)
        thread = threading.Thread(target=lambda: found.append(append(model, cache, [1, 2, 3])))
        thread.start()
        thread.join(0.2)
        assert not found
        gate.open.set()
        thread.join(60)
        assert (found[0] == expected).all()
        assert len(gate.done) == matrices


def test_closing_a_model_ends_its_loading(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with ModelFile.open(demo_file("f16")) as file:
        model = CpuModel.load(file, kernels(), threads=2)
    threading.Timer(0.1, gate.open.set).start()
    model.close()
    assert len(gate.done) == 1
    assert not any(thread.name == "repack" for thread in threading.enumerate())


def test_other_threads_wait_for_the_background() -> None:
    pool, order = Pool(kernels(), 1), list[str]()
    gate = threading.Event()

    def first() -> None:
        assert gate.wait(60)
        order.append("background")

    nothing = steps_array([])
    pool.run_in_background([(nothing, first)])
    threading.Timer(0.1, gate.set).start()
    pool.start(2)
    order.append("threads")
    pool.run(nothing)
    assert order == ["background", "threads"]
    pool.close()


def test_what_fails_in_the_background_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(kernels(), 1)

    def fails() -> None:
        raise OSError("no such memory")

    pool.run_in_background([(steps_array([]), fails)])
    with pytest.raises(OSError, match="no such memory"):
        pool.wait()
    pool.close()
