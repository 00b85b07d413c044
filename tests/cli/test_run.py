"""orthrus-run as a user meets it: what it prints, where, and how it fails."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter

from orthrus_gguf.cli import options
from orthrus_gguf.cli.run import main, unescape
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import Value
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.text.tokenizer import load_tokenizer

DemoFile = Callable[..., Path]


@pytest.fixture(scope="module")
def model(demo_file: DemoFile) -> str:
    return str(demo_file("f32"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command in this process; returns exit code, stdout, stderr."""

    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([*argv, "-t", "1"])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def golden_case(golden: dict[str, Any], number: int) -> tuple[str, dict[str, Any]]:
    case = golden["cases"][number]
    return case["prompt"], case


@pytest.mark.parametrize("number", [1, 10])
def test_json_equals_the_official_run(
    run: Any, model: str, golden: dict[str, Any], number: int
) -> None:
    prompt, case = golden_case(golden, number)
    code, out, err = run(
        model,
        "-p",
        prompt,
        "--no-escape",
        "--temp",
        "0",
        "-n",
        str(case["n_new"]),
        "--strategy",
        "two-pass",
        "--json",
    )
    report = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert "no chat template" in err
    assert report["prompt_ids"] == case["prompt_ids"]
    assert report["output_ids"] == case["output_ids"]
    assert report["cycle_starts"] == case["cycle_starts"]
    assert report["finish_reason"] == "length"
    starts = [*case["cycle_starts"], len(case["prompt_ids"]) + case["n_new"] - 1]
    gains = [b - a - 1 for a, b in pairwise(starts)]
    assert report["accepted"] == gains
    assert report["stats"]["accepted"] == sum(gains)
    assert report["stats"]["cycles"] == len(gains)
    assert report["settings"]["strategy"] == "two-pass"
    assert report["settings"]["draft_width"] == 15
    assert report["model"]["files"] == [model]
    assert report["timings"]["generation_tokens_per_second"] > 0
    assert set(report) == {
        "prompt_ids",
        "output_ids",
        "text",
        "finish_reason",
        "cycle_starts",
        "accepted",
        "stats",
        "timings",
        "model",
        "settings",
    }


@pytest.mark.parametrize("runtime", ["cpu", "reference"])
def test_text_goes_to_stdout_and_the_rest_to_stderr(run: Any, model: str, runtime: str) -> None:
    flags = ("-p", "import os\\nimport", "-n", "20", "--temp", "0", "--runtime", runtime)
    code, out, err = run(model, *flags, "--strategy", "two-pass")
    assert code == 0
    assert out.startswith(" os\nimport os")
    for word in ("load", "prompt: ", "output:  20 tokens in ", "tokens per cycle", "accepted"):
        assert word in err
    assert f"Tiny Orthrus Stdlib on {runtime} (" in err
    _, plain, plain_err = run(model, *flags, "--strategy", "ar", "--no-perf")
    assert plain == out
    assert "tok/s" not in plain_err


def test_split_files_give_the_same_text(run: Any, model: str, demo_file: DemoFile) -> None:
    base = demo_file("f32", split=True)
    heads = str(base.with_name(base.stem + "-heads.gguf"))
    flags = ("-p", "def ", "-n", "30", "--temp", "0", "--json", "--strategy", "two-pass")
    single = json.loads(run(model, *flags)[1])
    pair = json.loads(run("-m", str(base), "--heads", heads, *flags)[1])
    assert pair["output_ids"] == single["output_ids"]
    assert pair["accepted"] == single["accepted"]
    code, out, err = run(str(base), *flags)  # they are found where they lie
    assert json.loads(out)["accepted"] == single["accepted"]
    assert f"with the diffusion heads beside it, {base.stem}-heads.gguf (--no-heads" in err
    alone = json.loads(run(str(base), *flags, "--strategy", "ar", "--no-heads")[1])
    assert alone["output_ids"] == single["output_ids"]
    code, _, err = run(str(base), *flags, "--no-heads")
    assert code == 1
    assert "has no diffusion heads; use --strategy ar, or name a heads file with --heads" in err


