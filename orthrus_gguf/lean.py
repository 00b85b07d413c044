"""The `gguf` package without what nobody asked for.

Its `__init__` imports everything that it has: YAML, HTTP, progress bars, SentencePiece and writers,
a tenth of a second in which a command could have been answering. Nearly all that is wanted of it
are names and numbers, which one module holds. So the package is put in place unrun: its submodules
are imported as ever, names of `gguf.constants` come from there, and any other name runs `__init__`
after all.
"""

from __future__ import annotations

import sys
import threading
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_PACKAGE = "gguf"
_running = threading.RLock()


class _Unrun(ModuleType):
    """A package whose `__init__` has not run yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's questions
            raise AttributeError(f"module {_PACKAGE!r} has no attribute {name!r}")
        constants = import_module(f"{_PACKAGE}.constants")
        if hasattr(constants, name):
            return getattr(constants, name)
        if find_spec(f"{_PACKAGE}.{name}") is not None:
            return import_module(f"{_PACKAGE}.{name}")
        with _running:  # what `__init__` imports may ask for names itself, on the same thread
            package: ModuleType = self
            if type(self) is _Unrun:
                assert self.__spec__ is not None
                assert self.__spec__.loader is not None
                package.__class__ = _Running
                self.__spec__.loader.exec_module(package)
                package.__class__ = ModuleType
        return ModuleType.__getattribute__(self, name)


class _Running(_Unrun):
    """The same while it runs."""


def install() -> None:
    """Put the package in place, unless it has been imported already or is not installed."""
    if _PACKAGE in sys.modules:
        return
    spec: ModuleSpec | None = find_spec(_PACKAGE)
    if spec is None or spec.loader is None or not spec.submodule_search_locations:
        return
    package = module_from_spec(spec)
    package.__class__ = _Unrun
    sys.modules[_PACKAGE] = package
