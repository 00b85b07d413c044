"""How commands start and end as processes: Ctrl-C at any moment, streams of any kind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: An import that takes forever, and takes an interrupt for a module that is broken.
SLOW_IMPORT = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException:
    raise ImportError("broken") from None
"""

COMMANDS = {
    "orthrus-run": ["orthrus_gguf.cli.run"],
    "orthrus-bench": ["orthrus_gguf.cli.bench"],
    "orthrus-inspect": ["orthrus_gguf.cli.inspect"],
    "orthrus-server": ["orthrus_gguf.cli.server"],
    "orthrus-convert": ["orthrus_converters"],
}

BABBLE = (
    *("--raw", "-p", "é", "-n", "60", "-s", "1", "--temp", "100", "--top-k", "0", "--top-p", "1"),
    *("--min-p", "0", "--ignore-eos", "--strategy", "ar", "-t", "1"),
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and shells of POSIX")


@pytest.fixture(scope="module")
def model(demo_file: Callable[..., Path]) -> str:
    return str(demo_file("q8_0"))


def start(
    module: Sequence[str], *words: object, before: Path | None = None, **settings: Any
) -> subprocess.Popen[str]:
    """A command in a process of its own. before: a folder whose modules come first."""
    found = [str(before)] if before else []
    environment = {**os.environ, **settings.pop("env", {})}
    environment["PYTHONPATH"] = os.pathsep.join([*found, *filter(None, sys.path)])
    process: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-m", *module, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **settings,
    )
    return process


@pytest.mark.parametrize("program", COMMANDS)
def test_ctrl_c_while_importing(program: str, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text(SLOW_IMPORT)
    ways = [COMMANDS[program], ["orthrus_gguf", program.removeprefix("orthrus-")]]
    for module in ways:
        process = start(module, before=tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert (process.returncode, out, err) == (130, "", f"{program}: interrupted\n")


@pytest.mark.parametrize("program", COMMANDS)
def test_ctrl_c_at_any_moment(program: str, model: str, tmp_path: Path) -> None:
    words: dict[str, list[object]] = {
        "orthrus-run": [model, "-p", "import ", "--ignore-eos", "-t", "1"],
        "orthrus-bench": [model, "-t", "1", "-r", "1000"],
        "orthrus-inspect": [model, "--tensors"],
        "orthrus-server": [model, "--port", "0", "-t", "1"],
        "orthrus-convert": ["--synthetic", "smollm2-135m", tmp_path / "new.gguf"],
    }
    interrupted = 0
    for seconds in (0.05, 0.1, 0.15, 0.2, 0.3, 0.45):
        process = start(COMMANDS[program], *words[program])
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        python_starts = "Traceback" in err and "entry.py" not in err
        if python_starts or process.returncode == -signal.SIGINT:
            continue
        assert "Traceback" not in err
        last = err.splitlines()[-1] if err else ""
        if process.returncode == 0:  # it was faster
            assert program == "orthrus-inspect"
            assert out
            continue
        assert process.returncode == 130
        # In the import of `signal` alone, the program does not know its name yet.
        assert last == "interrupted" or last.startswith(f"{program}: interrupted")
        interrupted += 1
    assert interrupted
    assert not list(tmp_path.iterdir())


def test_an_ignored_ctrl_c_stays_ignored(model: str) -> None:
    """As in a script's background job."""
    process = start(
        COMMANDS["orthrus-run"],
        *(model, "-p", "import ", "-n", "3", "-t", "1", "--strategy", "ar"),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "interrupted" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_bench_ends_its_converter(number: signal.Signals, tmp_path: Path) -> None:
    """The signal reaches the command alone, as from a supervisor, and nothing is left."""
    process = start(
        COMMANDS["orthrus-bench"], "--synthetic", "smollm2-135m", "--make-only", cwd=tmp_path
    )
    end = time.monotonic() + 20
    while not list(tmp_path.glob("*.tmp*")):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err == "orthrus-convert: terminated, nothing was written\n"
    assert not list(tmp_path.iterdir())


def run(*words: object, shell: str = "", **env: str) -> tuple[int, bytes, str]:
    """Run orthrus-run to its end, with a redirection of the shell's; code, stdout, stderr."""
    command = [sys.executable, "-m", *COMMANDS["orthrus-run"], *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **env}
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", *command],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr.decode(errors="replace")


@pytest.fixture(scope="module")
def text(model: str) -> str:
    """What BABBLE says where it can be shown."""
    code, out, _ = run(model, *BABBLE, PYTHONIOENCODING="utf-8")
    assert code == 0
    assert not out.isascii()
    return out.decode()


C_LOCALE = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.parametrize(
    ("env", "encoding"),
    [
        ({"PYTHONIOENCODING": "ascii"}, "ascii"),
        ({"PYTHONIOENCODING": "latin-1"}, "latin-1"),
        (C_LOCALE, "ascii"),
    ],
)
def test_streams_that_are_not_utf_8(
    env: dict[str, str], encoding: str, model: str, text: str
) -> None:
    """The prompt arrives as it is, the text is shown as far as it can be, JSON holds all of it."""
    code, out, err = run(model, *BABBLE, **env)
    assert (code, out) == (0, text.encode(encoding, "replace")), err
    code, out, err = run(model, *BABBLE, "--json", **env)
    assert code == 0, err
    assert json.loads(out.decode(encoding))["text"] == text[:-1]
    code, out, err = run("--help", **env)
    assert (code, err) == (0, "")
    assert b"orthrus-run" in out


def test_closed_streams(model: str) -> None:
    flags = (model, "-p", "import ", "-n", "5", "--temp", "0", "-t", "1", "--strategy", "ar")
    code, text, err = run(*flags)
    assert code == 0
    assert "tok/s" in err
    assert run(*flags, shell="<&-")[:2] == (0, text)
    assert run(*flags, shell="2>&-") == (0, text, "")
    code, out, err = run(model, shell="<&-")
    assert (code, out, err.count("\n")) == (1, b"", 1)
    assert "no prompt" in err
    line = "orthrus-run: error: stdout is closed: there is nowhere to print to\n"
    assert run(*flags, shell=">&-") == (1, b"", line)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is full is a Linux thing")
def test_a_full_disk_is_one_line(model: str) -> None:
    for words in (["--help"], [model, "-p", "x", "-n", "3", "-t", "1", "--no-perf", "--raw"]):
        code, _, err = run(*words, "--strategy", "ar", shell=">/dev/full")
        assert code == 1
        assert err.startswith("orthrus-run: error: ")
        assert "No space left on device" in err
        assert err.count("\n") == 1


def test_an_empty_cache_variable_means_unset(model: str, tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    process = start(
        COMMANDS["orthrus-run"],
        *(model, "-p", "import ", "-n", "2", "-t", "1"),
        cwd=here,
        env={"XDG_CACHE_HOME": "", "HOME": str(home)},
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert not list(here.iterdir())
    assert list((home / ".cache" / "orthrus-gguf").glob("costs-*.json"))


def test_the_package_is_a_command(model: str) -> None:
    process = start(["orthrus_gguf"], "inspect", model)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, "")
    assert "Tiny Orthrus Stdlib" in out
    process = start(["orthrus_gguf"], "inspct", model)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (1, "")
    assert "did you mean inspect?" in err


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_demo_says_what_a_source_archive_lacks(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(
        ROOT / "models",
        tmp_path / "models",
        ignore=shutil.ignore_patterns("*.safetensors", "*.gguf"),
    )
    done = subprocess.run(
        ["make", "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "models/ has no weights" in done.stderr
    assert not (tmp_path / ".venv").exists()
