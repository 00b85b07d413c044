"""Repository ids as sources, with a stand-in for the Hub's client: nothing here uses a network."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import pytest
from damage import check_refusal
from hf_checkpoint import write_checkpoint, write_json
from huggingface_hub import errors
from orthrus_converters.cli import main

REPO = "some-lab/Orthrus-Tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """snapshot_download() over one folder; records what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[SimpleNamespace] = []
        self.fetched: list[str] = []
        self.error: Exception | None = None

    def download(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        allow_patterns: list[str],
        ignore_patterns: list[str],
    ) -> str:
        self.calls.append(SimpleNamespace(repo=repo_id, revision=revision))
        if self.error is not None:
            raise self.error
        names = [str(path.relative_to(self.folder)) for path in self.folder.rglob("*")]
        self.fetched = [
            name
            for name in names
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)
            and not any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns)
        ]
        return str(self.folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A hub with one sharded checkpoint, in a folder named as in the client's cache."""
    folder = write_checkpoint(tmp_path / "snapshots" / COMMIT, n_shards=2)
    fake = FakeHub(folder)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.download)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_repository(hub: FakeHub, convert: Callable[..., Any], out: Path) -> None:
    (hub.folder / "pytorch_model.bin").touch()
    (hub.folder / "modeling_orthrus.py").touch()
    (hub.folder / "original").mkdir()
    (hub.folder / "original" / "model.safetensors").touch()
    (hub.folder / "additional_chat_templates").mkdir()
    (hub.folder / "additional_chat_templates" / "rag.jinja").write_text("RAG")
    assert main([REPO, str(out / "model.gguf"), "--type", "q8_0"]) == 0
    assert [(call.repo, call.revision) for call in hub.calls] == [(REPO, None)] * 2
    assert sorted(hub.fetched) == [
        "additional_chat_templates/rag.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    fields = gguf.GGUFReader(out / "model.gguf").fields
    assert fields["general.name"].contents() == "Orthrus Tiny"
    assert fields["tokenizer.chat_template.rag"].contents() == "RAG"
    assert fields["general.source.repo_url"].contents() == f"https://huggingface.co/{REPO}"


def test_the_data_is_that_of_the_folder(hub: FakeHub, out: Path) -> None:
    assert main([REPO, str(out / "a.gguf")]) == 0
    assert main([str(hub.folder), str(out / "b.gguf")]) == 0
    first, second = (gguf.GGUFReader(out / name).tensors for name in ("a.gguf", "b.gguf"))
    for ours, theirs in zip(first, second, strict=True):
        assert ours.name == theirs.name
        assert ours.data.tobytes() == theirs.data.tobytes()


def test_revisions(hub: FakeHub, tiny: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([REPO, str(out / "a.gguf"), "--revision", "v2"]) == 0
    assert {call.revision for call in hub.calls} == {"v2"}
    assert main([str(tiny), str(out / "b.gguf"), "--revision", "v2"]) == 1
    assert "--revision v2: only repositories have revisions" in capsys.readouterr().err


def test_folders_come_first(hub: FakeHub, out: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / REPO)
    assert main([REPO, str(out / "a.gguf")]) == 0
    assert hub.calls == []


def test_a_plain_model_is_refused_before_its_weights_come(
    hub: FakeHub, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(
        hub.folder / "model.safetensors.index.json",
        {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}},
    )
    assert main([REPO, str(out / "a.gguf")]) == 1
    assert f"{REPO}: holds no diffusion heads" in capsys.readouterr().err
    assert len(hub.calls) == 1
    assert not any(name.endswith(".safetensors") for name in hub.fetched)


def test_heads_from_a_repository(hub: FakeHub, out: Path) -> None:
    base = out / "base.gguf"
    assert main([str(hub.folder), str(base), "--split", "--type", "q8_0"]) == 0
    argv = ["--base", str(base), "--heads", REPO, str(out / "m.gguf"), "--revision", "main"]
    assert main(argv) == 0
    fields = gguf.GGUFReader(out / "m.gguf").fields
    prefix = "orthrus.graft.heads."
    found = {key: field.contents() for key, field in fields.items() if key.startswith(prefix)}
    assert found == {
        f"{prefix}name": f"https://huggingface.co/{REPO}",
        f"{prefix}revision": COMMIT,
    }


def bare(kind: type[Exception]) -> Exception:
    """An error of this kind without the HTTP response that its constructor asks for."""
    return kind.__new__(kind)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: errors.LocalEntryNotFoundError("offline"), "cannot be reached; go online"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "cannot be reached; go online"),
        (
            lambda: bare(errors.RepositoryNotFoundError),
            "no such repository on the Hugging Face Hub",
        ),
        (lambda: bare(errors.GatedRepoError), "set HF_TOKEN to your access"),
        (lambda: bare(errors.RevisionNotFoundError), "no such revision"),
        (lambda: errors.HFValidationError("bad"), "no valid repository id"),
        (lambda: ConnectionError("reset\nby peer"), "reset by peer; run the same command again"),
        (lambda: OSError(28, "No space left on device"), "No space left on device"),
        (lambda: RuntimeError(), "cannot be downloaded: RuntimeError"),
    ],
)
def test_errors(
    make: Callable[[], Exception],
    expected: str,
    hub: FakeHub,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.error = make()
    assert main([REPO, str(out / "model.gguf")]) == 1
    captured = capsys.readouterr()
    run = SimpleNamespace(
        code=1, stdout=captured.out, stderr=captured.err, files=[p.name for p in out.iterdir()]
    )
    check_refusal(run, REPO, expected)


def test_interrupting_a_download(
    hub: FakeHub, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: Any, **named: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    assert main([REPO, str(out / "model.gguf")]) == 130
    assert "interrupted, nothing was written" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no/such/folder", "nothing", "../up", "a/b.gguf", "/abs/path"])
def test_what_is_no_repository_id(name: str, hub: FakeHub, out: Path) -> None:
    assert main([name, str(out / "model.gguf")]) == 1
    assert hub.calls == []
