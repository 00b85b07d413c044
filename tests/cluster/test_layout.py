"""Arguments of an application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orthrus_gguf.cli import server
from orthrus_gguf.cluster.layout import read
from orthrus_gguf.errors import OrthrusError


def test_flags_and_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.gguf").touch()
    Path("keys").write_text("one\ntwo\n")
    layout, flags, settings = read(
        {
            "model": "model.gguf",
            "replicas": "1..4",
            "cpus": "2",
            "parallel": "3",
            "queue": 7,
            "c": "512",
            "metrics": "true",
            "props": False,
            "api_key_file": "keys",
            "api-prefix": "/api",
        }
    )
    assert (layout.least, layout.most, layout.cpus, layout.gpus) == (1, 4, 2, 0)
    assert (layout.parallel, layout.queue) == (3, 7)
    assert (settings.keys, settings.prefix) == (["one", "two"], "/api")
    assert (settings.metrics, settings.props) == (True, False)
    args = server.parser().parse_args(flags)
    assert args.model == str(tmp_path.resolve() / "model.gguf")
    assert (args.threads, args.parallel, args.ctx_size) == (2, 3, 512)
    assert args.metrics
    assert args.api_key_file is None


def test_one_gpu_a_replica() -> None:
    layout, flags, _ = read({"model": "x", "replicas": 2, "gpus": 1, "runtime": "cuda"})
    assert (layout.least, layout.most, layout.gpus) == (2, 2, 1)
    assert "--threads" not in flags
    _, flags, _ = read({"model": "x", "threads": 5})
    assert flags.count("--threads") == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"replica": 2}, "replica: is no flag of orthrus-server, and none of replicas, cpus"),
        ({"replicas": "two"}, "replicas=two: expected 2, or 1..4"),
        ({"replicas": "4..1"}, "replicas=4..1: expected"),
        ({"replicas": "0"}, "replicas=0: expected"),
        ({"doors": "0"}, "doors=0: expected a whole number"),
        ({"cpus": "-1"}, "cpus=-1: expected a number"),
        ({"parallel": "many"}, "parallel: expected a whole number, found 'many'"),
        ({"port": 80}, "port: Ray Serve listens, not the replicas; see serve start --http-port"),
        ({"api_prefix": "x"}, "must begin with /"),
    ],
)
def test_wrong_arguments(args: dict[str, Any], words: str) -> None:
    with pytest.raises(OrthrusError, match=words.replace("..", r"\.\.")):
        read({"model": "x", **args})


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, and how to get it."""
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    monkeypatch.delitem(__import__("sys").modules, "orthrus_gguf.cluster.app", raising=False)
    with pytest.raises(OrthrusError, match=r"pip install 'orthrus-gguf\[ray\]'"):
        __import__("orthrus_gguf.cluster.app")
