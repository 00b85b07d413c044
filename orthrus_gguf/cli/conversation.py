"""A conversation of the chat: its messages and settings, and the request that comes of them."""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from orthrus_gguf.cli.loaded import Loaded, say
from orthrus_gguf.cli.options import random_seed
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.request import Request, Result
from orthrus_gguf.sampling import MAX_SEED
from orthrus_gguf.text.chat import Message

#: Share of the context that an answer should have: with less, the oldest turns go.
ANSWER_SHARE = 8


@dataclass
class Conversation:
    """loaded: the model, with the settings as they are now. seed: of every answer; None draws a
    new one each time. messages: the system message if there is one, then pairs of turns.
    """

    loaded: Loaded
    seed: int | None
    messages: list[Message] = field(default_factory=list)
    _tries: int = 0

    @property
    def system(self) -> list[Message]:
        """The system message, if there is one."""
        return [m for m in self.messages[:1] if m.role == "system"]

    @property
    def turns(self) -> list[Message]:
        """All other messages: user and assistant by turns."""
        return self.messages[len(self.system) :]

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = self.system

    def set_system(self, text: str) -> None:
        """Raises OrthrusError for a model that has no place for it."""
        if self.loaded.template is None:
            raise OrthrusError("without a chat template there is no system message")
        self.messages = [*([Message("system", text)] if text else []), *self.turns]

    def take_back(self) -> str | None:
        """Forget the last question and its answer; returns the question, None if there is none."""
        if not self.turns:
            return None
        question = self.messages[-2].content
        del self.messages[-2:]
        return question

    def request(self, question: str, *, again: bool = False) -> Request:
        """The request for an answer to `question`, shortened where prompts are.

        The oldest turns are forgotten, with a line, where they leave no room for an answer.
        again: with another seed than last time, also where one was given. Raises OrthrusError for
        what the template refuses.
        """
        self._tries = self._tries + 1 if again else 0
        seed = random_seed() if self.seed is None else (self.seed + self._tries) % (MAX_SEED + 1)
        self.loaded = replace(self.loaded, sampling=replace(self.loaded.sampling, seed=seed))
        return self._fitting(question)

    def _fitting(self, question: str) -> Request:
        """With as many of the turns as leave room for an answer: what is read of them counts."""
        whole, n_ctx = self._request(question, 0), self.loaded.session.n_ctx
        request = self.loaded.shortened(whole, self._with(question))
        share = n_ctx // ANSWER_SHARE
        most = self.loaded.max_tokens
        wanted = share if most < 0 else min(most, share)
        pairs = len(self.turns) // 2
        if self.loaded.template is None or len(request.prompt) + wanted <= n_ctx or not pairs:
            return request
        kept = range(len(whole.prompt)) if request.selection is None else request.selection.kept

        def left(forgotten: int) -> int:
            """Tokens that are read, about: those of the turns that stay."""
            dropped = len(whole.prompt) - len(self._request(question, forgotten).prompt)
            return len(kept) - bisect_left(kept, dropped)

        # Down to half of the context: everything behind a gap has to be computed again, and should
        # not be at every turn.
        forgotten = 1 + bisect_left(
            range(1, pairs),
            True,
            key=lambda count: left(count) <= n_ctx // 2,
        )
        self.messages = [*self.system, *self.turns[2 * forgotten :]]
        turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
        say(f"[the context of {n_ctx} tokens is full: the oldest {turns} forgotten]")
        return self.loaded.shortened(self._request(question, 0), self._with(question))

    def _request(self, question: str, forgotten: int) -> Request:
        return self.loaded.turn(self._with(question, forgotten))

    def _with(self, question: str, forgotten: int = 0) -> list[Message]:
        """The messages and a question, without the oldest turns."""
        return [*self.system, *self.turns[2 * forgotten :], Message("user", question)]

    def answered(self, question: str, result: Result) -> None:
        """Remember a turn."""
        self.messages += [Message("user", question), Message("assistant", result.text)]

    def save(self, path: Path) -> None:
        """Write the messages as JSON, for nobody else to read. Raises OrthrusError."""
        data = {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            with open(beside, "w", encoding="utf-8", opener=_private) as file:
                json.dump(data, file, ensure_ascii=False, indent=1)
                file.write("\n")
            beside.replace(path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise OrthrusError(f"{path}: cannot be written: {error.strerror}") from error

    def load(self, path: Path) -> None:
        """Go on with what `save` wrote. Raises OrthrusError, and then nothing has changed."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise OrthrusError(f"{path}: cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise OrthrusError(
                f"{path}: no JSON ({error}); name a file that /save wrote"
            ) from error
        self.messages = _messages(data, path)


def _private(name: str, flags: int) -> int:
    return os.open(name, flags, 0o600)


def _messages(data: Any, path: Path) -> list[Message]:
    """The messages of a saved conversation. Raises OrthrusError unless it is one."""
    items = data.get("messages") if isinstance(data, dict) else None
    wrong = OrthrusError(
        f'{path}: expected {{"messages": [{{"role": …, "content": …}}, …]}} with a system message'
        " at most first, then user and assistant by turns, an answer last"
    )
    if not isinstance(items, list):
        raise wrong
    messages = []
    for item in items:
        role, content = (
            (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
        )
        if not isinstance(role, str) or not isinstance(content, str):
            raise wrong
        messages.append(Message(role, content))
    roles = [m.role for m in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise wrong
    return messages
