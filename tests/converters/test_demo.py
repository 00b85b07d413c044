"""The demo checkpoint, converted: every key, every tensor, every value, and stock llama.cpp."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import xllamacpp
from hf_checkpoint import Weights, read_safetensors
from make_file import make_file
from tokenizers import Tokenizer

from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.ggml.quantize import quantize
from orthrus_gguf.model.file import ModelFile

F32, F16, BF16, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0"))

SHAPE_KEYS: dict[str, Any] = {
    "block_count": 4,
    "context_length": 2048,
    "embedding_length": 256,
    "feed_forward_length": 768,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 1e6,
    "attention.layer_norm_rms_epsilon": np.float32(1e-6),
    "attention.key_length": 64,
    "attention.value_length": 64,
}
GENERAL_KEYS: dict[str, Any] = {
    "general.name": "Tiny Orthrus Stdlib",
    "general.file_type": 32,
    "general.quantization_version": 2,
}
TOKENIZER_KEYS: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.token_type": [1] * 4092 + [3] * 4,
    "tokenizer.ggml.bos_token_id": 4092,
    "tokenizer.ggml.eos_token_id": 4092,
    "tokenizer.ggml.padding_token_id": 4092,
    "tokenizer.ggml.add_bos_token": False,
}
DIFFUSION_KEYS: dict[str, Any] = {
    "orthrus.diffusion.block_size": 16,
    "tokenizer.ggml.mask_token_id": 4095,
}

#: Tensor of a layer → its shape in the file (columns first) and its name in the checkpoint.
LAYER = {
    "attn_norm": ([256], "input_layernorm"),
    "attn_q": ([256, 256], "self_attn.q_proj"),
    "attn_k": ([256, 128], "self_attn.k_proj"),
    "attn_v": ([256, 128], "self_attn.v_proj"),
    "attn_output": ([256, 256], "self_attn.o_proj"),
    "attn_q_norm": ([64], "self_attn.q_norm"),
    "attn_k_norm": ([64], "self_attn.k_norm"),
    "ffn_norm": ([256], "post_attention_layernorm"),
    "ffn_gate": ([256, 768], "mlp.gate_proj"),
    "ffn_up": ([256, 768], "mlp.up_proj"),
    "ffn_down": ([768, 256], "mlp.down_proj"),
    "attn_q_diff": ([256, 256], "self_attn.q_proj_diff"),
    "attn_k_diff": ([256, 128], "self_attn.k_proj_diff"),
    "attn_v_diff": ([256, 128], "self_attn.v_proj_diff"),
    "attn_output_diff": ([256, 256], "self_attn.o_proj_diff"),
    "attn_q_norm_diff": ([64], "self_attn.q_norm_diff"),
    "attn_k_norm_diff": ([64], "self_attn.k_norm_diff"),
}
TENSORS = {
    "token_embd.weight": ([256, 4096], "model.embed_tokens.weight"),
    **{
        f"blk.{layer}.{name}.weight": (shape, f"model.layers.{layer}.{source}.weight")
        for layer in range(4)
        for name, (shape, source) in LAYER.items()
    },
    "output_norm.weight": ([256], "model.norm.weight"),
}


@pytest.fixture(scope="module")
def bare(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint without its model card, which has tests of its own."""
    folder = tmp_path_factory.mktemp("bare") / "tiny-orthrus-stdlib"
    shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns("*.md"))
    return folder


