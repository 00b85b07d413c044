"""Compile Triton kernels for NVIDIA GPUs that this machine lacks, and read off what they use.

`triton.compile` needs neither a GPU nor a driver, and triton's wheel bundles `cuobjdump`, so that
registers, spills, shared memory and the instructions of the hot loop are known offline.
The process must run without TRITON_INTERPRET: the interpreter replaces the compiler's functions.

    from orthrus_kernels.tools.offline import KernelCase, compile_case, compile_kernel
    compiled = compile_kernel(fn, 86, {"x": "*fp16", "n": "i32:16", "m": "i32"}, {"BM": 32}, 4, 3)
    compiled.report().registers

`python -m orthrus_kernels.tools.offline MODULE [--capability 86] [--only TEXT] [--json FILE]`
compiles every `KernelCase` of `MODULE.CASES` and prints one line each.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED_MEMORY_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 120: 99}
"""KiB of shared memory that one program may use, by compute capability (CUDA programming guide)."""

CAPABILITIES = (80, 86, 89, 90, 120)
"""What triton makes MMAs for. For sm_75 it (3.7) falls back to FMAs for fp16 products, which spill,
and refuses int8 ones."""


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses. `loop_*` describe the hottest loop: the one with most MMAs
    (or, without MMAs, the longest)."""

    registers: int
    stack: int
    spills: int  # LDL + STL instructions in the whole kernel
    shared: int  # bytes
    mma: int  # mma.sync in the PTX
    wgmma: int  # wgmma.mma_async (sm_90) in the PTX
    ldmatrix: int
    async16: int  # cp.async of 16 bytes
    async_small: int  # cp.async of 4 or 8 bytes
    loop_instructions: int
    loop_i2f: int  # int-to-float conversions in the loop
    loop_mix: dict[str, int]  # opcode -> count, most frequent first
    warps_per_cta: tuple[tuple[int, ...], ...]  # one per distinct MMA layout in the TTGIR
    num_warps: int
    instructions_per_weight: float | None = None  # per thread; None where there are no weights


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: `handle.asm` holds ttir, ttgir, llir, ptx and cubin."""

    handle: Any
    num_warps: int
    weights_per_iteration: int | None = None

    def report(self) -> Resources:
        """Registers, memory and instruction counts of this kernel."""
        usage, sass = _dump(self.handle.asm["cubin"])
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
        ptx: str = self.handle.asm["ptx"]
        body = hot_loop(sass)
        mix = collections.Counter(opcode(line) for line in body)
        per_weight = None
        if self.weights_per_iteration:
            per_weight = len(body) * self.num_warps * 32 / self.weights_per_iteration
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)[,;]", ptx)
        wide = sum(int(size, 0) == 16 for size in copies)
        return Resources(
            registers=int(found[1]),
            stack=int(found[2]),
            spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
            shared=int(self.handle.metadata.shared),
            mma=ptx.count("mma.sync"),
            wgmma=ptx.count("wgmma.mma_async"),
            ldmatrix=ptx.count("ldmatrix"),
            async16=wide,
            async_small=len(copies) - wide,
            loop_instructions=len(body),
            loop_i2f=sum(count for name, count in mix.items() if name.startswith("I2F")),
            loop_mix=dict(mix.most_common()),
            warps_per_cta=mma_warps(self.handle.asm["ttgir"]),
            num_warps=self.num_warps,
            instructions_per_weight=per_weight,
        )


@dataclass(frozen=True)
class KernelCase:
    """One kernel with one set of constants: the unit of the budgets and of the resource table.

    `weights_per_iteration` is the number of weights that one pass through the hot loop consumes in
    one program (tile N x tile K), or None for kernels without weights.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    weights_per_iteration: int | None = None
    capabilities: tuple[int, ...] = CAPABILITIES


