"""Dependencies point one way: read from the import statements, not from what happens to load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    ROOT / "orthrus_gguf",
    ROOT / "converters/orthrus_converters",
    ROOT / "kernels/orthrus_kernels",
)

#: Room → rooms that it may import. A room is a module of orthrus_gguf or a folder in it.
ALLOWED = {
    "__init__": set(),
    "errors": set(),
    "command": {"__init__", "errors"},
    "gguf": {"errors"},
    "config": {"errors", "gguf"},
    "tensors": {"config", "errors", "gguf"},
    "model_file": {"config", "errors", "gguf", "tensors"},
    "cache_layout": {"config", "errors"},
    "inspection": {"cache_layout", "config", "errors", "gguf", "model_file", "tensors"},
    "segments": {"config"},
    "sampling": {"errors"},
    "stop": {"errors"},
    "vocab": {"errors", "gguf"},
    "tokenizer": {"errors", "gguf", "vocab"},
    "chat": {"errors", "gguf", "tokenizer"},
    "chat_worker": set(),
    "ggml": {"errors"},
    "runtime": {
        "cache_layout",
        "config",
        "errors",
        "gguf",
        "ggml",
        "model_file",
        "policy",
        "sampling",
        "segments",
        "tensors",
    },
    "drafts": {"config", "sampling", "segments"},
    "lookup": {"drafts"},
    "policy": {"drafts", "errors", "segments"},
    "decode": {"drafts", "lookup", "policy", "sampling", "segments"},
    "acceptance": {"drafts", "policy"},
    "costs": {"policy"},
    "machine": {"__init__"},
    "calibration": {"__init__", "costs", "machine", "policy", "segments"},
    "outlook": {"drafts", "policy"},
    "riders": {"drafts", "policy"},
    "controller": {"acceptance", "costs", "drafts", "outlook", "policy", "riders"},
    "statistics": {"decode"},
    "qwen3_shapes": {"config"},
    "prediction": {"config", "errors", "qwen3_shapes", "tensors"},
    "benchmark": {"decode", "errors", "sampling", "segments"},
    "engine": {"decode", "errors", "sampling", "segments", "statistics", "stop", "tokenizer"},
    "comparison": {
        "chat",
        "config",
        "costs",
        "decode",
        "drafts",
        "engine",
        "errors",
        "policy",
        "sampling",
        "segments",
        "statistics",
        "tokenizer",
    },
    "simulation": {
        "calibration",
        "comparison",
        "config",
        "controller",
        "costs",
        "decode",
        "drafts",
        "errors",
        "policy",
        "prediction",
        "qwen3_shapes",
        "sampling",
        "segments",
        "statistics",
    },
    "orthrus_kernels": set(),
    "orthrus_converters": {
        "__init__",
        "command",
        "config",
        "errors",
        "ggml",
        "gguf",
        "model_file",
        "tensors",
    },
}
ANYTHING = {"cli"}

#: The only module of the runtime package that may use the converters: it makes synthetic models.
CONVERTER_USERS = {"orthrus_gguf.cli.bench_synthetic"}

#: Tools on top of the decode loop that live with the runtime they check.
CHECKS = {"orthrus_gguf.bench.gpu_check", "orthrus_gguf.bench.gpu_figures"}

#: The only package that may use the kernels, or torch at the top of its modules.
KERNEL_USER = "orthrus_gguf.runtime.cuda."

#: Heavy third-party packages → the only modules of the two other packages that may import them.
HEAVY = {
    "torch": {"orthrus_gguf.runtime", "orthrus_gguf.runtime.reference"},
    "triton": set(),
    "matplotlib": {"orthrus_gguf.bench.comparison.plots"},
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for package in PACKAGES:
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__") if len(parts) > 2 else ".".join(parts)
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(module: str) -> str | None:
    parts = module.split(".")
    if parts[0] in ("orthrus_converters", "orthrus_kernels"):
        return parts[0]
    if parts[0] != "orthrus_gguf":
        return None
    return parts[1] if len(parts) > 1 else "__init__"


ROOMS = {path.stem for path in (ROOT / "orthrus_gguf").glob("*") if path.name != "__pycache__"}


@pytest.mark.parametrize(
    ("name", "tree"), [pytest.param(*module, id=module[0]) for module in modules()]
)
def test_imports(name: str, tree: ast.Module) -> None:
    home = room(name)
    assert home is not None
    for target in imports(tree):
        for package, users in HEAVY.items():
            if target.split(".")[0] == package and home != "orthrus_kernels":
                allowed = name in users or name.startswith(KERNEL_USER)
                assert allowed, f"{name} imports {package}"
        there = room(target)
        if there == "orthrus_kernels" and home != there:
            assert name.startswith(KERNEL_USER), f"{name} imports {target}"
        if there == "orthrus_converters" and home != there:
            assert name in CONVERTER_USERS, f"{name} imports {target}"
        if there is None or there == home or home in ANYTHING or there not in ROOMS:
            continue
        if name in CHECKS and there == "decode":
            continue
        assert there in ALLOWED[home], f"{name} imports {target}"


def test_the_table_is_complete() -> None:
    assert {*ALLOWED, *ANYTHING} == {*ROOMS, "orthrus_converters", "orthrus_kernels"}


def test_commands_start_without_torch() -> None:
    """The core install has no torch: importing the commands must not ask for it."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['triton'] = None;"
        "import orthrus_gguf.cli.run, orthrus_converters.cli, orthrus_gguf.runtime.ggml.model"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
