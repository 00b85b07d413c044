"""Run the kernels' launch code with a driver that compiles for one card and launches nothing.

    python launch_without_gpu.py products|passes|needed|mtp|cached|early

The interpreter binds arguments in its own way, and the offline compiler takes signatures from the
cases: only this shows that what the wrappers pass is what the real launcher takes, and that it
compiles. `products` runs the products' functions on small matrices for sm_86; `passes` a pass of
every kind of a whole tiny model, for sm_90. Prints the names of the kernels that compiled. `needed`
compiles nothing: it prints, as JSON, what 8B and others launch on four cards, as the launcher
specialises it, and what passes launch that are not among the usual ones. `mtp` compiles what an MTP
block launches beside a hybrid, for sm_86, and prints the names. `cached` compiles a kernel ahead
and then launches it, and prints how many kernels triton's cache holds after each. Run as a process
of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from gguf import GGMLQuantizationType as T
from orthrus_kernels.elementwise.activation_rows import new_int8_rows
from orthrus_kernels.elementwise.activations import interleave
from orthrus_kernels.elementwise.ops import residual_norm
from orthrus_kernels.packing.pack import pack
from orthrus_kernels.packing.quant_tensor import Layout
from orthrus_kernels.products.dequantize import dequantize
from orthrus_kernels.products.dispatch import Tile
from orthrus_kernels.products.matmul import gate_up, head_top2, matmul
from orthrus_kernels.tools.launches import CompileOnly, cache_folder, recorded
from quant_rows import random_rows
from synthetic_model import model_shape, planned_tensors, write_model
from triton.runtime.jit import JITFunction

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import block_config, block_tensors
from orthrus_gguf.model.shapes import HYBRID_SHAPES, SHAPES
from orthrus_gguf.model.tensors import OUTPUT_NORM, is_diffusion_tensor
from orthrus_gguf.runtime.cuda.compile_ahead import (
    EmptyMachine,
    empty_model,
    needed_launches,
    one_layer_of_each,
    usual_passes,
)
from orthrus_gguf.runtime.cuda.kernels import TRITON
from orthrus_gguf.runtime.cuda.memory_plan import META
from orthrus_gguf.runtime.cuda.model import PROMPT_ROWS, CudaModel
from orthrus_gguf.runtime.protocol import Draw, ar_segment, diffusion_segment
from orthrus_gguf.sampling import Sampler, SamplingSettings

TILE = Tile(16, 64, 4, 3)
TREE = (-1, 0, 0, 1, 2, 2)
SHAPES_NEEDED = ("qwen3-8b", "qwen3-4b", "qwen3-1.7b", "llama-3.2-1b")
CARDS = (86, 89, 90, 120)


def products() -> None:
    """Every function of matmul.py and dequantize.py."""
    x = interleave(torch.zeros(5, 512).half())
    a16 = pack(random_rows(T.Q4_K, 128, 512), T.Q4_K, 512)
    second = pack(random_rows(T.Q6_K, 64, 512), T.Q6_K, 512)
    matmul(x, a16, TILE, 2, second=second)
    gate_up(x, a16, TILE)
    head_top2(x, second, TILE)
    dequantize(a16)
    rows = new_int8_rows(5, 288, "cpu")
    a8 = pack(random_rows(T.Q5_0, 128, 288), T.Q5_0, 288, Layout.A8)
    matmul(rows, a8, TILE, 2)
    gate_up(rows, a8, TILE, out=new_int8_rows(5, 64, "cpu"))
    head_top2(rows, a8, TILE)
    dequantize(a8)


def passes() -> None:
    """Drafts, verification with blocks, trees, several sequences, every way to draw, a prompt."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        config = model_shape(n_layers=1, n_embd=64, n_ff=64, n_head=2, n_head_kv=1, n_vocab=160)
        write_model(load_library().api, path, config, lambda name: T.Q8_0)
        with (
            ModelFile.open(path) as file,
            CudaModel.load(
                file, device="cpu", kernels=TRITON, capability=90, cache_type_k="q8_0"
            ) as model,
        ):
            _run_passes(model)


def _run_passes(model: CudaModel) -> None:
    greedy, sampled = Sampler(SamplingSettings(temperature=0)), Sampler(SamplingSettings())
    open_ = Sampler(SamplingSettings(top_k=0, repeat_penalty=1.1, banned=(3,)))
    a, b = model.new_cache(128), model.new_cache(128)
    history = list(range(20))

    def chain(draw: Draw) -> Any:
        return ar_segment(a, range(3), a.length, draw=draw)

    model.forward([chain(Draw(greedy, history))])
    a.commit(range(3))
    tree = ar_segment(b, range(6), 0, parents=TREE, draw=Draw(sampled, history, detail=True))
    block = diffusion_segment(a, 1, 63, 4, 3, draw=Draw(greedy, history, detail=True))
    model.forward([chain(Draw(open_, history, top=3)), tree, block])
    b.commit([0, 2, 4])
    mask = torch.full((3, 5), -1, dtype=torch.int32).numpy().view("u4")
    model.forward([chain(Draw(greedy, history, allowed=mask)), ar_segment(b, [1], 3,
                   draw=Draw(greedy, history))])  # fmt: skip
    prompt = ar_segment(model.new_cache(70), [1] * 70, 0, wanted=range(69, 70),
                        draw=Draw(greedy, [1]))  # fmt: skip
    model.forward([prompt])


