"""The house in figures: lines of product by room, the longest functions, the longest files.

    python tests/bench/house.py [CHECKOUT]

Code lines are lines with code: no blank ones, no comments, no docstrings. Docstrings do not count
towards a function's length either; functions of C are not looked at. Works on any checkout, since
it reads files only.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

FOLDERS = ("orthrus_gguf", "converters", "kernels")
LONGEST = 8

_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}


def main(checkout: Path) -> None:
    rooms: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    functions: list[tuple[int, str]] = []
    files: list[tuple[int, str]] = []
    for path in product_files(checkout):
        text = path.read_text(encoding="utf-8")
        is_python = path.suffix == ".py"
        tree = ast.parse(text if is_python else "")
        code = code_lines(text, tree) if is_python else code_lines_of_c(text)
        name, lines = str(path.relative_to(checkout)), text.count("\n")
        for i, more in enumerate((1, lines, len(code))):
            rooms[room(path.relative_to(checkout))][i] += more
        files.append((lines, name))
        functions += [(length, f"{name}: {f}") for f, length in function_lengths(tree, code)]
    print(f"{'room':40} {'files':>5} {'lines':>7} {'code':>7}")
    for name, counts in sorted(rooms.items()):
        print(f"{name:40} {counts[0]:5} {counts[1]:7,} {counts[2]:7,}")
    total = [sum(column) for column in zip(*rooms.values(), strict=True)]
    print(f"{'all':40} {total[0]:5} {total[1]:7,} {total[2]:7,}")
    lengths = sorted(length for length, _ in functions)
    print(f"\n{len(lengths)} functions, median {lengths[len(lengths) // 2]} lines; the longest:")
    for title, longest in (("", functions), ("\nlongest files:\n", files)):
        print(title, end="")
        for length, name in sorted(longest, reverse=True)[:LONGEST]:
            print(f"{length:6}  {name}")


def product_files(checkout: Path) -> Iterator[Path]:
    for folder in FOLDERS:
        files = (checkout / folder).rglob("*.*")
        yield from sorted(path for path in files if path.suffix in (".py", ".c", ".h"))


def room(path: Path) -> str:
    """orthrus_gguf/decode.py → decode; orthrus_gguf/auto/costs.py → auto; runtimes by themselves;
    kernels by their folder."""
    parts = path.parts[1:] if path.parts[0] != "orthrus_gguf" else path.parts
    head, *rest = parts
    depth = 2 if rest[0] in ("runtime", "bench") else 1
    if len(rest) <= depth:
        depth = len(rest) - 1
    if not depth:
        return f"{head}: modules of its own"
    return "/".join([head, *rest[:depth]])


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that hold code."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _NO_CODE:
            found |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                found -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return found


def code_lines_of_c(text: str) -> set[int]:
    """The same; comments are those of whole lines, which start with `//`."""
    lines = enumerate(text.splitlines(), 1)
    return {number for number, line in lines if line.strip() and not line.strip().startswith("//")}


def function_lengths(tree: ast.Module, code: set[int]) -> Iterator[tuple[str, int]]:
    """Name and lines of code of every function."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, len(code & set(range(node.lineno, (node.end_lineno or 0) + 1)))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
