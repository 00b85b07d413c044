"""Which runtime is taken, and what is said about it. No GPU and no torch is asked for real."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime import load
from orthrus_gguf.runtime.cuda import presence
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model, resolve

AUTO = RuntimeSettings()
CUDA = RuntimeSettings(RuntimeName.CUDA)


def machine(
    monkeypatch: pytest.MonkeyPatch, *, gpu: bool, extra: bool, reason: str | None = None
) -> None:
    """Pretend to be on a machine; `reason` is what torch finds wrong with its GPU."""
    for module in (load, presence):
        monkeypatch.setattr(module, "gpu_visible", lambda: gpu)
        monkeypatch.setattr(module, "extra_installed", lambda: extra)
    if gpu and extra:
        monkeypatch.setattr(load, "why_unusable", lambda device=None: reason)


@pytest.mark.parametrize(
    ("gpu", "extra", "reason", "expected", "lines"),
    [
        (False, False, None, RuntimeName.CPU, []),
        (False, True, None, RuntimeName.CPU, []),
        (True, True, None, RuntimeName.CUDA, []),
        (True, False, None, RuntimeName.CPU, ["pip install 'orthrus-gguf[cuda]'"]),
        (True, True, "the driver is too old", RuntimeName.CPU, ["the driver is too old"]),
    ],
)
def test_auto(
    monkeypatch: pytest.MonkeyPatch,
    gpu: bool,
    extra: bool,
    reason: str | None,
    expected: RuntimeName,
    lines: list[str],
) -> None:
    machine(monkeypatch, gpu=gpu, extra=extra, reason=reason)
    said: list[str] = []
    assert resolve(AUTO, said.append).name is expected
    assert len(said) == len(lines)
    for line, part in zip(said, lines, strict=True):
        assert part in line
        assert "on the CPU" in line
        assert "\n" not in line


def test_a_fallback_reaches_stderr(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    demo_file: Callable[..., Path],
) -> None:
    machine(monkeypatch, gpu=True, extra=False)
    path = demo_file("f16")
    with ModelFile.open(path) as file:
        model = load_model(file, RuntimeSettings(threads=1))
        assert model.description.startswith("cpu (")
        model.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "pip install 'orthrus-gguf[cuda]'" in captured.err


@pytest.mark.parametrize(
    ("gpu", "extra", "message"),
    [
        (False, True, "no NVIDIA GPU was found"),
        (True, False, r"not installed: pip install 'orthrus-gguf\[cuda\]'"),
    ],
)
def test_asked_for_and_impossible(
    monkeypatch: pytest.MonkeyPatch,
    demo_file: Callable[..., Path],
    gpu: bool,
    extra: bool,
    message: str,
) -> None:
    machine(monkeypatch, gpu=gpu, extra=extra)
    with ModelFile.open(demo_file("f16")) as file:
        for settings in (CUDA, RuntimeSettings(device="cuda:1")):  # a device asks for cuda, too
            with pytest.raises(OrthrusError, match=message) as caught:
                load_model(file, settings)
            assert str(caught.value).startswith("--runtime cuda cannot run here: ")
            assert "\n" not in str(caught.value)


def test_devices_belong_to_cuda(demo_file: Callable[..., Path]) -> None:
    with ModelFile.open(demo_file("f16")) as file:
        for name in (RuntimeName.CPU, RuntimeName.REFERENCE):
            with pytest.raises(OrthrusError, match="--device cuda:0: only --runtime cuda"):
                load_model(file, RuntimeSettings(name, device="cuda:0"))


def test_device_names() -> None:
    assert presence.device_index(None) == presence.device_index("cuda") == 0
    assert presence.device_index("cuda:3") == 3
    for bad in ("cuda:", "cuda:-1", "cuda:x", "cpu", "gpu:0", "1"):
        with pytest.raises(OrthrusError, match=f"--device {bad}: expected cuda or cuda:N"):
            presence.device_index(bad)


@pytest.mark.parametrize(
    ("count", "capability", "device", "message"),
    [
        (0, (9, 0), None, "finds no usable GPU"),
        (2, (9, 0), "cuda:2", "no cuda:2, only cuda:0 to cuda:1"),
        (1, (7, 5), None, "compute capability 7.5; the kernels need 8.0"),
        (1, (8, 6), "cuda:0", None),
        (1, (12, 0), None, None),
        (1, (10, 0), None, "compute capability 10.0, where Triton may miscompute the products"),
        (1, (11, 0), None, "compute capability 11.0, where Triton may miscompute the products"),
    ],
)
def test_what_torch_says(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    capability: tuple[int, int],
    device: str | None,
    message: str | None,
) -> None:
    torch = pytest.importorskip("torch")
    fake = SimpleNamespace(
        is_available=lambda: count > 0,
        device_count=lambda: count,
        get_device_capability=lambda index: capability,
        get_device_name=lambda index: "Some GPU",
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(presence, "gpu_visible", lambda: True)
    monkeypatch.setattr(presence, "extra_installed", lambda: True)
    found = presence.why_unusable(device)
    assert (message is None and found is None) or (found is not None and str(message) in found)


@pytest.mark.parametrize(
    ("found", "header", "message"),
    [
        ((), True, "a C compiler: install gcc"),
        (("gcc",), False, f"install python3.{sys.version_info.minor}-dev"),
        (("clang",), True, None),
    ],
)
def test_what_triton_builds_with(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    found: tuple[str, ...],
    header: bool,
    message: str | None,
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: name if name in found else None)
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": str(tmp_path)})
    if header:
        (tmp_path / "Python.h").touch()
    reason = presence.missing_build_tool()
    assert (reason is None and message is None) or (message is not None and message in str(reason))
