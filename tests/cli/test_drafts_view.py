"""`--show-drafts`: in a terminal, piped, in a chat, and beside `--json`."""

from __future__ import annotations

import io
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orthrus_gguf.cli.drafts_view import has_colours, paint, painted, summary, text_origins
from orthrus_gguf.cli.run import main
from orthrus_gguf.drafting.block import BLOCK
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.lookup import LOOKUP
from orthrus_gguf.request import Origin, Result
from orthrus_gguf.stats import Timings, count

ESCAPES = re.compile("\x1b\\[[0-9;]*m")
FLAGS = ("--temp", "0", "-n", "40", "-t", "1", "--show-drafts")
TWO_PASS = ("--strategy", "two-pass", "-p", "import os\\nimport")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Told:
    """A generation whose pieces and their origins are given."""

    def __init__(self, *pieces: tuple[str, Origin]) -> None:
        self.pieces = pieces
        self.origin = Origin.PLAIN

    def __iter__(self) -> Iterator[str]:
        for piece, origin in self.pieces:
            self.origin = origin
            yield piece


@pytest.fixture(scope="module")
def model(demo_file: Callable[..., Path]) -> str:
    return str(demo_file("f32"))


@pytest.fixture(autouse=True)
def colours_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def result(cycles: list[Cycle], tokens: int) -> Result:
    statistics = count(cycles, prompt_tokens=1, cached_tokens=0, output_tokens=tokens)
    timings = Timings(0, 0, 0, 0)
    return Result((1,) * tokens, "", "stop", tuple(cycles), statistics, timings)


def cycle(source: Source, drafts: int, accepted: int) -> Cycle:
    offered = (1,) * drafts
    draft = Draft(source, offered, (1.0,) * drafts)
    return Cycle(0, offered, accepted, (1,) * (accepted + 1), draft)


CYCLES = [
    cycle(BLOCK, 4, 2),
    cycle(BLOCK, 0, 0),
    cycle(LOOKUP, 3, 3),
    cycle(BLOCK, 4, 4),
]


def test_every_token_of_the_text_has_an_origin() -> None:
    plain, drafted, corrected = Origin.PLAIN, Origin.DRAFTED, Origin.CORRECTED
    told = [plain, drafted, drafted, corrected, plain, *[drafted] * 3, plain, *[drafted] * 4, plain]
    assert text_origins(result(CYCLES, 14)) == told
    assert text_origins(result(CYCLES, 10)) == told[:10], "the text ended inside the last cycle"


def test_the_summary_counts_by_origin_and_by_source() -> None:
    assert summary(result(CYCLES, 10), colours=False).splitlines() == [
        "text        10 tokens",
        "             6 drafted    60 %  accepted drafts",
        "             1 corrected  10 %  in place of a refused draft",
        "             3 plain      30 %  without a draft",
        "drafts       3",
        "             2 block      75 %  6 of 8 tokens accepted",
        "             1 lookup    100 %  3 of 3 tokens accepted",
    ]
    coloured = summary(result(CYCLES, 10), colours=True)
    assert paint("corrected", Origin.CORRECTED) in coloured
    assert ESCAPES.sub("", coloured) == summary(result(CYCLES, 10), colours=False)


def test_a_new_source_shows_up() -> None:
    oracle = Source("oracle", "an oracle", "#123456", 0.9)
    shown = summary(result([cycle(oracle, 4, 1)], 3), colours=False)
    assert shown.endswith("\n             1 oracle     25 %  1 of 4 tokens accepted")


def test_a_summary_of_nothing() -> None:
    assert "0 tokens" in summary(result([], 0), colours=False)


def test_pieces_take_the_colour_of_what_released_them() -> None:
    told: Any = Told(("a", Origin.PLAIN), ("bé", Origin.DRAFTED), ("c", Origin.CORRECTED))
    assert "".join(painted(told, Terminal())) == "a\x1b[32mbé\x1b[0m\x1b[33mc\x1b[0m"
    assert "".join(painted(told, io.StringIO())) == "abéc"


def test_colours_need_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_colours(Terminal())
    assert not has_colours(Terminal(), io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not has_colours(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colours(Terminal())


def test_piped_text_is_plain(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, *TWO_PASS, "--temp", "0", "-n", "40", "-t", "1"]) == 0
    plain = capsys.readouterr()
    assert main([model, *TWO_PASS, *FLAGS]) == 0
    shown = capsys.readouterr()
    assert shown.out == plain.out
    assert "\x1b" not in shown.out + shown.err
    assert "40 tokens\n" in shown.err
    assert re.search(r"\d+ block .* tokens accepted", shown.err)


def test_json_excludes_it(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([model, *TWO_PASS, *FLAGS, "--json"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "--show-drafts: --json" in err


def in_terminal(model: str, *flags: str, typed: bytes = b"", **environment: str) -> str:
    """Run the command in a pseudo-terminal; returns what it showed there."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "orthrus_gguf.cli.run", model, *flags],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    os.close(theirs)
    shown, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if typed and shown.rstrip().endswith(b"\n>"):
            os.write(ours, typed)
            typed = b""
        elif shown.count(b"\n> ") == 2 and shown.rstrip().endswith(b">"):
            os.write(ours, b"\x04")
        if select.select([ours], [], [], 0.1)[0]:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so when the other side is closed
                break
            if not piece:
                break
            shown += piece
    assert process.wait(timeout=20) == 0
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")


@needs_terminal
def test_a_terminal_shows_colours(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([model, *TWO_PASS, "--temp", "0", "-n", "40", "-t", "1"])
    text = capsys.readouterr().out
    shown = in_terminal(model, *TWO_PASS, *FLAGS)
    assert text in ESCAPES.sub("", shown), "nothing lost, nothing added"
    answer, _, report = shown.partition("\nload: ")
    assert "\x1b[32m" in answer
    assert "\x1b[33m" in answer
    assert answer.count("\x1b[0m") == answer.count("\x1b[32m") + answer.count("\x1b[33m")
    assert "\x1b[32mdrafted" in report
    assert "\x1b" not in in_terminal(model, *TWO_PASS, *FLAGS, NO_COLOR="1")


@needs_terminal
def test_a_chat_shows_colours(model: str) -> None:
    shown = in_terminal(model, *FLAGS, "--strategy", "two-pass", typed=b"import os\n")
    _, _, answer = shown.partition("import os\n")
    assert "\x1b[32m" in answer.partition("tok/s")[0]
    assert "\x1b[32mdrafted" in answer
