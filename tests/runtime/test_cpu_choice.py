"""When `--runtime cpu` takes the native kernels, and what is said when it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
from cpu_models import kernels, small_file
from orthrus_cpu_kernels import library
from synthetic_model import model_shape

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime import limits
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Model

DemoFile = Callable[..., Path]


@contextmanager
def chosen(path: Path, said: list[str], **settings: Any) -> Iterator[Model]:
    with ModelFile.open(path) as file:
        values = RuntimeSettings(RuntimeName.CPU, **{"threads": 1, **settings})
        model = load_model(file, values, say=said.append)
        try:
            yield model
        finally:
            model.close()


def test_the_native_kernels_say_nothing(demo_file: DemoFile) -> None:
    said: list[str] = []
    with chosen(demo_file("q8_0"), said) as model:
        assert kernels().isa in model.description
    assert not said


@pytest.mark.parametrize("k", ["f32", "q8_0", "q4_0"])
def test_they_take_every_cache_type(demo_file: DemoFile, k: str) -> None:
    said: list[str] = []
    kernels()
    with chosen(demo_file("q8_0"), said, cache_type_k=k, cache_type_v="f16") as model:
        assert f"{k}/f16 cache" in model.description
    assert not said


def fallback(path: Path) -> str:
    """The line that is said when ggml takes over."""
    said: list[str] = []
    with chosen(path, said) as model:
        assert "ggml" in model.description
    (line,) = said
    assert "\n" not in line
    assert line.startswith("running on ggml, which is slower: ")
    return line


def test_without_objects_ggml_takes_over(
    demo_file: DemoFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an installation on a machine without a C compiler."""
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.delenv(library.ISA, raising=False)
    line = fallback(demo_file("q8_0"))
    assert "were not built, for want of a C compiler" in line
    assert "install gcc or clang, then repeat the pip install with --force-reinstall" in line


def test_objects_that_cannot_be_used(
    demo_file: DemoFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "avx2.so").write_bytes(b"not a library")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.delenv(library.ISA, raising=False)
    assert "no CPU kernels can be used: avx2: it cannot be loaded (" in fallback(demo_file("q8_0"))


def test_an_instruction_set_that_is_not_there(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels()
    monkeypatch.setenv(library.ISA, "mmx")
    assert "ORTHRUS_CPU_ISA=mmx: expected one of" in fallback(demo_file("q8_0"))
    monkeypatch.setenv(library.ISA, "portable")
    said: list[str] = []
    with chosen(demo_file("q8_0"), said) as model:
        assert "portable C" in model.description
    assert not said


def test_types_without_a_product(tmp_path: Path) -> None:
    kernels()
    path = small_file(tmp_path, gguf.GGMLQuantizationType.IQ3_S)
    assert "token_embd.weight is IQ3_S, which they have no product for" in fallback(path)


def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    kernels()
    config = model_shape(n_head=4, n_head_kv=2, head_dim=40, n_embd=160)
    path = small_file(tmp_path, gguf.GGMLQuantizationType.F16, config)
    assert "heads of 40 elements are no multiple of 16" in fallback(path)


def test_more_threads_than_cores_are_clamped(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels()
    monkeypatch.setattr(limits, "usable_cores", lambda: 2)
    for threads, used in ((1, 1), (2, 2), (3, 2), (None, 2)):
        said: list[str] = []
        with chosen(demo_file("q8_0"), said, threads=threads) as model:
            assert f", {used} thread" in model.description
        expected = "--threads 3: more than this process can run at once; it uses 2"
        assert said == ([expected] if threads == 3 else [])
    for threads in (0, 1000):
        refused = pytest.raises(OrthrusError, match=f"--threads {threads}: must lie in 1")
        with refused, chosen(demo_file("q8_0"), [], threads=threads):
            pass
