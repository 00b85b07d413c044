"""Prompts, shortened to what matters in them (lossy, and only where it is asked for).

A small model, or the first layers of the model itself, reads the prompt; what the end of it attends
to stays, as a shorter prompt (Speculative Prefill, arXiv 2502.02789; 2603.02631 across
vocabularies). System and tool messages, control tokens, the first tokens and the last ones always
stay. The next turn of a conversation begins with what was kept of the turns before, so that the
cache still serves it, and only what is new is scored.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.prefill.choice import choose, may_go
from orthrus_gguf.prefill.scorer import Scorer
from orthrus_gguf.prefill.spans import within
from orthrus_gguf.records import dataclass

#: Roles whose messages may be shortened; what others say always stays.
COMPRESSIBLE = ("user", "assistant")

#: Prompts that are remembered, so that what follows them keeps the same of them.
REMEMBERED = 64


@dataclass(frozen=True)
class Compression:
    """How much to keep. keep: share of what may be dropped. threshold: tokens of a prompt, or of
    what a turn adds to it, up to which it is read whole. Raises OrthrusError."""

    keep: float
    threshold: int

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise OrthrusError(f"{self.keep:g}: expected a share, more than 0 and at most 1")


@dataclass(frozen=True)
class Selection:
    """What was kept of a prompt. tokens: those, at the positions `kept` of the whole prompt, which
    has `full`. scored: tokens that the scorer read for it, and seconds that it took. scorer: its
    name."""

    tokens: tuple[int, ...]
    kept: tuple[int, ...]
    full: int
    scored: int
    seconds: float
    scorer: str

    @property
    def words(self) -> str:
        """One line: it says that the answer is not one to the whole prompt."""
        share = 100 * len(self.tokens) / self.full
        return (
            f"{len(self.tokens)} of {self.full} prompt tokens ({share:.0f} %), chosen by"
            f" {self.scorer} in {self.seconds:.2f} s; the answer may differ from that to all of it"
        )

    def places(self, places: Iterable[int]) -> tuple[int, ...]:
        """Where places of the whole prompt are in what was kept of it, in order."""
        return tuple(sorted({bisect_left(self.kept, place) for place in places}))

    def to_json(self) -> dict[str, Any]:
        return {
            "lossy": True,
            "scorer": self.scorer,
            "prompt_tokens": self.full,
            "kept_tokens": len(self.tokens),
            "scored_tokens": self.scored,
            "scoring_ms": self.seconds * 1e3,
        }


def label(selection: Selection | None) -> dict[str, Any]:
    """What results say in JSON: nothing, unless their prompt was shortened."""
    return {} if selection is None else {"prefill": selection.to_json()}


@dataclass(frozen=True)
class _Known:
    """A prompt, what was kept of it and how, and where the text of its last message ends."""

    compression: Compression
    tokens: NDArray[np.int32]
    kept: NDArray[np.int32]
    end: int


class Compressor:
    """Shortens prompts; safe to use from several threads, one of which scores at a time: the cache
    for a long prompt takes much memory. What is not to be scored waits for nobody."""

    def __init__(self, scorer: Scorer, compression: Compression) -> None:
        self.scorer, self.compression = scorer, compression
        self._known: deque[_Known] = deque(maxlen=REMEMBERED)
        self._scoring, self._memory = threading.Lock(), threading.Lock()

    @property
    def words(self) -> str:
        """What is done where nothing else is asked for."""
        usual = self.compression
        return (
            f"prompts of more than {usual.threshold} tokens are shortened: {100 * usual.keep:g} %"
            f" stay, chosen by {self.scorer.name}; answers to them may differ"
        )

    def to_json(self) -> dict[str, Any]:
        """What is done where nothing else is asked for."""
        usual = self.compression
        return {"scorer": self.scorer.name, "keep": usual.keep, "threshold": usual.threshold}

    def select(
        self,
        prompt: Sequence[int],
        contents: Iterable[str] | None = None,
        compression: Compression | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> Selection | None:
        """What to keep of a prompt; None where that is all of it.

        contents: texts in the prompt, in their order, of which tokens may be dropped; None: any.
        compression: another than usual. on_progress: is told how many tokens the scorer has read.
        Raises OrthrusError (see `Scorer.scores`).
        """
        compression = compression or self.compression
        if compression.keep == 1:
            return None
        return self._select(np.array(prompt, np.int32), contents, compression, on_progress)

    def _select(
        self,
        prompt: NDArray[np.int32],
        contents: Iterable[str] | None,
        compression: Compression,
        on_progress: Callable[[int], None] | None,
    ) -> Selection | None:
        seconds = 0.0
        inside = within(self.scorer.target, prompt.tolist(), contents)
        before, kept = self._before(prompt, compression)
        droppable = may_go(inside)
        droppable[:before] = False
        read = np.zeros(0, np.int32)
        stay = np.ones(len(prompt), bool)
        if len(prompt) - before > compression.threshold and droppable.any():
            # What is kept of the turns before, and what is new.
            read = np.concatenate([kept, np.arange(before, len(prompt), dtype=np.int32)])
            scores = np.zeros(len(prompt), np.float32)
            with self._scoring:
                began = time.perf_counter()
                scores[read] = self.scorer.scores(prompt[read].tolist(), on_progress)
                seconds = time.perf_counter() - began
            stay = choose(scores, droppable, compression.keep)
        stay[:before] = False
        stay[kept] = True
        if before < len(prompt):
            end = int(np.flatnonzero(inside)[-1]) + 1 if inside.any() else len(prompt)
            positions = np.flatnonzero(stay).astype(np.int32)
            with self._memory:
                self._known.append(_Known(compression, prompt, positions, end))
        if stay.all():
            return None
        return Selection(
            tuple(prompt[stay].tolist()),
            tuple(np.flatnonzero(stay).tolist()),
            len(prompt),
            len(read),
            seconds,
            self.scorer.name,
        )

    def _before(
        self, prompt: NDArray[np.int32], compression: Compression
    ) -> tuple[int, NDArray[np.int32]]:
        """How many tokens at the beginning are an earlier prompt's, and which were kept of them.

        All messages of the earlier prompt must be there: another question about the same text has
        other answers in it.
        """
        best, found = 0, np.zeros(0, np.int32)
        with self._memory:
            everything = list(self._known)
        for known in everything:
            most = min(len(known.tokens), len(prompt))
            unlike = np.flatnonzero(known.tokens[:most] != prompt[:most])
            common = int(unlike[0]) if len(unlike) else most
            if known.compression == compression and common >= known.end and common > best:
                best, found = common, known.kept[known.kept < common]
        return best, found
