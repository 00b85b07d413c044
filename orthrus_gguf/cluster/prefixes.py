"""What prompts begin alike: a request's text as a chain of hashes, without a tokenizer.

Each hash stands for all text up to its place. Places are the ends of messages, and every `PIECE`
characters of what is longer; a conversation's next turn shares all of those of the turn before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from orthrus_gguf.server.anthropic import BILLING

#: Characters of a piece: about as many tokens as are worth being found in a cache.
PIECE = 256

#: Fields that come before the messages in a prompt, in their order.
HEADS = ("system", "instructions", "tools")

#: Fields that hold the prompt itself, of which a request has one.
BODIES = ("messages", "input", "prompt")

#: Fields that clients change from turn to turn, though no token depends on them.
IGNORED = frozenset({"cache_control", "id"})


class Place(NamedTuple):
    """A place in a prompt. hash: of the text before it. end: characters before it."""

    hash: int
    end: int


Prefix = tuple[Place, ...]


def prefix(body: Any) -> Prefix:
    """The chain of a request's JSON, whichever API it speaks; empty where it holds no prompt."""
    if not isinstance(body, dict):
        return ()
    prompt = next((body[name] for name in BODIES if body.get(name)), None)
    if prompt is None:
        return ()
    heads = [body[name] for name in HEADS if body.get(name)]
    digest, end, found = hashlib.blake2b(digest_size=8), 0, []
    for piece in _pieces([*heads, *(prompt if isinstance(prompt, list) else [prompt])]):
        digest.update(piece.encode("utf-8", errors="surrogatepass"))
        end += len(piece)
        found.append(Place(int.from_bytes(digest.digest(), "big"), end))
    return tuple(found)


def _pieces(parts: list[Any]) -> Iterator[str]:
    if all(isinstance(part, int) for part in parts):  # ids of tokens
        parts = [" ".join(map(str, parts))]
    for part in parts:
        text = part if isinstance(part, str) else json.dumps(_plain(part), sort_keys=True)
        yield from (text[at : at + PIECE] for at in range(0, len(text), PIECE))


def _plain(value: Any) -> Any:
    """A value without what changes from turn to turn."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in IGNORED}
    if isinstance(value, list):
        return [_plain(v) for v in value if not _billing(v)]
    return value


def _billing(part: Any) -> bool:
    return isinstance(part, dict) and str(part.get("text")).startswith(BILLING)
