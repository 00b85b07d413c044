"""What can be told to the chat instead of a message: lines that begin with a slash and a word."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from orthrus_gguf.cli import options
from orthrus_gguf.cli.chat_input import ChatInput
from orthrus_gguf.cli.conversation import Conversation
from orthrus_gguf.cli.loaded import say
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.sampling import out_of_range

_COMMAND = re.compile(r"/(?P<name>[a-z?]+)(\s+(?P<rest>.*))?", re.DOTALL | re.IGNORECASE)


class Statistics(Enum):
    """What is told of each answer."""

    OFF = "off"
    LINE = "line"
    ALL = "all"


@dataclass
class State:
    """Everything that a command can change."""

    conversation: Conversation
    input: ChatInput
    statistics: Statistics
    leaving: bool = False


@dataclass(frozen=True)
class Command:
    """names: the first is the one that help shows. run: returns a question to answer once more."""

    names: tuple[str, ...]
    argument: str
    help: str
    run: Callable[[State, str], str | None]


def obey(state: State, line: str) -> str | None:
    """Do what a line asks for; returns the question that is to be answered again, if one is.

    Raises OrthrusError for what cannot be done, and for words that are no commands.
    """
    match = _COMMAND.fullmatch(line.strip())
    assert match is not None, "only commands get here"
    name = match["name"].lower()
    for command in COMMANDS:
        if name in command.names:
            rest = (match["rest"] or "").strip()
            if rest and not command.argument:
                raise OrthrusError(f"/{name} takes nothing after it; leave out {rest!r:.40}")
            return command.run(state, rest)
    names = [name for command in COMMANDS for name in command.names]
    close = difflib.get_close_matches(name, names, n=1)
    meant = f" (did you mean /{close[0]}?)" if close else ""
    raise OrthrusError(
        f"/{name} is no command{meant}; /help lists them, and a message may begin with a space"
    )


def is_command(line: str) -> bool:
    """Whether a line begins with a slash and a word, and not with a path such as /usr/bin."""
    return _COMMAND.fullmatch(line.rstrip()) is not None


def _help(state: State, rest: str) -> None:
    width = max(len(_usage(command)) for command in COMMANDS)
    say("\n".join(f"{_usage(command):<{width}}  {command.help}" for command in COMMANDS))
    say(
        'Several lines: """ … """, a \\ at the end of a line, or paste them. Ctrl-C stops an'
        " answer, Ctrl-D leaves."
    )


def _usage(command: Command) -> str:
    names = ", ".join(f"/{name}" for name in command.names)
    return f"{names} {command.argument}".rstrip()


def _leave(state: State, rest: str) -> None:
    state.leaving = True


def _clear(state: State, rest: str) -> None:
    state.conversation.clear()
    say("[the conversation is forgotten]")


def _again(state: State, rest: str) -> str:
    question = state.conversation.take_back()
    if question is None:
        raise OrthrusError("there is no answer yet that could be given again")
    if state.conversation.loaded.sampling.greedy:
        say("[temperature 0 gives the same answer again; /set temp 0.8 changes that]")
    return question


def _undo(state: State, rest: str) -> None:
    question = state.conversation.take_back()
    if question is None:
        raise OrthrusError("there is nothing to take back")
    say(f"[taken back: {_shortened(question)}]")


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"


def _system(state: State, rest: str) -> None:
    conversation = state.conversation
    if not rest:
        found = conversation.system
        say(f"system message: {found[0].content}" if found else "[no system message]")
        return
    conversation.set_system("" if rest == '""' else rest)
    say("[the system message is changed]" if conversation.system else "[no system message now]")


def _save(state: State, rest: str) -> None:
    path = _path("save", rest)
    state.conversation.save(path)
    say(f"[{len(state.conversation.messages)} messages saved to {path}]")


def _load(state: State, rest: str) -> None:
    path = _path("load", rest)
    state.conversation.load(path)
    say(f"[{len(state.conversation.messages)} messages loaded from {path}]")


def _path(name: str, rest: str) -> Path:
    if not rest:
        raise OrthrusError(f"/{name} FILE: name a file")
    return Path(rest).expanduser()


def _set(state: State, rest: str) -> None:
    if not rest:
        say("\n".join(f"  {name:<18} {show(state)}" for name, (show, _) in SETTINGS.items()))
        return
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    key = name.lstrip("-").replace("_", "-").lower()
    setting = SETTINGS.get(ALIASES.get(key, key))
    if setting is None:
        close = difflib.get_close_matches(key, [*SETTINGS, *ALIASES], n=1)
        meant = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(SETTINGS)}"
        raise OrthrusError(f"/set {name}: no such setting{meant}")
    show, change = setting
    if value.strip():
        try:
            change(state, value.strip())
        except (ValueError, KeyError, argparse.ArgumentTypeError) as error:
            reason = (
                str(error) if isinstance(error, argparse.ArgumentTypeError) else "no such value"
            )
            raise OrthrusError(f"/set {name} {value.strip()}: {reason}") from None
    say(f"  {ALIASES.get(key, key)} {show(state)}")


COMMANDS = (
    Command(("help", "?"), "", "this list", _help),
    Command(("exit", "bye", "quit"), "", "leave", _leave),
    Command(("clear",), "", "forget the conversation, but not the system message", _clear),
    Command(("regen",), "", "answer the last message again, with another seed", _again),
    Command(("undo",), "", "take the last message and its answer back", _undo),
    Command(("system",), '[TEXT or ""]', "show, change or remove the system message", _system),
    Command(("save",), "FILE", "write the conversation to a file (JSON)", _save),
    Command(("load",), "FILE", "go on with a conversation from a file", _load),
    Command(("set",), "[NAME [VALUE]]", "show or change settings: /set temp 0.5", _set),
)

Setting = tuple[Callable[[State], Any], Callable[[State, str], None]]


def _sampling(field: str, kind: Callable[[str], Any]) -> Setting:
    def change(state: State, text: str) -> None:
        loaded = state.conversation.loaded
        value = kind(text)
        if problem := out_of_range(field, value):
            raise argparse.ArgumentTypeError(problem)
        sampling = replace(loaded.sampling, **{field: value})
        state.conversation.loaded = replace(loaded, sampling=sampling)

    return lambda state: getattr(state.conversation.loaded.sampling, field), change


def _set_seed(state: State, text: str) -> None:
    value = options.seed(text)
    state.conversation.seed = None if value < 0 else value


def _set_predict(state: State, text: str) -> None:
    state.conversation.loaded = replace(state.conversation.loaded, max_tokens=int(text))


def _set_think(state: State, text: str) -> None:
    loaded = state.conversation.loaded
    thinking = {"on": True, "off": False, "auto": None}[text]
    if loaded.template is None or not loaded.template.supports_thinking:
        raise OrthrusError("/set think: the chat template of this model has no such switch")
    state.conversation.loaded = replace(loaded, thinking=thinking)


def _set_statistics(state: State, text: str) -> None:
    state.statistics = Statistics(text)


def _set_history(state: State, text: str) -> None:
    state.input.remembers = {"on": True, "off": False}[text]


def _switch(value: bool | None) -> str:
    return "auto" if value is None else "on" if value else "off"


#: Name → how it is shown, and changed (ValueError or KeyError: it cannot be that).
SETTINGS: dict[str, Setting] = {
    **{
        field.replace("_", "-"): _sampling(field, kind)
        for _, field, kind, _ in options.SAMPLING_FLAGS
    },
    "seed": (lambda s: "random" if s.conversation.seed is None else s.conversation.seed, _set_seed),
    "predict": (lambda s: s.conversation.loaded.max_tokens, _set_predict),
    "think": (lambda s: _switch(s.conversation.loaded.thinking), _set_think),
    "statistics": (lambda s: s.statistics.value, _set_statistics),
    "history": (lambda s: _switch(s.input.remembers), _set_history),
}

#: Flags of the command line that are called otherwise here.
ALIASES = {"temp": "temperature", "n": "predict", "n-predict": "predict", "s": "seed"}
