"""The process that renders chat templates: run as a script by `chat_process.py`, never imported.

Reads jobs, a line of JSON each, from stdin and writes {"text": ...} or {"error": ...} to stdout. It
imports nothing of this package, and Jinja only after it knows where to look for it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

try:
    import resource
except ImportError:  # Windows limits neither memory nor files; the parent limits time
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from jinja2 import Environment


class RefusalError(Exception):
    """The template's own complaint."""


def main() -> None:
    """Do the jobs on stdin: a line each, after one that says where to look for modules."""
    sys.path[:] = json.loads(sys.stdin.buffer.readline())
    environment = make_environment()
    for line in sys.stdin.buffer:
        if not hasattr(os, "fork"):  # Windows: a process for every job
            send(answer(environment, line))
            return
        send(forked(environment, line))


def send(encoded: bytes) -> None:
    sys.stdout.buffer.write(encoded + b"\n")
    sys.stdout.buffer.flush()


def forked(environment: Environment, line: bytes) -> bytes:
    """Do a job in a fork, so that limits count for it alone and nothing of it stays here."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            os.close(0)  # what this process says and hears is none of the template's business
            os.close(1)
            with open(writing, "wb") as pipe:
                pipe.write(answer(environment, line))
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        encoded = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        return encoded
    if status == -signal.SIGXCPU:
        seconds = json.loads(line)["limits"]["cpu_seconds"]
        problem = f"did not finish within {seconds} s of processor time"
    else:
        problem = f"the process that renders it ended with status {status}"
    return json.dumps({"error": problem}).encode()


def answer(environment: Environment, line: bytes) -> bytes:
    """The answer to a job, in JSON. This process is limited from here on."""
    job = json.loads(line)
    limits = job["limits"]
    restrict(limits)
    try:
        done = {"text": render(environment, job["source"], job["variables"], limits["output"])}
    except MemoryError:
        done = {"error": f"needs more than {limits['memory'] >> 20} MiB of memory"}
    except RecursionError:
        done = {"error": "is nested, or calls itself, too deeply"}
    except RefusalError as error:
        done = {"error": f"refuses the messages: {error!s:.300}"}
    except Exception as error:  # a template can raise anything
        where = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
        done = {"error": f"{where}{type(error).__name__}: {error!s:.300}"}
    return json.dumps(done).encode()


def make_environment() -> Environment:
    """The environment in which Hugging Face renders chat templates."""
    # The first four are imported by Jinja where it needs them, when `close_doors` forbids it.
    import pprint  # noqa: F401
    import textwrap  # noqa: F401

    import jinja2.constants
    import jinja2.debug  # noqa: F401
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what to train on; a prompt has its contents only."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def restrict(limits: dict[str, int]) -> None:
    """Have the kernel bound the rest of this process, which takes effect inside C code too."""
    seconds, memory = limits["cpu_seconds"], limits["memory"]
    lower("RLIMIT_CORE", 0, 0)
    lower("RLIMIT_CPU", seconds, seconds + 1)  # SIGXCPU first, which tells the parent
    lower("RLIMIT_AS", memory, memory)


def close_doors() -> None:
    """Let nothing more be opened: should the sandbox have a hole, there are no files, sockets or
    programs behind it."""
    datetime.now().astimezone()  # reads the time zone while it can
    lower("RLIMIT_NOFILE", 0, 0)


def lower(name: str, soft: int, hard: int) -> None:
    """Set a limit, unless a tighter one holds already or (RLIMIT_AS on macOS) none can be had."""
    if resource is not None:
        with suppress(OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (soft, hard))


def render(
    environment: Environment, source: str, variables: dict[str, Any], max_output: int
) -> str:
    """The template's output, in pieces so that it can be stopped before it grows too long."""
    pieces: list[str] = []
    length = 0
    template = environment.from_string(source)
    close_doors()
    for piece in template.generate(**variables):
        length += len(piece)
        if length > max_output:
            raise OverflowError(f"the output is longer than {max_output} characters")
        pieces.append(piece)
    return "".join(pieces)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, without the HTML escapes of Jinja's own filter."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def raise_exception(message: str) -> NoReturn:
    """What a template calls about messages that it cannot express."""
    raise RefusalError(message)


def strftime_now(format: str) -> str:
    """The local date or time; templates put it into system prompts."""
    return datetime.now().strftime(format)


if __name__ == "__main__":
    main()