def needed() -> None:
    """What models need; and what other row counts, widths and draws need beyond that."""
    found = []
    for name in SHAPES_NEEDED:
        config = SHAPES[name]
        tensors = planned_tensors(config, "q4_k_m")
        for card in CARDS:
            launches = needed_launches(config, tensors, card)
            found += [
                {"model": name, "card": card, "kernel": launch.name, "arguments": launch.arguments}
                for launch in launches
            ]
    config, tensors = one_layer_of_each(config, tensors)
    machine = EmptyMachine(META, "no card", CARDS[-1], TRITON, {}, None, False)
    with recorded(CARDS[-1]) as others:
        model = empty_model(config, tensors, machine)
        for segments in usual_passes(model, PROMPT_ROWS):
            model.forward(segments)
        usual = len(others)
        cache = model.new_cache(2000)
        cache.assume(1234)
        for draw in (Sampler(SamplingSettings(temperature=0)), Sampler(SamplingSettings(seed=5))):
            some = Draw(draw, [0] * 1235)
            for count in (1, 3, 5, 13, 31, 47, 64):
                model.forward([ar_segment(cache, [1] * count, 1234, draw=some)])
                block = diffusion_segment(
                    cache, 0, config.mask_token or 0, min(count, 31), 1234,
                    draw=Draw(draw, [0] * 1235, detail=True),
                )  # fmt: skip
                model.forward([block])
                model.forward([ar_segment(cache, [1] * min(count, 33), 1234, draw=some), block])
    beyond = [{"kernel": launch.name, "arguments": launch.arguments} for launch in others[usual:]]
    print(json.dumps({"needed": found, "beyond": beyond}))


def mtp() -> None:
    """With a head of fewer ids, and what the model itself needs left out."""
    config = HYBRID_SHAPES["qwen3.5-0.8b-mtp"]
    planned = planned_tensors(config, "q4_k_m")
    own = {OUTPUT_NORM: planned[OUTPUT_NORM], **block_tensors(planned, config.n_layers)}
    tensors = {
        name: info
        for name, info in planned.items()
        if not is_diffusion_tensor(name) and not name.startswith(f"blk.{config.n_layers}.")
    }
    block = block_config(config), own
    alone, both = (
        needed_launches(config, tensors, CARDS[0], drafter=beside, ids=32_768)
        for beside in (None, block)
    )
    for launch in both[len(alone) :]:
        launch.compile()
        print(launch.name)


def cached() -> None:
    """Compiled ahead: the launch finds it in triton's cache."""

    def held() -> int:
        return len(list(cache_folder().rglob("*.cubin")))

    weight = pack(random_rows(T.Q8_0, 64, 256), T.Q8_0, 256)
    with recorded(86) as launches:
        dequantize(weight)
    (launch,) = launches
    launch.compile()
    counts = [held()]
    watch_launches(86)
    dequantize(weight)
    print(*counts, held())


def early() -> None:
    """A kernel that may start before its predecessor has ended: how it is launched, and what of its
    PTX comes in which order."""
    with recorded(90) as launches:
        x = torch.zeros(2, 256)
        residual_norm(None, x, x[0], 1e-6, interleave(x.half()))
    (launch,) = launches
    ptx = launch.compile().asm["ptx"]
    words = ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "ld.global", "st.global")
    found = sorted((ptx.index(word), word) for word in words if word in ptx)
    print(launch.options["launch_pdl"], *(word for _, word in found))


RUNS: dict[str, tuple[int, Callable[[], None]]] = {
    "products": (86, products),
    "passes": (90, passes),
}


def watch_launches(capability: int) -> None:
    """From now on launches compile, for this card, and go no further; their names are printed."""
    triton.runtime.driver.set_active(CompileOnly(capability))
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        print(self.__name__)
        return kernel

    JITFunction.run = compile_only


def main() -> None:
    others = {"needed": needed, "mtp": mtp, "cached": cached, "early": early}
    if sys.argv[1] in others:
        others[sys.argv[1]]()
        return
    capability, run = RUNS[sys.argv[1]]
    watch_launches(capability)
    run()


if __name__ == "__main__":
    main()
