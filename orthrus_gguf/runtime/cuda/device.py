"""Where a model runs: device, stream, kernels, and what decides about tiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from orthrus_kernels.packing.quant_tensor import QuantTensor
from orthrus_kernels.products.dispatch import (
    MAX_ROWS,
    Tile,
    TunedTable,
    Use,
    choose,
    fit_tile,
    load_table,
)
from torch import Tensor

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.cuda.kernels import STAND_INS, TRITON, Kernels
from orthrus_gguf.runtime.cuda.presence import device_index, why_unusable

#: Environment variable: "1" runs every verify row again, alone, and raises if its bits differ.
CHECK_ROWS = "ORTHRUS_CHECK_ROWS"

#: Stands in for a card's compute capability where there is none: fp16 activations everywhere.
STAND_IN_CAPABILITY = 80


@dataclass(frozen=True)
class Machine:
    """A device and how to use it. stream: None on the CPU. check_rows: see CHECK_ROWS."""

    device: torch.device
    name: str
    capability: int
    kernels: Kernels
    tuned: TunedTable
    stream: torch.cuda.Stream | None
    check_rows: bool

    @property
    def is_cuda(self) -> bool:
        return self.stream is not None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything launched inside goes to the model's own stream."""
        with torch.inference_mode():
            if self.stream is None:
                yield
                return
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                yield

    def tile(
        self,
        weight: QuantTensor,
        rows: int,
        use: Use = Use.MATMUL,
        second: QuantTensor | None = None,
    ) -> Tile:
        """The tile for a product of `rows` rows; more than MAX_ROWS are computed in row tiles.

        second: continues the columns in the same launch, so that the tile must divide its panels.
        """
        choice = choose(
            min(rows, MAX_ROWS),
            weight.type,
            weight.rows,
            weight.k,
            self.capability,
            self.tuned,
            weight.layout,
            use,
            None if second is None else second.type,
        )
        return choice.tile if second is None else fit_tile(choice.tile, second.rows)

    def host_buffer(self, n_bytes: int) -> Tensor:
        """Host memory (u8) that copies can go to and from without anybody waiting."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self.is_cuda)

    def new_event(self) -> torch.cuda.Event | None:
        """Something to wait for, once it has been recorded."""
        return torch.cuda.Event() if self.is_cuda else None  # type: ignore[no-untyped-call]

    def record(self, event: torch.cuda.Event | None) -> None:
        """Have an event stand for all that has been enqueued so far."""
        if event is not None:
            event.record()

    def wait(self, event: torch.cuda.Event | None) -> None:
        """Wait until what an event stands for is done."""
        if event is not None:
            event.synchronize()

    def download(self, found: Tensor, buffer: Tensor) -> NDArray[Any]:
        """Wait for numbers of the device: the one place where a pass does. buffer: host memory of
        the same size, which the result lies in."""
        buffer.copy_(found, non_blocking=True)
        if self.is_cuda:
            torch.cuda.current_stream().synchronize()
        return buffer.numpy()

    def trim(self) -> None:
        """Give memory that loading needed for a moment back to the device."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def free_bytes(self) -> int | None:
        """Memory that is free on the device; None on the CPU, where the plan is not enforced."""
        if not self.is_cuda:
            return None
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held


def find_machine(
    device: str | None, *, kernels: Kernels | None = None, capability: int | None = None
) -> Machine:
    """The machine for `--device`: None, `cuda` or `cuda:N`; for tests also `cpu`.

    kernels: by default Triton's on a GPU and the stand-ins on the CPU. capability: what a stand-in
    pretends to be. Raises OrthrusError where the device cannot be used.
    """
    check_rows = os.environ.get(CHECK_ROWS) == "1"
    if device == "cpu":
        return Machine(
            torch.device("cpu"),
            "CPU stand-ins",
            capability or STAND_IN_CAPABILITY,
            kernels or STAND_INS,
            {},
            None,
            check_rows,
        )
    reason = why_unusable(device)
    if reason is not None:
        raise OrthrusError(f"--runtime cuda cannot run on a GPU: {reason}")
    chosen = torch.device("cuda", device_index(device))
    major, minor = torch.cuda.get_device_capability(chosen)
    name = torch.cuda.get_device_name(chosen)
    return Machine(
        chosen,
        name,
        major * 10 + minor,
        kernels or TRITON,
        load_table(name),
        torch.cuda.Stream(chosen),  # type: ignore[no-untyped-call]
        check_rows,
    )
