"""Dependencies point one way: read from the import statements, not from what happens to load.

A *room* is a folder or a module directly in `orthrus_gguf`, or one of the other packages. Imports
in functions and under `TYPE_CHECKING` count like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    ROOT / "orthrus_gguf",
    *sorted((ROOT / "converters").glob("orthrus_*")),
    *sorted((ROOT / "kernels").glob("orthrus_*")),
)

#: Room → rooms that it may import.
ALLOWED: dict[str, set[str]] = {
    "__init__": {"lean"},
    "lean": set(),
    "errors": set(),
    "records": set(),
    "signals": set(),
    "entry": set(),
    "__main__": {"entry", "errors"},
    "command": {"__init__", "entry", "errors", "records"},
    "hub": {"errors"},
    "this_machine": {"__init__"},
    "gguf": {"errors", "records"},
    "ggml": {"errors"},
    "model": {"errors", "gguf", "records"},
    "text": {"errors", "gguf", "records"},
    "sampling": {"errors", "records"},
    "runtime": {
        *("errors", "ggml", "gguf", "model", "orthrus_cpu_kernels", "orthrus_kernels", "records"),
        "sampling",
    },
    "drafting": {"errors", "model", "records", "runtime", "sampling"},
    "auto": {"__init__", "drafting", "model", "records", "runtime", "sampling", "this_machine"},
    "decode": {"drafting", "errors", "records", "runtime", "sampling"},
    "stats": {"drafting", "records"},
    "prefill": {"errors", "model", "records", "runtime", "text"},
    "request": {"drafting", "prefill", "records", "sampling", "stats"},
    "engine": {"decode", "drafting", "errors", "request", "runtime", "sampling", "stats", "text"},
    "together": {"decode", "engine", "request", "runtime"},
    "server": {
        *("__init__", "decode", "drafting", "engine", "errors", "model", "prefill"),
        *("request", "runtime", "sampling", "text", "together"),
    },
    "training": {
        *("drafting", "engine", "errors", "gguf", "model", "orthrus_converters", "runtime"),
        *("request", "sampling", "signals", "text", "together"),
    },
    "inspection": {"errors", "gguf", "model", "runtime"},
    "bench": {
        *("auto", "decode", "drafting", "engine", "errors", "model", "orthrus_kernels"),
        *("request", "runtime", "sampling", "stats", "text"),
    },
    "cli": {
        *("auto", "bench", "command", "decode", "drafting", "engine", "entry", "errors", "gguf"),
        *("hub", "server", "signals"),
        *("inspection", "model", "prefill", "records", "request", "runtime", "sampling", "text"),
        *("this_machine", "training"),
    },
    "cluster": {"cli", "errors", "server"},
    "orthrus_kernels": set(),
    "orthrus_cpu_kernels": set(),
    "orthrus_converters": {
        *("command", "entry", "errors", "ggml", "gguf", "hub", "model", "signals", "text"),
    },
}

#: Tools that run on a GPU, and say so.
GPU_CHECKS = tuple(
    f"orthrus_gguf.bench.gpu_{name}"
    for name in ("checks", "figures", "hybrid", "sanitizer", "stage")
)

#: Packages that are heavy, or a concern of few → the modules, or folders, that may import them.
FEW: dict[str, tuple[str, ...]] = {
    "torch": (
        *("orthrus_gguf.runtime.load", "orthrus_gguf.runtime.reference"),
        *("orthrus_gguf.runtime.reference_cache", "orthrus_gguf.runtime.reference_drafter"),
        *("orthrus_gguf.runtime.reference_hybrid", "orthrus_gguf.runtime.reference_mtp"),
        "orthrus_gguf.runtime.cuda",
        *("orthrus_gguf.training", *GPU_CHECKS, "orthrus_kernels"),
    ),
    "triton": (*GPU_CHECKS, "orthrus_kernels"),
    "ray": ("orthrus_gguf.cluster",),
    "starlette": ("orthrus_gguf.cluster", "orthrus_gguf.server"),
    "uvicorn": ("orthrus_gguf.server",),
    "llguidance": ("orthrus_gguf.server",),
    "prometheus_client": ("orthrus_gguf.server",),
    "matplotlib": ("orthrus_gguf.bench.comparison.plots",),
    "orthrus_kernels": ("orthrus_gguf.runtime.cuda", *GPU_CHECKS, "orthrus_kernels"),
    "orthrus_cpu_kernels": (
        *("orthrus_gguf.runtime.cpu", "orthrus_gguf.runtime.load", "orthrus_gguf.runtime.memory"),
        "orthrus_cpu_kernels",
    ),
    "orthrus_converters": ("orthrus_converters", "orthrus_gguf.training"),
}

#: Implementations of `Model`. None may borrow from another: `reference` is the oracle of the rest.
RUNTIMES = ("reference", "ggml", "cpu", "cuda")


@cache
def modules() -> dict[str, ast.Module]:
    """Name → code, of every Python file of the product. Names of packages stand for their
    `__init__.py`."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(
            ".__init__"
        ): ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted(package.rglob("*.py"))
    }


