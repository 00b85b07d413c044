"""Attention, small ops and sampling: what the compiler is told (`test_offline_matmul.py`: what it
makes of all kernels)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import orthrus_kernels
from orthrus_kernels.attention import attention
from orthrus_kernels.tools.budget_table import load_budgets
from orthrus_kernels.tools.offline import load_cases


def test_two_attention_programs_fit_an_sm() -> None:
    """At head_dim 128, registers and shared memory (100 KiB per SM on sm_86) leave room for two."""
    warps = {case.name: case.num_warps for case in load_cases("orthrus_kernels.attention.cases")}
    for type_name in ("f16", "q8_0", "q4_0"):
        name = f"attention {type_name} d=128"
        budget = load_budgets()[name][86]
        assert 2 * budget.shared <= 100 * 1024
        assert 2 * budget.most_registers * warps[name] * 32 <= 65536


def test_arguments_that_vary_do_not_specialize() -> None:
    """Another number of rows or another layer must not compile another kernel.

    Triton compiles anew for an integer of 1, or one divisible by 16, unless told not to. Asked of
    the compiler's own description of the kernel, in a process without the interpreter.
    """
    code = """
from orthrus_kernels.attention import attention, finish_qkv
from orthrus_kernels.elementwise import ops
from orthrus_kernels.recurrence import delta_net
for kernel in (
    attention._parts, attention._combine, ops._residual_norm, finish_qkv._finish_qkv,
    delta_net._convolve, delta_net._recur, delta_net._gated_norm,
):
    print(kernel.fn.__name__, *(p.name for p in kernel.params if p.do_not_specialize))
"""
    root = str(Path(orthrus_kernels.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": root, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    free = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert free["_parts"] == ["layer", "block_capacity", "packed", "lanes", "back"]
    assert free["_combine"] == ["packed", "lanes", "part_rows"]
    assert free["_residual_norm"] == ["part_rows"]
    assert free["_finish_qkv"] == ["part_rows", "layer", "block_capacity"]
    assert free["_convolve"] == ["part_rows", "gate_rows", "layer"]
    assert free["_recur"] == ["layer", "layers"]
    assert free["_gated_norm"] == ["part_rows"]


def test_constants_agree() -> None:
    """A chunk is whole tiles of keys; otherwise tiles would not lie at absolute positions."""
    assert attention.CHUNK % attention.KEYS == 0
    for head_dim in (64, 80, 96, 128, 256):
        tile, warps = attention.attention_tile(head_dim)
        assert tile % 16 == 0
        assert warps in (4, 8)


def test_whoever_starts_early_waits_first() -> None:
    """The kernels that are launched with `overlapped` are those that begin with `begin`."""
    begin, launched = set(), set()
    for path in Path(orthrus_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[ast.get_docstring(node) is not None :]
                if ast.unparse(body[0]) == "begin()":
                    begin.add(node.name)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                options = [ast.unparse(word.value) for word in node.keywords if word.arg is None]
                if "overlapped()" in options:
                    launched.add(ast.unparse(node.func.value))
    assert (
        begin
        == launched
        == {
            *("_residual_norm", "_finish_qkv", "_parts", "_combine"),
            *(f"{part}_{form}" for part in ("matmul", "gate_up", "head") for form in ("a16", "a8")),
        }
    )


def test_no_atomics() -> None:
    """Sums are ordered everywhere."""
    folder = Path(orthrus_kernels.__file__).parent
    for path in folder.rglob("*.py"):
        assert not re.search(r"\batomic_\w+\(", path.read_text(encoding="utf-8")), path.name
