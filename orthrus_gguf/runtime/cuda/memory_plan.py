"""Does it fit? Before anything is allocated, and what would fit if it does not.

Everything is made once on the meta device, by the functions that make it for real, and its bytes
are added up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from orthrus_kernels.recurrence.states import new_state
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.tensors import is_diffusion_tensor
from orthrus_gguf.runtime.cuda.buffers import new_buffers, pass_rows
from orthrus_gguf.runtime.cuda.cache import new_cache_planes
from orthrus_gguf.runtime.cuda.drafter_weights import (
    DrafterPlan,
    empty_drafter,
    new_drafter_buffers,
)
from orthrus_gguf.runtime.cuda.loader import assemble, empty_embedding
from orthrus_gguf.runtime.cuda.prompt_pass import new_prompt_buffers
from orthrus_gguf.runtime.cuda.state import state_shape
from orthrus_gguf.runtime.cuda.weight_plan import MatrixPlan, WeightPlan
from orthrus_gguf.runtime.cuda.weights import Weights

META = torch.device("meta")

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
    """Bytes on the device. weights: without heads; drafter: weights and buffers of one beside the
    model; cache_row: per token of context, a drafter's included; spare: what a cache takes beside
    its rows.

    work: buffers of passes, or what loading needs for a moment, whichever is more.
    """

    weights: int
    heads: int
    work: int
    graphs: int
    runtime: int
    cache_row: int
    spare: int
    context: int
    drafter: int = 0

    @property
    def cache(self) -> int:
        """Of the rows of the context."""
        return self.cache_row * self.context

    @property
    def fixed(self) -> int:
        """Everything but the cache's rows."""
        model = self.weights + self.heads + self.drafter
        return model + self.work + self.graphs + self.runtime + self.spare

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
    drafter: DrafterPlan | None = None,
) -> MemoryPlan:
    """What a model takes with a cache of `context` tokens. prompt_rows: of one prompt pass.
    drafter: beside it, with a cache of its own and graphs of its own."""
    weights = empty_weights(config, tensors, plan)
    heads = sum(matrix.nbytes for matrix in plan.matrices() if _is_heads(matrix))
    static = new_buffers(config, plan, META)
    buffers = allocated(static)
    buffers += allocated(new_prompt_buffers(config, weights, prompt_rows, META))
    loading = max(2 * matrix.raw_bytes for matrix in plan.matrices()) + PACKING_BYTES
    cache_row, spare = cache_sizes(
        config, type_k, type_v, None if drafter is None else drafter.config
    )
    beside = 0
    if drafter is not None:
        network = empty_drafter(drafter, weights, META)
        own = new_drafter_buffers(drafter, network, static, META)
        beside = allocated((weights, static, network, own)) - allocated((weights, static))
    return MemoryPlan(
        weights=allocated(weights) - heads,
        heads=heads,
        work=max(buffers, loading),
        graphs=GRAPH_BYTES if drafter is None else 2 * GRAPH_BYTES,
        runtime=RUNTIME_BYTES,
        cache_row=cache_row,
        spare=spare,
        context=context,
        drafter=beside,
    )


def empty_weights(
    config: ModelConfig, tensors: Mapping[str, TensorInfo], plan: WeightPlan
) -> Weights:
    """The weights of a model, without their numbers."""
    embedding = empty_embedding(plan.embedding, config.n_vocab, config.n_embd, META)
    packed = {matrix: matrix.empty(META) for matrix in plan.matrices()}
    vectors = {name: torch.empty(tensors[name].shape, device=META) for name in plan.vectors}
    return assemble(config, plan, packed, vectors, embedding)


def cache_sizes(
    config: ModelConfig, type_k: str, type_v: str, drafter: ModelConfig | None = None
) -> tuple[int, int]:
    """Bytes of a cache per token, and beside its rows, a hybrid's state among them; with what a
    drafter keeps beside it."""
    if drafter is not None:
        (row, spare), (more, apart) = (cache_sizes(c, type_k, type_v) for c in (config, drafter))
        return row + more, spare + apart
    rows = pass_rows(config)
    none, one = (
        allocated(new_cache_planes(config, type_k, type_v, columns, META))
        for columns in (rows, rows + 1)
    )
    state = 0
    if LayerKind.DELTA_NET in config.layer_kinds:
        state = allocated(new_state(state_shape(config), META))
    return one - none, none + state


def tensors_in(thing: Any) -> Iterator[Tensor]:
    """Every tensor of a dataclass, a sequence or a mapping, however deep."""
    if isinstance(thing, Tensor):
        yield thing
    elif dataclasses.is_dataclass(thing):
        for field in dataclasses.fields(thing):
            yield from tensors_in(getattr(thing, field.name))
    elif isinstance(thing, (list, tuple)):
        for item in thing:
            yield from tensors_in(item)
    elif isinstance(thing, Mapping):
        yield from tensors_in(list(thing.values()))


def allocated(thing: Any) -> int:
    """Bytes of the storages behind all tensors of a thing, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors_in(thing)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def check_memory(
    plan: MemoryPlan,
    free: int,
    config: ModelConfig,
    type_k: str,
    type_v: str,
    device: str,
    drafter: ModelConfig | None = None,
) -> None:
    """Raise OrthrusError with every part and what would fit, unless the plan fits into `free`."""
    if plan.total <= free:
        return
    beside = f" + drafter {_gib(plan.drafter)}" if plan.drafter else ""
    parts = (
        f"weights {_gib(plan.weights)} + heads {_gib(plan.heads)}{beside} + key/value cache of "
        f"{plan.context} tokens ({type_k}/{type_v}) {_gib(plan.cache + plan.spare)} + buffers "
        f"{_gib(plan.work + plan.graphs)} + runtime {_gib(plan.runtime)}"
    )
    raise OrthrusError(
        f"{device}: needs {_gib(plan.total)} GiB, {_gib(free)} GiB are free: {parts}; "
        + _advice(plan, free, config, type_k, type_v, drafter)
    )


def _advice(
    plan: MemoryPlan,
    free: int,
    config: ModelConfig,
    type_k: str,
    type_v: str,
    drafter: ModelConfig | None,
) -> str:
    choices = []
    largest = plan.largest_context(free)
    if largest:
        choices.append(f"-c {largest}")
    if "q8_0" not in (type_k, type_v) and type_k == type_v == "f16" and not config.head_dim % 32:
        row, spare = cache_sizes(config, "q8_0", "q8_0", drafter)
        quantized = max(0, (free - plan.fixed + plan.spare - spare) // row)
        if quantized >= plan.context:
            choices.append("-ctk q8_0 -ctv q8_0")
        elif quantized:
            choices.append(f"-ctk q8_0 -ctv q8_0 -c {quantized}")
    if not choices:
        return "use a smaller quantization of the model, or --runtime cpu"
    return f"what fits: {' or '.join(choices)}, or a smaller quantization of the model"


def _is_heads(matrix: MatrixPlan) -> bool:
    return any(is_diffusion_tensor(name) for name in matrix.names)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.2f}"
