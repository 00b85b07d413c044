"""Stop strings over streamed text."""

from __future__ import annotations

from collections.abc import Sequence

from orthrus_gguf.errors import OrthrusError


class StopStrings:
    """Passes text through until one of the stop strings appears; the string itself is cut off.

    Text that may turn out to be the beginning of a stop string is held back until it is decided,
    so nothing is ever shown that would have to be taken back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if not all(strings):
            raise OrthrusError("a stop string must not be empty; check --stop")
        self._strings = tuple(strings)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Text that may be shown now. After a hit (see `hit`), nothing more."""
        if self.hit is not None:
            return ""
        self._held += text
        found = [(at, s) for s in self._strings if (at := self._held.find(s)) >= 0]
        if found:
            at, self.hit = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            shown, self._held = self._held[:at], ""
            return shown
        keep = max((_overlap(self._held, s) for s in self._strings), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What is still held back; call it once, at the end of the text."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, string: str) -> int:
    """Length of the longest proper prefix of `string` that ends `text`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
