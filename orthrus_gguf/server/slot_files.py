"""Slots on disk: the rows of a conversation, saved and restored."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np

from orthrus_gguf.engine import Rows
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.server.api_errors import ApiError, wrong
from orthrus_gguf.server.slots import Slot

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class SlotFiles:
    """A folder of saved slots. identity: of the model and its cache, which they must be of."""

    def __init__(self, folder: Path, identity: str) -> None:
        """Raises OrthrusError if there is no such folder."""
        if not folder.is_dir():
            raise OrthrusError(f"--slot-save-path {folder}: no such folder; make it first")
        self._folder, self._identity = folder, identity

    def path(self, name: str) -> Path:
        """The file of that name. Raises ApiError for names that could lead elsewhere."""
        if not _NAME.fullmatch(name):
            raise wrong("filename", "expected letters, digits, . _ and -, not beginning with a dot")
        path = self._folder / name
        if path.is_symlink():
            raise wrong("filename", "is a link; choose another name")
        return path

    def save(self, slot: Slot, path: Path) -> int:
        """Write what an idle slot holds; returns its tokens."""
        session = _idle(slot).session
        tokens = list(session.held)
        tokens = tokens[: session.reachable(len(tokens))]
        rows = session.take(tokens)
        parts = (*rows.model, *rows.drafter)
        counts = {"drafted": rows.drafted, "model_parts": len(rows.model)}
        head = json.dumps({"identity": self._identity, "tokens": tokens, **counts})
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                np.savez(
                    file,
                    head=np.frombuffer(head.encode(), np.uint8),
                    **{f"part{i}": part for i, part in enumerate(parts)},  # type: ignore[arg-type]
                )
            beside.replace(path)
        except OSError as error:
            raise ApiError(f"the slot cannot be saved: {error.strerror}", status=500) from error
        finally:
            beside.unlink(missing_ok=True)
        return len(tokens)

    def restore(self, slot: Slot, path: Path) -> int:
        """Let an idle slot hold what `save` wrote; returns its tokens."""
        session = _idle(slot).session
        try:
            with np.load(path, allow_pickle=False) as data:
                head = json.loads(data["head"].tobytes())
                parts = [data[f"part{i}"] for i in range(len(data.files) - 1)]
            same = head["identity"] == self._identity
            tokens = tuple(int(token) for token in head["tokens"])
            drafted, cut = int(head["drafted"]), int(head["model_parts"])
            rows = Rows(tokens, tuple(parts[:cut]), drafted, tuple(parts[cut:]))
        except FileNotFoundError:
            raise ApiError("filename: no slot was saved under it", status=404) from None
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            raise wrong("filename", f"is no saved slot ({error!s:.100})") from error
        except Exception as error:  # zipfile.BadZipFile and its like
            raise wrong("filename", f"is damaged ({error!s:.100})") from error
        if not same:
            raise wrong("filename", "was saved of another model, or another type of cache")
        try:
            session.put(rows)
        except ValueError as error:
            raise wrong("filename", f"does not fit: {error}") from error
        return len(tokens)


def erase(slot: Slot) -> int:
    """Let an idle slot forget everything; returns the tokens that it held."""
    session = _idle(slot).session
    count = len(session.held)
    session.keep(())
    return count


def _idle(slot: Slot) -> Slot:
    if slot.job is not None:
        raise ApiError(f"slot {slot.id} is busy; try again later", status=400)
    if not slot.session.portable:
        raise ApiError("this runtime's cache cannot be saved", status=501)
    return slot
