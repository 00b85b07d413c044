"""How much context fits on a card beside a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from orthrus_kernels.attention.kv_cache import QBLOCK

from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.runtime.cuda.cache import check_cache_types, check_head_size
from orthrus_gguf.runtime.cuda.device import Machine, find_machine
from orthrus_gguf.runtime.cuda.drafter_weights import plan_beside, plan_drafter
from orthrus_gguf.runtime.cuda.memory_plan import GIB, cache_sizes, plan_memory
from orthrus_gguf.runtime.cuda.model import PROMPT_ROWS
from orthrus_gguf.runtime.cuda.weight_plan import plan_weights

#: Sizes of cards that a table tells about, GiB.
CARDS = (8, 12, 16, 24)

#: What CUDA and a desktop take of a card before anything is loaded. An allowance.
TAKEN_BYTES = 768 << 20

#: Cache types of keys and values that a table tells about.
CACHES = (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))

#: A context that is shortened is a multiple of the first, and at least the second: with less, an
#: error that lists what takes the memory is of more use.
STEP, LEAST = 256, 4096

#: Cards of the table: GeForce RTX 40.
_CAPABILITY = 89


@dataclass(frozen=True)
class ContextFit:
    """One type of cache. row: its bytes per token. contexts: tokens that fit, by card of `cards`
    (GiB); 0 where the model alone does not. needs: bytes on a card for `target` tokens."""

    cache_types: tuple[str, str]
    row: int
    contexts: tuple[int, ...]
    target: int
    needs: int


def context_table(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    target: int,
    cards: Sequence[int] = CARDS,
    beside: tuple[ModelConfig, Mapping[str, TensorInfo]] | None = None,
) -> list[ContextFit]:
    """For each of CACHES that the model can have: what fits on cards of so many GiB. beside: a
    drafter's network. Raises OrthrusError for heads without kernels."""
    configs = [config] if beside is None else [config, beside[0]]
    for each in configs:
        check_head_size(each)
    plan = plan_weights(config, tensors, _CAPABILITY)
    drafter = None if beside is None else plan_drafter(*beside, plan, _CAPABILITY)
    table = []
    for types in CACHES:
        if types != ("f16", "f16") and any(each.head_dim % QBLOCK for each in configs):
            continue
        memory = plan_memory(config, tensors, plan, target, *types, PROMPT_ROWS, drafter)
        contexts = [memory.largest_context(gib * GIB - TAKEN_BYTES) for gib in cards]
        needs = memory.total + TAKEN_BYTES
        table.append(ContextFit(types, memory.cache_row, tuple(contexts), target, needs))
    return table


def fitting_context(
    file: ModelFile,
    device: str | None,
    cache_types: tuple[str, str],
    wanted: int,
    say: Callable[[str], None],
    machine: Machine | None = None,
    drafter: DrafterFile | MtpFile | None = None,
) -> int:
    """`wanted` tokens, or as many as fit on the device, which is said. Where not even LEAST do,
    `wanted`: loading then tells what takes the memory. Raises OrthrusError as loading does.

    machine: instead of the device, for tests. drafter: beside the model.
    """
    config = file.config
    for each in (config, *([] if drafter is None else [drafter.config])):
        check_head_size(each)
        check_cache_types(each, *cache_types)
    machine = find_machine(device) if machine is None else machine
    free = machine.free_bytes()
    if free is None:
        return wanted
    plan = plan_weights(config, file.tensors, machine.capability)
    beside = None if drafter is None else plan_beside(drafter, plan, machine.capability)
    memory = plan_memory(config, file.tensors, plan, wanted, *cache_types, PROMPT_ROWS, beside)
    fitting = memory.largest_context(free) // STEP * STEP
    if memory.total <= free or fitting < LEAST:
        return wanted
    beside_config = None if drafter is None else drafter.config
    say(
        f"context of {fitting} tokens instead of {wanted}: that is what fits in the "
        f"{free / GIB:.2f} GiB that are free on {machine.device} ({'/'.join(cache_types)} cache)"
        + _larger(config, beside_config, cache_types, memory.fixed - memory.spare, free, wanted)
        + "; -c N sets it"
    )
    return fitting


def _larger(
    config: ModelConfig,
    drafter: ModelConfig | None,
    cache_types: tuple[str, str],
    fixed: int,
    free: int,
    wanted: int,
) -> str:
    """The first smaller cache that holds what is wanted, in words."""
    own, _ = cache_sizes(config, *cache_types, drafter)
    ragged = any(c is not None and c.head_dim % QBLOCK for c in (config, drafter))
    for types in CACHES:
        if ragged and types != ("f16", "f16"):
            continue
        row, spare = cache_sizes(config, *types, drafter)
        if row < own and fixed + spare + row * wanted <= free:
            return f"; -ctk {types[0]} -ctv {types[1]} holds {wanted}"
    return ""
