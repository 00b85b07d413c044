"""The kernels through the real compiler, for cards that need not be here.

It runs in processes of its own, since this one runs the interpreter; compiled kernels are kept in
triton's cache between runs. What was accepted from the same sources, by the same compiler, is not
compiled again: a few kernels are, here, and everything in the slow tests.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from orthrus_kernels.tools.budget_table import (
    MAIN_KERNELS,
    MATRIX,
    PINNED,
    Budget,
    check,
    known_cases,
    load_budgets,
    summary,
    violations,
)
from orthrus_kernels.tools.offline import (
    CAPABILITIES,
    Resources,
    compile_kernel,
    hot_loop,
    load_cases,
    mma_warps,
    opcode,
    report_module,
)

MODULE = "orthrus_kernels.products.cases"
TABLE = "orthrus_kernels.tools.budget_table"

Report = dict[str, dict[int, Resources]]

GOOD = Resources(
    registers=96,
    stack=0,
    spills=0,
    shared=1024,
    mma=4,
    wgmma=0,
    ldmatrix=4,
    async16=8,
    async_small=2,
    loop_instructions=100,
    loop_i2f=0,
    loop_mix={"HMMA": 4},
    warps_per_cta=((4, 1),),
    num_warps=4,
    instructions_per_weight=3.5,
)


#: Compiled here whatever was accepted; other kinds are where launches are tested.
SAMPLE = ("matmul Q4_K a16 32 rows", "matmul Q6_K a16 32 rows")


@pytest.fixture(scope="module")
def report() -> Report:
    return report_module(MODULE, (86, 90), wanted=SAMPLE.__contains__)


def test_compiled_anew_they_keep_their_budgets(report: Report) -> None:
    found = {(name, card) for name, by_card in report.items() for card in by_card}
    assert found == {(name, card) for name in SAMPLE for card in (86, 90)}
    assert check(report, load_budgets()) == []


def test_every_architecture_is_covered() -> None:
    known: dict[str, set[int]] = {}
    for case in load_cases(MODULE):
        known.setdefault(case.name, set()).update(case.capabilities)
    assert all(86 in capabilities for capabilities in known.values())
    assert set().union(*known.values()) == set(CAPABILITIES)


def test_promised_instruction_counts(report: Report) -> None:
    """The figures that the design asks for at 32 rows on sm_86."""
    q4, q6 = (report[f"matmul {kind} a16 32 rows"][86] for kind in ("Q4_K", "Q6_K"))
    assert q4.instructions_per_weight is not None
    assert q6.instructions_per_weight is not None
    assert q4.instructions_per_weight <= 7.5
    assert q6.instructions_per_weight <= 9.5


def test_the_table_for_people_is_that_of_the_budgets() -> None:
    text = (Path(__file__).resolve().parents[2] / "kernels/RESOURCES.md").read_text()
    assert text == summary(load_budgets())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(MAIN_KERNELS)
    assert all(line.count("|") == 2 + len(CAPABILITIES) for line in lines)


def test_every_case_has_a_budget_and_every_budget_a_case() -> None:
    budgets = load_budgets()
    assert {name: set(cards) for name, cards in budgets.items()} == known_cases()


@pytest.mark.slow
def test_every_product_keeps_its_budget() -> None:
    """Type x row tile x use x architecture; an hour on two cores unless triton's cache has it."""
    report = report_module(MATRIX)
    assert len(report) > 500
    assert check(report, load_budgets()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 8}, "8 bytes of stack"),
        ({"spills": 3}, "3 spill instructions"),
        ({"shared": 200 * 1024}, "do not fit the card"),
        ({"registers": 100}, "100 registers, budget 99"),
        ({"instructions_per_weight": 3.7}, "3.7 instructions per weight, budget 3.6"),
        ({"mma": 0}, "no MMA"),
        ({"async16": 0}, "16 bytes at a time"),
        ({"loop_i2f": 1}, "int-to-float"),
        ({"warps_per_cta": ((2, 2),)}, "split K"),
    ],
)
def test_violations_are_seen(change: dict[str, Any], message: str) -> None:
    budget = Budget(96, 1024, 3.5)
    assert violations("k", 86, GOOD, budget) == []
    assert message in "\n".join(violations("k", 86, dataclasses.replace(GOOD, **change), budget))
    assert "no budget" in violations("k", 86, GOOD, None)[0]


PRODUCTS = {
    "matmul_a16",
    "gate_up_a16",
    "head_a16",
    "matmul_a8",
    "gate_up_a8",
    "head_a8",
    "_dequantize_a16",
    "_dequantize_a8",
}

PASSES = {
    *("matmul_a16", "gate_up_a16", "head_a16", "_dequantize_a16"),
    *("_embed", "_angles", "_residual_norm", "_silu_multiply"),
    *("_finish_qkv", "_parts", "_combine", "_move"),
    *("penalize", "ban", "mask", "best_of_tile", "extract", "pack_keys", "mass_of_tile"),
    *("choose_in_tile", "settle", "pick", "log_sum_of_tile", "report"),
}


ROOT = Path(__file__).resolve().parents[2]

#: Where `make test` puts the oldest triton that is promised, without torch.
OLDEST_TRITON = ROOT / ".cache" / "triton-3.6"


@pytest.fixture(params=["pinned", "oldest"])
def compiler_path(request: pytest.FixtureRequest) -> list[str]:
    """What goes before everything else on the path."""
    if request.param == "pinned":
        return []
    if not (OLDEST_TRITON / "triton").is_dir():
        pytest.skip(f"{OLDEST_TRITON} is missing: `make test` installs triton 3.6.0 there")
    return [str(OLDEST_TRITON)]


