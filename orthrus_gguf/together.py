"""Generations of several sessions in one pass."""

from __future__ import annotations

from orthrus_gguf.decode import Done, run_together
from orthrus_gguf.engine import Generation
from orthrus_gguf.request import Piece
from orthrus_gguf.runtime.protocol import Model, Segment


class Together:
    """Runs generations of sessions on one model side by side, all of them in every pass.

    `join` at any time; one that has ended leaves, and so does one that failed
    (`Generation.error`). What each says does not depend on the others.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._waiting: dict[Generation, list[Segment]] = {}
        self._ready: list[tuple[Generation, Piece]] = []

    def join(self, generation: Generation) -> None:
        """Let it take part from the next pass on. Raises ValueError if its session has another one
        under way: a cache holds one text."""
        if any(other.session is generation.session for other in self._waiting):
            raise ValueError("the session has another generation under way")
        self._advance(generation, None)

    def leave(self, generation: Generation) -> None:
        """Cancel a generation."""
        self._waiting.pop(generation, None)
        generation.cancel()

    def __len__(self) -> int:
        """Generations under way."""
        return len(self._waiting)

    def __contains__(self, generation: Generation) -> bool:
        """Whether it is under way."""
        return generation in self._waiting

    def step(self, prompt_rows: int | None = None) -> list[tuple[Generation, Piece]]:
        """Run one pass; returns the text that came since the last call.

        prompt_rows: prompts take part, in turn, until they have so many rows; None: all of them do.
        """
        if self._waiting:
            members = self._members(prompt_rows)
            wanted = [self._waiting[generation] for generation in members]
            for generation, done in zip(members, run_together(self._model, wanted), strict=True):
                self._advance(generation, done)
        ready, self._ready = self._ready, []
        return ready

    def _members(self, prompt_rows: int | None) -> list[Generation]:
        """Who takes part in the next pass. Those that did last come last among equals."""
        members, rows = [], 0
        for generation, segments in self._waiting.items():
            if generation.in_prompt and prompt_rows is not None:
                if rows >= prompt_rows:
                    continue
                rows += sum(map(len, segments))
            members.append(generation)
        return members

    def _advance(self, generation: Generation, done: Done | None) -> None:
        self._waiting.pop(generation, None)
        pieces, segments = generation.advance(done)
        self._ready += [(generation, piece) for piece in pieces]
        if segments:
            self._waiting[generation] = segments