def test_prompt_files_and_escapes(
    run: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("é\\n = 1\n\n".encode())
    flags = ("-n", "1", "--temp", "0", "--json")
    ids = json.loads(run(model, "-f", str(file), *flags)[1])["prompt_ids"]
    assert ids == json.loads(run(model, "-p", "é\\n = 1\n", "--no-escape", *flags)[1])["prompt_ids"]
    assert ids == json.loads(run(model, "-p", r"é\\n = 1\n", *flags)[1])["prompt_ids"]
    with file.open(encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert json.loads(run(model, "-f", "-", *flags)[1])["prompt_ids"] == ids
    assert unescape(r"a\tb\\n\"\q" + "\\") == 'a\tb\\n"\\q\\'


def test_seeds_and_stop_strings(run: Any, model: str) -> None:
    flags = ("-p", "class ", "-n", "24", "--json")
    first, again, other = (
        json.loads(run(model, *flags, "--seed", seed)[1]) for seed in ("5", "5", "6")
    )
    assert first["text"] == again["text"] != other["text"]
    assert first["settings"]["seed"] == 5
    seeds = {json.loads(run(model, *flags)[1])["settings"]["seed"] for _ in range(2)}
    assert len(seeds) == 2
    cut = first["text"][6:9]
    stopped = json.loads(run(model, *flags, "--seed", "5", "--stop", cut, "--no-escape")[1])
    assert stopped["text"] == first["text"].split(cut)[0]
    assert stopped["finish_reason"] == "stop"


def with_metadata(source: str, target: Path, **values: float | str) -> str:
    """A copy of a GGUF with `general.sampling.*` values (or keys in full) added, written by the
    gguf package."""
    reader = GGUFReader(source)
    writer = GGUFWriter(str(target), "orthrus")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            writer.add_key_value(
                name, field.contents(), kinds[0], kinds[1] if len(kinds) > 1 else None
            )
    for name, value in values.items():
        key = name if "." in name else f"general.sampling.{name}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_int32(key, value)
        else:
            writer.add_float32(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(target)


def test_the_file_sets_sampling_defaults(run: Any, model: str, tmp_path: Path) -> None:
    plain = json.loads(run(model, "-p", "x", "-n", "1", "--json")[1])["settings"]
    defaults = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n")
    assert [plain[name] for name in defaults] == [0.8, 40, 0.95, 0.05, 1.0, 64]
    file = with_metadata(
        model, tmp_path / "m.gguf", temp=0.5, top_k=20, top_p=0.75, penalty_repeat=1.5
    )
    chosen = json.loads(run(file, "-p", "x", "-n", "1", "--top-k", "7", "--json")[1])["settings"]
    assert [chosen[name] for name in defaults] == [0.5, 7, 0.75, 0.05, 1.5, 64]


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("temp", "hot", "expected a number, found 'hot'; set it with --temp"),
        ("top_k", float("nan"), "expected a number, found nan; set it with --top-k"),
        ("penalty_last_n", -7, "expected -1 or more, found -7; set it with --repeat-last-n"),
        ("penalty_repeat", 0.0, "expected 1e-06 to 1e+06, found 0.0; set it with --repeat-penalty"),
    ],
)
def test_bad_sampling_values_of_a_file(key: str, value: Value, problem: str) -> None:
    """Named as what they are; a flag replaces them."""
    parser = argparse.ArgumentParser()
    options.add_sampling_options(parser)
    metadata = {f"general.sampling.{key}": value}
    with pytest.raises(OrthrusError) as caught:
        options.sampling_settings(parser.parse_args([]), metadata, frozenset())
    assert str(caught.value) == f"the file's general.sampling.{key}: {problem}"
    flag = problem.rpartition(" ")[2]
    options.sampling_settings(parser.parse_args([flag, "1"]), metadata, frozenset())


def test_special_tokens_in_prompts(run: Any, model: str, tmp_path: Path) -> None:
    """By default a prompt opens turns, as in llama.cpp; without, it is text whatever it spells."""
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}<|im_start|>assistant\n"
    file = with_metadata(model, tmp_path / "m.gguf", **{"tokenizer.chat_template": template})
    flags = (file, "-p", "hi<|im_end|><|im_start|>system", "-n", "1", "--json")
    with ModelFile.open(file) as opened:
        n_vocab = opened.config.n_vocab
        tokenizer = load_tokenizer(opened.metadata, path=opened.paths[0], n_vocab=n_vocab)
    start = tokenizer.special_id("<|im_start|>")
    assert start is not None
    for raw, by_default, without in ((True, 1, 0), (False, 3, 2)):
        more = ["--raw"] if raw else []
        found = json.loads(run(*flags, *more)[1])["prompt_ids"]
        assert found.count(start) == by_default
        plain = json.loads(run(*flags, *more, "--no-special-in-prompt")[1])["prompt_ids"]
        assert plain.count(start) == without
        assert tokenizer.decode(plain) == tokenizer.decode(found)


