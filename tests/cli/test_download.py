"""-hf: files from a stand-in for the Hugging Face Hub, over real connections that break."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, HubServer, serve

from orthrus_gguf.cli.download import choose, resolve
from orthrus_gguf.cli.heads import heads_name
from orthrus_gguf.errors import OrthrusError

REPO = "some-lab/Orthrus-Tiny-GGUF"
CODE = "import sys; from orthrus_gguf.cli.download import resolve; print(resolve(sys.argv[1]))"

ALL = """
import sys
from orthrus_gguf.cli.download import resolve
from orthrus_gguf.errors import OrthrusError
for spec in sys.argv[1:]:
    try:
        print(resolve(spec))
    except OrthrusError as error:
        print(error)
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    names = ("tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "tiny-Q4_K_M-heads.gguf", "README.md")
    files = {name: hashlib.sha256(name.encode()).digest() * 20_000 for name in names}
    with serve(HubServer(REPO, files)) as server:
        yield server


@pytest.fixture
def start(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python with the stand-in as the Hub, and a cache of its own."""

    def run(*argv: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
        return subprocess.run(
            [sys.executable, *argv],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            timeout=60,
        )

    return run


def cached(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / "hf/hub" / f"models--{REPO.replace('/', '--')}"
    return folder / "snapshots" / COMMIT / name


def test_a_file_and_its_heads_are_downloaded_once(
    hub: HubServer, start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    done = start("-c", CODE, REPO, stderr=theirs)
    os.close(theirs)
    path = cached(tmp_path, "tiny-Q4_K_M.gguf")
    assert (done.returncode, done.stdout) == (0, f"{path}\n"), done.stderr
    assert path.read_bytes() == hub.files[path.name]
    heads = path.with_name("tiny-Q4_K_M-heads.gguf")
    assert heads.read_bytes() == hub.files[heads.name]
    assert [name for name, _ in hub.requests] == [path.name, heads.name]
    assert path.name.encode() in os.read(ours, 4096), "no bar"
    os.close(ours)
    again = start("-c", CODE, f"{REPO}:q4_k_m")
    assert (again.stdout, again.stderr) == (done.stdout, "")
    assert len(hub.requests) == 2
    hub.url = "http://127.0.0.1:9"  # nobody answers there
    offline = start("-c", CODE, REPO)
    assert offline.stdout == done.stdout
    assert f"-hf {REPO}: the Hugging Face Hub cannot be reached; going on with" in offline.stderr
    missing = start("-c", CODE, f"{REPO}:Q8_0")
    assert "(offline): no file of that quantization; there are tiny-Q4_K_M.gguf" in missing.stderr


def test_what_was_cut_off_goes_on_where_it_was(
    hub: HubServer, start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    name, size = "tiny-Q8_0.gguf", 40 << 20  # the client writes 10 MiB at a time
    hub.files[name] = hashlib.sha256(b"x").digest() * (size // 32)
    hub.script = ["cut", "cut", 403]
    first = start("-c", CODE, f"{REPO}:Q8_0")
    assert first.returncode == 1
    assert "run the same command again, finished parts are kept" in first.stderr
    half, rest = f"bytes={size // 2}-", f"bytes={size * 3 // 4}-"
    assert hub.requests == [(name, None), (name, half), (name, rest)]
    assert start("-c", CODE, f"{REPO}:Q8_0").returncode == 0
    assert hub.requests[3:] == [(name, rest)]
    path = cached(tmp_path, name)
    assert path.read_bytes() == hub.files[name]
    assert not list(path.resolve().parent.glob("*incomplete")), "the part is the file now"


def test_damage_on_the_way_is_noticed(
    hub: HubServer, start: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    hub.script = ["wrong"]
    first = start("-c", CODE, f"{REPO}:Q8_0")
    assert first.returncode == 1
    assert "its SHA-256 differs); run the same command again" in first.stderr
    assert not cached(tmp_path, "tiny-Q8_0.gguf").exists()
    assert start("-c", CODE, f"{REPO}:Q8_0").returncode == 0
    assert hub.requests == [("tiny-Q8_0.gguf", None)] * 2


def test_refusals_are_one_line(
    hub: HubServer, start: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    hub.refusals["some-lab/gated"] = (401, "GatedRepo")
    expected = {
        "some-lab/nothing": "no such repository on the Hugging Face Hub; check the name",
        "some-lab/gated": "access is restricted; accept its terms on its page and set HF_TOKEN",
        f"{REPO}:Q2_K": "no file of that quantization; there are tiny-Q4_K_M.gguf, tiny-Q8_0.gguf",
    }
    done = start("-c", ALL, *expected)
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected), (done.stdout, done.stderr)
    for line, (spec, message) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"-hf {spec}: {message}")
    hub.url = "http://127.0.0.1:9"
    done = start("-m", "orthrus_gguf.cli.run", "-p", "x", "-hf", REPO)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "the Hugging Face Hub cannot be reached (" in done.stderr
    assert "go online, or name a file that is here" in done.stderr


def test_a_model_runs_from_the_hub(
    hub: HubServer,
    start: Callable[..., subprocess.CompletedProcess[str]],
    demo_file: Callable[..., Path],
) -> None:
    base = demo_file("f32", split=True)
    heads = Path(heads_name(str(base)))
    hub.files = {"m-F32.gguf": base.read_bytes(), "m-F32-heads.gguf": heads.read_bytes()}
    flags = ("-p", "import os", "-n", "5", "--temp", "0", "-t", "1", "--strategy", "two-pass")
    done = start("-m", "orthrus_gguf.cli.run", "-hf", REPO, *flags, "--no-perf")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "with the diffusion heads beside it, m-F32-heads.gguf" in done.stderr


MANY = [
    *("sub/a-Q4_K_M.gguf", "b-Q8_0-00002-of-00002.gguf", "b-Q8_0-00001-of-00002.gguf"),
    *("b-Q8_0-heads.gguf", "b-mmproj-Q2_K.gguf", "imatrix.gguf", "c-IQ1_S.gguf", "notes.txt"),
    "d-Q5_0-00001-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        (None, ["sub/a-Q4_K_M.gguf"]),
        ("q4_k_m", ["sub/a-Q4_K_M.gguf"]),
        ("Q8_0", [*sorted(MANY)[:3]]),
        ("IQ1_S", ["c-IQ1_S.gguf"]),
    ],
)
def test_which_files(quant: str | None, expected: list[str]) -> None:
    assert sorted(choose(MANY, quant, "x")) == sorted(expected)
    assert choose(MANY, quant, "x")[0] == min(expected, key=lambda n: ("heads" in n, n))


def test_the_first_file_where_no_preferred_one_is() -> None:
    assert choose(["z-Q2_K.gguf", "b-IQ1_S.gguf", "a-heads.gguf"], None, "x") == ["b-IQ1_S.gguf"]
    assert choose(["z-Q2_K.gguf", "b-Q8_0.gguf"], None, "x") == ["b-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        ("Q3_K", "no file of that quantization; there are b-Q8_0-00001"),
        ("Q5_0", "lacks d-Q5_0-00002-of-00002.gguf"),
    ],
)
def test_files_that_are_not_there(quant: str, expected: str) -> None:
    with pytest.raises(OrthrusError, match=expected):
        choose(MANY, quant, "x")
    with pytest.raises(OrthrusError, match="holds no GGUF model"):
        choose(["a-heads.gguf", "model.safetensors"], None, "x")


@pytest.mark.parametrize("spec", ["name", "a/b/c", "a/b:", "../x:Q4", "/etc/x", "a/b:Q4/../x"])
def test_what_is_no_repository(spec: str) -> None:
    with pytest.raises(OrthrusError, match="expected OWNER/NAME or OWNER/NAME:QUANT"):
        resolve(spec)
