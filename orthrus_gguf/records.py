"""Records: dataclasses that nobody changes, of which every token makes several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

T = TypeVar("T")

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform

    @dataclass_transform(frozen_default=True)
    def record(*, eq: bool = True) -> Callable[[type[T]], type[T]]:
        """A frozen dataclass, as far as the type checker can tell; a plain one when it runs.

        A frozen one takes six to eight times as long to make (each field goes through
        `object.__setattr__`), and making them was most of what the host did for a token.
        """
        ...
else:
    # Read as it stands by the type checker, which must see what decorates a class.
    def record(*, eq=True):
        return dataclass(eq=eq, unsafe_hash=eq)
