"""Does it fit? Arithmetic before anything is allocated, and what would fit if it does not.

Every part is computed from shapes and types alone. Tests compare the parts with what is really
allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orthrus_kernels.attention.attention import LANES
from orthrus_kernels.attention.kv_cache import QBLOCK, halves
from orthrus_kernels.packing.quant_tensor import STEP, Layout, row_bytes
from orthrus_kernels.sampling.sample import EXTRACT_TILE, MAX_TOP_K, SORTED_TILE

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.tensors import is_diffusion_tensor
from orthrus_gguf.runtime.cuda.buffers import normed_layouts, pass_rows
from orthrus_gguf.runtime.cuda.weight_plan import MatrixPlan, WeightPlan
from orthrus_gguf.runtime.protocol import View

GIB = 2**30

#: What torch, cuBLAS and the compiled kernels take beside what is allocated here. An allowance, not
#: yet a measurement.
RUNTIME_BYTES = 512 << 20

#: Graphs of one session: nodes and temporaries. An allowance, not yet a measurement.
GRAPH_BYTES = 128 << 20

#: Temporaries of `packing.pack`, which works on 2^25 weights at a time. An allowance.
PACKING_BYTES = 8 << 25


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on the device. weights: without heads; cache_row: per token of context.

    work: buffers of passes, or what loading needs for a moment, whichever is more.
    """

    weights: int
    heads: int
    work: int
    graphs: int
    runtime: int
    cache_row: int
    context: int

    @property
    def cache(self) -> int:
        return self.cache_row * self.context

    @property
    def fixed(self) -> int:
        """Everything but the cache."""
        return self.weights + self.heads + self.work + self.graphs + self.runtime

    @property
    def total(self) -> int:
        return self.fixed + self.cache

    def largest_context(self, free: int) -> int:
        """The longest context that fits into `free` bytes; 0 if none does."""
        return max(0, (free - self.fixed) // self.cache_row)


def plan_memory(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    plan: WeightPlan,
    context: int,
    type_k: str,
    type_v: str,
    prompt_rows: int,
) -> MemoryPlan:
    """What a model takes with a cache of `context` tokens. prompt_rows: of one prompt pass."""
    heads = sum(matrix.nbytes for matrix in plan.matrices() if _is_heads(matrix))
    packed = sum(matrix.nbytes for matrix in plan.matrices())
    embedding = config.n_vocab * row_bytes(plan.embedding, config.n_embd)
    norms = vector_bytes(config)
    buffers = buffer_bytes(config, plan) + prompt_bytes(config, plan, prompt_rows)
    loading = max(2 * matrix.raw_bytes for matrix in plan.matrices()) + PACKING_BYTES
    return MemoryPlan(
        weights=packed - heads + embedding + norms,
        heads=heads,
        work=max(buffers, loading),
        graphs=GRAPH_BYTES,
        runtime=RUNTIME_BYTES,
        cache_row=cache_row_bytes(config, type_k, type_v),
        context=context,
    )


def check_memory(
    plan: MemoryPlan, free: int, config: ModelConfig, type_k: str, type_v: str, device: str
) -> None:
    """Raise OrthrusError with every part and what would fit, unless the plan fits into `free`."""
    if plan.total <= free:
        return
    parts = (
        f"weights {_gib(plan.weights)} + heads {_gib(plan.heads)} + key/value cache of "
        f"{plan.context} tokens ({type_k}/{type_v}) {_gib(plan.cache)} + buffers "
        f"{_gib(plan.work + plan.graphs)} + runtime {_gib(plan.runtime)}"
    )
    raise OrthrusError(
        f"{device}: needs {_gib(plan.total)} GiB, {_gib(free)} GiB are free: {parts}; "
        + _advice(plan, free, config, type_k, type_v)
    )


def _advice(plan: MemoryPlan, free: int, config: ModelConfig, type_k: str, type_v: str) -> str:
    choices = []
    largest = plan.largest_context(free)
    if largest:
        choices.append(f"-c {largest}")
    if "q8_0" not in (type_k, type_v) and type_k == type_v == "f16" and not config.head_dim % 32:
        row = cache_row_bytes(config, "q8_0", "q8_0")
        quantized = max(0, (free - plan.fixed) // row)
        if quantized >= plan.context:
            choices.append("-ctk q8_0 -ctv q8_0")
        elif quantized:
            choices.append(f"-ctk q8_0 -ctv q8_0 -c {quantized}")
    if not choices:
        return "use a smaller quantization of the model, or --runtime cpu"
    return f"what fits: {' or '.join(choices)}, or a smaller quantization of the model"


def cache_row_bytes(config: ModelConfig, type_k: str, type_v: str) -> int:
    """Bytes of one token's keys and values in all layers (`kv_cache.new_planes`)."""
    row = {
        "f16": 2 * config.head_dim,
        "q8_0": config.head_dim + 2 * (config.head_dim // QBLOCK),
        "q4_0": halves(config.head_dim)[0] + 2 * (config.head_dim // QBLOCK),
    }
    return config.n_layers * config.n_head_kv * (row[type_k] + row[type_v])


def cache_bytes(config: ModelConfig, type_k: str, type_v: str, capacity: int, spare: int) -> int:
    """Bytes of a `CudaCache`: rows, one-element placeholders for scales, and the token history."""
    placeholders = 2 * config.n_layers * [type_k, type_v].count("f16")
    rows = capacity * cache_row_bytes(config, type_k, type_v)
    return rows + placeholders + 4 * (capacity + spare)


def vector_bytes(config: ModelConfig) -> int:
    """Bytes of all norms, f32. Both views' attention norms have a place even without heads."""
    layer = 2 * config.n_embd + 4 * config.head_dim
    return 4 * (config.n_layers * layer + config.n_embd)


def buffer_bytes(config: ModelConfig, plan: WeightPlan) -> int:
    """Bytes of `buffers.new_buffers`."""
    c, first, rows = config, plan.layers[0], pass_rows(config)
    heads, kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    row = 6 * 4 + 4 * c.head_dim  # tokens, positions and so on; angles
    row += 4 * c.n_embd + 2 * heads + 4 * kv
    row += sum(_activation_bytes(layout, c.n_embd) for layout in normed_layouts(plan))
    row += sum(
        _activation_bytes(layout, heads)
        for layout in {layer.output[View.AR].layout for layer in plan.layers}
    )
    row += sum(
        _activation_bytes(layout, c.n_ff) for layout in {layer.down.layout for layer in plan.layers}
    )
    row += _activation_bytes(plan.head.layout, c.n_embd)
    row += 4 * first.qkv[View.AR].split * (heads + 2 * kv)
    row += 4 * (first.output[View.AR].split + first.down.split) * c.n_embd
    separate = [layer.gate_up for layer in plan.layers if len(layer.gate_up.matrices) > 1]
    row += 2 * 4 * separate[0].split * c.n_ff if separate else 0
    row += 4 * c.n_vocab + 4  # logits, tokens
    row += _sampling_bytes(c.n_vocab)
    packed = -(-rows * (c.n_head // c.n_head_kv) // 64) * 64
    attention = 4 * (LANES + 1) * c.n_head_kv * packed * (c.head_dim + 2)
    placeholders, codebook = 4, 64
    return rows * row + attention + placeholders + codebook


def prompt_bytes(config: ModelConfig, plan: WeightPlan, rows: int) -> int:
    """Bytes that a prompt pass of `rows` rows allocates at its worst moment, at most."""
    c = config
    matrices = [m for layer in plan.layers for p in (layer.gate_up, layer.down) for m in p.matrices]
    matrices += [m for layer in plan.layers for p in layer.qkv.values() for m in p.matrices]
    dense = 2 * max(m.rows * -(-m.k // STEP) * STEP for m in matrices)
    heads, kv = c.n_head * c.head_dim, c.n_head_kv * c.head_dim
    wide = max(2 * c.n_ff, heads + 2 * kv)
    # Residual and rows of activations; a product in fp16 and f32, then its halves or its parts.
    row = 4 * c.n_embd + 2 * (c.n_embd + 2 * heads + c.n_ff + 3 * STEP) + 4 * c.head_dim + 24
    return dense + rows * (row + (2 + 4 + 4) * wide + 4 * c.n_embd + 2 * c.n_ff)


def _activation_bytes(layout: Layout, columns: int) -> int:
    if layout is Layout.A8:
        return columns + 8 * (columns // QBLOCK)
    return 2 * -(-columns // STEP) * STEP


def _sampling_bytes(n_vocab: int) -> int:
    extract, tiles = -(-n_vocab // EXTRACT_TILE), -(-n_vocab // SORTED_TILE)
    return 8 * MAX_TOP_K * (extract + 1) + 20 * tiles


def _is_heads(matrix: MatrixPlan) -> bool:
    return any(is_diffusion_tensor(name) for name in matrix.names)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f}"
