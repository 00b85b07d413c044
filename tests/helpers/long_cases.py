"""Cases of a test of which a few run always, and the rest with the long tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(always: Iterable[Any], others: Iterable[Any]) -> list[Any]:
    """Values for `pytest.mark.parametrize`; a tuple holds a value per name."""
    rest = [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in others
    ]
    return [*always, *rest]
