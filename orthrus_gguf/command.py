"""What every command shares: how its flags are read, how it fails, how it ends."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field
from typing import Any, NoReturn

from orthrus_gguf import __version__
from orthrus_gguf.entry import INTERRUPTED
from orthrus_gguf.errors import OrthrusError, did_you_mean
from orthrus_gguf.records import dataclass

#: What can go wrong without a bug. Anything else is one, and shows its traceback.
REPORTED = (OrthrusError, MemoryError, OSError)

_NUMBER = re.compile(r"-(\d|\.\d)")


@dataclass(frozen=True)
class ForeignFlag:
    """A flag of another program that users bring along.

    values: arguments that follow it. optional: what may follow it besides, and is then its value.
    note: one line, without a full stop: why it has no effect, or what to do instead. refused:
    whether it is an error. harmless: values that ask for what is done anyway.
    """

    values: int
    optional: frozenset[str]
    note: str
    refused: bool
    harmless: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Foreign:
    """What a command knows of another program's command line.

    flags: those that the command does not have itself. environment: variables → the command's own
    flag, which they stand for unless it is given. exclusive: flags of which one leaves no room for
    the others; a word that is no flag counts as the first of them.
    """

    flags: Mapping[str, ForeignFlag] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    exclusive: tuple[str, ...] = ()


class Parser(argparse.ArgumentParser):
    """argparse, but read strictly: an option is its whole name, and what follows it is its value.

    argparse takes `-ngl 99` for `-n gl 99`, and `-p -x` for two options. Here multi-letter options
    may begin with one dash, underscores are as good as dashes, and a wrong word is one line and
    exit code 1, like any other bad input.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        #: What is known of another program's command line: to be set when all flags are there.
        self.foreign = Foreign()
        #: Whether several words that are no flags may stand apart, which argparse does not like.
        #: Only for parsers whose flags take one value at most.
        self.scattered = False
        #: Said of words that have no place.
        self.hint = ""
        self._from_environment: dict[str, str] = {}

    def format_help(self) -> str:
        """Examples, description, groups; the flags that are in none come last."""
        self._action_groups.sort(key=lambda group: group is self._optionals)
        return super().format_help()

    def own_flags(self) -> set[str]:
        """All spellings of all flags."""
        return {*self._option_string_actions}

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = self._prepared(args)
        return super().parse_known_args(_gathered(words) if self.scattered else words, namespace)

    def parse_known_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        # Older Pythons call the method above from theirs: what is prepared stays so.
        return super().parse_known_intermixed_args(self._prepared(args), namespace)

    def _prepared(self, words: Sequence[str] | None) -> list[str]:
        return self._from_variables(list(self._read(sys.argv[1:] if words is None else words)))

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line, and leave with exit code 1."""
        stray = message.removeprefix("unrecognized arguments: ")
        if stray != message:
            message = f"what is {stray!r}?{self.hint}"
        for name, variable in self._from_environment.items():
            if message.startswith(f"argument {name}:"):
                message += f" (from {variable})"
        close = message.endswith("?")
        self.exit(
            1, f"{self.prog}: error: {message}{'' if close else ';'} see {self.prog} --help\n"
        )

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse would not say that there is no room for its help."""
        if message:
            print(message, end="", file=file or sys.stderr, flush=True)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            close = did_you_mean(str(value), known) or f"; choose from {', '.join(known)}"
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}{close}")

    def _read(self, words: Sequence[str]) -> Iterator[str]:
        """The words for argparse: options by their names here, joined with their values."""
        rest = deque(words)
        while rest:
            word = rest.popleft()
            if word == "--":
                yield word
                yield from rest
                return
            if not _is_option(word):
                yield word
                continue
            name, equals, value = word.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            action = self._option_string_actions.get(name)
            if action is None:
                self._pass_over(name, [value] if equals else None, rest)
                continue
            if not equals and action.nargs is None:
                if not rest:
                    self.error(f"argument {'/'.join(action.option_strings)}: needs a value")
                equals, value = "=", rest.popleft()
            yield name + equals + value

    def _pass_over(self, name: str, given: list[str] | None, rest: deque[str]) -> None:
        """Say what a flag of another program means here, and take its values from the rest."""
        flag = self.foreign.flags.get(name)
        if flag is None:
            self.error(f"unknown option {name}{self._similar(name)}")
        if given is None:
            count = flag.values or int(bool(rest) and rest[0] in flag.optional)
            given = [rest.popleft() for _ in range(min(count, len(rest)))]
        if given and given[0] in flag.harmless:
            return
        if flag.refused:
            self.exit(1, f"{self.prog}: error: {name} is not supported: {flag.note}\n")
        print(f"{self.prog}: {name} has no effect here: {flag.note}", file=sys.stderr)

    def _similar(self, name: str) -> str:
        own = [*self._option_string_actions]
        short = [option for option in own if len(option) == 2 and name.startswith(option)]
        if not name.startswith("--") and short and re.fullmatch(r"[\d.]+", name[2:]):
            return f", did you mean {short[0]} {name[2:]}?"
        return did_you_mean(name, own if name.startswith("--") else [*own, *self.foreign.flags])

    def _from_variables(self, words: list[str]) -> list[str]:
        """The words, after what the environment says and they do not."""
        own, exclusive = self._option_string_actions, self.foreign.exclusive
        given = {id(own.get(word.partition("=")[0])) for word in words if word.startswith("-")}
        if exclusive and any(not word.startswith("-") for word in words):
            given.add(id(own[exclusive[0]]))
        rivals = {id(own[name]) for name in exclusive}
        found = []
        for variable, flag in self.foreign.environment.items():
            action, value = own[flag], os.environ.get(variable)
            if value is None or id(action) in given or (id(action) in rivals and rivals & given):
                continue
            given.add(id(action))
            self._from_environment["/".join(action.option_strings)] = variable
            found.append(f"{flag}={value}" if action.nargs is None else _switch(flag, value))
            if found[-1] == "":
                self.error(
                    f"argument {'/'.join(action.option_strings)}: {value!r} is not on or off"
                )
        return found + words


