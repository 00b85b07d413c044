"""The kernels in a process of their own: on another kind of machine, and under sanitizers.

Both run what the objects here run (`cpu_cases.py`): products of every type, and whole passes with
every type of cache. Portable C in this process says what must come out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import gguf
import pytest
from cpu_calls import Case, assert_same, run_driver, run_here
from cpu_cases import WEIGHTS, attention_passes, hybrid_passes, passes, products
from hf_hybrid import TEXT, WIDE, weights, write_hybrid
from numpy.typing import NDArray
from orthrus_converters.cli import main
from orthrus_cpu_kernels.library import Kernels, load
from synthetic_model import model_shape, write_model

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.runtime.cache_layout import CACHE_TYPES

Make = Callable[..., list[str]]

GCC_ARM, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"

#: Compiles in a fraction of the time that -O1 takes, most of all the products; the same bits.
QUICK = "-Og"

#: Every error ends the process. (Leaks are the driver's own business: it ends anyway.)
SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"


def mixed_types(name: str) -> gguf.GGMLQuantizationType:
    """All forms of activations; gate and up of different ones."""
    types = gguf.GGMLQuantizationType
    known = {"attn_output": types.Q8_0, "ffn_gate": types.Q4_K, "ffn_up": types.Q5_0}
    known |= {"attn_q": types.Q6_K, "attn_k": types.Q4_1, "ffn_down": types.Q4_K}
    return known.get(name.split(".")[2] if name.startswith("blk.") else name, types.F16)


@pytest.fixture(scope="module")
def cases(portable: Kernels, tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Products, and passes of a small model; heads of 96 elements make three blocks."""
    found = [one.case(portable, add=True) for kind in WEIGHTS for one in products(kind)]
    path = tmp_path_factory.mktemp("passes") / "model.gguf"
    config = model_shape(n_ff=256, n_vocab=80, n_head=6, n_head_kv=2, head_dim=96)
    write_model(load_library().api, path, config, mixed_types)
    for k, v in zip(CACHE_TYPES, [*CACHE_TYPES][::-1], strict=True):
        found += passes(path, portable, k, v)
    for k, v in (("f32", "q4_0"), ("q8_0", "f16")):
        found += attention_passes(path, load(), k, v)
    for number, overrides in enumerate(({}, WIDE)):
        hybrid = path.with_name(f"hybrid{number}.gguf")
        folder = write_hybrid(hybrid.with_suffix(""), TEXT | overrides, weights(overrides))
        assert main([str(folder), str(hybrid), "--type", "f32"]) == 0
        found += hybrid_passes(hybrid, portable)
    return found


@pytest.fixture(scope="module")
def expected(portable: Kernels, cases: list[Case]) -> list[list[NDArray[Any]]]:
    return [run_here(portable, case) for case in cases]


def test_passes_are_the_same_on_all_objects(
    objects: dict[str, Kernels], cases: list[Case], expected: list[list[NDArray[Any]]]
) -> None:
    """Caches, floats between steps, logits: bit for bit. (Products alone: `test_products.py`.)"""
    for name, kernels in objects.items():
        for case, wanted in zip(cases, expected, strict=True):
            if case.name == "pass":
                assert_same(run_here(kernels, case), wanted, name)


@pytest.mark.parametrize(
    "name", ["neoni8mm", "neon", pytest.param("portable", marks=pytest.mark.slow)]
)
def test_arm_gives_the_bits_of_portable_c(
    build: ModuleType,
    driver: Make,
    cases: list[Case],
    expected: list[list[NDArray[Any]]],
    name: str,
) -> None:
    if shutil.which(GCC_ARM) is None or shutil.which(QEMU) is None:
        pytest.skip(
            "NEON needs a cross compiler and an emulator: apt-get install gcc-aarch64-linux-gnu"
            " libc6-dev-arm64-cross qemu-user"
        )
    command = driver(GCC_ARM, *build.targets("aarch64")[name], QUICK, "-static")
    found = run_driver([QEMU, *command], cases)
    for case, ours, wanted in zip(cases, found, expected, strict=True):
        assert_same(ours, wanted, f"{name} (aarch64), {case.name}")


@pytest.fixture
def sanitized(build: ModuleType, driver: Make, objects: dict[str, Kernels]) -> Callable[..., Any]:
    """`sanitized(name, cases)`: outputs of cases, by a driver where every buffer is a block of its
    own, so that a byte too far is seen."""

    def run(name: str, cases: Sequence[Case]) -> list[list[NDArray[Any]]]:
        if name not in objects:
            pytest.skip(f"this machine does not run {name}")
        command = driver(build.compiler(), *build.targets()[name], QUICK, *SANITIZERS)
        return run_driver(command, cases, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})

    return run


#: Portable C has the same loops, but takes long to compile with sanitizers.
@pytest.mark.parametrize("name", ["avx2", pytest.param("portable", marks=pytest.mark.slow)])
def test_nothing_is_out_of_bounds_or_undefined(
    sanitized: Callable[..., Any],
    cases: list[Case],
    expected: list[list[NDArray[Any]]],
    name: str,
) -> None:
    for case, ours, wanted in zip(cases, sanitized(name, cases), expected, strict=True):
        assert_same(ours, wanted, f"{name} under sanitizers, {case.name}")


def test_sanitizers_would_notice(sanitized: Callable[..., Any], portable: Kernels) -> None:
    """A product whose result is one float too short."""
    case = next(products(gguf.GGMLQuantizationType.F32)).case(portable)
    for number in case.outputs:
        case.buffers[number] = case.buffers[number][:-4]
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        sanitized("avx2", [case])
