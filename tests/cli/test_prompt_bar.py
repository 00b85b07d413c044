"""Progress of a prompt: by time, on terminals, and gone before the text comes."""

from __future__ import annotations

import io
import sys
import threading
import time

import pytest

from orthrus_gguf.cli import loaded


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch, patience: float) -> Terminal:
    """Make stderr a terminal. (Not in a fixture: pytest sets stderr again before each test.)"""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(loaded, "REFRESH", 0.01)
    monkeypatch.setattr(loaded, "PATIENCE", patience)
    return stream


def wait_for(terminal: Terminal, text: str) -> None:
    end = time.monotonic() + 20
    while text not in terminal.getvalue():
        assert time.monotonic() < end, terminal.getvalue()
        time.sleep(0.01)


def test_a_long_pass_shows_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any pass has ended, and until the last one has."""
    terminal = on_terminal(monkeypatch, 0.01)
    bar = loaded.PromptBar(40)
    with bar:
        wait_for(terminal, " 0/40 ")
        bar.update(30)
        wait_for(terminal, " 30/40 ")
    shown = terminal.getvalue()
    assert shown.endswith("\r")  # the line is the text's again
    assert shown.split("\r")[-2].strip() == ""
    time.sleep(0.05)
    assert terminal.getvalue() == shown


def test_a_quick_prompt_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, 60)
    with loaded.PromptBar(40):
        assert threading.active_count() > 1
    assert terminal.getvalue() == ""


def test_what_is_no_terminal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch, 0)
    monkeypatch.setattr(terminal, "isatty", lambda: False)
    with loaded.PromptBar(40):
        time.sleep(0.05)
    assert terminal.getvalue() == ""
