"""`--twice`: both answers, and what they took."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from orthrus_gguf.cli.run import main as run

DemoFile = Callable[..., Path]


@pytest.mark.parametrize("flags", [("--temp", "0"), ("--temp", "0.8", "--seed", "3")])
def test_both_answers_and_a_verdict(
    demo_file: DemoFile, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    file = str(demo_file("q8_0"))
    words = [file, "-p", "import ", "-n", "24", "--strategy", "two-pass"]
    assert run([*words, *flags]) == 0
    once = capsys.readouterr().out
    assert run([*words, *flags, "--twice"]) == 0
    out, err = capsys.readouterr()
    assert out == once + once
    assert "same text: yes" in err
    passes = re.search(r"passes: +(\d+) plainly, (\d+) with drafts", err)
    assert passes is not None
    assert int(passes[1]) == 24
    assert 2 < int(passes[2]) < 24
    speed = re.search(
        r"speed: .* ([\d.]+) times as fast: ([\d.]+) times fewer.* ([\d.]+) times", err
    )
    assert speed is not None
    fast, fewer, longer = map(float, speed.groups())
    assert fewer == pytest.approx(int(passes[1]) / int(passes[2]), abs=0.006)
    assert fast == pytest.approx(fewer / longer, rel=0.05)


@pytest.mark.parametrize(
    ("flags", "message"), [(("--json", "-p", "x"), "not JSON"), ((), "no prompt")]
)
def test_what_makes_no_sense(
    demo_file: DemoFile,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert run([str(demo_file("q8_0")), "--twice", *flags]) == 1
    assert message in capsys.readouterr().err
