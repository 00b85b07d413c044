"""ModelFile: whole models, bases with heads, and every pair or file that is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import ARCHITECTURES
from orthrus_gguf.model.config import Rope
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.tensors import base_tensors, diffusion_tensors
from tests.tiny_model import (
    BASES,
    BLOCK_SIZE,
    LAYER,
    MASK,
    N_LAYERS,
    N_VOCAB,
    REMOVE,
    SCALINGS,
    TWINS,
    diffusion_keys,
    random_tensors,
    shape_keys,
    write_gguf,
    write_heads,
    write_model,
)

KINDS = gguf.GGMLQuantizationType
TWIN = "blk.1.attn_q_diff.weight"


def refusal(path: Path, heads: Path | None = None) -> str:
    """The message that opening gives."""
    with pytest.raises(OrthrusError) as caught:
        ModelFile.open(path, heads)
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message, "says what to do"
    return message


def test_single_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf")
    with ModelFile.open(path) as model:
        assert model.paths == (path,)
        assert model.config.name == "Tiny"
        assert model.config.n_vocab == N_VOCAB
        assert model.config.n_layers == N_LAYERS
        assert model.config.tied
        assert model.config.block_size == BLOCK_SIZE
        assert model.config.mask_token == MASK
        assert len(model.tensors) == 2 + N_LAYERS * (len(LAYER) + len(TWINS))
        reader = gguf.GGUFReader(path)
        assert list(model.tensors) == [t.name for t in reader.tensors]
        for t in reader.tensors:
            assert model.data(t.name).tobytes() == t.data.tobytes()
        assert model.metadata["tokenizer.ggml.tokens"] == [f"token{i}" for i in range(N_VOCAB)]


def test_keys_without_effect_are_noted(tmp_path: Path) -> None:
    yarn = {"orthrus.rope.scaling.yarn_attn_factor": np.float32(1.25)}
    path = write_model(tmp_path / "tiny.gguf", metadata=yarn)
    with ModelFile.open(path) as model:
        assert model.config.rope.attn_factor == 1.0
        assert model.notes == (
            f"{path}: ignored, as llama.cpp does: orthrus.rope.scaling.yarn_attn_factor",
        )
    with ModelFile.open(write_model(tmp_path / "plain.gguf")) as model:
        assert model.notes == ()


def test_path_as_string_and_untied(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tied=False)
    with ModelFile.open(str(path)) as model:
        assert not model.config.tied
        assert "output.weight" in model.tensors


def test_stock_qwen3(tmp_path: Path) -> None:
    with ModelFile.open(write_model(tmp_path / "qwen.gguf", "qwen3")) as model:
        assert not model.config.has_heads
        assert len(model.tensors) == 2 + N_LAYERS * len(LAYER)


def test_base_and_heads(tmp_path: Path) -> None:
    """A pair is the same model as one file that holds both."""
    whole = write_model(tmp_path / "tiny.gguf")
    base = write_model(tmp_path / "base.gguf", "qwen3")
    heads = write_heads(
        tmp_path / "heads.gguf", tensors=twins_of(whole), metadata={"general.name": "Heads"}
    )
    with ModelFile.open(whole) as one, ModelFile.open(base, heads) as two:
        assert two.paths == (base, heads)
        assert two.config == one.config
        assert two.metadata["orthrus.diffusion.block_size"] == BLOCK_SIZE
        assert two.metadata["tokenizer.ggml.mask_token_id"] == MASK
        assert two.metadata["general.architecture"] == "qwen3"
        assert two.metadata["general.name"] == "Tiny"
        assert set(two.tensors) == set(one.tensors)
        for name in one.tensors:
            assert two.tensors[name].shape == one.tensors[name].shape
            if name.endswith("_diff.weight"):
                assert two.data(name).tobytes() == one.data(name).tobytes()


def twins_of(path: Path) -> dict[str, Any]:
    """The diffusion tensors of a whole model, read with the gguf package."""
    return {t.name: t.data.copy() for t in gguf.GGUFReader(path).tensors if "_diff" in t.name}


def test_heads_need_not_repeat_what_they_share(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", "qwen3")
    absent = ("context_length", "feed_forward_length", "attention.layer_norm_rms_epsilon")
    heads = write_heads(
        tmp_path / "heads.gguf", metadata={f"orthrus.{key}": REMOVE for key in absent}
    )
    with ModelFile.open(base, heads) as model:
        assert model.config.has_heads


def test_context_length_of_the_base_counts(tmp_path: Path) -> None:
    """Conversions of one model differ in it; it does not tell models apart."""
    base = write_model(
        tmp_path / "b.gguf", "qwen3", metadata={"qwen3.context_length": np.uint32(64)}
    )
    with ModelFile.open(base, write_heads(tmp_path / "h.gguf")) as model:
        assert model.config.n_ctx_train == 64


def test_same_yarn_on_both_sides(tmp_path: Path) -> None:
    def yarn(arch: str) -> dict[str, Any]:
        return {
            f"{arch}.rope.scaling.type": "yarn",
            f"{arch}.rope.scaling.factor": np.float32(4),
            f"{arch}.rope.scaling.original_context_length": np.uint32(32),
        }

    base = write_model(tmp_path / "base.gguf", "qwen3", metadata=yarn("qwen3"))
    heads = write_heads(tmp_path / "heads.gguf", metadata=yarn("orthrus"))
    with ModelFile.open(base, heads) as model:
        assert model.config.rope == Rope(1e6, factor=4, original_context=32, ext_factor=1)
    message = refusal(base, write_heads(tmp_path / "plain.gguf"))
    assert "rope factor is 1, the base has 4" in message
    assert "rope ext_factor is 0, the base has 1" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("block_count", np.uint32(3), "n_layers is 3, the base has 2"),
        ("embedding_length", np.uint32(64), "n_embd is 64, the base has 32"),
        ("feed_forward_length", np.uint32(65), "n_ff is 65, the base has 64"),
        ("attention.head_count", np.uint32(8), "n_head is 8, the base has 4"),
        ("attention.head_count_kv", np.uint32(4), "n_head_kv is 4, the base has 2"),
        ("rope.freq_base", np.float32(1e4), "rope freq_base is 10000, the base has 1000000"),
    ],
)
def test_heads_of_another_model(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    base = write_model(tmp_path / "base.gguf", "qwen3")
    heads = write_heads(tmp_path / "heads.gguf", metadata={f"orthrus.{key}": value})
    message = refusal(base, heads)
    assert f"{heads}: these heads do not belong to {base}: {expected}; use the heads" in message


def test_heads_of_another_head_dim(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", "qwen3")
    both = {f"orthrus.attention.{name}_length": np.uint32(32) for name in ("key", "value")}
    heads = write_heads(tmp_path / "heads.gguf", metadata=both)
    assert "head_dim is 32, the base has 16" in refusal(base, heads)


@pytest.mark.parametrize(
    ("metadata", "tensors", "expected"),
    [
        ({"tokenizer.ggml.mask_token_id": np.uint32(N_VOCAB)}, {}, "expected 0 to 39, found 40"),
        ({"tokenizer.ggml.mask_token_id": REMOVE}, {}, "mask_token_id: is missing"),
        ({"orthrus.diffusion.block_size": REMOVE}, {}, "diffusion.block_size: is missing"),
        ({"orthrus.block_count": REMOVE}, {}, "orthrus.block_count: is missing"),
        ({"general.type": REMOVE}, {}, "is not a heads file: expected 'adapter', found 'model'"),
        ({"adapter.type": "lora"}, {}, "is not a heads file: expected 'orthrus_heads', found 'lo"),
        ({"adapter.type": REMOVE}, {}, "adapter.type: is missing"),
        ({}, {TWIN: REMOVE}, f"tensor {TWIN} is missing, expected shape (64, 32)"),
        ({}, {TWIN: np.zeros((64, 64), np.float32)}, "expected shape (64, 32), found (64, 64)"),
        ({}, {"output_norm.weight": np.ones(32, np.float32)}, "heads must not replace it"),
        ({}, {"blk.0.attn_q.weight": np.ones((64, 32), np.float32)}, "heads must not replace it"),
        ({}, {"blk.0.attn_q_diff.bias": np.ones(64, np.float32)}, "bias' is not supported: qwen3"),
        ({"split.count": np.uint16(2)}, {}, "split.no: is missing"),
    ],
)
def test_heads_refused(
    tmp_path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, Any], expected: str
) -> None:
    base = write_model(tmp_path / "base.gguf", "qwen3")
    heads = write_heads(tmp_path / "heads.gguf", metadata=metadata, tensors=tensors)
    message = refusal(base, heads)
    assert message.startswith(f"{heads}: ")
    assert expected in message


def test_files_in_the_wrong_places(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "tiny.gguf")
    base = write_model(tmp_path / "base.gguf", "qwen3")
    heads = write_heads(tmp_path / "heads.gguf")
    alone = refusal(heads)
    assert f"{heads}: holds only diffusion heads; open their base model (qwen3), with" in alone
    of_llama = write_heads(tmp_path / "llama-heads.gguf", base="llama")
    assert "open their base model (llama), with --heads" in refusal(of_llama)
    assert "holds only diffusion heads" in refusal(heads, base)
    assert f"{whole}: already holds diffusion heads; leave out" in refusal(whole, heads)
    assert f"{whole}: metadata key general.type: is not a heads file" in refusal(base, whole)
    assert f"{base}: metadata key general.type: is not a heads file" in refusal(base, base)
    assert "no such file" in refusal(base, tmp_path / "nothing.gguf")


def test_other_adapter(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "lora.gguf", "qwen3", {"general.type": "adapter", "adapter.type": "lora"}, {}
    )
    assert "expected a model, found an adapter of type 'lora'" in refusal(path)


@pytest.mark.parametrize("part", [0, 1])
def test_one_part_without_the_other(tmp_path: Path, part: int) -> None:
    """Later parts hold no keys but these. (What whole sets give is tested with the reader.)"""
    path = tmp_path / f"tiny-0000{part + 1}-of-00002.gguf"
    keys = {"split.count": np.uint16(2), "split.no": np.uint16(part)}
    if part == 0:
        write_model(path, metadata=keys)
    else:
        write_gguf(path, "?", {"general.architecture": REMOVE, **keys}, {})
    assert f"tiny-0000{2 - part}-of-00002.gguf: this part of a model split" in refusal(path)


def test_one_part_is_whole(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", metadata={"split.count": np.uint16(1)})
    with ModelFile.open(path) as model:
        assert model.config.has_heads


def test_not_a_model(tmp_path: Path) -> None:
    """Architectures of others, files without one, and files without weights."""
    other = write_model(tmp_path / "other.gguf", "gemma")
    assert "'orthrus' or one of 'qwen3', 'qwen2', 'llama', 'qwen35', found 'gemma'" in refusal(
        other
    )
    none = write_gguf(
        tmp_path / "imatrix.gguf",
        "?",
        {"general.architecture": REMOVE, "general.type": "imatrix"},
        {},
    )
    assert "general.architecture: is missing" in refusal(none)
    empty = write_gguf(tmp_path / "vocab.gguf", "qwen3", {}, {})
    assert "tensor token_embd.weight is missing" in refusal(empty)


@pytest.mark.parametrize("key", ["orthrus.diffusion.block_size", "tokenizer.ggml.mask_token_id"])
def test_heads_without_their_keys(tmp_path: Path, key: str) -> None:
    path = write_model(tmp_path / "tiny.gguf", metadata={key: REMOVE})
    assert f"{key}: is missing, but the file holds diffusion heads" in refusal(path)


def test_orthrus_without_heads(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "tiny.gguf",
        heads=False,
        metadata={
            "orthrus.diffusion.block_size": np.uint32(8),
            "tokenizer.ggml.mask_token_id": np.uint32(3),
        },
    )
    assert "is an Orthrus model, but holds no diffusion tensors" in refusal(path)


@pytest.mark.parametrize("base", BASES)
def test_stock_architecture_with_heads(tmp_path: Path, base: str) -> None:
    path = write_model(tmp_path / "tiny.gguf", base, heads=True)
    assert f"holds diffusion tensors, but its general.architecture is {base!r}" in refusal(path)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("base", BASES)
def test_every_base_and_its_heads(tmp_path: Path, base: str, scaling: str) -> None:
    """In one file or in two: the same config and the same bytes."""
    more: dict[str, Any] = {"n_heads": (6, 1), "scaling": scaling}
    whole = write_model(tmp_path / "tiny.gguf", base=base, tied=False, **more)
    alone = write_model(tmp_path / "base.gguf", base, tied=False, **more)
    heads = write_heads(tmp_path / "heads.gguf", base=base, **more)
    with ModelFile.open(whole) as one, ModelFile.open(alone, heads) as two:
        assert one.config == two.config
        assert one.config.architecture is ARCHITECTURES[base]
        assert (one.config.rope.freq_factors is not None) == (scaling == "llama3")
        assert one.config.rope.factor == (4 if scaling in ("linear", "yarn") else 1)
        assert one.config.rope.ext_factor == (scaling == "yarn")
        assert set(one.tensors) == set(two.tensors)
        assert set(one.tensors) == {*base_tensors(one.config), *diffusion_tensors(one.config)}
        for name in one.tensors:
            assert one.data(name).tobytes() == two.data(name).tobytes()
    with ModelFile.open(alone) as plain:
        assert plain.config == replace(one.config, block_size=None, mask_token=None)


def test_heads_of_another_architecture(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", "llama")
    message = refusal(base, write_heads(tmp_path / "heads.gguf"))
    assert "architecture is qwen3, the base has llama; use the heads" in message
    qwen2 = write_model(tmp_path / "qwen2.gguf", "qwen2")
    message = refusal(qwen2, write_heads(tmp_path / "heads2.gguf", base="llama"))
    assert "architecture is llama, the base has qwen2" in message
    biasless = {f"blk.{i}.attn_v_diff.bias": REMOVE for i in range(N_LAYERS)}
    message = refusal(qwen2, write_heads(tmp_path / "h3.gguf", base="qwen2", tensors=biasless))
    assert "tensor blk.0.attn_v_diff.bias (and 1 more) is missing" in message


def test_constants_up_to_single_precision(tmp_path: Path) -> None:
    """Heads whose metadata was rounded on its way; a difference that means something is none."""
    base = write_model(tmp_path / "base.gguf", "qwen3")
    key = "orthrus.rope.freq_base"
    for nearly, same in ((1e6 * (1 + 5e-7), True), (1e6 * (1 + 2e-6), False)):
        heads = write_heads(tmp_path / "heads.gguf", metadata={key: np.float64(nearly)})
        if same:
            ModelFile.open(base, heads).close()
        else:
            assert "rope freq_base is 1000002, the base has 1000000" in refusal(base, heads)


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        (np.ones(7, np.float32), "expected 8 floats, one per pair of a head, found F32 (7,)"),
        (np.ones((1, 8), np.float32), "found F32 (1, 8)"),
        (np.ones(8, np.int32), "found I32 (8,)"),
        (np.array([1] * 7 + [0], np.float32), "expected numbers above 0, found 0.0"),
        (np.array([-1] + [1] * 7, np.float32), "found -1.0"),
        (np.array([1] * 7 + [np.nan], np.float32), "found nan"),
        (np.array([1] * 7 + [np.inf], np.float32), "found inf"),
    ],
)
def test_wrong_frequency_factors(tmp_path: Path, factors: Any, expected: str) -> None:
    path = write_model(tmp_path / "t.gguf", "llama", tensors={"rope_freqs.weight": factors})
    message = refusal(path)
    assert "tensor rope_freqs.weight: " in message
    assert expected in message


@pytest.mark.parametrize(
    ("base", "name", "shape"),
    [
        ("llama", "blk.0.attn_q.bias", (64,)),
        ("llama", "blk.1.attn_output.bias", (32,)),
        ("llama", "blk.0.ffn_gate_inp.weight", (8, 32)),
        ("llama", "blk.0.ffn_gate_exps.weight", (8, 64, 32)),
        ("llama", "blk.0.attn_q_norm.weight", (16,)),
        ("llama", "output.bias", (40,)),
        ("llama", "rope_factors_long.weight", (8,)),
        ("qwen2", "blk.1.attn_output.bias", (32,)),
        ("qwen2", "blk.1.attn_k_norm.weight", (16,)),
        ("qwen2", "output_norm.bias", (32,)),
        ("qwen3", "blk.0.attn_sinks.weight", (4,)),
        ("qwen3", "token_embd_norm.weight", (32,)),
    ],
)
def test_parts_that_the_architecture_lacks(
    tmp_path: Path, base: str, name: str, shape: tuple[int, ...]
) -> None:
    """By name, since leaving them out would give other results."""
    path = write_model(tmp_path / "t.gguf", base, tensors={name: np.ones(shape, np.float32)})
    assert f"tensor {name!r} is not supported: {base} models have no such part" in refusal(path)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"blk.1.ffn_up.weight": REMOVE}, "tensor blk.1.ffn_up.weight is missing"),
        (
            {"blk.0.ffn_up.weight": REMOVE, "output_norm.weight": REMOVE},
            "tensor blk.0.ffn_up.weight (and 1 more) is missing, expected shape (64, 32)",
        ),
        (
            {TWIN: np.zeros((32, 64), np.float32)},
            f"tensor {TWIN}: expected shape (64, 32), found (32, 64)",
        ),
        (
            {"token_embd.weight": np.zeros(N_VOCAB, np.float32)},
            "token_embd.weight: expected shape (40, 32), found (40,)",
        ),
        (
            {"token_embd.weight": np.zeros((41, 32), np.float32)},
            "expected 41 tokens as in token_embd.weight, found 40",
        ),
        (
            {"output.weight": np.zeros((41, 32), np.float32)},
            "output.weight: expected shape (40, 32), found (41, 32)",
        ),
        (
            {"blk.0.attn_norm.weight": np.zeros(32, np.int32)},
            "blk.0.attn_norm.weight: expected F32, F16 or BF16, found I32",
        ),
        (
            {"blk.0.attn_norm.weight": (np.zeros(34, np.uint8), KINDS.Q8_0)},
            "blk.0.attn_norm.weight: expected F32, F16 or BF16, found Q8_0",
        ),
        (
            {"blk.0.attn_q.weight": np.zeros((64, 32), np.int8)},
            "blk.0.attn_q.weight: expected a weight type, found I8",
        ),
        (
            {"blk.0.attn_q.bias": np.zeros(64, np.float32)},
            "tensor 'blk.0.attn_q.bias' is not supported",
        ),
        (
            {"blk.1.attn_q_diff.scale": np.zeros(1, np.float32)},
            "tensor 'blk.1.attn_q_diff.scale' is not supported",
        ),
        (
            {"blk.2.attn_q.weight": np.zeros((64, 32), np.float32)},
            "tensor 'blk.2.attn_q.weight' belongs to no layer: the metadata says 2 layers",
        ),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: Mapping[str, Any], expected: str) -> None:
    message = refusal(write_model(tmp_path / "tiny.gguf", tensors=tensors))
    assert message.startswith(f"{tmp_path / 'tiny.gguf'}: ")
    assert expected in message


def test_harmless_differences(tmp_path: Path) -> None:
    """Files of others: more keys and tensors, other float types."""
    half = np.ones(32, np.float16)
    bf16 = gguf.quantize(np.ones((1, 16), np.float32), KINDS.BF16)[0]
    q8 = gguf.quantize(np.ones((64, 32), np.float32), KINDS.Q8_0)
    tensors = {
        "blk.0.attn_norm.weight": half,
        "blk.1.attn_q_norm_diff.weight": (bf16, KINDS.BF16),
        "blk.1.attn_q_diff.weight": (q8, KINDS.Q8_0),
        "something.else": np.ones(8, np.float32),
    }
    metadata = {
        "general.type": REMOVE,
        "orthrus.unknown": "x",
        "orthrus.rope.dimension_count": np.uint32(16),
        "orthrus.attention.head_count_kv": np.array([2, 2], np.int32),
        "quantize.imatrix.file": "x.dat",
    }
    path = write_model(tmp_path / "tiny.gguf", metadata=metadata, tensors=tensors)
    with ModelFile.open(path) as model:
        assert model.config.n_head_kv == 2
        assert model.tensors["blk.1.attn_q_diff.weight"].type == KINDS.Q8_0
        assert "something.else" in model.tensors


def test_any_order_of_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(heads=True, base=True, tied=True)
    backwards = dict(reversed(tensors.items()))
    keys = {**shape_keys("orthrus"), **diffusion_keys()}
    with ModelFile.open(write_gguf(tmp_path / "x.gguf", "orthrus", keys, backwards)) as model:
        assert list(model.tensors) == list(backwards)
        for name, weights in tensors.items():
            assert model.data(name).tobytes() == weights.tobytes()


def test_data_and_close(tmp_path: Path) -> None:
    model = ModelFile.open(write_model(tmp_path / "tiny.gguf"))
    view = model.data(TWIN)
    assert view.shape == (64 * 32 * 4,)
    assert not view.flags.writeable
    with pytest.raises(KeyError):
        model.data("no such tensor")
    model.close()
    with pytest.raises(ValueError, match="is closed"):
        model.data(TWIN)
    assert np.isfinite(view.view("<f4")).all(), "a view outlives close()"
