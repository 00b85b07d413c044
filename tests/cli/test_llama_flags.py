"""A llama.cpp user's habits: flags, variables, and what is said of those that do nothing here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from orthrus_gguf.cli import options
from orthrus_gguf.cli.llama_flags import FLAGS, markdown
from orthrus_gguf.cli.llama_table import Status
from orthrus_gguf.cli.run import _parser
from orthrus_gguf.command import Parser
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.load import RuntimeName

TABLE = Path(__file__).resolve().parents[2] / "LLAMA-FLAGS.md"

Parse = Callable[..., argparse.Namespace]
Refused = Callable[..., str]


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Parse:
    """Parse words as orthrus-run does, with nothing in the environment but what is given."""
    for flag in FLAGS:
        monkeypatch.delenv(flag.variable or "LLAMA_ARG_MODEL", raising=False)

    def call(*words: str, **variables: str) -> argparse.Namespace:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return _parser().parse_args(words)

    return call


@pytest.fixture
def refused(parse: Parse, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Parse words that are wrong; returns the one line that says so."""

    def call(*words: str, **variables: str) -> str:
        with pytest.raises(SystemExit) as stop:
            parse(*words, **variables)
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith("orthrus-run: error: ")
        return err.removeprefix("orthrus-run: error: ").rstrip()

    return call


def test_the_table_names_every_flag_once() -> None:
    names = [name for flag in FLAGS for name in flag.names]
    assert len(names) == len(set(names)) > 400
    assert all(flag.note or flag.status is Status.SUPPORTED for flag in FLAGS)


def test_what_the_table_calls_supported_is_what_the_parser_has() -> None:
    own = _parser().own_flags()
    for flag in FLAGS:
        assert own.issuperset(flag.names) == (flag.status is Status.SUPPORTED), flag
        assert flag.status is Status.SUPPORTED or not own & set(flag.names), flag


def test_the_table_for_readers_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """If not: python -m orthrus_gguf.cli.llama_flags > LLAMA-FLAGS.md"""
    assert TABLE.read_text(encoding="utf-8") == markdown()
    with pytest.raises(SystemExit) as stop:
        _parser().parse_args(["--help-llama"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == markdown()


@pytest.mark.parametrize("flag", [flag for flag in FLAGS if flag.status is not Status.SUPPORTED])
def test_every_other_flag_says_its_line(
    flag: Any, parse: Parse, refused: Refused, capsys: Any
) -> None:
    values = ["7"] * flag.values
    for name in flag.names:
        if flag.status is Status.REFUSED:
            assert refused(name, *values, "m.gguf") == f"{name} is not supported: {flag.note}"
            continue
        args = parse(name, *values, "m.gguf", "-n", "3")
        assert (args.model, args.predict) == ("m.gguf", 3)
        assert capsys.readouterr().err == f"orthrus-run: {name} has no effect here: {flag.note}\n"


def test_values_of_other_flags_are_taken_along(parse: Parse, capsys: Any) -> None:
    words = (
        "-ngl 99 -fa on -co -fa --color auto -sm none -t 2 --mirostat 0 --typical 1.0 m.gguf -fa"
    )
    args = parse(*words.split())
    assert (args.model, args.threads) == ("m.gguf", 2)
    said = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert said == ["-ngl", "-fa", "-co", "-fa", "--color", "-sm", "-fa"]


def test_names_of_llama_cpp(parse: Parse) -> None:
    args = parse(
        *("-m", "m.gguf", "--n_predict", "5", "--temperature=0.5", "--cache_type_k", "q8_0"),
        *("-v", "-r", "stop", "--reverse-prompt", "-end", "-p", "-n", "-rea", "off"),
        *("-no-cnv", "--no-show-timings", "-t", "-1", "--repeat-last-n", "-1"),
    )
    assert (args.predict, args.temperature, args.cache_type_k) == (5, 0.5, "q8_0")
    assert (args.verbose, args.stop, args.prompt) == (True, ["stop", "-end"], "-n")
    assert (args.think, args.raw, args.no_perf) == (False, True, True)
    assert (args.threads, args.repeat_last_n) == (None, -1)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--tmp 0", "unknown option --tmp, did you mean --temp? see orthrus-run --help"),
        ("-n5", "unknown option -n5, did you mean -n 5? see orthrus-run --help"),
        ("-gnl 99", "unknown option -gnl, did you mean -ngl? see orthrus-run --help"),
        ("--pred 5", "unknown option --pred"),  # prefixes are not guessed at
        ("--zzz", "unknown option --zzz; see orthrus-run --help"),
        (
            "--strategy two-pas",
            "argument --strategy: invalid choice: 'two-pas', did you mean two-pass?",
        ),
        ("--strategy x", "argument --strategy: invalid choice: 'x'; choose from auto, ar, "),
        ("hello", "what is 'hello'? A prompt goes with -p; see orthrus-run --help"),
        ("-n", "argument -n/--predict/--n-predict: needs a value"),
        ("-t 0", "argument -t/--threads: 0: expected at least 1"),
        ("-rea maybe", "argument -rea/--reasoning: expected on, off or auto, found 'maybe'"),
    ],
)
def test_what_is_mistyped(refused: Refused, words: str, line: str) -> None:
    assert refused("m.gguf", *words.split()).startswith(line)