def test_what_was_mended_is_said(run: Any, model: str, tmp_path: Path) -> None:
    file = with_metadata(model, tmp_path / "m.gguf", **{"tokenizer.ggml.eot_token_id": 2**31 - 1})
    code, out, err = run(file, "-p", "x", "-n", "1", "--no-perf")
    assert code == 0
    assert "tokenizer.ggml.eot_token_id is 2147483647, outside the vocabulary of 4096" in err
    assert "outside" not in out


def test_a_context_beyond_the_training_warns(run: Any, model: str) -> None:
    flags = (model, "-p", "x", "-n", "1", "--strategy", "ar", "-c")
    line = "-c 2049: Tiny Orthrus Stdlib was trained for 2048 tokens of context; "
    assert line in run(*flags, "2049")[2]
    assert "trained" not in run(*flags, "2048")[2]


def test_no_rate_without_time(run: Any, model: str) -> None:
    code, out, err = run(model, "-p", "import os", "-n", "0")
    assert (code, out) == (0, "\n")
    assert "prompt:  0 tokens (2 more were not processed)\n" in err
    assert "output:  0 tokens, " in err
    assert "tok/s" not in err
    _, _, err = run(model, "-p", "import os", "-n", "1")
    assert "output:  1 token, " in err
    timings = json.loads(run(model, "-p", "import os", "-n", "0", "--json")[1])["timings"]
    assert timings["prompt_tokens_per_second"] is timings["generation_tokens_per_second"] is None


def test_json_explains(run: Any, model: str) -> None:
    flags = (model, "-p", "import os", "-n", "20", "--json", "--explain")
    phases = json.loads(run(*flags)[1])["explanation"]
    assert sum(phase["tokens"] for phase in phases) >= 19
    assert set(phases[0]) == {
        *("plan", "tokens", "cycles", "expected_tokens_per_second", "tokens_per_second"),
    }
    assert json.loads(run(*flags, "--strategy", "ar")[1])["explanation"] == []


def test_system_messages_from_files(run: Any, model: str, tmp_path: Path) -> None:
    file = tmp_path / "system.txt"
    file.write_text("be brief\n")
    code, _, err = run(model, "-p", "x", "-sysf", str(file))
    assert code == 1
    assert "-sys: " in err  # it has arrived: the demo model has no template to put it into
    assert "not with both" in run(model, "-p", "x", "-sys", "y", "-sysf", str(file))[2]
    assert f"-sysf {tmp_path}: cannot be read" in run(model, "-p", "x", "-sysf", str(tmp_path))[2]


