"""API keys."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers

from orthrus_gguf.server import page_files

#: Paths that need no key: whether the server is there, what it serves, and the page, which asks for
#: the key.
PUBLIC = frozenset({"/health", "/v1/health", "/models", "/v1/models", *page_files.FILES})


class Keys:
    """The keys that open the server; none of them: it is open."""

    def __init__(self, keys: Sequence[str]) -> None:
        # Digests have one length, so that comparing them tells nothing of the keys.
        self._digests = [_digest(key.encode()) for key in keys]

    def fit(self, path: str, headers: Headers) -> bool:
        """Whether a request may come in: `Authorization: Bearer KEY`, or `X-Api-Key: KEY`."""
        if not self._digests or path in PUBLIC:
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        given = _digest(key.strip().encode("utf-8", errors="replace"))
        # All of them are compared, whichever fits.
        return sum(hmac.compare_digest(given, known) for known in self._digests) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
