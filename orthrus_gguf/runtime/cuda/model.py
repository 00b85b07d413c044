"""CudaModel: the `Model` protocol on the kernels of `orthrus_kernels`."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence

import numpy as np
import torch
from orthrus_kernels.attention.kv_cache import HEAD_DIMS
from orthrus_kernels.elementwise.rows import STATE_SIZE
from orthrus_kernels.products.matmul import Activations
from torch import Tensor

from orthrus_gguf.drafting.policy import Cycle, Plan, Policy, SteadyPolicy
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cuda.buffers import (
    new_buffers,
    pass_rows,
    pick_rows,
    row_range,
    some_rows,
)
from orthrus_gguf.runtime.cuda.cache import CudaCache, check_cache_types
from orthrus_gguf.runtime.cuda.device import Machine, find_machine
from orthrus_gguf.runtime.cuda.fused_pass import PassRunner, check_rows
from orthrus_gguf.runtime.cuda.kernels import Kernels
from orthrus_gguf.runtime.cuda.loader import Progress, load_weights
from orthrus_gguf.runtime.cuda.memory_plan import MemoryPlan, check_memory, plan_memory
from orthrus_gguf.runtime.cuda.passes import (
    Piece,
    cut,
    is_prompt,
    pass_tokens,
    segment_table,
    wanted_rows,
)
from orthrus_gguf.runtime.cuda.prompt_pass import finish_prompt, prompt_rows_of, run_prompt
from orthrus_gguf.runtime.cuda.weight_plan import plan_weights
from orthrus_gguf.runtime.protocol import Logits, Segment, View, check_segments
from orthrus_gguf.runtime.reference import rope_frequencies
from orthrus_gguf.sampling import SamplingSettings

#: AR rows of one prompt pass. Longer prompts are cut.
PROMPT_ROWS = 512


class CudaModel:
    """See `segments.Model`. Use as a context manager, or close it.

    AR rows are row-invariant in segments of up to `dispatch.MAX_ROWS` rows: those run through the
    fused products. Longer segments are prompts (`prompt_pass.py`).
    One pass runs at a time; calls from several threads wait for one another.
    """

    def __init__(
        self,
        runner: PassRunner,
        type_k: str,
        type_v: str,
        prompt_rows: int,
        memory: MemoryPlan,
    ) -> None:
        """Take over what `load` has made."""
        self.config: ModelConfig = runner.config
        self.memory = memory
        self.lock = threading.RLock()
        self._runner: PassRunner | None = runner
        self._types = type_k, type_v
        self._prompt_rows = prompt_rows
        kinds = {m.type.name for p in runner.weights.products() for m in p.matrices}
        self._kinds = "/".join(sorted(kinds))
        self._staging: Tensor | None = None

    @classmethod
    def load(
        cls,
        file: ModelFile,
        *,
        device: str | None = None,
        context: int | None = None,
        cache_type_k: str = "f16",
        cache_type_v: str = "f16",
        prompt_rows: int = PROMPT_ROWS,
        on_progress: Progress | None = None,
        kernels: Kernels | None = None,
        capability: int | None = None,
    ) -> CudaModel:
        """Load an open file onto a device.

        device: `cuda`, `cuda:N`, or `cpu` for the stand-ins (tests).
        context: tokens of the cache that will be asked for, for the memory plan; default: one.
        prompt_rows: AR rows of one prompt pass; with at most 64, prompts are row-invariant, too.
        kernels, capability: see `find_machine`.
        Raises OrthrusError for a device, model or setting that cannot be used, or too little
        memory, before anything is allocated.
        """
        config = file.config
        if config.head_dim not in HEAD_DIMS:
            raise OrthrusError(
                f"{file.paths[0]}: heads of {config.head_dim} elements have no CUDA kernel "
                f"(expected {', '.join(map(str, HEAD_DIMS))}); use --runtime cpu"
            )
        if prompt_rows < 1:
            raise OrthrusError(f"-b {prompt_rows}: expected at least 1 row per batch")
        check_cache_types(config, cache_type_k, cache_type_v)
        machine = find_machine(device, kernels=kernels, capability=capability)
        plan = plan_weights(config, file.tensors, machine.capability)
        memory = plan_memory(
            config, file.tensors, plan, context or 1, cache_type_k, cache_type_v, prompt_rows
        )
        free = machine.free_bytes()
        if free is not None:
            check_memory(memory, free, config, cache_type_k, cache_type_v, str(machine.device))
        with machine.running():
            weights = load_weights(file, plan, machine.device, on_progress=on_progress)
            machine.trim()
            buffers = new_buffers(config, plan, machine.device)
            inv_freq, rope_scale = rope_frequencies(config.rope, config.head_dim)
            runner = PassRunner(
                config, machine, weights, buffers, inv_freq.to(machine.device), rope_scale
            )
        return cls(runner, cache_type_k, cache_type_v, prompt_rows, memory)

    @property
    def runner(self) -> PassRunner:
        """Weights, buffers and kernels. Raises OrthrusError once the model is closed."""
        if self._runner is None:
            raise OrthrusError("the model is closed; load it again")
        return self._runner

    @property
    def machine(self) -> Machine:
        return self.runner.machine

    @property
    def description(self) -> str:
        device = f"{self.machine.name}, " if self._runner is not None else ""
        cache = "/".join(self._types)
        return f"cuda ({device}torch {torch.__version__}, {self._kinds} weights, {cache} cache)"

    def close(self) -> None:
        """Let go of the device memory; caches cannot be used afterwards."""
        with self.lock:
            self._runner = None
            self._staging = None

    def __enter__(self) -> CudaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_cache(self, capacity: int) -> CudaCache:
        """See `Model.new_cache`. Raises OrthrusError when it does not fit."""
        with self.lock, self.machine.running():
            free = self.machine.free_bytes()
            row = self.memory.cache_row
            if free is not None and capacity * row > free:
                raise OrthrusError(
                    f"a context of {capacity} tokens needs {capacity * row / 2**30:.2f} GiB of "
                    f"key/value cache, {free / 2**30:.2f} GiB are free on {self.machine.device}; "
                    f"choose -c {free // row} or less, or smaller cache types with -ctk and -ctv"
                )
            return CudaCache(
                self.config, *self._types, capacity, self.machine.device, spare_positions(self)
            )

    def forward(self, segments: Sequence[Segment], cache: CudaCache) -> list[Logits]:
        """See `Model.forward`."""
        with self.lock, self.machine.running():
            self._check(segments, cache)
            length = cache.length
            try:
                return self._run(segments, cache)
            except BaseException:
                cache.truncate(min(length, cache.length))
                raise

    def decodes(self, plan: Plan | Policy) -> bool:
        """Whether `decode` can follow this plan."""
        if isinstance(plan, Plan):
            return not (plan.lookup or plan.tail or plan.cut or plan.tree)
        return isinstance(plan, SteadyPolicy)

    def decode(
        self,
        cache: CudaCache,
        settings: SamplingSettings,
        tokens: list[int],
        plan: Plan | SteadyPolicy,
        max_tokens: int,
        stop_tokens: Sequence[int] = (),
    ) -> Generator[Cycle, None, None]:
        """Decode on the device; see `decode_on_device`."""
        # These import this module.
        from orthrus_gguf.runtime.cuda.decoding import decode_on_device
        from orthrus_gguf.runtime.cuda.steps import STOP_TOKENS

        # The caller stops at all of them; the device, which only runs ahead less, at some.
        watched = stop_tokens[:STOP_TOKENS]
        return decode_on_device(self, cache, settings, tokens, plan, max_tokens, watched)

    def _check(self, segments: Sequence[Segment], cache: CudaCache) -> None:
        if len(cache.layers) != self.config.n_layers:
            raise ValueError("the cache is closed, or belongs to another model")
        check_segments(segments, cache)
        most = pass_rows(self.config)
        for segment in segments:
            low, high = min(segment.tokens), max(segment.tokens)
            if low < 0 or high >= self.config.n_vocab:
                raise OrthrusError(
                    f"token {low if low < 0 else high} is outside the vocabulary of "
                    f"{self.config.n_vocab}; the tokenizer does not belong to this model"
                )
            if segment.view is View.DIFFUSION:
                if not self.config.has_heads:
                    raise OrthrusError(
                        f"{self.config.name} has no diffusion heads; use --strategy ar"
                    )
                if len(segment) > most:
                    raise ValueError(f"block of {len(segment)} rows, at most {most} fit")

    def _run(self, segments: Sequence[Segment], cache: CudaCache) -> list[Logits]:
        found: list[list[Logits]] = [[] for _ in segments]
        passes = cut(segments, self._prompt_rows, pass_rows(self.config))
        for number, pieces in enumerate(passes, 1):
            logits = self._run_pass(pieces, cache)
            if number < len(passes):
                logits = logits.copy()  # the next pass reuses this memory
            row = 0
            for piece in pieces:
                count = len(piece.wanted)
                found[piece.index].append(logits[row : row + count])
                row += count
        empty = np.empty((0, self.config.n_vocab), np.float32)
        return [parts[0] if len(parts) == 1 else np.concatenate([empty, *parts]) for parts in found]

    def _run_pass(self, pieces: Sequence[Piece], cache: CudaCache) -> Logits:
        """The logits of the pass's wanted rows; its AR rows are appended to the cache."""
        runner, machine = self.runner, self.machine
        wanted = wanted_rows(pieces)
        table = torch.from_numpy(segment_table(pieces, cache.length))
        tokens = torch.from_numpy(pass_tokens(pieces))
        state = torch.zeros(STATE_SIZE, dtype=torch.int32)
        state[0] = cache.length
        prompt = is_prompt(pieces)
        rows = (
            prompt_rows_of(runner, len(tokens))
            if prompt
            else some_rows(runner.buffers.rows, 0, len(tokens))
        )
        runner.plan(
            rows, machine.upload(state), cache.history, machine.upload(table), cache.history,
            cache.capacity,
        )  # fmt: skip
        rows.tokens.copy_(machine.upload(tokens))
        ar = pieces[0].count if pieces[0].segment.view is View.AR else 0
        logits = self._logits_for(len(wanted))
        if prompt:
            x, partials = run_prompt(runner, rows, cache)
            if wanted:
                finish_prompt(runner, x, partials, range(wanted[0], wanted[-1] + 1), logits)
        else:
            hidden = runner.run(rows, ar, cache)
            if machine.check_rows and ar > 1:
                check_rows(runner, rows, ar, cache)
            if wanted:
                runner.logits(self._picked(hidden, wanted), logits)
        cache.append(ar)
        return self._to_host(logits)

    def _picked(self, hidden: Activations, wanted: list[int]) -> Activations:
        """The wanted rows, without a copy where they follow one another."""
        if wanted[-1] - wanted[0] + 1 == len(wanted):
            return row_range(hidden, wanted[0], wanted[-1] + 1)
        return pick_rows(hidden, self.machine.upload(torch.tensor(wanted)))

    def _logits_for(self, count: int) -> Tensor:
        """Room for the logits of one pass, static unless a prompt wants more than a pass has."""
        static = self.runner.buffers.logits
        return static[:count] if count <= len(static) else static.new_empty(count, static.shape[1])

    def _to_host(self, logits: Tensor) -> Logits:
        """The logits as an array, which the next pass may overwrite."""
        if not self.machine.is_cuda:
            return logits.numpy()
        if len(logits) > pass_rows(self.config):
            return logits.cpu().numpy()
        if self._staging is None:
            shape = self.runner.buffers.logits.shape
            self._staging = torch.empty(shape, dtype=torch.float32, pin_memory=True)
        host = self._staging[: len(logits)]
        host.copy_(logits, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        return host.numpy()


def spare_positions(model: CudaModel) -> int:
    """Positions beyond the end of the context that drafts may be written to."""
    return 2 * pass_rows(model.config) + 2