def test_ignore_eos_bans_end_tokens(run: Any, model: str) -> None:
    report = json.loads(run(model, "-p", "x", "-n", "1", "--ignore-eos", "--json")[1])
    assert report["settings"]["ignore_eos"] is True


BAD = {
    "no model": ([], "name one model file"),
    "two models": (["MODEL", "-m", "MODEL", "-p", "x"], "name one model file"),
    "no such file": (["missing.gguf", "-p", "x"], "missing.gguf"),
    "a folder": (["FOLDER", "-p", "x"], "FOLDER"),
    "not a GGUF": (["TEXT", "-p", "x"], "GGUF"),
    "no such heads": (["MODEL", "--heads", "missing.gguf", "-p", "x"], "missing.gguf"),
    "heads twice": (["MODEL", "--heads", "MODEL", "-p", "x"], "already holds diffusion heads"),
    "no prompt": (["MODEL"], "no prompt"),
    "no prompt for JSON": (["MODEL", "--json"], "no prompt"),
    "two kinds of JSON": (["MODEL", "-p", "x", "--json", "--json-stream"], "leave one of them"),
    "heads and none": (["MODEL", "--heads", "x", "--no-heads", "-p", "x"], "exclude each other"),
    "a repository and a file": (["MODEL", "-hf", "a/b", "-p", "x"], "name one model file"),
    "no repository": (["-hf", "a", "-p", "x"], "expected OWNER/NAME or OWNER/NAME:QUANT"),
    "two prompts": (["MODEL", "-p", "x", "-f", "TEXT"], "not with both"),
    "empty prompt": (["MODEL", "-p", ""], "prompt is empty"),
    "no prompt file": (["MODEL", "-f", "missing.txt"], "missing.txt"),
    "prompt not UTF-8": (["MODEL", "-f", "BINARY"], "not UTF-8"),
    "prompt too long": (["MODEL", "-p", "a b c d e f", "-c", "4"], "the context 4"),
    "system prompt": (["MODEL", "-p", "x", "-sys", "y"], "chat template"),
    "thinking": (["MODEL", "-p", "x", "--think"], "--think"),
    "width too large": (["MODEL", "-p", "x", "--draft-width", "17"], "1..16"),
    "width zero": (["MODEL", "-p", "x", "--draft-width", "0"], "at least 1"),
    "strategy": (["MODEL", "-p", "x", "--strategy", "magic"], "invalid choice"),
    "temperature": (["MODEL", "-p", "x", "--temp", "nan"], "--temp"),
    "seed": (["MODEL", "-p", "x", "--seed", "-2"], "--seed"),
    "number": (["MODEL", "-p", "x", "-n", "many"], "expected a whole number, found 'many'"),
    "empty stop string": (["MODEL", "-p", "x", "--stop", ""], "stop string"),
    "unknown flag": (["MODEL", "-p", "x", "--fast"], "--fast"),
    "cache type": (
        ["MODEL", "-p", "x", "-ctk", "q8_0", "--runtime", "reference"],
        "-ctk q8_0",
    ),
    "unknown cache type": (["MODEL", "-p", "x", "-ctk", "q9"], "q9"),
    "context beyond memory": (["MODEL", "-p", "x", "-c", "99999999999"], "GiB"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_line_and_exit_code_1(
    run: Any, model: str, tmp_path: Path, name: str
) -> None:
    (tmp_path / "text").write_text("hello, this is no model, only some text in a file\n" * 9)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    words = {
        "MODEL": model,
        "TEXT": str(tmp_path / "text"),
        "BINARY": str(tmp_path / "binary"),
        "FOLDER": str(tmp_path),
    }
    argv, message = BAD[name]
    code, out, err = run(*(words.get(word, word) for word in argv))
    status = ("so the prompt is", "measuring what passes cost")
    lines = [line for line in err.splitlines() if not any(text in line for text in status)]
    assert (code, out, len(lines)) == (1, "", 1), err
    assert words.get(message, message) in lines[0]
    assert lines[0].startswith("orthrus-run: error: ")


def test_verbose_shows_the_traceback(run: Any) -> None:
    code, _, err = run("missing.gguf", "-p", "x", "--verbose")
    assert code == 1
    assert "Traceback" in err


def start_process(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "orthrus_gguf.cli.run", *argv, "-t", "1"]
    return subprocess.Popen(command, **options)


def test_ctrl_c_ends_with_130_and_keeps_the_text(model: str) -> None:
    process = start_process(
        model,
        "-p",
        "import ",
        "--ignore-eos",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert err.splitlines()[-1] == b"orthrus-run: interrupted"


def test_a_reader_that_leaves_is_no_error(model: str) -> None:
    process = start_process(
        model,
        "-p",
        "import ",
        "--ignore-eos",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    assert process.wait(timeout=20) == 1
    assert b"Traceback" not in err
    assert b"Exception ignored" not in err


def test_ctrl_c_keeps_the_json(model: str) -> None:
    process = start_process(
        *(model, "-p", "import ", "--ignore-eos", "--json-stream"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == b"orthrus-run: interrupted"
    *pieces, last = [json.loads(line) for line in [*first, *rest.splitlines()]]
    assert last["stopped"] == "interrupted"
    assert last["finish_reason"] == "cancelled"
    # What was made when it ended may not have been shown any more.
    assert last["text"].startswith("".join(piece["piece"] for piece in pieces))
    assert len(last["output_ids"]) >= 3


def test_json_streams_what_json_says(run: Any, model: str) -> None:
    flags = ("-p", "import os\\nimport", "-n", "30", "--temp", "0", "--strategy", "two-pass")
    whole = json.loads(run(model, *flags, "--json")[1])
    code, out, _ = run(model, *flags, "--json-stream")
    *pieces, last = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert "".join(piece["piece"] for piece in pieces) == whole["text"] == last["text"]
    assert {piece["origin"] for piece in pieces} >= {"drafted", "plain"}
    assert last["output_ids"] == whole["output_ids"]
    assert "stopped" not in last
    assert set(last) == set(whole)


PIPED = {
    "alone": ((), b"import os\n", "import os"),
    "after -p": (("-p", "import re"), b"import os\n\n", "import re\n\nimport os\n"),
    "nothing": (("-p", "import re"), b"", "import re"),
    "-f is all": (("-f", "FILE"), b"import os", "import sys"),
    "-f - too": (("-f", "-"), b"import os\n", "import os"),
}


@pytest.mark.parametrize("name", PIPED)
def test_text_that_is_piped_in(model: str, run: Any, tmp_path: Path, name: str) -> None:
    flags, text, expected = PIPED[name]
    file = tmp_path / "prompt.txt"
    file.write_text("import sys")
    argv = [str(file) if flag == "FILE" else flag for flag in flags]
    process = start_process(
        *(model, *argv, "-n", "1", "--json"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    out, _ = process.communicate(text, timeout=20)
    wanted = run(model, "-p", expected, "--no-escape", "-n", "1", "--json")[1]
    assert json.loads(out)["prompt_ids"] == json.loads(wanted)["prompt_ids"]


def test_piped_text_that_is_none(model: str) -> None:
    for text, message in ((b"", b"no prompt"), (b"\xff", b"stdin: not UTF-8 text (at byte 0)")):
        process = start_process(model, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        _, err = process.communicate(text, timeout=20)
        assert (process.returncode, err.count(b"\n")) == (1, 1)
        assert message in err


def test_who_waits_for_a_prompt_says_so(model: str) -> None:
    process = start_process(
        model, "-p", "x", "-n", "1", stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    assert b"reading the prompt from stdin" in process.stderr.readline()
    process.communicate(b"", timeout=20)
    assert process.returncode == 0
