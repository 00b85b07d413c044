"""The one exception type that users are meant to see, and what helps those who mistyped."""

from __future__ import annotations

from collections.abc import Iterable


class OrthrusError(Exception):
    """A problem that the user can act on: one line that says where, what, and what to do next.

    Commands print it without a traceback (unless `--verbose`) and exit with code 1.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ ", did you mean X?", with the word of `known` that looks most like it; "" if none does."""
    from difflib import get_close_matches

    names = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), names, n=1, cutoff=0.65)
    return f", did you mean {names[close[0]]}?" if close else ""
