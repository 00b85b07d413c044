"""An answer as a list of blocks, one after another: thoughts, texts, calls of tools."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from orthrus_gguf.server.chat_requests import Chat
from orthrus_gguf.server.events import End, Text
from orthrus_gguf.server.splitter import Delta, Part, Splitter


@dataclass
class Block:
    """kind: REASONING, CONTENT or CALL. name: of the tool. text: so far; a call's: arguments."""

    kind: Part
    id: str
    name: str = ""
    text: str = ""


class Change(Enum):
    """What happens to the block that is the last one then."""

    OPENED = "opened"
    GREW = "grew"
    CLOSED = "closed"


class Blocks:
    """Push events; `blocks` holds what has come."""

    def __init__(self, chat: Chat) -> None:
        self._splitter = Splitter(thinking=chat.prompt.thinking, tools=chat.tools)
        self.blocks: list[Block] = []
        self._open = False

    @property
    def index(self) -> int:
        """Of the last block."""
        return len(self.blocks) - 1

    @property
    def calls(self) -> bool:
        """Whether tools are called."""
        return any(block.kind is Part.CALL for block in self.blocks)

    def push(self, event: Text | End) -> Iterator[tuple[Change, Block, str]]:
        """What changes, change by change. The text is that which came."""
        if isinstance(event, Text):
            for delta in self._splitter.push(event.text):
                yield from self._apply(delta)
            return
        for delta in self._splitter.flush():
            yield from self._apply(delta)
        if not self.blocks:
            yield self._opened(Block(Part.CONTENT, secrets.token_hex(12)))
        yield from self._close()

    def _apply(self, delta: Delta) -> Iterator[tuple[Change, Block, str]]:
        kind = Part.CALL if delta.part is Part.ARGUMENTS else delta.part
        if delta.part is Part.CALL:
            yield from self._close()
            yield self._opened(Block(kind, secrets.token_hex(12), name=delta.text))
            return
        if not self._open or self.blocks[-1].kind is not kind:
            yield from self._close()
            yield self._opened(Block(kind, secrets.token_hex(12)))
        self.blocks[-1].text += delta.text
        yield Change.GREW, self.blocks[-1], delta.text

    def _opened(self, block: Block) -> tuple[Change, Block, str]:
        self.blocks.append(block)
        self._open = True
        return Change.OPENED, block, ""

    def _close(self) -> Iterator[tuple[Change, Block, str]]:
        if self._open:
            self._open = False
            yield Change.CLOSED, self.blocks[-1], ""
