"""`records.dataclass` beside the standard library's."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import field
from typing import Any

import pytest

from orthrus_gguf import records

#: The standard library's, and ours as it is when it runs.
Decorator = Callable[..., Any]
BOTH: list[Decorator] = [dataclasses.dataclass, records.dataclass]


def made(decorator: Decorator, **settings: bool) -> tuple[Any, Any, Any]:
    """A class, one that inherits from it, and one without fields."""

    @decorator(**settings)
    class Point:
        """A docstring."""

        x: int
        names: tuple[str, ...] = ()
        cache: list[int] = field(default_factory=list, compare=False, repr=False)

        @property
        def twice(self) -> int:
            return 2 * self.x

    @decorator(**settings)
    class Named(Point):
        """Another."""

        name: str = "none"

        def __repr__(self) -> str:
            return self.name

    @decorator(**settings)
    class Empty:
        """Nothing."""

    return Point, Named, Empty


@pytest.mark.parametrize(
    "settings", [{}, {"frozen": True}, {"eq": False}, {"frozen": True, "eq": False}]
)
def test_it_behaves_as_the_standard_library_s(settings: dict[str, bool]) -> None:
    def story(decorator: Decorator) -> list[object]:
        Point, Named, Empty = made(decorator, **settings)
        points = Point(1, ("a",), [1]), Point(1, ("a",), [2]), Point(2), Named(1, ("a",))
        equal = [[a == b for b in points] for a in points]
        shown = [repr(point) for point in (*points, Empty())]
        changed = dataclasses.replace(points[0], x=7)
        hashed = Point.__hash__ is not None
        same = hashed and hash(points[0]) == hash(points[1])
        return [
            *(equal, shown, changed.x, changed.twice, dataclasses.asdict(points[1]), hashed, same),
            *(Empty() == Empty(), points[0] == 1, Point.__match_args__, Point.__doc__),
        ]

    theirs, ours = map(story, BOTH)
    assert ours == theirs


def test_a_missing_field_is_an_error_as_there() -> None:
    point, _, _ = made(records.dataclass)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        point()


def test_all_that_a_run_defines_is_quick_to_define() -> None:
    code = (
        "import dataclasses, sys, orthrus_gguf.cli.run, orthrus_gguf.runtime.cpu.model\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if name.startswith('orthrus_gguf'):\n"
        "        for kind in vars(module).values():\n"
        "            own = getattr(kind, '__module__', None) == name\n"
        "            if own and isinstance(kind, type) and dataclasses.is_dataclass(kind):\n"
        "                quick = not kind.__dataclass_params__.repr\n"
        "                print(quick, kind.__module__, kind.__name__)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = set(done.splitlines())
    assert len(lines) > 40
    assert [line for line in lines if not line.startswith("True")] == []