def compile_kernel(
    fn: Any,
    capability: int,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    num_warps: int = 4,
    num_stages: int = 3,
    fp_fusion: bool = False,
    weights_per_iteration: int | None = None,
) -> Compiled:
    """Compile `fn` (a `triton.jit` function) for compute capability `capability` (86 = sm_86).

    `signature` gives each run-time argument a type: "*fp16", "*u8", "i32", "fp32". Pointers are
    taken to be 16-byte aligned (as torch allocates); an integer is "i32:16" where it is always a
    multiple of 16, or else the 16-byte loads vanish, and "1" where it is always 1. `constants`
    holds the constexpr arguments, and every argument must be in one of the two. `fp_fusion` False
    keeps a*b+c at two roundings.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    handle = triton.compile(
        _source(fn, signature, constants),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": num_warps,
            "num_stages": num_stages,
            "enable_fp_fusion": fp_fusion,
        },
    )
    return Compiled(handle, num_warps, weights_per_iteration)


def _source(fn: Any, signature: Mapping[str, str], constants: Mapping[str, Any]) -> Any:
    """A kernel with its arguments, as triton's compiler takes it."""
    from triton.compiler import ASTSource

    if not hasattr(fn, "arg_names") or type(fn).__name__ == "InterpretedFunction":
        raise RuntimeError("offline compilation needs a process without TRITON_INTERPRET")
    types: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    constants = {**constants, **{name: 1 for name, kind in signature.items() if kind == "1"}}
    for index, name in enumerate(fn.arg_names):
        if name in constants:
            types[name] = "constexpr"
            continue
        kind, _, multiple = signature[name].partition(":")
        types[name] = kind
        if kind.startswith("*") or multiple == "16":
            attributes[(index,)] = [["tt.divisibility", 16]]
    values = {(fn.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(fn, signature=types, constexprs=values, attrs=attributes)


def source_key(case: KernelCase, capability: int) -> str:
    """What decides what becomes of a case: the kernel's source with all that it calls (as triton's
    own cache tells them apart), its arguments, options, the card and the exact compiler."""
    import triton

    source = _source(case.fn, case.signature, case.constants).hash()
    words = (triton.__version__, source, capability, case.num_warps, case.num_stages)
    return hashlib.sha256(repr(words).encode()).hexdigest()[:16]


def compile_case(case: KernelCase, capability: int) -> Compiled:
    """Compile one case for one compute capability."""
    return compile_kernel(
        case.fn,
        capability,
        case.signature,
        case.constants,
        case.num_warps,
        case.num_stages,
        weights_per_iteration=case.weights_per_iteration,
    )


def hot_loop(sass: str) -> list[str]:
    """The instructions of the loop that does the work: most MMAs, then most instructions."""
    lines = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*?)\s*;", sass)
    ]
    best: list[str] = []
    for address, text in lines:
        jump = re.search(r"\bBRA(?:\.\w+)*\b.*?0x([0-9a-f]+)", text)
        if jump is None or int(jump[1], 16) >= address:
            continue
        body = [other for at, other in lines if int(jump[1], 16) <= at <= address]
        if _work(body) > _work(best):
            best = body
    return [line for line in best if opcode(line) != "NOP"]


def opcode(line: str) -> str:
    """`@!P0 LDS.128 R4, [R2]` -> `LDS`; conversions keep their name (`I2F`, `I2FP`, `F2F`)."""
    words = line.split()
    if words[0].startswith("@"):
        words = words[1:]
    return words[0].split(".")[0]


def mma_warps(ttgir: str) -> tuple[tuple[int, ...], ...]:
    """warpsPerCTA of every distinct MMA layout that occurs in the kernel."""
    layouts = re.findall(r"nvidia_mma<\{[^}]*?warpsPerCTA = \[([\d, ]+)\]", ttgir)
    found = {tuple(int(size) for size in layout.split(",")) for layout in layouts}
    return tuple(sorted(found))