def imports(tree: ast.Module) -> Iterator[str]:
    """What is imported: modules as far as they are ours, and names of the packages of others."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in modules() else node.module


def room(module: str) -> str | None:
    """The room of a module; None for the modules of others."""
    parts = module.split(".")
    if module == "orthrus_gguf":
        return "__init__"
    if parts[0] == "orthrus_gguf":
        return parts[1]
    return parts[0] if parts[0].startswith("orthrus_") else None


def runtime(module: str) -> str | None:
    """Which implementation a module belongs to, if to any."""
    parts = module.split(".")
    if parts[:2] != ["orthrus_gguf", "runtime"] or len(parts) < 3:
        return None
    return next((name for name in RUNTIMES if parts[2].split("_")[0] == name), None)


@pytest.mark.parametrize("name", modules())
def test_imports(name: str) -> None:
    home = room(name)
    assert home is not None
    for target in imports(modules()[name]):
        few = FEW.get(target.split(".")[0])
        if few is not None:
            assert any(f"{name}.".startswith(f"{user}.") for user in few), f"{name}: {target}"
        there = room(target)
        if there not in (None, home):
            assert there in ALLOWED[home], f"{name} imports {target}"
        if runtime(name) is not None and runtime(target) is not None:
            assert runtime(name) == runtime(target), f"{name} borrows from {target}"


def test_every_file_belongs_to_a_room() -> None:
    """The table names all rooms, and no others; outside of the packages there is no code."""
    assert {room(name) for name in modules()} == {*ALLOWED}
    outside = [
        path
        for folder in ("orthrus_gguf", "converters", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if not any(path.is_relative_to(package) for package in PACKAGES)
    ]
    assert not outside


def test_the_table_allows_no_more_than_is_used() -> None:
    used: dict[str, set[str]] = {name: set() for name in ALLOWED}
    for name, tree in modules().items():
        home = room(name)
        assert home is not None
        used[home] |= {there for t in imports(tree) if (there := room(t)) not in (None, home)}
    assert used == ALLOWED


def circle(edges: Mapping[str, set[str]]) -> list[str]:
    """A way that comes back to where it began; empty if there is none."""
    done: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for there in sorted(edges[path[-1]]):
            if there in path:
                return [*path[path.index(there) :], there]
            if there not in done and (found := search([*path, there])):
                return found
        done.add(path[-1])
        return []

    return next((found for start in edges if (found := search([start]))), [])


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c", "d"}, "c": set[str](), "d": {"b"}}
    assert circle(edges) == ["b", "d", "b"]
    assert circle({**edges, "d": set()}) == []


def test_no_circles_between_rooms() -> None:
    assert not circle(ALLOWED)


def test_no_circles_between_modules() -> None:
    edges = {
        name: {target for target in imports(tree) if target in modules() and target != name}
        for name, tree in modules().items()
    }
    assert not circle(edges)


def test_commands_start_without_torch() -> None:
    """The core install has no torch: importing the commands must not ask for it."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['triton'] = None;"
        "import orthrus_gguf.cli.run, orthrus_gguf.cli.bench, orthrus_gguf.cli.inspect;"
        "import orthrus_gguf.runtime.ggml.model, orthrus_gguf.runtime.cpu.model;"
        "import orthrus_converters.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
