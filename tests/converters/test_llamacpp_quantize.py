"""Opt-in: the quantized base equals what llama.cpp's own llama_model_quantize writes.

Runs where llama-cpp-python is installed (it has no wheels; compiling it takes minutes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from orthrus_converters.cli import main as convert
from orthrus_converters.synthetic import plan_synthetic

from orthrus_gguf.gguf.writer import write_files
from orthrus_gguf.model.shapes import HYBRID_SHAPES

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python to run it")

#: Our name of a mix → llama.cpp's LLAMA_FTYPE_MOSTLY_... All that need no imatrix.
MIXES = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)


def check(source: Path, mix: str, ours: Path, folder: Path) -> None:
    """llama.cpp makes of `source` what we made of it."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix.upper()}")
    params.nthread = 1
    theirs = folder / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(theirs), params) == 0
    expected = {tensor.name: tensor for tensor in GGUFReader(theirs).tensors}
    found = {tensor.name: tensor for tensor in GGUFReader(ours).tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert found[name].data.tobytes() == tensor.data.tobytes(), name


@pytest.mark.parametrize("mix", MIXES)
def test_types_and_bytes_of_the_base(
    mix: str, demo_file: Callable[..., Path], tmp_path: Path
) -> None:
    check(demo_file("f32", split=True), mix, demo_file(mix, split=True), tmp_path)


@pytest.fixture(scope="module", params=["qwen3.5-0.8b-mtp", "qwen3.5-9b"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All layers of such a shape, narrow ones: tied and with an MTP block, and neither."""
    shape = HYBRID_SHAPES[request.param]
    assert shape.hybrid is not None
    few = replace(shape.hybrid, n_key_heads=2, n_value_heads=shape.hybrid.n_value_heads // 8)
    shape = replace(shape, n_embd=256, n_ff=256, n_vocab=512, hybrid=few)
    path = tmp_path_factory.mktemp("hybrid") / f"{request.param}.gguf"
    write_files([plan_synthetic(path, shape, "f32")], lambda _: None)
    return path


@pytest.mark.parametrize("mix", MIXES)
def test_hybrids(mix: str, hybrid: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    assert convert([str(hybrid), str(ours), "--type", mix]) == 0
    check(hybrid, mix, ours, tmp_path)
