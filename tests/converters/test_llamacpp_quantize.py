"""Opt-in: the quantized base equals what llama.cpp's own llama_model_quantize writes.

Runs where llama-cpp-python is installed (it has no wheels; compiling it takes minutes).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python to run it")

#: Our name of a mix → llama.cpp's LLAMA_FTYPE_MOSTLY_... All that need no imatrix.
MIXES = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)


@pytest.mark.parametrize("mix", MIXES)
def test_types_and_bytes_of_the_base(
    mix: str, demo_file: Callable[..., Path], tmp_path: Path
) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix.upper()}")
    params.nthread = 1
    theirs = tmp_path / "theirs.gguf"
    source = demo_file("f32", split=True)
    assert llama_cpp.llama_model_quantize(bytes(source), bytes(theirs), params) == 0
    expected = {tensor.name: tensor for tensor in GGUFReader(theirs).tensors}
    found = {tensor.name: tensor for tensor in GGUFReader(demo_file(mix, split=True)).tensors}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert found[name].data.tobytes() == tensor.data.tobytes(), name
