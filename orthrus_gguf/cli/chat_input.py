"""What is typed into the chat: messages of several lines, and those of earlier days.

Lines are edited with the standard library's readline, where Python has it. It knows pasted text by
itself (GNU readline; macOS's libedit does not), moves in a history, and follows the user's inputrc.
prompt_toolkit would do the same on Windows too, at the price of two more packages for everybody.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

from orthrus_gguf.cli.loaded import say

PROMPT, CONTINUED = "> ", ". "
QUOTES = '"""'
REMEMBERED = 1000  # messages of earlier days that can be called back


class ChatInput:
    """Reads messages. remembers: whether they are kept for the next start (where readline is)."""

    def __init__(self) -> None:
        self.remembers = True
        self._readline = _readline()
        self._history = state_folder() / "chat-history"
        if self._readline is not None:
            try:
                earlier = _read_history(self._history)
            except OSError as error:
                self._give_up(error)
            else:
                for text in earlier:
                    self._readline.add_history(text)

    def read(self) -> str:
        """The next message: a line, or several, between triple quotes, ending with a backslash
        each, or pasted. Raises EOFError at the end, KeyboardInterrupt where the user gives it up.
        """
        message = _line("\n" + PROMPT)
        if message.lstrip().startswith(QUOTES):
            message = _quoted(message.lstrip().removeprefix(QUOTES))
        while message.endswith("\\"):
            message = message[:-1] + "\n" + _next_line()
        if message.strip() and self._readline is not None:
            self._readline.add_history(message)
            self._keep(message)
        return message

    def _keep(self, message: str) -> None:
        if not self.remembers:
            return
        try:
            _append(self._history, message)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.remembers = False
        say(f"{self._history}: messages cannot be kept for the next start: {error.strerror}")


def _quoted(text: str) -> str:
    """What stands between triple quotes: on this line, or up to a line that ends with them."""
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + _next_line()
    return text.rstrip().removesuffix(QUOTES).strip("\n")


def _next_line() -> str:
    return _line(CONTINUED)


def state_folder() -> Path:
    """Where programs of this user keep what should outlive a restart. Empty variables count as
    unset, as the XDG base directory specification has it."""
    if os.environ.get("XDG_STATE_HOME"):
        return Path(os.environ["XDG_STATE_HOME"]) / "orthrus-gguf"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "orthrus-gguf"
    return Path.home() / ".local" / "state" / "orthrus-gguf"


def _readline() -> ModuleType | None:
    """The module, set up for messages; None where Python has none."""
    try:
        import readline
    except ImportError:
        return None
    readline.set_auto_history(False)  # whole messages go in, not their lines
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline


def _read_history(path: Path) -> list[str]:
    """Messages of earlier days, oldest first. A file that grew long is cut."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = [text for line in lines if (text := _message(line)) is not None]
    if len(lines) > 2 * REMEMBERED:
        beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        for text in found[-REMEMBERED:]:
            _append(beside, text)
        beside.replace(path)
    return found[-REMEMBERED:]


def _message(line: str) -> str | None:
    """A line of the file: JSON, since messages may have several lines. None for a damaged one."""
    try:
        text = json.loads(line)
    except ValueError:
        return None
    return text if isinstance(text, str) else None


def _append(path: Path, message: str) -> None:
    """Keep a message, for nobody else to read. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(file, (json.dumps(message, ensure_ascii=True) + "\n").encode())
    finally:
        os.close(file)


def _line(prompt: str) -> str:
    """One line. The prompt never gets into redirected output."""
    if sys.stdout.isatty():
        return input(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()