def test_the_environment_speaks_for_flags_that_are_not_given(parse: Parse) -> None:
    variables = {"LLAMA_ARG_CTX_SIZE": "100", "LLAMA_ARG_N_PREDICT": "7", "LLAMA_ARG_PERF": "off"}
    args = parse("m.gguf", "--n-predict", "9", **variables, LLAMA_ARG_MODEL="other.gguf")
    assert (args.model, args.model_flag) == ("m.gguf", None)
    assert (args.ctx_size, args.predict, args.no_perf) == (100, 9, True)
    assert parse("--perf").no_perf is False
    assert parse().model_flag == "other.gguf"
    assert parse("-m", "mine.gguf").model_flag == "mine.gguf"


def test_errors_of_the_environment_name_the_variable(refused: Refused) -> None:
    line = refused("m.gguf", LLAMA_ARG_CTX_SIZE="many")
    assert line.startswith("argument -c/--ctx-size: expected a whole number, found 'many' (from")
    assert "(from LLAMA_ARG_CTX_SIZE)" in line
    line = refused("m.gguf", "-c", "5", LLAMA_ARG_SHOW_TIMINGS="perhaps")
    assert "'perhaps' is not on or off (from LLAMA_ARG_SHOW_TIMINGS)" in line


@pytest.mark.parametrize("name", ["cpu", "none", "CPU"])
def test_the_device_cpu_is_the_cpu(parse: Parse, name: str) -> None:
    settings = options.runtime_settings(parse("m.gguf", "-dev", name))
    assert (settings.name, settings.device) == (RuntimeName.CPU, None)
    settings = options.runtime_settings(parse("m.gguf", "-dev", name, "--runtime", "ggml"))
    assert (settings.name, settings.device) == (RuntimeName.GGML, None)
    with pytest.raises(OrthrusError, match=f"--device {name}: --runtime cuda needs a GPU"):
        options.runtime_settings(parse("m.gguf", "--device", name, "--runtime", "cuda"))
    assert options.runtime_settings(parse("m.gguf", "--device", "CUDA1")).device == "cuda:1"


def test_devices_are_listed(parse: Parse, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--list-devices")
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0
    assert lines[0] == "Available devices:"
    assert lines[1].startswith(("  no GPU: ", "  cuda:0: "))
    assert lines[-1].startswith("  cpu: ")


PARSERS = {
    **{name: f"orthrus_gguf.cli.{name}" for name in ("run", "bench", "inspect", "bench_compare")},
    **{name: f"orthrus_gguf.cli.{name}" for name in ("bench_predict", "bench_record")},
    "bench_simulate": "orthrus_gguf.cli.bench_simulate",
    "convert": "orthrus_converters.options",
}


@pytest.mark.parametrize("name", PARSERS)
def test_no_inner_name_reaches_a_user(name: str) -> None:
    """argparse would print the name of a function that raises ValueError."""
    module = import_module(PARSERS[name])
    parser: Parser = getattr(module, "_parser", None) or module.build_parser
    for action in parser()._actions:  # type: ignore[operator]
        if callable(action.type) and action.type is not Path:
            with suppress(argparse.ArgumentTypeError):
                action.type("x,?")