@pytest.fixture(scope="module")
def converted(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`converted(*flags)`: the demo model as a GGUF, made once for each set of flags."""
    folder = tmp_path_factory.mktemp("converted")

    def make(*flags: str) -> Path:
        path = folder / f"{''.join(flags) or 'default'}.gguf"
        if not path.exists():
            make_file(bare, path, *flags)
        return path

    return make


@pytest.fixture(scope="module")
def weights(bare: Path) -> Weights:
    return {
        name: values
        for shard in sorted(bare.glob("*.safetensors"))
        for name, values in read_safetensors(shard).items()
    }


def keys_of(path: Path) -> dict[str, Any]:
    """All keys as the gguf package reads them, without those of the file format itself."""
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def test_keys(converted: Callable[..., Path], bare: Path) -> None:
    found = keys_of(converted())
    tokenizer = json.loads((bare / "tokenizer.json").read_text(encoding="utf-8"))
    reference = Tokenizer.from_file(str(bare / "tokenizer.json"))
    assert found.pop("tokenizer.ggml.tokens") == [reference.id_to_token(i) for i in range(4096)]
    assert found.pop("tokenizer.ggml.merges") == [" ".join(m) for m in tokenizer["model"]["merges"]]
    assert found == {
        "general.architecture": "orthrus",
        "general.type": "model",
        "general.size_label": "5.0M",
        **GENERAL_KEYS,
        **{f"orthrus.{key}": value for key, value in SHAPE_KEYS.items()},
        **TOKENIZER_KEYS,
        **DIFFUSION_KEYS,
    }


def test_key_types(converted: Callable[..., Path]) -> None:
    """Types matter to readers that are less forgiving than Python."""
    fields = gguf.GGUFReader(converted()).fields
    kinds = gguf.GGUFValueType
    for key in ("block_count", "attention.head_count_kv", "diffusion.block_size"):
        assert fields[f"orthrus.{key}"].types == [kinds.UINT32]
    assert fields["orthrus.rope.freq_base"].types == [kinds.FLOAT32]
    assert fields["tokenizer.ggml.mask_token_id"].types == [kinds.UINT32]
    assert fields["tokenizer.ggml.token_type"].types == [kinds.ARRAY, kinds.INT32]
    assert fields["tokenizer.ggml.add_bos_token"].types == [kinds.BOOL]


def test_tensors_in_order(converted: Callable[..., Path]) -> None:
    reader = gguf.GGUFReader(converted())
    found = [(tensor.name, tensor.shape.tolist()) for tensor in reader.tensors]
    assert found == [(name, shape) for name, (shape, _) in TENSORS.items()]
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


@pytest.mark.parametrize(("flag", "kind"), [("f32", F32), ("f16", F16), ("bf16", BF16)])
def test_values_are_exact(
    flag: str, kind: gguf.GGMLQuantizationType, converted: Callable[..., Path], weights: Weights
) -> None:
    for tensor in gguf.GGUFReader(converted("--type", flag)).tensors:
        expected = weights[TENSORS[tensor.name][1]]
        assert tensor.tensor_type == (F32 if expected.ndim == 1 else kind)
        if tensor.tensor_type == BF16:
            found = (tensor.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            found = tensor.data
            expected = expected.astype(found.dtype)  # float16 rounds
        np.testing.assert_array_equal(found, expected, err_msg=tensor.name)


def test_q8_0_bytes_equal_ggml(converted: Callable[..., Path], weights: Weights) -> None:
    api = load_library().api
    for tensor in gguf.GGUFReader(converted("--type", "q8_0")).tensors:
        values = weights[TENSORS[tensor.name][1]]
        assert tensor.tensor_type == (F32 if values.ndim == 1 else Q8_0)
        if values.ndim == 2:
            np.testing.assert_array_equal(tensor.data, quantize(api, values, Q8_0), tensor.name)


def test_default_and_spellings_of_the_type(converted: Callable[..., Path]) -> None:
    """The checkpoint is bfloat16, so bf16 is what loses nothing."""
    expected = converted("--type", "bf16").read_bytes()
    for flags in ((), ("--outtype", "BF16"), ("--type", "Auto")):
        assert converted(*flags).read_bytes() == expected


def test_split_keys(converted: Callable[..., Path]) -> None:
    base = converted("--split")
    found = keys_of(base)
    assert len(found.pop("tokenizer.ggml.tokens")) == 4096
    assert len(found.pop("tokenizer.ggml.merges")) == 3836
    assert found == {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.size_label": "4.2M",
        **GENERAL_KEYS,
        **{f"qwen3.{key}": value for key, value in SHAPE_KEYS.items()},
        **TOKENIZER_KEYS,
    }
    assert keys_of(base.with_name(f"{base.stem}-heads.gguf")) == {
        "general.architecture": "orthrus",
        "general.type": "adapter",
        "general.size_label": "787K",
        "adapter.type": "orthrus_heads",
        **GENERAL_KEYS,
        **{f"orthrus.{key}": value for key, value in SHAPE_KEYS.items()},
        **DIFFUSION_KEYS,
    }


def test_split_tensors_are_those_of_the_single_file(converted: Callable[..., Path]) -> None:
    single, base = converted(), converted("--split")
    heads = base.with_name(f"{base.stem}-heads.gguf")
    expected = {tensor.name: tensor.data for tensor in gguf.GGUFReader(single).tensors}
    parts = [gguf.GGUFReader(path).tensors for path in (base, heads)]
    assert [tensor.name for part in parts for tensor in part] == [
        *(name for name in TENSORS if "_diff" not in name),
        *(name for name in TENSORS if "_diff" in name),
    ]
    for tensor in (*parts[0], *parts[1]):
        np.testing.assert_array_equal(tensor.data, expected[tensor.name], tensor.name)


def test_our_reader_opens_both_kinds(converted: Callable[..., Path]) -> None:
    base = converted("--split")
    with ModelFile.open(converted()) as single:
        with ModelFile.open(base, base.with_name(f"{base.stem}-heads.gguf")) as pair:
            assert pair.config == single.config
        assert single.config.tied
        assert (single.config.block_size, single.config.mask_token) == (16, 4095)


@pytest.mark.parametrize("flag", ["q4_k_m", "q3_k_l", "q2_k", "iq4_xs", "q5_0"])
def test_stock_llamacpp_loads_quantized_bases(flag: str, converted: Callable[..., Path]) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = str(converted("--split", "--type", flag))
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 64, 1, 0, False
    params.cpuparams.n_threads = 1
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": [40, 41, 42], "n_predict": 2, "temperature": 0, "n_probs": 1}
    )
    content = answer["choices"][0]["logprobs"]["content"]
    assert content
    assert all(np.isfinite(entry["logprob"]) for entry in content)


@pytest.mark.parametrize("flag", ["bf16", "q8_0"])
def test_split_base_runs_in_stock_llamacpp(
    flag: str, converted: Callable[..., Path], golden: dict[str, Any]
) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = str(converted("--split", "--type", flag))
    params.n_ctx, params.n_parallel, params.verbosity, params.warmup = 64, 1, 0, False
    params.cpuparams.n_threads = 1
    case = golden["cases"][1]
    answer = xllamacpp.Server(params).handle_completions(
        {"prompt": case["prompt_ids"], "n_predict": 8, "temperature": 0, "n_probs": 1}
    )
    found = [entry["id"] for entry in answer["choices"][0]["logprobs"]["content"]]
    assert found == case["ar_output_ids"][:8]
