"""The torch side of a pass, without a device: no step waits for one, and launches are counted.

The real wrappers of the kernels run on tensors without numbers, with a launcher that launches
nothing. What torch is asked for in a pass is seen operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
from cuda_models import small_heads
from gguf import GGMLQuantizationType as T
from mtp_models import mtp_model, opened_mtp
from numpy.typing import NDArray
from orthrus_hybrid import heads_model
from synthetic_model import model_shape, write_drafter, write_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.gguf.parts import open_gguf
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.buffers import new_buffers
from orthrus_gguf.runtime.cuda.compile_ahead import empty_block, empty_model, empty_network
from orthrus_gguf.runtime.cuda.device import Machine
from orthrus_gguf.runtime.cuda.graphs import Graphs
from orthrus_gguf.runtime.cuda.kernels import TRITON
from orthrus_gguf.runtime.cuda.memory_plan import META, empty_weights, plan_memory
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.runner import PassRunner
from orthrus_gguf.runtime.cuda.weight_plan import plan_weights
from orthrus_gguf.runtime.mtp import MtpNetwork
from orthrus_gguf.runtime.protocol import (
    Cache,
    Choices,
    Draw,
    Segment,
    ar_segment,
    diffusion_segment,
)
from orthrus_gguf.sampling import Sampler, SamplingSettings

MASK = 319
LAYERS = 6
GREEDY = Sampler(SamplingSettings(temperature=0))
TREE = (-1, 0, 0, 1, 2, 2)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What torch is asked for: operations that wait for a device are refused, and copies between
    host and device noted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.uploads = 0
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert "_local_scalar_dense" not in name, "the host would wait for a number"
        assert "nonzero" not in name, "the host would wait for a size"
        kwargs = kwargs or {}
        if name == "aten._to_copy.default":
            device = kwargs.get("device")
            assert device is None or device == args[0].device, "a copy that the host waits for"
        if name == "aten.copy_.default" and args[0].device != args[1].device:
            assert args[0].device.type == "meta", "a copy to the host"
            assert kwargs.get("non_blocking") or (len(args) > 2 and args[2]), "the host would wait"
            self.uploads += 1
        elif any(isinstance(a, Tensor) and a.device.type == "meta" for a in args):
            self.kernels += not func.is_view
        return func(*args, **kwargs)


class Device:
    """A machine without memory: counts downloads and kernel launches."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads = 0
        self.launches: list[str] = []

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            for value in (*args, *options.values()):
                if isinstance(value, Tensor):
                    assert value.device.type == "meta", f"{kernel.fn.__name__}: a host tensor"
            self.launches.append(kernel.fn.__name__)

        def download(machine: Machine, found: Tensor, buffer: Tensor) -> NDArray[Any]:
            assert found.is_contiguous()
            assert found.device.type == "meta"
            assert found.numel() * found.element_size() == buffer.numel() * buffer.element_size()
            self.downloads += 1
            return buffer.zero_().numpy()

        monkeypatch.setattr(JITFunction, "run", launch)
        monkeypatch.setattr(InterpretedFunction, "run", launch)
        monkeypatch.setattr(Machine, "download", download)
        self.machine = Machine(META, "nothing", 80, TRITON, {}, None, False)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launches") / "model.gguf"
    config = model_shape(n_layers=LAYERS)
    write_model(load_library().api, path, config, lambda name: T.Q8_0)
    return path