def tools_directory() -> Path:
    """Where triton's wheel keeps cuobjdump and ptxas."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _work(body: Sequence[str]) -> tuple[int, int]:
    return sum("MMA" in line for line in body), len(body)


def _dump(cubin: bytes) -> tuple[str, str]:
    """cuobjdump's resource usage and SASS of a cubin."""
    cuobjdump = tools_directory() / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        outputs = [
            subprocess.run(
                [cuobjdump, flag, path], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("--dump-resource-usage", "-sass")
        ]
    return outputs[0], outputs[1]


def report_cases(
    cases: Iterable[KernelCase], capabilities: Iterable[int], talk: bool = False
) -> dict[str, dict[int, Resources]]:
    """Compile and report every case for every capability it names: {case: {capability: ...}}.

    talk: print a line for each as it is done.
    """
    wanted = frozenset(capabilities)
    table: dict[str, dict[int, Resources]] = {}
    for case in cases:
        for capability in sorted(wanted.intersection(case.capabilities)):
            used = compile_case(case, capability).report()
            table.setdefault(case.name, {})[capability] = used
            if talk:
                print(summary_line(case.name, capability, used), flush=True)
    return table


def report_module(
    module: str,
    capabilities: Sequence[int] = CAPABILITIES,
    jobs: int = 2,
    talk: bool = False,
    wanted: Callable[[str], bool] | None = None,
) -> dict[str, dict[int, Resources]]:
    """`report_cases` of a module's CASES in `jobs` fresh processes without TRITON_INTERPRET.

    wanted: which of them, by name; default: all.

    Compiled kernels are kept in triton's cache directory, so that a second run takes seconds.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = str(Path(__file__).parent.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, *filter(None, [environment.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{shard}.json" for shard in range(jobs)]
        processes = []
        for shard, path in enumerate(files):
            command = [sys.executable, "-m", "orthrus_kernels.tools.offline", module]
            command += ["--shard", f"{shard}/{jobs}", "--json", str(path)]
            command += [] if talk else ["--quiet"]
            command += [f"--capability={capability}" for capability in capabilities]
            if wanted is not None:
                names = dict.fromkeys(case.name for case in load_cases(module))
                command += ["--names", json.dumps([name for name in names if wanted(name)])]
            processes.append(subprocess.Popen(command, env=environment))
        codes = [process.wait() for process in processes]
        if any(codes):
            raise RuntimeError(f"offline compilation of {module} failed: exit codes {codes}")
        table: dict[str, dict[int, Resources]] = {}
        for path in files:
            for name, by_capability in json.loads(path.read_text()).items():
                for capability, used in by_capability.items():
                    used["warps_per_cta"] = tuple(map(tuple, used["warps_per_cta"]))
                    table.setdefault(name, {})[int(capability)] = Resources(**used)
    return table


@functools.cache
def load_cases(module: str) -> tuple[KernelCase, ...]:
    """The `CASES` of a module, by import path."""
    return tuple(importlib.import_module(module).CASES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: compile the cases of a module, print a line each, optionally write JSON."""
    parser = argparse.ArgumentParser(prog="python -m orthrus_kernels.tools.offline")
    parser.add_argument("module", help="import path of a module with CASES")
    parser.add_argument("--capability", type=int, action="append", help="86 = sm_86; repeatable")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--names", type=json.loads, help="a JSON list: these cases alone")
    parser.add_argument("--json", type=Path, help="write the full report here")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th case from the I-th on")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: the interpreter hides the compiler", file=sys.stderr)
        return 1
    shard, shards = (int(part) for part in options.shard.split("/"))
    cases = [
        case
        for case in load_cases(options.module)
        if options.only in case.name and (options.names is None or case.name in options.names)
    ]
    cases = cases[shard::shards]
    table = report_cases(cases, options.capability or CAPABILITIES, talk=not options.quiet)
    if options.json:
        data = {
            name: {str(cap): dataclasses.asdict(used) for cap, used in by_capability.items()}
            for name, by_capability in table.items()
        }
        options.json.write_text(json.dumps(data, indent=1))
    return 0


def summary_line(name: str, capability: int, used: Resources) -> str:
    """One line for people."""
    weight = used.instructions_per_weight
    return (
        f"{name} sm_{capability}: {used.registers} regs, stack {used.stack}, spills {used.spills}, "
        f"{used.shared} B shared, mma {used.mma}, wgmma {used.wgmma}, "
        f"cp.async16 {used.async16}+{used.async_small}, loop {used.loop_instructions}"
        + (f" = {weight:.2f}/weight" if weight is not None else "")
        + f", I2F {used.loop_i2f}, warps {list(used.warps_per_cta)}"
    )


if __name__ == "__main__":
    sys.exit(main())
