"""Checkpoints of Qwen3.5: every way they are stored gives one file, which computes what they do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from cpu_models import kernels
from hf_hybrid import (
    N_GREEDY,
    NESTED,
    PROMPTS,
    TEXT,
    nested_names,
    weights,
    write_hybrid,
)
from orthrus_converters.cli import main
from orthrus_cpu_kernels import library
from stock import Stock

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.inspection.report import inspect, report_json
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import ar_segment
from orthrus_gguf.runtime.reference import ReferenceModel

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

_ROPE = TEXT["rope_parameters"]

#: What llama.cpp's converter writes for such a model.
KEYS: dict[str, Any] = {
    "block_count": 9,
    "context_length": 256,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.freq_base": 1e7,
    "attention.layer_norm_rms_epsilon": np.float32(1e-6),
    "attention.key_length": 32,
    "attention.value_length": 32,
    "rope.dimension_count": 8,
    "rope.dimension_sections": [2, 1, 1, 0],
    "ssm.conv_kernel": 4,
    "ssm.state_size": 16,
    "ssm.group_count": 2,
    "ssm.time_step_rank": 4,
    "ssm.inner_size": 64,
    "full_attention_interval": 4,
    "nextn_predict_layers": 1,
}


def converted(folder: Path, *flags: str) -> Path:
    path = folder.with_suffix(".gguf")
    assert main([str(folder), str(path), *(flags or ("--type", "f32"))]) == 0
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a text-only checkpoint, F32."""
    return converted(write_hybrid(tmp_path_factory.mktemp("hybrid") / "plain"))


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    return {
        tensor.name: (tensor.tensor_type.name, tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def keys_of(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def test_logits_and_greedy_tokens_are_those_of_hugging_face(plain: Path) -> None:
    with ModelFile.open(plain) as file:
        model = ReferenceModel(file)
    logits = np.load(GOLDEN / "hybrid.npz")
    greedy = json.loads((GOLDEN / "hybrid.json").read_text())["greedy"]
    for index, prompt in enumerate(PROMPTS):
        cache, expected = model.new_cache(64), logits[f"logits_{index}"]
        (found,) = model.logits([ar_segment(cache, prompt, 0)])
        assert np.abs(expected).max() > 10
        np.testing.assert_allclose(found[-len(expected) :], expected, rtol=0, atol=1e-3)
        cache.commit(range(len(prompt)))
        text: list[int] = []
        for _ in range(N_GREEDY):
            text.append(int(found[-1].argmax()))
            (found,) = model.logits([ar_segment(cache, text[-1:], cache.length)])
            cache.commit(range(1))
        assert text == greedy[index]


def test_stock_llama_cpp_gives_them_too(plain: Path) -> None:
    stock = Stock(plain, "f32", 64)
    logits = np.load(GOLDEN / "hybrid.npz")
    for index in (0, 3, 4):
        [entry] = stock.greedy(PROMPTS[index], 1, 20)
        last = logits[f"logits_{index}"][-1].astype(np.float64)
        expected = last - np.logaddexp.reduce(last)
        found = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
        assert len(found) == 20
        for token, logprob in found.items():
            assert logprob == pytest.approx(expected[token], abs=1e-3)


def test_keys_are_those_of_llama_cpp(plain: Path) -> None:
    keys = keys_of(plain)
    assert keys["general.architecture"] == "qwen35"
    assert keys["tokenizer.ggml.pre"] == "qwen35"
    ours = {k.removeprefix("qwen35."): v for k, v in keys.items() if k.startswith("qwen35.")}
    assert ours == KEYS


def test_nested_and_with_vision(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_hybrid(tmp_path / "nested", NESTED, nested_names(weights()))
    assert tensors_of(converted(folder)) == tensors_of(plain)
    assert "left out 1 weights of the vision model" in capsys.readouterr().err


def test_what_configs_leave_out(plain: Path, tmp_path: Path) -> None:
    """What transformers has defaults for."""
    rope = {k: v for k, v in _ROPE.items() if k not in ("mrope_interleaved", "rope_type")}
    del rope["partial_rotary_factor"]
    short = {k: v for k, v in TEXT.items() if k not in ("layer_types", "full_attention_interval")}
    more = {"rope_parameters": rope, "mlp_only_layers": [], "output_gate_type": "swish"}
    path = converted(write_hybrid(tmp_path / "short", {**short, **more}))
    assert tensors_of(path) == tensors_of(plain)
    ours = {key: value for key, value in keys_of(path).items() if key.startswith("qwen35.")}
    assert ours == {key: value for key, value in keys_of(plain).items() if key in ours}
    assert len(ours) == len(KEYS)


def test_without_mtp(plain: Path, tmp_path: Path) -> None:
    """Smaller by the block, and the same model."""
    few = {name: values for name, values in weights().items() if not name.startswith("mtp.")}
    path = converted(write_hybrid(tmp_path / "few", TEXT, few))
    all_tensors = tensors_of(plain)
    assert tensors_of(path) == {k: v for k, v in all_tensors.items() if ".8." not in k}
    keys = keys_of(path)
    assert keys["qwen35.block_count"] == 8
    assert "qwen35.nextn_predict_layers" not in keys
    with ModelFile.open(path) as one, ModelFile.open(plain) as other:
        assert one.config.n_layers == other.config.n_layers == 8
        assert one.config.n_blocks + 1 == other.config.n_blocks == 9


def test_untied(tmp_path: Path) -> None:
    config = {**TEXT, "tie_word_embeddings": False}
    path = converted(write_hybrid(tmp_path / "untied", config, weights(tied=False)))
    with ModelFile.open(path) as file:
        assert not file.config.tied
        values = file.data("output.weight").view(np.float32)
    np.testing.assert_array_equal(values, weights(tied=False)["lm_head.weight"].ravel())


def test_quantized_in_one_step_or_two(plain: Path, tmp_path: Path) -> None:
    """What stays in F32 does so, and the types are llama-quantize's: attn_qkv counts as attn_v."""
    once = converted(write_hybrid(tmp_path / "q"), "--type", "q4_0")
    twice = tmp_path / "twice.gguf"
    assert main([str(plain), str(twice), "--type", "q4_0"]) == 0
    found = tensors_of(once)
    assert found == tensors_of(twice)
    exact = ("norm", "ssm_a.", "ssm_conv1d", "ssm_dt")
    for name, (kind, _) in found.items():
        kept = any(part in f"{name}." for part in exact)
        assert (kind == "F32") == kept, name
    mixed = tmp_path / "mixed.gguf"
    assert main([str(plain), str(mixed), "--type", "q4_k_m"]) == 0
    types = {name: kind for name, (kind, _) in tensors_of(mixed).items()}
    # Rows of 64 and 96 are no whole qblocks of 256: Q8_0 stands in for Q6_K, and Q5_0 for Q4_K.
    more = {0, 3, 6, 7, 8}  # of nine: an eighth at either end, and every third between
    for i in range(9):
        part = "attn_v" if i in (3, 7, 8) else "attn_qkv"
        assert types[f"blk.{i}.{part}.weight"] == ("Q8_0" if i in more else "Q5_0"), i
        assert types[f"blk.{i}.ffn_down.weight"] == ("Q8_0" if i in more else "Q5_0"), i
    assert types["blk.0.attn_gate.weight"] == types["blk.0.ssm_alpha.weight"] == "Q5_0"
    with ModelFile.open(mixed) as file:
        ReferenceModel(file)


def test_inspected(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the native kernels run it; where there are none, the reference runtime is what is left."""
    kernels()
    report = report_json(inspect(plain))
    assert report["problem"] is None
    assert report["model"]["hybrid"]["mtp"]
    state = 6 * 4 * (4 * 16 * 16 + 3 * 128)
    assert report["model"]["hybrid"]["state_bytes"] == state
    elements = 2 * 2 * 2 * 32  # keys and values of two layers, two heads of 32
    assert report["cache_bytes_per_token"] == 2 * elements
    assert report["memory_runtime"] == "cpu"
    records = 67 * 6 * 4 * (128 + 6 * 16 + 16)  # inputs, keys and values, decay
    rows = 256 + 128  # of the context, and for blocks
    taken = [2 * elements * rows + 2 * 6 * 4 * 4 * 16 * 16 + records]
    assert [need["cache"] for need in report["memory"]] == taken

    monkeypatch.setenv(library.ISA, "mmx")
    report = report_json(inspect(plain))
    assert report["memory_runtime"] == "reference"
    taken = [256 * 4 * elements + state]
    assert [need["cache"] for need in report["memory"]] == taken


def _with(**more: Any) -> dict[str, Any]:
    return {**TEXT, **more}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "experts": (_with(model_type="qwen3_5_moe"), "qwen3_5_moe, Qwen3.5 with experts"),
    "next": (_with(model_type="qwen3_next"), "qwen3_next, Qwen3-Next"),
    "kernel": (_with(linear_conv_kernel_dim=3), "linear_conv_kernel_dim: expected 4, found 3"),
    "heads": (_with(linear_num_key_heads=3), "4 is no multiple of 3 key heads"),
    "sizes": (_with(linear_key_head_dim=8), "16 is not the keys' 8"),
    "layers": (_with(layer_types=["full_attention"] * 8), "layer_types: expected full_attention"),
    "sections": (_with(rope_parameters={**_ROPE, "mrope_section": [2, 2, 1]}), "of 4 in all"),
    "default": (
        _with(rope_parameters={k: v for k, v in _ROPE.items() if k != "mrope_section"}),
        "expected three numbers of 4 in all, found [11, 11, 10]",
    ),
    "gate": (_with(output_gate_type="sigmoid"), 'output_gate_type: expected "swish"'),
    "apart": (_with(rope_parameters={**_ROPE, "mrope_interleaved": False}), "is false"),
    "scaled": (_with(rope_parameters={**_ROPE, "rope_type": "yarn"}), "scaling is not supported"),
    "ungated": (_with(attn_output_gate=False), "attn_output_gate: expected true, found false"),
    "tied": ({**NESTED, "tie_word_embeddings": False}, "contradicts tie_word_embeddings"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs(name: str, tmp_path: Path, convert: Callable[..., Any], out: Path) -> None:
    config, message = BAD[name]
    run = convert(write_hybrid(tmp_path / "bad", config), "--type", "f32")
    assert run.code == 1
    assert message in run.stderr
    assert run.stderr.count("\n") == 1
    assert not run.files


def test_mlx_checkpoints(tmp_path: Path, convert: Callable[..., Any]) -> None:
    """Their norms hold the 1 already, which nothing but the convolution's layout tells."""
    named = {k: v.swapaxes(1, 2) if "conv1d" in k else v for k, v in weights().items()}
    run = convert(write_hybrid(tmp_path / "mlx", TEXT, named), "--type", "f32")
    assert run.code == 1
    assert "lies as MLX has it" in run.stderr


def refusal(metadata: dict[str, Any]) -> str:
    with pytest.raises(OrthrusError) as caught:
        ModelConfig.from_metadata(
            metadata, path=Path("x.gguf"), n_vocab=270, tied=True, has_heads=False
        )
    return str(caught.value)


def test_bad_files(plain: Path) -> None:
    with GGUFFile.open(plain) as file:
        good = dict(file.metadata)

    def changed(key: str, value: Any) -> str:
        return refusal({**good, f"qwen35.{key}": value})

    without = {k: v for k, v in good.items() if "sections" not in k}
    assert "dimension_sections: is missing" in refusal(without)
    sections = np.array([2, 1, 0, 0], np.int32)
    assert "expected 4 pairs in all" in changed("rope.dimension_sections", sections)
    assert "expected an array of integers" in changed("rope.dimension_sections", 4)
    assert "expected 4, found 3" in changed("ssm.conv_kernel", 3)
    assert "expected a multiple of the 3 key heads" in changed("ssm.group_count", 3)
    assert "expected 64, 4 heads of 16, found 63" in changed("ssm.inner_size", 63)
    assert "expected 0 to 1, found 2" in changed("nextn_predict_layers", 2)
    assert "leaves no layers" in changed("block_count", 1)
    for name in ("qwen35moe", "qwen3next"):
        assert f"is {name}, " in refusal({**good, "general.architecture": name})


def rewritten(source: Path, path: Path, keep: Callable[[str], bool], extra: str = "") -> Path:
    """The file with some of its tensors, and one more."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(path, "qwen35")
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        sub = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        if keep(tensor.name):
            writer.add_tensor(tensor.name, tensor.data)
    if extra:
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_parts_and_other_layouts(plain: Path, tmp_path: Path) -> None:
    block = rewritten(plain, tmp_path / "mtp.gguf", lambda name: not name.startswith("blk.0."))
    with pytest.raises(OrthrusError, match="holds only an MTP block"):
        ModelFile.open(block)
    ollama = rewritten(plain, tmp_path / "v.gguf", lambda _: True, "v.blk.0.attn_q.weight")
    with pytest.raises(OrthrusError, match=r"Ollama's layout .* is not supported"):
        ModelFile.open(ollama)
    bare = rewritten(plain, tmp_path / "bare.gguf", lambda name: "shared_head_norm" not in name)
    with ModelFile.open(bare) as file:
        assert file.config.n_blocks == 9
    head = "blk.8.nextn.shared_head_head.weight"
    strange = rewritten(plain, tmp_path / "head.gguf", lambda _: True, head)
    with pytest.raises(OrthrusError, match=r"expected shape \(270, 64\)"):
        ModelFile.open(strange)