@pytest.fixture
def model(path: Path, device: Device) -> CudaModel:
    """Weights and buffers of the right shapes, without numbers."""
    with ModelFile.open(path) as file:
        config = file.config
        plan = plan_weights(config, file.tensors, 80)
        weights = empty_weights(config, file.tensors, plan)
        memory = plan_memory(config, file.tensors, plan, 1, "q8_0", "f16", 512)
    runner = PassRunner(
        config,
        device.machine,
        weights,
        new_buffers(config, plan, META),
        torch.empty(config.head_dim // 2, dtype=torch.float64, device=META),
        1.0,
        torch.empty(256, dtype=torch.uint8, device=META),
        ("q8_0", "f16"),
    )
    return CudaModel(runner, 512, memory, None, plan)


def passes(model: CudaModel) -> dict[str, list[Segment]]:
    """A pass of every kind."""
    a, b = model.new_cache(64), model.new_cache(100)
    for cache in (a, b):
        cache.assume(20)
    sampled = Sampler(SamplingSettings(seed=1, top_k=0))
    history = list(range(21))
    plain, block = Draw(GREEDY, history), Draw(GREEDY, history, detail=True)

    def chain(rows: int, draw: Draw, **more: Any) -> Segment:
        return ar_segment(a, range(20, 20 + rows), 20, draw=draw, **more)

    def draft(**more: Any) -> Segment:
        return diffusion_segment(a, 20, MASK, 16, 20, draw=block, **more)

    penalties = Sampler(SamplingSettings(repeat_penalty=1.1, banned=(3, 4)))
    allowed = np.full((2, 10), 77, np.uint32)
    return {
        "one AR row": [chain(1, plain)],
        "AR rows": [chain(16, plain)],
        "a draft": [draft()],
        "verification and blocks": [chain(7, plain), draft(), draft()],
        "a tree": [ar_segment(b, range(6), 20, parents=TREE, draw=plain)],
        "several sequences": [
            chain(3, plain),
            ar_segment(b, range(6), 20, parents=TREE, draw=Draw(sampled, history)),
            draft(),
        ],
        "penalties and log-probabilities": [chain(2, Draw(penalties, history, top=3))],
        "a mask": [chain(2, Draw(GREEDY, history, allowed=allowed))],
        "taps": [chain(2, plain, taps=(0, 3, LAYERS, LAYERS + 1))],
        "no choices": [chain(5, plain, wanted=range(0))],
        "a prompt": [ar_segment(model.new_cache(99), range(99), 0, wanted=range(98, 99),
                                draw=Draw(GREEDY, [0]))],
    }  # fmt: skip


NAMES = (
    "one AR row",
    "AR rows",
    "a draft",
    "verification and blocks",
    "a tree",
    "several sequences",
    "penalties and log-probabilities",
    "a mask",
    "taps",
    "no choices",
    "a prompt",
)


@contextmanager
def watched(device: Device) -> Iterator[Watch]:
    device.downloads, device.launches = 0, []
    with Watch() as watch:
        yield watch


@pytest.mark.parametrize("name", NAMES)
def test_no_step_of_a_pass_waits(model: CudaModel, device: Device, name: str) -> None:
    """One upload, one download of the choices (none where nothing is asked), and no other copy
    between host and device, number on the host or size that depends on numbers."""
    segments = passes(model)[name]
    for _ in range(2):
        with watched(device) as watch:
            found: list[Choices] = model.forward(segments)
        assert watch.uploads == 1
        assert device.downloads == (name != "no choices")
        assert len(found) == len(segments)
        assert len(device.launches) > 8 * LAYERS


def test_logits_come_in_one_copy(model: CudaModel, device: Device) -> None:
    for name, segments in passes(model).items():
        if name == "no choices":
            continue
        with watched(device) as watch:
            model.logits(segments)
        assert (watch.uploads, device.downloads) == (1, 1)


def test_a_captured_pass_is_one_launch(model: CudaModel, device: Device) -> None:
    """With graphs, a pass is an upload, a replay and a download: torch and Triton are asked for
    nothing else."""
    replays = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return lambda: replays.append(step)

    model.graphs = Graphs(capture)
    for name, segments in passes(model).items():
        if name == "a prompt":
            continue
        for _ in range(2):
            model.forward(segments)
        replays.clear()
        with watched(device) as watch:
            model.forward(segments)
        assert len(replays) == 1, name
        assert device.launches == [], name
        assert (watch.uploads, watch.kernels) == (1, 0), name


def test_committed_trees_are_moved_by_the_next_pass(model: CudaModel, device: Device) -> None:
    tree = passes(model)["a tree"]
    model.forward(tree)
    with watched(device) as watch:
        cast(Cache, tree[0].cache).commit([0, 2, 4])
    assert not device.launches
    assert watch.uploads == watch.kernels == 0, "commit asks the device for nothing"
    model.forward([ar_segment(tree[0].cache, [1], 23, draw=Draw(GREEDY, range(24)))])
    assert device.launches.count("_move") == 2
    device.launches = []
    cache = tree[0].cache
    model.forward([ar_segment(cache, [1], 23, draw=Draw(GREEDY, range(24)))])
    assert "_move" not in device.launches


def test_how_many_launches_a_pass_takes(model: CudaModel, device: Device) -> None:
    """Nine a layer and a few around them; a second view adds its products, and nothing else does:
    not trees, not sequences."""
    counts = {}
    for name, segments in passes(model).items():
        if name == "a prompt":
            continue
        with watched(device) as watch:
            model.forward(segments)
        counts[name] = len(device.launches)
        if name not in ("taps", "several sequences", "penalties and log-probabilities"):
            assert watch.kernels == 0, f"{name}: torch works, too"
        views = {segment.view for segment in segments}
        per_layer = 11 if len(views) == 2 else 9
        # Angles and embedding; final norm, head, the best of its tiles.
        around = 2 if name == "no choices" else 5
        if name not in ("several sequences", "penalties and log-probabilities", "a mask"):
            assert counts[name] == per_layer * LAYERS + around, name
    assert counts["a mask"] == 9 * LAYERS + 7
    # Penalties, bans; log sums, the likeliest of each tile and of all, the report.
    assert counts["penalties and log-probabilities"] <= 9 * LAYERS + 14
    assert counts["several sequences"] <= 11 * LAYERS + 9


def test_how_many_launches_a_prompt_takes(model: CudaModel, device: Device) -> None:
    """Ten a layer (two norms, four matrices to fp16, silu, and three around attention, whose window
    is eight times that of other passes), and the library's products."""
    for rows in (99, 512):
        cache = model.new_cache(600)
        wanted = range(rows - 1, rows)
        with watched(device) as watch:
            model.forward(
                [ar_segment(cache, [1] * rows, 0, wanted=wanted, draw=Draw(GREEDY, [0] * rows))]
            )
        assert len(device.launches) == 10 * LAYERS + 5
        assert watch.kernels == 4 * LAYERS, "the library's products, and nothing else"


def test_passes_of_a_hybrid(device: Device) -> None:
    """Both views of a hybrid: one upload and one download as well, and nothing in between. A view
    adds its products, and in DeltaNet layers the recurrence of what may need the other's records.
    """
    with small_heads(), ModelFile.open(heads_model()) as file:
        model = empty_model(file.config, file.tensors, device.machine)
        cache = model.new_cache(64)
    cache.assume(20)
    nets, draw = model.config.layer_kinds.count(LayerKind.DELTA_NET), Draw(GREEDY, list(range(25)))
    rows = ar_segment(cache, range(4), 20, draw=draw)
    blocks = [diffusion_segment(cache, 7, 261, 8, start, draw=draw) for start in (20, 22)]
    counts = {}
    for name, segments in (("rows", [rows]), ("block", blocks[:1]), ("both", [rows, *blocks])):
        with watched(device) as watch:
            model.forward(segments)
        assert (watch.uploads, device.downloads, watch.kernels) == (1, 1, 0)
        assert device.launches.count("_recur") == nets * (1 + (name == "both"))
        counts[name] = len(device.launches)
    assert counts["rows"] == counts["block"]
    assert counts["both"] == counts["rows"] + 2 * model.config.n_layers + nets


def test_passes_of_a_drafters_network(model: CudaModel, device: Device, tmp_path: Path) -> None:
    """What it learns of rows costs two uploads and no download: three launches a layer less than
    a model's, without attention and MLP; a block costs what one of the model's own does. Again,
    each is one launch."""
    config = model_shape(n_layers=2)
    drafter, replays = tmp_path / "drafter.gguf", []
    write_drafter(load_library().api, drafter, config, lambda name: T.Q8_0, (1, 3, LAYERS))
    with open_gguf(drafter) as file:
        network = empty_network(config, file.tensors, model)
    cache, taps = network.new_cache(64), np.ones((3, 16, config.n_embd), np.float32)

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return lambda: replays.append(step)

    network.graphs = Graphs(capture)
    for turn in range(3):
        with watched(device) as watch:
            network.inject(cache, [0] * taps.shape[1], taps)
        assert (watch.uploads, device.downloads) == (2, 0)
        # Angles, taps to rows, features, their norm; k and v, and what finishes them.
        assert len(device.launches) == (4 + 2 * config.n_layers if turn < 2 else 0)
        draw = Draw(GREEDY, [0] * 100, detail=True)
        block = diffusion_segment(cache, 20, MASK, 16, cache.length, draw=draw)
        with watched(device) as watch:
            network.forward([block])
        assert (watch.uploads, device.downloads) == (1, 1)
        assert len(device.launches) == (9 * config.n_layers + 5 if turn < 2 else 0)
    assert len(replays) == 4  # both kinds, at their second turn and their third


def test_chains_of_an_mtp_block(device: Device) -> None:
    """What it learns of rows costs two uploads and no download; a chain of any length two and one.
    Again, each is one launch."""
    replays = []

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        step()
        return lambda: replays.append(step)

    with small_heads(), opened_mtp(mtp_model()) as (file, beside):
        model = empty_model(file.config, file.tensors, device.machine)
        block = empty_block(beside.config, beside.tensors, model, None)
        network = MtpNetwork(block, beside.beside, beside.taps)
        caches = [network.new_cache(64) for _ in range(3)]
    block.graphs = Graphs(capture)
    hidden = np.ones((1, 16, block.config.n_embd), np.float32)
    draw = Draw(GREEDY, [0] * 100, detail=True)
    for turn in range(3):
        with watched(device) as watch:
            network.inject(caches[turn], [1] * hidden.shape[1], hidden)
        assert (watch.uploads, device.downloads) == (2, 0)
        # Angles, embedding, both halves to rows, their product; a norm, k and v, their finish.
        assert len(device.launches) == (7 if turn < 2 else 0)
        segments = [
            diffusion_segment(cache, 20, 0, length, cache.length, draw=draw)
            for cache, length in zip(caches, (3, 1, 2), strict=True)
        ]
        with watched(device) as watch:
            network.forward(segments)
        assert (watch.uploads, device.downloads) == (2, 1)
        assert len(device.launches) == (3 * 16 if turn < 2 else 0)
        assert turn < 2 or watch.kernels == 0
    assert len(replays) == 4  # both kinds, at their second turn and their third
