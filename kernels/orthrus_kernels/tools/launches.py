"""What launches would compile, found without a GPU: signatures, exactly as the launcher makes them.

Inside `recorded(capability)` kernels are bound to their arguments and neither compiled nor
launched; tensors may be on the meta device. It changes triton for the whole process, so use it in
one that launches nothing else, and without TRITON_INTERPRET.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from orthrus_kernels.overlap import PDL


def cache_folder() -> Path:
    """Where triton keeps what it has compiled."""
    return Path(triton.knobs.cache.dir)


def kernels_digest() -> str:
    """Of what decides how kernels compile: sources, compiler, Python, ORTHRUS_PDL."""
    found = hashlib.sha256(repr((triton.__version__, sys.version_info[:2], PDL.value)).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


class CompileOnly:
    """The parts of a triton driver that a launch asks for before it launches."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # a cache of its own for each

    def get_current_stream(self, device: int) -> int:
        return device


@dataclass(frozen=True)
class Launch:
    """One kernel as a launch specialises it: what `triton.compile` takes."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    capability: int

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def arguments(self) -> dict[str, str]:
        """As in `KernelCase.signature`: i32 and *fp16 (aligned), i32:16, and 1 for what always is;
        pointers without their type, since that follows the type of weights."""
        names = self.kernel.arg_names
        values = {names[at[0]]: value for at, value in self.constants.items()}
        kinds = {}
        for index, name in enumerate(names):
            kind = self.signature[name]
            aligned = any(key[0] == index for key in self.attributes)
            if kind != "constexpr":
                suffix = ":16" if aligned and not kind.startswith("*") else ""
                kinds[name] = ("*" if kind.startswith("*") else kind) + suffix
            elif not self.kernel.params[index].is_constexpr:
                kinds[name] = str(values.get(name))
        return kinds

    def compile(self) -> Any:
        """The compiled kernel, which triton also puts where the launcher will look for it."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        target = GPUTarget("cuda", self.capability, 32)
        return triton.compile(source, target=target, options=self.options)


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """A list that receives each distinct launch of the block."""
    found: list[Launch] = []
    seen: set[Any] = set()
    run, do_compile = JITFunction.run, JITFunction._do_compile

    def bind(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    def record(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any,
        attributes: Any, warmup: bool,
    ) -> None:  # fmt: skip
        if (self, key) not in seen:
            seen.add((self, key))
            launch = Launch(
                self, signature, constants, attributes, dict(options.__dict__), capability
            )
            found.append(launch)

    triton.runtime.driver.set_active(CompileOnly(capability))
    JITFunction.run, JITFunction._do_compile = bind, record
    try:
        yield found
    finally:
        JITFunction.run, JITFunction._do_compile = run, do_compile
