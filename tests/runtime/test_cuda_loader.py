"""Loading: right bytes, bounded host memory, progress, and a clean end when something fails."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from cuda_models import stand_in
from gguf.quants import dequantize
from orthrus_kernels.products.plain import dequantize as unpacked

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.loader import load_weights, reading_order
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.staging import StagedReader
from orthrus_gguf.runtime.cuda.weight_plan import Join, plan_weights
from orthrus_gguf.runtime.protocol import View

DemoFile = Callable[..., Path]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("slots", "slot_bytes"), [(1, 1000), (2, 4096), (4, 32 << 20)])
def test_every_byte_arrives(demo_file: DemoFile, slots: int, slot_bytes: int) -> None:
    """Whatever the slots, and never more in flight than they hold."""
    with ModelFile.open(demo_file("q8_0")) as file:
        names = list(file.tensors)
        reader = StagedReader(file, names, CPU, slots=slots, slot_bytes=slot_bytes)
        for name, raw in reader:
            assert np.array_equal(raw.numpy(), file.data(name))
        largest = max(info.n_bytes for info in file.tensors.values())
        assert 0 < reader.peak_bytes <= slots * min(slot_bytes, largest)
    assert not any(thread.name == "orthrus-reader" for thread in threading.enumerate())


def test_memory_is_bounded_while_packing(demo_file: DemoFile) -> None:
    """The file is 5.4 MB; loading it holds 300 kB of it on the host at most."""
    with ModelFile.open(demo_file("q8_0")) as file:
        plan = plan_weights(file.config, file.tensors, 80)
        names = reading_order(plan)
        reader = StagedReader(file, names, CPU, slots=3, slot_bytes=100_000)
        weights = load_weights(file, plan, CPU, reader=reader)
        assert reader.peak_bytes <= 300_000
        assert len(names) == len(set(names))
        raw = file.data("blk.2.attn_v_diff.weight").reshape(128, -1)
        (qkv,) = weights.layers[2].qkv[View.DIFFUSION].matrices
        expected = dequantize(raw, file.tensors["blk.2.attn_v_diff.weight"].type)
        np.testing.assert_array_equal(unpacked(qkv)[256 + 128 :].numpy(), expected)
        assert plan.layers[0].gate_up.matrices[0].join is Join.PAIRS


def test_progress(demo_file: DemoFile) -> None:
    calls: list[tuple[int, int]] = []
    path = demo_file("f16")
    with ModelFile.open(path) as file:
        matrices = sum(i.n_bytes for i in file.tensors.values() if len(i.shape) == 2)
    with stand_in(path, on_progress=lambda done, total: calls.append((done, total))):
        pass
    assert calls[-1] == (matrices, matrices)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_an_interrupted_load_ends_its_thread(demo_file: DemoFile) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with ModelFile.open(demo_file("f16")) as file, pytest.raises(KeyboardInterrupt):
        CudaModel.load(file, device="cpu", on_progress=interrupt)
    assert not any(thread.name == "orthrus-reader" for thread in threading.enumerate())


def test_an_error_of_the_reader_is_raised(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ModelFile.open(demo_file("f16")) as file:
        data = file.data

        def failing(name: str) -> object:
            if name.startswith("blk.3"):
                raise OrthrusError("the file has vanished")
            return data(name)

        monkeypatch.setattr(file, "data", failing)
        with pytest.raises(OrthrusError, match="the file has vanished"):
            CudaModel.load(file, device="cpu")
    assert not any(thread.name == "orthrus-reader" for thread in threading.enumerate())


def test_split_files(demo_file: DemoFile) -> None:
    base = demo_file("f16", split=True)
    heads = base.with_name(base.stem + "-heads.gguf")
    with ModelFile.open(base, heads) as file, CudaModel.load(file, device="cpu") as model:
        assert model.config.has_heads
    with ModelFile.open(base) as file, CudaModel.load(file, device="cpu") as model:
        assert model.memory.heads == 0