#: How the environment says yes and no.
_SWITCHES = {
    **dict.fromkeys(("1", "on", "true", "enabled"), True),
    **dict.fromkeys(("0", "off", "false", "disabled"), False),
}


def _switch(flag: str, value: str) -> str:
    """The flag, or its `--no-` twin, as `value` says; "" if it says neither."""
    wanted = _SWITCHES.get(value.lower())
    return "" if wanted is None else flag if wanted else flag.replace("--", "--no-", 1)


def _gathered(words: Sequence[str]) -> list[str]:
    """Prepared words, first the options, then the others."""
    end = words.index("--") if "--" in words else len(words)
    options = [word for word in words[:end] if _is_option(word)]
    others = [word for word in words[:end] if not _is_option(word)]
    return [*options, "--", *others, *words[end + 1 :]]


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-" and not _NUMBER.match(word)


def base_parser(prog: str, examples: Sequence[str], description: str) -> Parser:
    """A parser with the flags that every command has. examples: what its help begins with."""
    parser = Parser(
        prog=prog,
        usage="\n       ".join(examples),
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--usage", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"orthrus-gguf {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    return parser


def json_text(value: object) -> str:
    """One line of JSON; all of it in ASCII where stdout could not show it otherwise."""
    line = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        line.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return line


def print_json(value: object) -> None:
    """Print one line of JSON (see `json_text`)."""
    print(json_text(value), flush=True)


def run_command(
    parser: Parser,
    command: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """Parse and run. Errors become one line on stderr and exit code 1; Ctrl-C becomes 130."""
    args = parser.parse_args(argv)
    try:
        return command(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output left (`| head`): nobody is there to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except REPORTED as error:
        return report(parser.prog, error, verbose=args.verbose)


def report(program: str, error: Exception, *, verbose: bool) -> int:
    """Print an error as one line, after its traceback if asked for; returns the exit code."""
    if verbose:
        traceback.print_exception(error)
    text = " ".join(str(error).split()) or "out of memory"
    print(f"{program}: error: {text}", file=sys.stderr)
    return 1
