"""Temporary files beside their target: what they are called, and which ones nobody writes."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a file that somebody has open cannot be removed anyway
    LOCKS = False
else:
    LOCKS = True


def temporary_path(target: Path, process: int) -> Path:
    """The name that process number `process` writes `target` under until it is complete."""
    return target.with_name(f".{target.name}.{process}.tmp")


def remove_leftovers(target: Path) -> None:
    """Remove temporary files for `target` whose process is gone (killed, or a crash of the system).

    Twice careful: no other process of that number may live here, and the file must not be locked,
    as a writer keeps it, also one in another container or, over NFS, on another machine. Never
    raises OSError.
    """
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(\d+)\.tmp")  # of temporary_path()
    with suppress(OSError):
        for path in list(target.parent.iterdir()):
            match = pattern.fullmatch(path.name)
            if match and not _is_alive(int(match[1])):
                with suppress(OSError):
                    _remove_unlocked(path)


def _is_alive(process: int) -> bool:
    """True if another process of that number lives. In containers, numbers repeat: ours may be
    that of the dead one, and a lock tells whether it is in use by this very process."""
    if process == os.getpid() or not LOCKS:  # (a signal 0 would be a Ctrl-C on Windows)
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # it is somebody else's, or no process number at all
        return True
    return True


def lock(descriptor: int) -> None:
    """Mark an open file as in use, where there are locks. Raises OSError if somebody else has."""
    if LOCKS:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_unlocked(path: Path) -> None:
    """Remove a regular file that nobody has locked. Raises OSError."""
    if not LOCKS:
        if stat.S_ISREG(os.lstat(path).st_mode):
            path.unlink()
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            lock(descriptor)
            path.unlink()
    finally:
        os.close(descriptor)