def run_python(path: list[str], *words: str) -> str:
    """What Python prints, without the interpreter of kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([*path, *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    return done.stdout


LAUNCHES = str(ROOT / "tests/helpers/launch_without_gpu.py")


@pytest.mark.parametrize(("run", "kernels"), [("products", PRODUCTS), ("passes", PASSES)])
def test_launches_bind_their_arguments(
    compiler_path: list[str], run: str, kernels: set[str]
) -> None:
    """The real launcher takes what the wrappers pass, and the runtime what they ask for (compiled,
    not launched)."""
    assert set(run_python(compiler_path, LAUNCHES, run).split()) == kernels


@pytest.mark.slow
def test_what_an_mtp_block_launches_compiles(compiler_path: list[str]) -> None:
    """All of it: rows given by the host, k and v without q. The rest is as the hybrid has it."""
    names = run_python(compiler_path, LAUNCHES, "mtp").split()
    assert {"_quantize_rows", "_finish_qkv", "matmul_a16"} <= {*names}, names


def test_launches_find_what_was_compiled_ahead(
    compiler_path: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert run_python(compiler_path, LAUNCHES, "cached") == "_dequantize_a16\n1 1\n"


@pytest.mark.parametrize("switch", ["0", "1"])
def test_kernels_that_start_early_wait_first(
    compiler_path: list[str], switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORTHRUS_PDL", switch)
    early, *found = run_python(compiler_path, LAUNCHES, "early").split()
    assert early == str(switch == "1")
    waits = ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    assert found[-2:] == ["ld.global", "st.global"]
    assert found[:-2] == (waits if switch == "1" else [])


def test_every_kernel_keeps_its_budget(compiler_path: list[str]) -> None:
    """What differs from what was accepted is compiled."""
    found = run_python(compiler_path, "-m", TABLE, "--changed")
    assert found.startswith(f"triton {'3.6' if compiler_path else PINNED}: ")
    assert found.endswith(" 0 problems\n")


@pytest.mark.slow
def test_every_kernel_keeps_its_budget_compiled_anew(compiler_path: list[str]) -> None:
    assert run_python(compiler_path, "-m", TABLE).endswith(" 0 problems\n")


def test_sources_are_told_apart() -> None:
    """A kernel's own lines, what it calls, arguments, constants, options and cards."""
    code = """
import dataclasses
from orthrus_kernels.elementwise import ops
from orthrus_kernels.tools.offline import load_cases, source_key
cases = load_cases("orthrus_kernels.elementwise.cases")
case = next(one for one in cases if one.fn is ops._residual_norm)
change = lambda **changes: dataclasses.replace(case, **changes)
cases = [case, change(num_warps=2 * case.num_warps), change(num_stages=case.num_stages + 1)]
name, kind = next((n, k) for n, k in case.signature.items() if k.startswith("*"))
cases.append(change(signature={**case.signature, name: "*fp64"}))
name, value = next((n, v) for n, v in case.constants.items() if isinstance(v, int))
cases.append(change(constants={**case.constants, name: value + 1}))
keys = [source_key(one, 86) for one in cases] + [source_key(case, 90)]
assert source_key(change(name="another"), 86) == keys[0]
case.fn._unsafe_update_src(case.fn.src + "    tl.debug_barrier()")
keys.append(source_key(case, 86))
print(len(keys), len(set(keys)))
"""
    assert run_python([], "-c", code) == "7 7\n"


def numbers(arguments: Mapping[str, str]) -> dict[str, str]:
    """Arguments without pointers, whose types follow those of the weights."""
    return {name: kind for name, kind in arguments.items() if not kind.startswith("*")}


def test_cases_are_what_the_runtime_launches() -> None:
    """Every product of four models on four cards, as the launcher specialises it, is compiled with
    the same arguments by a case; and nothing is launched that is not compiled ahead."""
    data = json.loads(run_python([], LAUNCHES, "needed"))
    assert data["beyond"] == []
    assert {(found["model"], found["card"]) for found in data["needed"]} == {
        (model, card)
        for model in ("qwen3-8b", "qwen3-4b", "qwen3-1.7b", "llama-3.2-1b")
        for card in (86, 89, 90, 120)
    }
    known: dict[str, list[dict[str, str]]] = {}
    for case in (*load_cases(MODULE), *load_cases(MATRIX)):
        known.setdefault(case.fn.__name__, []).append(numbers(case.signature))
    products = [found for found in data["needed"] if found["kernel"].endswith(("_a16", "_a8"))]
    products = [found for found in products if not found["kernel"].startswith("_")]
    assert {found["kernel"] for found in products} == {
        *("matmul_a16", "gate_up_a16", "head_a16", "matmul_a8", "gate_up_a8", "head_a8"),
    } - {"head_a8"}
    for found in products:
        assert numbers(found["arguments"]) in known[found["kernel"]], found


def test_reading_a_listing() -> None:
    sass = """
        /*0000*/  MOV R1, c[0x0][0x28] ;
        /*0010*/  @!P0 LDS.128 R4, [R2] ;
        /*0020*/  HMMA.16816.F32 R8, R4, R6, R8 ;
        /*0030*/  I2F.S32 R9, R3 ;
        /*0040*/  @P1 BRA 0x10 ;
        /*0050*/  FADD R1, R2, R3 ;
        /*0060*/  BRA 0x50 ;
    """
    body = hot_loop(sass)
    assert [opcode(line) for line in body] == ["LDS", "HMMA", "I2F", "BRA"]
    layout = "#mma = #ttg.nvidia_mma<{versionMajor = 2, warpsPerCTA = [2, 2], instrShape = [16]}>"
    assert mma_warps(layout) == ((2, 2),)


def test_interpreted_functions_are_refused() -> None:
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"):
        compile_kernel(lambda: None, 86, {}, {})
