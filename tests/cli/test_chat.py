"""The chat as a user meets it, in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from orthrus_converters.cli import main as convert
from terminal import Terminal

from orthrus_gguf.cli.chat_commands import is_command
from orthrus_gguf.cli.chat_input import state_folder
from orthrus_gguf.cli.conversation import Conversation
from orthrus_gguf.cli.loaded import Loaded, load
from orthrus_gguf.cli.run import _parser
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.text.chat import Message

TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo model with a chat template: it does not chat, but it does not know that."""
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    path = folder.parent / "chat.gguf"
    assert convert([str(folder), str(path), "--type", "f16"]) == 0
    return str(path)


@pytest.fixture
def start(model: str, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start the chat; everything of the user is in tmp_path."""
    with ExitStack() as stack:

        def run(*flags: str, env: dict[str, str] | None = None) -> Terminal:
            command = [sys.executable, "-m", "orthrus_gguf.cli.run", model, "-t", "1"]
            home = {"HOME": str(tmp_path), "XDG_STATE_HOME": "", "INPUTRC": "/dev/null"}
            terminal = Terminal(
                [*command, "--strategy", "two-pass", *flags], {**home, **(env or {})}
            )
            return stack.enter_context(terminal)

        yield run


def saved(terminal: Terminal, path: Path) -> list[dict[str, str]]:
    """The conversation so far."""
    terminal.ask(f"/save {path}")
    messages: list[dict[str, str]] = json.loads(path.read_text("utf-8"))["messages"]
    return messages


def test_a_conversation_and_its_commands(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal, file = start("-n", "12", "-sys", "be brief"), tmp_path / "saved.json"
    assert "/help tells more" in terminal.read_until("\r\n> ")
    first = terminal.ask("import os")
    assert "[cut after 12 tokens (-n, /set predict)]" in first
    assert "[12 tokens, " in first
    assert "per cycle, prompt " in first
    assert "cycles " not in first, "one line of statistics"
    second = terminal.ask("import re")
    new = int(second.split("prompt ")[1].split(" new of")[0])
    assert new < 16, "only what is new is computed"
    messages = saved(terminal, file)
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2]
    assert [m["content"] for m in messages[1::2]] == ["import os", "import re"]
    assert file.stat().st_mode & 0o777 == 0o600

    again = terminal.ask("/regen")
    assert "prompt 1 new of " in again
    changed = saved(terminal, file)
    assert changed[:4] == messages[:4]
    assert changed[4] != messages[4], "another seed, another answer"
    assert "[taken back: import re]" in terminal.ask("/undo")
    assert saved(terminal, file) == messages[:3]
    assert "prompt 1 new of " in terminal.ask("import re"), "back where it was"

    assert "forgotten]" in terminal.ask("/clear")
    assert "nothing to take back" in terminal.ask("/undo")
    assert saved(terminal, file) == messages[:1]
    assert "error: there is no answer yet" in terminal.ask("/regen")
    file.write_text(json.dumps({"messages": messages}), "utf-8")
    assert "[5 messages loaded from" in terminal.ask(f"/load {file}")
    assert saved(terminal, tmp_path / "other.json") == messages
    assert "be brief" in terminal.ask("/system")
    terminal.ask("/system be long")
    assert saved(terminal, file)[0]["content"] == "be long"
    assert "no such file" in terminal.ask("/load missing.json").lower()

    help_text = terminal.ask("/help")
    for name in ["help", "exit", "bye", "clear", "regen", "undo", "system", "save", "load", "set"]:
        assert f"/{name}" in help_text
    assert "(did you mean /regen?); /help lists them" in terminal.ask("/regn")
    assert "error: /foobar is no command; /help lists them" in terminal.ask("/foobar")
    assert "takes nothing after it" in terminal.ask("/undo twice")
    terminal.type("/bye\n")
    assert terminal.process.wait(timeout=20) == 0


def test_settings(start: Callable[..., Terminal]) -> None:
    terminal = start("-n", "4", "--no-perf")
    terminal.read_until("\r\n> ")
    assert "tok/s" not in terminal.ask("import os")
    shown = terminal.ask("/set")
    for text in ("temperature        0.8", "seed               random", "predict            4"):
        assert text in shown
    assert "  temperature 0.0" in terminal.ask("/set temp 0")
    assert "  predict 3" in terminal.ask("/set n 3")
    assert "  top-k 7" in terminal.ask("/set --top_k=7")
    terminal.ask("/set statistics all")
    assert "  3 tokens" in terminal.ask("import os")
    assert "gives the same answer again" in terminal.ask("/regen")
    for line, message in (
        ("/set temp hot", "error: /set temp hot: "),
        ("/set temp nan", "expected a number, found nan"),
        ("/set heat 1", "error: /set heat: no such setting"),
        ("/set predct 1", "did you mean predict?"),
        ("/set history maybe", "no such value"),
        ("/set think on", "has no such switch"),
    ):
        assert message in terminal.ask(line)


def test_messages_of_several_lines(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start("-n", "2")
    terminal.read_until("\r\n> ")
    terminal.type('"""def f():\n')
    terminal.read_until("\x1b[?2004h. ")
    terminal.type("    return 1\n")
    terminal.read_until("\x1b[?2004h. ")
    terminal.ask('"""')
    terminal.type("one \\\n")
    terminal.read_until("\x1b[?2004h. ")
    terminal.ask("two")
    terminal.ask('"""said"""')
    terminal.type("\x1b[200~import re\rimport os\x1b[201~")
    terminal.ask("")
    assert terminal.ask("/usr/bin/python is what?")
    terminal.ask(" /help")
    questions = [m["content"] for m in saved(terminal, tmp_path / "s.json")[::2]]
    assert questions == [
        *("def f():\n    return 1", "one \ntwo", "said", "import re\nimport os"),
        *("/usr/bin/python is what?", " /help"),
    ]


def test_history_is_kept_and_private(start: Callable[..., Terminal], tmp_path: Path) -> None:
    first = start("-n", "1")
    first.read_until("\r\n> ")
    first.ask('"""import re\nimport os"""', until="tok")
    first.read_until("\r\n> ")
    first.ask("/set history off")
    first.ask("secret")
    first.type("\x04")
    assert first.process.wait(timeout=20) == 0
    file = tmp_path / ".local/state/orthrus-gguf/chat-history"
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        "import re\nimport os",
        "/set history off",
    ]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    second = start("-n", "1")
    second.read_until("\r\n> ")
    second.type("\x1b[A\x1b[A\n")  # up, up
    second.read_until("tok")
    second.read_until("\r\n> ")
    questions = [m["content"] for m in saved(second, tmp_path / "s.json")[::2]]
    assert questions == ["import re\nimport os"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    start: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = start("-c", "4096", "--ignore-eos")
    terminal.read_until("\r\n> ")
    terminal.interrupt_until("Ctrl-D leaves")
    terminal.read_until("\r\n> ")
    terminal.type("import os\n")
    terminal.read_until("\x1b[?2004l\r")  # the line is taken
    terminal.read_until("i")
    terminal.interrupt_until("[stopped]")
    assert "prompt 11 new of 11 tokens in " in terminal.read_until("\r\n> ")
    assert len(saved(terminal, tmp_path / "s.json")) == 2
    terminal.type("\x04")
    assert terminal.process.wait(timeout=20) == 0


def test_a_full_context_is_no_dead_end(start: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = start("-c", "96", "--ignore-eos")
    terminal.read_until("\r\n> ")
    assert "[cut: the context of 96 tokens is full (-c)]" in terminal.ask("import os")
    second = terminal.ask("import re")
    assert "[the context of 96 tokens is full: the oldest turn is forgotten]" in second
    assert "[cut: " in second
    messages = saved(terminal, tmp_path / "s.json")
    assert messages[0]["content"] == "import re"
    long = terminal.ask("word " * 100)
    assert "nothing can be generated; shorten the prompt or raise -c" in long
    assert saved(terminal, tmp_path / "s.json") == messages, "what failed is not kept"


def test_without_a_template_each_line_is_by_itself(demo_file: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "orthrus_gguf.cli.run", str(demo_file("f32")), "-t", "1"]
    with Terminal([*command, "--temp", "0", "-n", "40", "--explain"]) as terminal:
        assert "continued as it is" in terminal.read_until("\r\n> ")
        assert "import os\r\nimport os" in terminal.ask("import os", until="tok/s")
        terminal.read_until("\r\n> ")
        assert "there is no system message" in terminal.ask("/system x")
        terminal.type("\x04")
        terminal.read_until("what was decided")
        assert terminal.process.wait(timeout=20) == 0


@pytest.fixture
def loaded(model: str) -> Iterator[Loaded]:
    args = _parser().parse_args([model, "-t", "1", "--strategy", "ar", "-n", "3"])
    with ExitStack() as resources:
        yield load(model, args, resources)


def answer(conversation: Conversation, question: str, *, again: bool = False) -> Any:
    request = conversation.request(question, again=again)
    generation = conversation.loaded.start(request)
    list(generation)
    conversation.answered(question, generation.result)
    return request.sampling.seed, generation.result


def test_seeds(loaded: Loaded) -> None:
    free = Conversation(loaded, None)
    assert len({answer(free, "x")[0] for _ in range(3)}) == 3
    fixed = Conversation(loaded, 7)
    assert [answer(fixed, "x")[0] for _ in range(2)] == [7, 7]
    assert [answer(fixed, "x", again=True)[0] for _ in range(2)] == [8, 9]
    assert answer(fixed, "x")[0] == 7
    last = Conversation(loaded, 2**64 - 1)
    assert [answer(last, "x")[0], answer(last, "x", again=True)[0]] == [2**64 - 1, 0]


def test_only_what_is_new_is_computed(loaded: Loaded) -> None:
    conversation = Conversation(loaded, 1)
    _, first = answer(conversation, "import os")
    _, second = answer(conversation, "import re")
    held = first.statistics.prompt_tokens + len(first.output) - 1
    assert second.statistics.cached_tokens == held
    conversation.take_back()
    _, third = answer(conversation, "import sys")
    assert third.statistics.cached_tokens >= held
    conversation.take_back()
    _, again = answer(conversation, "import sys", again=True)
    assert again.statistics.prompt_tokens - again.statistics.cached_tokens == 1


def test_as_many_turns_are_forgotten_as_must_be(
    loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(loaded, 1, [Message("system", "be brief")])
    for number in range(80):
        conversation.messages += [
            Message("user", f"question {number}"),
            Message("assistant", "word " * 10),
        ]
    n_ctx = loaded.session.n_ctx
    before = list(conversation.messages)
    request = conversation.request("last")
    kept = conversation.messages
    assert kept[0] == before[0]
    assert kept[1:] == before[-len(kept) + 1 :]
    assert kept[1].role == "user"
    one_more = Conversation(loaded, 1, [before[0], *before[-len(kept) - 1 :]])
    assert len(request.prompt) <= n_ctx // 2
    assert len(one_more._request("last", 0).prompt) > n_ctx // 2
    gone = (len(before) - len(kept)) // 2
    assert f"the oldest {gone} turns are forgotten]" in capsys.readouterr().err


BAD = {
    "no JSON": ("{", "no JSON"),
    "a list": ("[]", "expected"),
    "no list": ('{"messages": 3}', "expected"),
    "no text": ('{"messages": [{"role": "user", "content": null}]}', "expected"),
    "no objects": ('{"messages": ["user"]}', "expected"),
    "two questions": (
        json.dumps({"messages": [{"role": "user", "content": "x"}] * 2}),
        "an answer last",
    ),
    "system last": (
        json.dumps({"messages": [{"role": r, "content": "x"} for r in ("user", "system")]}),
        "an answer last",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_no_conversations(loaded: Loaded, tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    file = tmp_path / "c.json"
    file.write_text(text)
    conversation = Conversation(loaded, None, [Message("system", "x")])
    with pytest.raises(OrthrusError, match=message):
        conversation.load(file)
    assert conversation.messages == [Message("system", "x")]


def test_saving_is_all_or_nothing(loaded: Loaded, tmp_path: Path) -> None:
    conversation = Conversation(loaded, None, [Message("system", "é\n")])
    with pytest.raises(OrthrusError, match="cannot be written: No such file"):
        conversation.save(tmp_path / "missing" / "c.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OrthrusError, match="folder: cannot be written"):
        conversation.save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]
    conversation.save(tmp_path / "c.json")
    other = Conversation(replace(loaded), None)
    other.load(tmp_path / "c.json")
    assert other.messages == conversation.messages


@pytest.mark.parametrize("line", ["/help", "/? ", "/set temp 3", "/SAVE x"])
def test_what_is_a_command(line: str) -> None:
    assert is_command(line)
    assert not is_command(" " + line)
    assert not is_command("/usr/bin/env")


def test_where_the_history_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    assert state_folder() == tmp_path / ".local/state/orthrus-gguf"
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert state_folder() == Path("/elsewhere/orthrus-gguf")
