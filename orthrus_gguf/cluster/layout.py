"""What an application is built of: arguments become flags of `orthrus-server`, and what the cluster
has to know."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus_gguf.cli import server
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.server.app import Settings

#: Flags of orthrus-server that say where it listens.
ELSEWHERE = {
    "host": "serve start --http-host",
    "port": "serve start --http-port",
    "ssl_cert_file": "a proxy with TLS before Ray Serve",
    "ssl_key_file": "a proxy with TLS before Ray Serve",
}

#: Requests that a replica takes beyond those that its queue holds.
SPARE = 100

#: Flags that are for the door only.
DOOR = frozenset({"api_key", "api_key_file", "cors", "api_prefix"})

#: Flags that name files. Where they are there from here, replicas get their whole paths.
FILES = frozenset({"model", "m", "heads", "drafter", "chat_template_file", "slot_save_path"})


@dataclass(frozen=True)
class Layout:
    """replicas: a number, or a range as `1..4`, within which they follow the load. cpus, gpus: of
    each replica. doors: processes that HTTP comes to. drain: seconds that answers under way may go
    on when their replica is to end. parallel: conversations that a replica has in one pass. queue:
    requests that may wait in each."""

    replicas: str = "1"
    cpus: float = 1
    gpus: float = 0
    doors: int = 1
    drain: float = 300
    parallel: int = 4
    queue: int = 64

    @property
    def least(self) -> int:
        """Replicas that there are in any case."""
        return int(self.replicas.split("..")[0])

    @property
    def most(self) -> int:
        """Replicas that there are at most."""
        return int(self.replicas.split("..")[-1])

    @property
    def ongoing(self) -> int:
        """Requests that a replica takes: also those that it refuses (429) or that need no slot."""
        return self.parallel + self.queue + SPARE


#: Fields of `Layout` that are no flags of orthrus-server.
OURS = {"replicas": str, "cpus": float, "gpus": float, "doors": int, "drain": float}

#: How their values look.
FORMS = {
    str: (r"\d+(\.\.\d+)?", "2, or 1..4"),
    float: (r"\d+(\.\d+)?", "a number"),
    int: (r"[1-9]\d*", "a whole number"),
}


def read(args: Mapping[str, Any]) -> tuple[Layout, list[str], Settings]:
    """The layout, the flags of each replica, and what the door has to know. Raises OrthrusError."""
    given = {name.strip("-").replace("-", "_"): value for name, value in args.items()}
    for name, where in ELSEWHERE.items():
        if name in given:
            raise OrthrusError(f"{name}: Ray Serve listens, not the replicas; see {where}")
    ours = {name: _number(name, given.pop(name)) for name in OURS if name in given}
    if not ours.get("gpus") and not {"threads", "t"} & given.keys():
        given["threads"] = max(int(ours.get("cpus", 1)), 1)
    parsed = _parsed(_flags(given))
    layout = Layout(**ours, parallel=parsed.parallel, queue=parsed.queue)
    if not 1 <= layout.least <= layout.most:
        raise OrthrusError(f"replicas={layout.replicas}: expected 2, or 1..4")
    flags = _flags({name: value for name, value in given.items() if name not in DOOR})
    return layout, flags, server.make_settings(parsed)


def _number(name: str, value: Any) -> Any:
    kind, text = OURS[name], str(value)
    form, example = FORMS[kind]
    if not re.fullmatch(form, text):
        raise OrthrusError(f"{name}={text}: expected {example}")
    return kind(text)


def _flags(given: Mapping[str, Any]) -> list[str]:
    """Command line of orthrus-server. Switches are true or false."""
    known, found = server.parser().own_flags(), list[str]()
    for name, value in given.items():
        text = str(value)
        if name in FILES and Path(text).exists():
            text = str(Path(text).resolve())
        if name == "model":
            found.append(text)
            continue
        flag = name.replace("_", "-")
        flag = f"--{flag}" if f"--{flag}" in known else f"-{flag}"
        if flag not in known:
            names = ", ".join(OURS)
            raise OrthrusError(f"{name}: is no flag of orthrus-server, and none of {names}")
        if text.lower() in ("true", "false"):
            found.append(flag if text.lower() == "true" else f"--no-{flag.strip('-')}")
        else:
            found += [flag, text]
    return found


def _parsed(flags: list[str]) -> Any:
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return server.parser().parse_args(flags)
    except SystemExit as error:
        last = said.getvalue().strip().splitlines()[-1:] or ["the flags are wrong"]
        raise OrthrusError(last[0].removeprefix("orthrus-server: error: ")) from error
