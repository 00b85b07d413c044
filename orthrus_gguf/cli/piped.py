"""A prompt that is piped into a command: `cat notes.txt | orthrus-run model.gguf -p "Sum up:"`."""

from __future__ import annotations

import os
import stat
import sys
import threading

from orthrus_gguf.cli.loaded import say
from orthrus_gguf.errors import OrthrusError

#: Seconds after which whoever waits learns what for: a pipe that nobody writes to never ends.
PATIENCE = 3.0


def piped_text() -> str | None:
    """All of stdin, where it is a pipe or a file; None where it is a terminal, a device, closed.

    Like llama.cpp's prompt files, without the newline at its end. Raises OrthrusError unless it is
    UTF-8.
    """
    if not _is_piped():
        return None
    notice = threading.Timer(PATIENCE, say, ["reading the prompt from stdin (</dev/null for none)"])
    notice.daemon = True
    notice.start()
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise OrthrusError(f"stdin: not UTF-8 text (at byte {error.start})") from error
    finally:
        notice.cancel()
    return text.removesuffix("\n")


def _is_piped() -> bool:
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # there is none, or no real one
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)
