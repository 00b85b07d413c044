"""CudaModel: the `Model` protocol on the kernels of `orthrus_kernels`."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.model.rope import frequencies
from orthrus_gguf.runtime.cuda.arrange import Arrangement, arrange, check_tokens
from orthrus_gguf.runtime.cuda.buffers import new_buffers, pass_rows
from orthrus_gguf.runtime.cuda.cache import CudaCache, check_cache_types, check_head_size
from orthrus_gguf.runtime.cuda.compiling import kernels_compiled
from orthrus_gguf.runtime.cuda.device import Machine, find_machine
from orthrus_gguf.runtime.cuda.drafter_weights import plan_beside
from orthrus_gguf.runtime.cuda.graphs import Capture, Graphs, capture_for
from orthrus_gguf.runtime.cuda.kernels import Kernels
from orthrus_gguf.runtime.cuda.loader import Progress, load_weights
from orthrus_gguf.runtime.cuda.memory_plan import GIB, MemoryPlan, check_memory, plan_memory
from orthrus_gguf.runtime.cuda.passes import cut, is_prompt
from orthrus_gguf.runtime.cuda.prompt_pass import run_prompt
from orthrus_gguf.runtime.cuda.results import Gathered
from orthrus_gguf.runtime.cuda.row_check import check_rows
from orthrus_gguf.runtime.cuda.runner import PassRunner
from orthrus_gguf.runtime.cuda.state import HybridCudaCache
from orthrus_gguf.runtime.cuda.tables import Shape, StagedTable
from orthrus_gguf.runtime.cuda.weight_plan import WeightPlan, plan_weights
from orthrus_gguf.runtime.passes import Piece
from orthrus_gguf.runtime.protocol import Choices, Logits, Segment, View, check_segments

log = logging.getLogger(__name__)

#: AR rows of one prompt pass; longer prompts are cut. Each pass writes all weights out as fp16,
#: which would take a quarter of the time of 512 rows on an RTX 3090 (kernels/LOG.md).
PROMPT_ROWS = 1024

#: Shapes of passes whose tables and graphs are kept; the one that was used longest ago goes first.
SHAPES = 256


@contextmanager
def _enough_memory(plan: MemoryPlan, machine: Machine, free: int | None) -> Iterator[None]:
    """What the plan said would fit may still not: in one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OrthrusError(
            f"{machine.device}: out of memory while loading, though {plan.total / GIB:.2f} GiB were"
            f" planned and {(free or 0) / GIB:.2f} GiB free: another program takes some, or what is"
            " left is in pieces; choose a smaller -c, or set the environment variable"
            " PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        ) from error


class CudaModel:
    """See `protocol.Model`. Use as a context manager, or close it.

    AR rows are row-invariant in passes of up to `dispatch.MAX_ROWS` rows: those run through the
    products that dequantize as they go, and as one graph launch each. Longer segments are prompts
    (`prompt_pass.py`). One pass runs at a time; calls from several threads wait for one another.
    """

    def __init__(
        self,
        runner: PassRunner,
        prompt_rows: int,
        memory: MemoryPlan,
        capture: Capture | None,
        plan: WeightPlan,
    ) -> None:
        """Take over what `load` has made."""
        self.plan = plan
        self.config: ModelConfig = runner.config
        self.memory = memory
        self.lock = threading.RLock()
        self.graphs = Graphs(capture)
        self._runner: PassRunner | None = runner
        self._types = runner.cache_types
        self._prompt_rows = prompt_rows
        kinds = {m.type.name for p in runner.weights.products() for m in p.matrices}
        self._kinds = "/".join(sorted(kinds))
        self._tables: OrderedDict[Shape, StagedTable] = OrderedDict()
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
        capture: Capture | None = None,
        say: Callable[[str], None] = log.info,
        drafter: DrafterFile | MtpFile | None = None,
    ) -> CudaModel:
        """Load an open file onto a device.

        device: `cuda`, `cuda:N`, or `cpu` for the stand-ins (tests).
        context: tokens of the cache that will be asked for, for the memory plan; default: one.
        prompt_rows: AR rows of one prompt pass; with at most 64, prompts are row-invariant, too.
        kernels, capability: see `find_machine`. capture: how passes become graphs, for tests.
        say: hears how far compiling is, the first time.
        drafter: will be loaded beside it (`CudaBeside`): memory and kernels are for both.
        Raises OrthrusError for a device, model or setting that cannot be used, or too little
        memory, before anything is allocated.
        """
        config = file.config
        types = (cache_type_k, cache_type_v)
        if prompt_rows < 1:
            raise OrthrusError(f"-b {prompt_rows}: expected at least 1 row per batch")
        for each in (config, *([] if drafter is None else [drafter.config])):
            check_head_size(each)
            check_cache_types(each, *types)
        machine = find_machine(device, kernels=kernels, capability=capability)
        plan = plan_weights(config, file.tensors, machine.capability)
        beside = None if drafter is None else plan_beside(drafter, plan, machine.capability)
        memory = plan_memory(config, file.tensors, plan, context or 1, *types, prompt_rows, beside)
        free = machine.free_bytes()
        if free is not None:
            own = None if drafter is None else drafter.config
            check_memory(memory, free, config, *types, str(machine.device), own)
        compiling = kernels_compiled(file, machine, types, prompt_rows, say, drafter)
        with compiling, machine.running(), _enough_memory(memory, machine, free):
            weights = load_weights(file, plan, machine.device, on_progress=on_progress)
            machine.trim()
            buffers = new_buffers(config, plan, machine.device)
            inv_freq, rope_scale = frequencies(config.rope, config.rotary_dim)
            runner = PassRunner(
                config,
                machine,
                weights,
                buffers,
                torch.from_numpy(inv_freq).to(machine.device),
                rope_scale,
                torch.zeros(256, dtype=torch.uint8, device=machine.device),
                types,
            )
        return cls(runner, prompt_rows, memory, capture or capture_for(machine), plan)

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
            self._tables.clear()
            self.graphs = Graphs(None)

    def __enter__(self) -> CudaModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def new_cache(self, capacity: int) -> CudaCache:
        """See `Model.new_cache`. Raises OrthrusError when it does not fit."""
        with self.lock, self.machine.running():
            free = self.machine.free_bytes()
            row, spare = self.memory.cache_row, self.memory.spare
            if free is not None and capacity * row + spare > free:
                raise OrthrusError(
                    f"a context of {capacity} tokens needs {capacity * row / 2**30:.2f} GiB of "
                    f"key/value cache, {free / 2**30:.2f} GiB are free on {self.machine.device}; "
                    f"choose -c {max(0, free - spare) // row} or less, or smaller cache types with"
                    " -ctk and -ctv"
                )
            own = (self.config, *self._types, capacity, self.runner.anchor, pass_rows(self.config))
            if LayerKind.DELTA_NET in self.config.layer_kinds:
                return HybridCudaCache(*own, self.machine, self.lock)
            return CudaCache(*own)

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """See `Model.forward`."""
        gathered = self._run(segments, draws=True)
        return gathered.choices()

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        """See `Model.logits`."""
        gathered = self._run(segments, draws=False)
        return gathered.logits(self.config.n_vocab)

    def launch_again(self, segments: Sequence[Segment]) -> Callable[[], None]:
        """What enqueues a pass of these segments once more, as `forward` last ran it, without
        asking for results: to time passes. They must be one pass, and no prompt.
        """
        (pieces,) = cut(segments, self._prompt_rows, pass_rows(self.config), draws=True)
        if is_prompt(pieces):
            raise ValueError("prompts are not launched as one")
        for segment in segments:
            segment.cache.drop()  # type: ignore[attr-defined]  # as `forward` does
        arranged = arrange(pieces, self.config, pass_rows(self.config), draws=True, prompt=False)
        table, runner = self._tables[arranged.shape], self.runner

        def launch() -> None:
            with runner.holding(arranged.caches):
                self.graphs.run(arranged.shape, partial(runner.run, table))

        return launch

    def _check(self, segments: Sequence[Segment]) -> None:
        most, last = pass_rows(self.config), self.config.n_layers + 1
        for segment in segments:
            cache = segment.cache
            ours = isinstance(cache, CudaCache) and cache.anchor is self.runner.anchor
            if not ours or cache.planes is None:  # type: ignore[attr-defined]
                raise ValueError("the cache is closed, or belongs to another model")
        check_segments(segments)
        for segment in segments:
            check_tokens(segment.tokens, self.config.n_vocab)
            if segment.taps and not 0 <= min(segment.taps) <= max(segment.taps) <= last:
                raise ValueError(f"taps {segment.taps}: expected 0..{last}")
            if segment.view is View.DIFFUSION and not self.config.has_heads:
                raise OrthrusError(f"{self.config.name} has no diffusion heads; use --strategy ar")
            whole = segment.view is View.DIFFUSION or segment.parents is not None
            if whole and len(segment) > most:
                kind = "block" if segment.parents is None else "tree"
                raise ValueError(f"{kind} of {len(segment)} rows, at most {most} fit")

    def _run(self, segments: Sequence[Segment], *, draws: bool) -> Gathered:
        """Run the passes of a call; the AR rows are pending afterwards."""
        with self.lock, self.machine.running():
            self._check(segments)
            caches = {id(s.cache): s.cache for s in segments}.values()
            for cache in caches:
                cache.drop()  # type: ignore[attr-defined]  # checked: they are ours
            gathered = Gathered(segments)
            trees = {}
            for pieces in cut(segments, self._prompt_rows, pass_rows(self.config), draws=draws):
                for placed in self._run_pass(pieces, gathered, draws=draws).placed:
                    trees[placed.piece.index] = placed.tree
            for index, segment in enumerate(segments):
                if segment.view is View.AR:
                    segment.cache.hold(len(segment), trees[index])  # type: ignore[attr-defined]
            return gathered

    def _run_pass(self, pieces: Sequence[Piece], gathered: Gathered, *, draws: bool) -> Arrangement:
        """One pass: tables up, one launch, results down where there are any."""
        runner, prompt = self.runner, is_prompt(pieces)
        most = pass_rows(self.config)
        arranged = arrange(pieces, self.config, most, draws=draws, prompt=prompt)
        table = self._table(arranged, keep=not prompt)
        arranged.fill(table.begin(), self.config)
        table.upload()
        runner.progress.moved = False
        logits = None
        try:
            with runner.holding(arranged.caches):
                if prompt:
                    if not draws and arranged.wanted_rows:
                        logits = self._logits_for(len(arranged.wanted_rows))
                    run_prompt(runner, table, logits)
                else:
                    self.graphs.run(arranged.shape, partial(runner.run, table))
                    runner.progress.moved = True
                    if self.machine.check_rows:
                        check_rows(runner, table)
        finally:
            if runner.progress.moved:
                for cache in arranged.caches:
                    cache.moves.clear()
        arranged.ran()
        if draws:
            if arranged.wanted_rows or arranged.shape.taps:
                gathered.add(arranged, table.download(), self.config.n_embd)
        elif arranged.wanted_rows:
            count = len(arranged.wanted_rows)
            found = runner.buffers.logits[:count] if logits is None else logits
            gathered.add_logits(arranged, self._to_host(found))
        return arranged

    def _table(self, arranged: Arrangement, *, keep: bool) -> StagedTable:
        """The tables of a shape. keep: for the next pass of the same shape, and its graph."""
        shape, config = arranged.shape, self.config
        table = self._tables.get(shape)
        if table is None:
            table = StagedTable(
                shape, config.n_vocab, config.n_embd, arranged.windows, self.machine
            )
            if keep:
                self._tables[shape] = table
                if len(self._tables) > SHAPES:
                    oldest, _ = self._tables.popitem(last=False)
                    self.graphs.drop(oldest)
        elif keep:
            self._tables.move_to_end(shape)
        return table

    def _logits_for(self, count: int) -> Tensor:
        """Room for the logits of a prompt."""
        return self.runner.buffers.logits.new_empty(count, self.config.n_vocab)

    def _to_host(self, logits: Tensor) -> Logits:
        """The logits as an array of the caller's."""
        if len(logits) > pass_rows(self.config):
            whole: Logits = logits.cpu().numpy()
            return whole
        if self._staging is None:
            shape = self.runner.buffers.logits.shape
            size = 4 * shape.numel()
            self._staging = self.machine.host_buffer(size).view(torch.float32).view(shape)
        found: Logits = self.machine.download(logits, self._staging[: len(logits)]).copy()
        return found
