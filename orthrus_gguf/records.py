"""Dataclasses as the standard library's, but quick to define, and to make where they are frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    import dataclasses
    from operator import attrgetter

    def dataclass(cls=None, /, *, frozen=False, eq=True):
        """`dataclasses.dataclass`, with two differences when it runs.

        Only `__init__` is compiled, which leaves a quarter of the time: a command defines sixty
        such classes before it does anything. And frozen ones are so to the type checker alone: each
        field would go through `object.__setattr__`, and making them was most of what the host did
        for a token.
        """

        def made(cls):
            own = vars(cls)
            cls = dataclasses.dataclass(eq=False, repr=False)(cls)
            methods = {"__repr__": _repr}
            if eq:
                methods |= _comparisons(cls, hashable=frozen)
            for name, method in methods.items():
                if name not in own:
                    setattr(cls, name, method)
            return cls

        return made if cls is None else made(cls)

    def _comparisons(cls, *, hashable):
        names = [field.name for field in dataclasses.fields(cls) if field.compare]
        values = attrgetter(*names) if names else type

        def equal(self, other):
            if other.__class__ is not self.__class__:
                return NotImplemented
            return values(self) == values(other)

        def hashed(self):
            return hash(values(self))

        return {"__eq__": equal, "__hash__": hashed if hashable else None}

    def _repr(self):
        shown = (field.name for field in dataclasses.fields(self) if field.repr)
        inside = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{self.__class__.__qualname__}({inside})"
