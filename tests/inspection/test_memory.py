"""The memory that inspection tells: of the runtime that would run the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from orthrus_cpu_kernels import library

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.inspection.report import Report, inspect
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from tests.tiny_model import N_LAYERS, write_model


def report_of(folder: Path) -> Report:
    path = write_model(folder / "tiny.gguf", metadata={"orthrus.context_length": np.uint32(8192)})
    return inspect(path, context=100, cache_types=("f32", "f16"))


def check(report: Report) -> None:
    assert [need.context for need in report.memory] == [100, 4096, 8192]
    need = report.memory[1]
    assert need.total == need.base + need.heads + need.cache + need.buffers
    assert min(need.base, need.heads, need.cache, need.buffers) > 0
    assert report.cache_per_token == N_LAYERS * 2 * 16 * (4 + 2)


def test_memory_of_a_report_on_ggml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are used as they lie in the file."""
    monkeypatch.setattr(library, "NAMES", ())
    report = report_of(tmp_path)
    assert report.runtime == "ggml"
    check(report)
    need = report.memory[1]
    assert need.base + need.heads == report.summary.total.n_bytes


def test_memory_of_a_report_on_the_native_kernels(tmp_path: Path) -> None:
    if not library.built():
        pytest.skip("the CPU kernels are not built")
    report = report_of(tmp_path)
    assert report.runtime == "cpu"
    check(report)
    need = report.memory[1]
    assert need.base + need.heads >= report.summary.total.n_bytes, "panels are padded"


def test_it_is_the_runtime_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not there are kernels, what is told and what is loaded agree."""
    said: list[str] = []
    for names in (library.NAMES, ()):
        monkeypatch.setattr(library, "NAMES", names)
        report = report_of(tmp_path)
        settings = RuntimeSettings(RuntimeName.CPU, threads=1)
        with ModelFile.open(tmp_path / "tiny.gguf") as file:
            model = load_model(file, settings, say=said.append)
        assert type(model).__module__ == f"orthrus_gguf.runtime.{report.runtime}.model"
        model.close()
    assert len([line for line in said if "running on ggml" in line]) >= 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("q8_0", "f16"), r"-ctk q8_0: needs a head size .* multiple of 32, this model's is 16"),
        (("f16", "q2_k"), "-ctv q2_k: expected one of f32, f16, q8_0, q4_0"),
    ],
)
def test_cache_types_that_cannot_be_used(
    tmp_path: Path, names: tuple[str, str], message: str
) -> None:
    with pytest.raises(OrthrusError, match=message):
        inspect(write_model(tmp_path / "tiny.gguf"), cache_types=names)
