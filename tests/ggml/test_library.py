"""Finding ggml: lookup order, refusals, and the self-test on libraries that are subtly wrong."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml import library, selftest
from orthrus_gguf.ggml.binding import PROTOTYPES, Ggml
from orthrus_gguf.ggml.library import ENVIRONMENT, find_cpu_library, load_library

SUFFIX = "dylib" if sys.platform == "darwin" else "so"


@pytest.fixture(autouse=True)
def _fresh_lookup(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup is cached per process; these tests start anew and leave it as it was."""
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(library, "load_library", load_library.__wrapped__)


def lookup() -> library.Library:
    return library.load_library()


# --- lookup ---


def test_the_wheel_is_found() -> None:
    found = lookup()
    assert found.version.startswith("0.20.")
    assert found.path.name.startswith("libggml-cpu")


def test_a_named_folder_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = lookup().path
    link = tmp_path / original.name
    link.symlink_to(original)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert lookup().path == link


def test_a_named_folder_must_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    with pytest.raises(OrthrusError, match=f"{ENVIRONMENT}={tmp_path}: holds no libggml-cpu"):
        lookup()
    (tmp_path / f"libggml-cpu.{SUFFIX}").write_bytes(b"not a library")
    with pytest.raises(OrthrusError, match=f"{ENVIRONMENT}={tmp_path}: cannot be loaded"):
        lookup()


def test_llama_cpp_is_preferred_but_not_trusted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "llama_cpp"
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "lib" / f"libggml-cpu.{SUFFIX}").write_bytes(b"broken")
    monkeypatch.syspath_prepend(tmp_path)
    assert library._installed_folders()[0] == package / "lib"
    assert "libggml" in lookup().path.parts
    monkeypatch.setattr(library, "_installed_folders", lambda: [package / "lib"])
    reason = rf"no usable ggml library \({package / 'lib'}: cannot be loaded .*\); install"
    with pytest.raises(OrthrusError, match=reason):
        lookup()


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        OrthrusError, match=r"no usable ggml library \(none is installed\); install"
    ):
        lookup()


@pytest.mark.parametrize(
    ("oldest", "newest", "expected"),
    [((0, 1), (0, 19), "0.1 to 0.19"), ((0, 21), (1, 0), "0.21 to 1.0")],
)
def test_versions_out_of_range(
    monkeypatch: pytest.MonkeyPatch, oldest: Any, newest: Any, expected: str
) -> None:
    monkeypatch.setattr(library, "OLDEST", oldest)
    monkeypatch.setattr(library, "NEWEST", newest)
    with pytest.raises(OrthrusError, match=rf"is ggml 0\.20\.\d+, expected {expected}"):
        lookup()


def test_a_missing_function_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOTYPES, "frobnicate", (None, ()))
    with pytest.raises(OrthrusError, match=r"ggml 0\.20\.\d+ in .*lacks a function .*frobnicate"):
        lookup()


def test_a_failed_self_test_names_version_and_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "failure", lambda api: "attention differ")
    with pytest.raises(
        OrthrusError, match=r"ggml 0\.20\.\d+ in .*libggml-cpu.* fails its self-test: attention"
    ):
        lookup()


def test_the_plain_name_wins(tmp_path: Path) -> None:
    assert find_cpu_library(tmp_path) is None
    names = {
        "darwin": ["libggml-cpu.0.20.2.dylib", "libggml-cpu.0.dylib", "libggml-cpu.dylib"],
        "linux": ["libggml-cpu.so.0.20.2", "libggml-cpu.so.0", "libggml-cpu.so"],
    }["darwin" if sys.platform == "darwin" else "linux"]
    (tmp_path / "libggml-base.so").touch()
    for name in names:
        (tmp_path / name).touch()
        assert find_cpu_library(tmp_path) == tmp_path / name


# --- self-test ---


@pytest.fixture
def api() -> Ggml:
    """An API object of its own, which a test may bend."""
    return Ggml(ctypes.CDLL(str(load_library().path)))


def test_it_passes_in_less_than_50_ms(api: Ggml) -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert selftest.failure(api) is None
        times.append(time.perf_counter() - start)
    assert min(times) < 0.050


def bend(name: str, change: Callable[..., Any]) -> Callable[[Ggml], None]:
    """Replace a function by `change(real, *arguments)`."""

    def apply(api: Ggml) -> None:
        real = getattr(api, name)
        setattr(api, name, lambda *arguments: change(real, *arguments))

    return apply


def replaced(arguments: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*arguments[:index], value, *arguments[index + 1 :])


def flip_first_bit(real: Callable[..., int], *arguments: Any) -> int:
    written = real(*arguments)
    ctypes.c_uint8.from_address(arguments[2]).value ^= 1
    return written


def clipped(context: int, tensor: int) -> int:
    return int(load_library().api.clamp(context, tensor, -0.5, 0.5))


BENT = {
    "quantization": bend("quantize_chunk", flip_first_bit),
    "matrix products": bend("mul_mat", lambda real, c, a, b: real(c, a, clipped(c, b))),
    "norms and activations": bend("rms_norm", lambda real, c, a, eps: real(c, a, eps + 0.01)),
    "rotary embedding": bend("rope_ext", lambda real, *a: real(*replaced(a, 5, 0))),
    "yarn": bend("rope_ext", lambda real, *a: real(*replaced(a, 9, 0.0))),
    "pairs": bend("rope_ext", lambda real, *a: real(*replaced(a, 5, 2))),
    "frequency factors": bend("rope_ext", lambda real, *a: real(*replaced(a, 3, None))),
    "attention": bend("soft_max_ext", lambda real, *a: real(*replaced(a, 3, 0.2))),
    "masks": bend("soft_max_ext", lambda real, *a: real(*replaced(a, 2, None))),
    "flash attention": bend("flash_attn_ext", lambda real, *a: real(*replaced(a, 5, 0.2))),
}


@pytest.mark.parametrize("name", BENT)
def test_wrong_results_are_noticed(api: Ggml, name: str) -> None:
    BENT[name](api)
    failure = selftest.failure(api)
    assert failure is not None
    aliases = {"masks": "attention"} | dict.fromkeys(
        ("yarn", "pairs", "frequency factors"), "rotary embedding"
    )
    assert failure.startswith(aliases.get(name, name))


def test_wrong_row_copies_are_noticed(api: Ggml) -> None:
    real = api.set_rows

    def set_other_rows(context: int, target: int, source: int, rows: int) -> int:
        where = ctypes.cast(api.get_data(rows), ctypes.POINTER(ctypes.c_int64))
        where[0], where[1] = 2, 1
        return int(real(context, target, source, rows))

    setattr(api, "set_rows", set_other_rows)  # noqa: B010
    failure = selftest.failure(api)
    assert failure is not None
    assert failure.startswith("row copies")


def test_row_dependence_is_noticed(api: Ggml, monkeypatch: pytest.MonkeyPatch) -> None:
    real = selftest._product

    def tiled(api: Ggml, weights: Any, qtype: Any, x: Any, outputs: int) -> Any:
        result = real(api, weights, qtype, x, outputs)
        return result if len(x) < 4 else np.nextafter(result, np.float32(9))

    monkeypatch.setattr(selftest, "_product", tiled)
    assert selftest.failure(api) == "a row's products with F32 depend on the rows beside it"


def test_unknown_functions_are_attribute_errors(api: Ggml) -> None:
    with pytest.raises(AttributeError, match="no prototype for ggml_nonsense"):
        api.nonsense()
