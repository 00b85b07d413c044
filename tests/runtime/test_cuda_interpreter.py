"""The real kernels behind the runtime, in Triton's interpreter: one tiny model, every strategy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")

from gguf import GGMLQuantizationType as T
from mtp_models import mtp_model
from orthrus_hybrid import heads_model
from synthetic_model import model_shape, write_drafter, write_model

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.architectures import LLAMA, QWEN2, QWEN3
from orthrus_gguf.model.config import Rope

HELPERS = Path(__file__).resolve().parents[1] / "helpers"


#: Architecture, RoPE to go with it, the card that is pretended (int8 activations on 86), and what
#: is decoded.
CASES = {
    "qwen3": (QWEN3, Rope(1e6), 86, ["fused"]),
    "qwen2": (QWEN2, Rope(1e6, factor=4.0, original_context=8, ext_factor=1.0), 80, []),
    "llama": (LLAMA, Rope(1e4, freq_factors=tuple(float(i) for i in range(1, 33))), 80, []),
}


def interpreted(script: str, *arguments: object) -> str:
    """What a script prints in the interpreter."""
    run = subprocess.run(
        [sys.executable, HELPERS / script, *map(str, arguments)],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_a_drafters_network(tmp_path: Path) -> None:
    """Keys and values of committed rows, in two parts, and the logits of a block that sees them:
    features and attention's output from int8 activations, q, k and v of mixed types, a causal
    window."""
    config = model_shape(
        n_layers=1, n_embd=64, n_ff=64, n_head=2, n_head_kv=1, n_vocab=64, block_size=4
    )
    api, quantized = load_library().api, ("fc.", "attn_q", "attn_k", "attn_output")

    def rule(name: str) -> T:
        return T.Q8_0 if any(part in name for part in quantized) else T.F16

    files = (tmp_path / "tiny.gguf", tmp_path / "drafter.gguf")
    write_model(api, files[0], config, rule)
    write_drafter(api, files[1], config, rule, (1, 1), window=4)
    found = json.loads(interpreted("cuda_drafter_interpreted.py", *files, 86))
    assert set(found) == {"keys", "values", "block"}
    assert max(found.values()) < 1e-4, found


@pytest.mark.slow
def test_chains_of_an_mtp_block() -> None:
    """Keys and values of committed rows, in two parts; chains of two lengths behind them, of the
    first ids."""
    found = json.loads(interpreted("cuda_mtp_interpreted.py", mtp_model(), 80).splitlines()[-1])
    kernels, stand_ins = found.pop("tokens")
    assert kernels == stand_ins
    assert len(kernels) == 3
    assert set(found) == {"keys", "values", "probabilities"}
    assert max(found.values()) < 1e-6, found


@pytest.mark.slow
def test_a_hybrid() -> None:
    """Both kinds of layers, both views of them, records, a tree, two sequences."""
    errors = json.loads(interpreted("cuda_hybrid_interpreted.py", heads_model()).splitlines()[-1])
    assert len(errors) == 8
    assert max(errors) < 1e-6, errors


#: The other ways to decode: minutes in the interpreter.
LONGER = ("ar", "two-pass", "tree", "sampled")


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        *((name, CASES[name][3]) for name in ("qwen3", "llama")),
        pytest.param("qwen2", CASES["qwen2"][3], marks=pytest.mark.slow),
        pytest.param("qwen3", LONGER, marks=pytest.mark.slow),
    ],
)
def test_kernels_and_stand_ins_agree(tmp_path: Path, name: str, runs: Sequence[str]) -> None:
    """Attention's products on int8 activations, as on a GeForce; the MLP's and the head's on fp16.

    int8 rows flip a unit where kernel and stand-in differ in the last bits: 1.5e-5 was seen.
    """
    architecture, rope, capability, _ = CASES[name]
    config = model_shape(
        n_layers=1, n_embd=64, n_ff=64, n_head=2, n_head_kv=1, n_vocab=64, block_size=4,
        rope=rope, architecture=architecture,
    )  # fmt: skip
    path = tmp_path / "tiny.gguf"
    write_model(load_library().api, path, config, lambda name: T.Q8_0 if ".attn" in name else T.F16)
    found = json.loads(interpreted("cuda_interpreted.py", path, capability, *runs))
    assert found["error"] < 1e-4
    assert found["kernels"] == found["stand-ins"]
    kernels = found["kernels"]
    assert len(kernels["company"]) == 6
    greedy = [kernels[run] for run in runs if run != "sampled"]
    assert all(text == greedy[0] and len(text) == 4 for text in greedy)
    if "sampled" in runs:
        assert kernels["sampled"] != kernels["ar"]
