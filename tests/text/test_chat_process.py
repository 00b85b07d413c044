"""The processes that render chat templates: kept, killed, replaced."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.text import chat_process
from orthrus_gguf.text.chat import ChatTemplate, Limits, Message

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="one job a process without fork")

HELLO = [Message("user", "hello")]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(autouse=True)
def none_idle() -> Iterator[None]:
    chat_process.end_idle()
    yield
    chat_process.end_idle()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[chat_process.Worker]:
    """Every process that is started from here on."""
    seen: list[chat_process.Worker] = []

    class Seen(chat_process.Worker):
        def __init__(self) -> None:
            super().__init__()
            seen.append(self)

    monkeypatch.setattr(chat_process, "Worker", Seen)
    return seen


def echo(cpu_seconds: int = 5) -> ChatTemplate:
    return ChatTemplate("{{ messages[0].content }}", "", "", Limits(cpu_seconds))


def idle() -> list[int]:
    return [worker.process.pid for worker in chat_process._idle]


def test_one_process_renders_one_message_after_another() -> None:
    assert echo().render(HELLO) == "hello"
    first = idle()
    assert len(first) == 1
    assert echo().render([Message("user", "line\nline ü")]) == "line\nline ü"
    with pytest.raises(OrthrusError, match="refuses the messages: no"):
        ChatTemplate("{{ raise_exception('no') }}", "", "", Limits()).render(HELLO)
    assert idle() == first


def test_processor_time_is_counted_for_each_message() -> None:
    """The limit ends the message, not the process, and the next one has all of it."""
    endless = ChatTemplate(ENDLESS, "", "", Limits(cpu_seconds=1))
    assert echo().render(HELLO) == "hello"
    first = idle()
    for _ in range(2):
        with pytest.raises(OrthrusError, match="within 1 s of processor time"):
            endless.render(HELLO)
    assert echo(cpu_seconds=1).render(HELLO) == "hello"
    assert idle() == first


def test_a_killed_idle_process_is_replaced() -> None:
    echo().render(HELLO)
    (first,) = idle()
    os.kill(first, signal.SIGKILL)
    assert echo().render(HELLO) == "hello"
    assert first not in idle()
    assert len(idle()) == 1


def test_a_process_killed_at_work_is_an_error_once(started: list[chat_process.Worker]) -> None:
    """The template may be why: a message that ended a new process is not tried for ever."""
    endless = ChatTemplate(ENDLESS, "", "", Limits(cpu_seconds=20))

    def kill() -> None:
        while not started:
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(started[0].process.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(OrthrusError, match="ended with status -9"):
        endless.render(HELLO)
    killer.join()
    assert len(started) == 1
    assert idle() == []
    assert echo().render(HELLO) == "hello"


def test_who_outlives_the_clock_is_ended_with_its_forks(
    started: list[chat_process.Worker],
) -> None:
    late = ChatTemplate(ENDLESS, "", "", Limits(cpu_seconds=20, wall_seconds=1.5))
    with pytest.raises(OrthrusError, match=r"within 1\.5 s"):
        late.render(HELLO)
    assert idle() == []
    (ended,) = started
    assert not alive(ended.process.pid)
    assert echo().render(HELLO) == "hello"


def alive(group: int) -> bool:
    """Whether anything of a group of processes still runs, a moment given to end."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.02)
    return True


def test_messages_rendered_at_once() -> None:
    texts: dict[int, str] = {}

    def render(number: int) -> None:
        texts[number] = echo().render([Message("user", str(number))])

    threads = [threading.Thread(target=render, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: str(number) for number in range(6)}
    assert len(idle()) <= chat_process.KEPT


def test_a_prepared_process_renders(started: list[chat_process.Worker]) -> None:
    chat_process.prepare()
    chat_process.prepare()
    assert len(started) == 1
    assert echo().render(HELLO) == "hello"
    assert len(started) == 1


def test_a_prepared_process_that_dies_is_replaced(started: list[chat_process.Worker]) -> None:
    chat_process.prepare()
    started[0].process.kill()
    started[0].process.wait()
    assert echo().render(HELLO) == "hello"
    assert len(started) == 2


def test_a_process_that_cannot_be_prepared_is_missed_only_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    chat_process.prepare()
    with pytest.raises(OrthrusError, match="cannot start /nowhere/python: No such file"):
        echo().render(HELLO)
