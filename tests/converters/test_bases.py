"""Bases other than Qwen3: their logits are Hugging Face's, their keys and tensors llama.cpp's.

What llama.cpp's own converter writes was compared once, key by key and tensor by tensor (version of
llama-cpp-python 0.3.36): the tables here are what it says.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hf_bases import BASES, ROWS, TOKENS, write_base
from hf_checkpoint import (
    LLAMA_CONFIG,
    QWEN2_CONFIG,
    plain,
    random_weights,
    write_checkpoint,
)
from make_file import make_file
from numpy.typing import NDArray
from orthrus_converters.cli import main
from stock import Stock

from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.rope_factors import llama3_factors
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment
from orthrus_gguf.runtime.reference import ReferenceModel

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "bases.npz"

ARCHITECTURES = {name: "qwen3" if name == "qwen3" else name.split("-")[0] for name in BASES} | {
    "llama3": "llama",
    "mistral": "llama",
}

#: The base's own keys of "llama3", as llama.cpp's converter writes them and in its order.
LLAMA_KEYS: dict[str, Any] = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 10000.0,
    "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
    "llama.attention.key_length": 32,
    "llama.attention.value_length": 32,
    "llama.vocab_size": 270,
    "llama.rope.dimension_count": 32,
}
ROPE_KEYS: dict[str, dict[str, Any]] = {
    "llama3": {},
    "llama-1": {},
    "llama-linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "llama-yarn": {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16,
    },
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`converted(name)`: one of BASES in F32."""
    folder = tmp_path_factory.mktemp("bases")

    def make(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            make_file(write_base(folder, name), path, "--type", "f32")
        return path

    return make


def keys_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    return {
        tensor.name: (tensor.tensor_type.name, tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("name", BASES)
def test_logits_are_those_of_hugging_face(name: str, converted: Callable[[str], Path]) -> None:
    """A wrong pairing, bias or scaling moves them by 0.02 and more (by 2 in the later rows)."""
    with ModelFile.open(converted(name)) as file:
        assert file.config.architecture.name == ARCHITECTURES[name]
        model = ReferenceModel(file)
    [logits] = model.logits([ar_segment(model.new_cache(32), TOKENS, 0)])
    np.testing.assert_allclose(logits[ROWS], np.load(GOLDEN)[name], atol=1e-4)


@pytest.mark.parametrize("name", BASES)
def test_stock_llama_cpp_gives_them_too(name: str, converted: Callable[[str], Path]) -> None:
    stock = Stock(converted(name), "f32", 64)
    [entry] = stock.greedy(TOKENS, 1, 270)
    found = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
    logits = np.load(GOLDEN)[name][-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    assert entry["id"] == int(expected.argmax())
    assert len(found) == 270
    for token, logprob in found.items():
        assert logprob == pytest.approx(expected[token], abs=1e-3), token


@pytest.mark.parametrize("name", ROPE_KEYS)
def test_keys_are_those_of_llama_cpp(name: str, converted: Callable[[str], Path]) -> None:
    keys = keys_of(converted(name))
    assert keys["general.architecture"] == "llama"
    ours = {key: value for key, value in keys.items() if key.startswith("llama.")}
    scaling = {f"llama.{key}": value for key, value in ROPE_KEYS[name].items()}
    expected = LLAMA_KEYS | ({"llama.attention.head_count_kv": 4} if name == "llama-1" else {})
    assert ours == expected | scaling
    assert [key for key in ours if key in LLAMA_KEYS] == list(LLAMA_KEYS)
    assert keys["tokenizer.ggml.pre"] == "qwen2"
    assert not any("orthrus" in key or "diffusion" in key for key in keys)


def test_keys_of_qwen2(converted: Callable[[str], Path]) -> None:
    keys = keys_of(converted("qwen2"))
    assert keys["general.architecture"] == "qwen2"
    assert {key.removeprefix("qwen2.") for key in keys if key.startswith("qwen2.")} == {
        key.removeprefix("llama.") for key in list(LLAMA_KEYS)[:-2]
    }
    types = {name: kind for name, (kind, _) in tensors_of(converted("qwen2")).items()}
    assert "output.weight" not in types
    assert [name for name in types if name.startswith("blk.1.attn_")] == [
        f"blk.1.attn_{part}"
        for part in (
            *("norm.weight", "q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "v.bias"),
            "output.weight",
        )
    ]


def test_the_factors_of_llama_3() -> None:
    """Llama 3.1's: as transformers computes the scaled frequencies, in single precision."""
    found = np.array(llama3_factors(500_000.0, 128, 8.0, 1.0, 4.0, 8192), np.float32)
    frequencies = (1.0 / 500_000.0 ** (np.arange(0, 128, 2).astype(np.float32) / 128)).astype(
        np.float32
    )
    wavelengths = (2 * np.pi / frequencies).astype(np.float32)
    for factor, wavelength in zip(found, wavelengths, strict=True):
        if wavelength < 8192 / 4:
            assert factor == 1
        elif wavelength > 8192:
            assert factor == 8
        else:
            smooth = (8192 / wavelength - 1) / 3
            assert factor == pytest.approx(1 / ((1 - smooth) / 8 + smooth), rel=1e-5)
    assert (found == 1).sum() == 29
    assert (found == 8).sum() == 29


def permuted(values: NDArray[np.float32], n_head: int) -> NDArray[np.float32]:
    """Row by row: what stands where in a head whose pairs are adjacent."""
    head_dim = len(values) // n_head
    rows = [
        head * head_dim + pair + half * head_dim // 2
        for head in range(n_head)
        for pair in range(head_dim // 2)
        for half in (0, 1)
    ]
    return values[rows]


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_rows_of_q_and_k_are_paired(kind: str, tmp_path: Path) -> None:
    weights = random_weights(LLAMA_CONFIG)
    folder = write_checkpoint(tmp_path / "m", LLAMA_CONFIG, weights)
    assert main([str(folder), str(tmp_path / "m.gguf"), "--type", kind]) == 0
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for part, n_head in (("q", 4), ("k", 2), ("v", 0)):
        for view in ("", "_diff"):
            tensor = found[f"blk.1.attn_{part}{view}.weight"]
            values = weights[f"model.layers.1.self_attn.{part}_proj{view}.weight"]
            expected = permuted(values, n_head) if n_head else values
            stored = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
            np.testing.assert_allclose(stored, expected, atol=2e-3 if kind == "q8_0" else 0)


def test_heads_of_rows_that_chunks_cut_through(tmp_path: Path) -> None:
    """Two heads of 512 rows of 1536: chunks of 341 rows begin and end within heads."""
    config = {**LLAMA_CONFIG, "hidden_size": 1536, "head_dim": 512, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    weights = random_weights(config)
    folder = write_checkpoint(tmp_path / "m", config, weights)
    assert main([str(folder), str(tmp_path / "m.gguf"), "--type", "f32"]) == 0
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    values = weights["model.layers.0.self_attn.q_proj.weight"]
    assert np.array_equal(found["blk.0.attn_q.weight"].data, permuted(values, 2))


def same_views(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Weights whose heads are copies of the AR view's, norms about one."""
    weights = random_weights(config)
    for name in weights:
        if "_diff" in name:
            weights[name] = weights[name.replace("_diff", "")]
    return {key: values + 1 if "norm" in key else values for key, values in weights.items()}


@pytest.mark.parametrize("config", [QWEN2_CONFIG, LLAMA_CONFIG], ids=["qwen2", "llama"])
class TestHeads:
    def test_both_views_are_converted_alike(self, config: dict[str, Any], tmp_path: Path) -> None:
        """With heads that equal the AR weights, a block of one row is an AR row."""
        folder = write_checkpoint(tmp_path / "m", config, same_views(config), dtype="F32")
        assert main([str(folder), str(tmp_path / "m.gguf")]) == 0
        with ModelFile.open(tmp_path / "m.gguf") as file:
            model = ReferenceModel(file)
        cache = model.new_cache(32)
        model.logits([ar_segment(cache, TOKENS[:-1], 0)])
        cache.commit(range(len(TOKENS) - 1))
        block = diffusion_segment(cache, TOKENS[-1], 261, 1, len(TOKENS) - 1)
        [of_block] = model.logits([block])
        [of_row] = model.logits([ar_segment(cache, TOKENS[-1:], len(TOKENS) - 1)])
        np.testing.assert_allclose(of_block, of_row, atol=1e-5)

    def test_files_say_what_their_base_is(self, config: dict[str, Any], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", config)
        single, base = tmp_path / "single.gguf", tmp_path / "base.gguf"
        assert main([str(folder), str(single)]) == 0
        assert main([str(folder), str(base), "--split"]) == 0
        kind = config["model_type"]
        for path in (single, tmp_path / "base-heads.gguf"):
            keys = keys_of(path)
            assert keys["general.architecture"] == "orthrus"
            assert keys["orthrus.base_architecture"] == kind
            assert keys["orthrus.diffusion.block_size"] == 8
            assert not any(key.startswith(f"{kind}.") for key in keys)
        assert keys_of(base)["general.architecture"] == kind
        assert not any("orthrus" in key for key in keys_of(base))
        heads = tensors_of(tmp_path / "base-heads.gguf")
        n_biases = 3 if kind == "qwen2" else 0
        assert len(heads) == 2 * (4 + n_biases)
        assert ("blk.0.attn_q_diff.bias" in heads) == bool(n_biases)
        assert tensors_of(base) | heads == tensors_of(single)
        with ModelFile.open(base, tmp_path / "base-heads.gguf") as pair:
            with ModelFile.open(single) as one:
                assert pair.config == one.config
            assert pair.config.architecture.name == kind

    def test_the_split_base_is_the_plain_model(
        self, config: dict[str, Any], tmp_path: Path
    ) -> None:
        weights = random_weights(config)
        folder = write_checkpoint(tmp_path / "m", config, weights)
        kept = {name: values for name, values in weights.items() if "_diff" not in name}
        write_checkpoint(tmp_path / "plain" / "m", plain(config), kept)
        paths = tmp_path / "base.gguf", tmp_path / "plain.gguf"
        assert main([str(folder), str(paths[0]), "--split"]) == 0
        assert main([str(tmp_path / "plain" / "m"), str(paths[1])]) == 0
        assert paths[0].read_bytes() == paths[1].read_bytes()

    @pytest.mark.parametrize("kind", ["bf16", "q8_0"])
    def test_split_and_merge_are_inverses(
        self, kind: str, config: dict[str, Any], tmp_path: Path
    ) -> None:
        folder = write_checkpoint(tmp_path / "m", config)
        single, base, merged = (tmp_path / f"{name}.gguf" for name in ("one", "base", "merged"))
        assert main([str(folder), str(single), "--type", kind]) == 0
        assert main([str(single), str(base), "--split"]) == 0
        assert main(["--merge", str(base), str(merged)]) == 0
        assert merged.read_bytes() == single.read_bytes()

    def test_grafts(self, config: dict[str, Any], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", config)
        single, base, grafted = (tmp_path / f"{name}.gguf" for name in ("one", "base", "new"))
        assert main([str(folder), str(single), "--type", "q8_0"]) == 0
        assert main([str(folder), str(base), "--type", "q8_0", "--split"]) == 0
        for heads in (folder, single, tmp_path / "base-heads.gguf"):
            argv = ["--base", str(base), "--heads", str(heads), str(grafted), "--overwrite"]
            assert main(argv) == 0
            assert tensors_of(grafted) == tensors_of(single)
            assert keys_of(grafted)["orthrus.base_architecture"] == config["model_type"]
            with ModelFile.open(grafted) as model:
                assert model.config.has_heads

    def test_only_matrices_are_quantized(self, config: dict[str, Any], tmp_path: Path) -> None:
        folder = write_checkpoint(tmp_path / "m", config)
        assert main([str(folder), str(tmp_path / "m.gguf"), "--type", "q8_0"]) == 0
        with GGUFFile.open(tmp_path / "m.gguf") as file:
            for name, info in file.tensors.items():
                assert info.type.name == ("Q8_0" if len(info.shape) == 2 else "F32"), name

    def test_a_plain_gguf_is_quantized_too(self, config: dict[str, Any], tmp_path: Path) -> None:
        kept = {k: v for k, v in random_weights(config).items() if "_diff" not in k}
        folder = write_checkpoint(tmp_path / "m", plain(config), kept)
        paths = [tmp_path / f"{name}.gguf" for name in ("f32", "twice", "once")]
        assert main([str(folder), str(paths[0]), "--type", "f32"]) == 0
        assert main([str(paths[0]), str(paths[1]), "--type", "q8_0"]) == 0
        assert main([str(folder), str(paths[2]), "--type", "q8_0"]) == 0
        assert tensors_of(paths[1]) == tensors_of(paths[2])


def test_heads_of_another_architecture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The shapes are the same; only the architecture tells."""
    config = {**QWEN2_CONFIG, "tie_word_embeddings": False, "head_dim": 32, "hidden_size": 64}
    other = {**LLAMA_CONFIG, "rms_norm_eps": 1e-6, "rope_parameters": config["rope_parameters"]}
    for name, values in (("qwen2", config), ("llama", other)):
        folder = write_checkpoint(tmp_path / name, values)
        assert main([str(folder), str(tmp_path / f"{name}.gguf"), "--split"]) == 0
    capsys.readouterr()
    base, heads = tmp_path / "qwen2.gguf", tmp_path / "llama-heads.gguf"
    for argv in (
        ["--base", str(base), "--heads", str(heads), str(tmp_path / "x.gguf")],
        ["--base", str(base), "--heads", str(tmp_path / "llama"), str(tmp_path / "x.gguf")],
        ["--merge", str(base), "--heads", str(heads), str(tmp_path / "x.gguf")],
    ):
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert "do not belong to" in error
        assert "architecture is llama, the base has qwen2" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x.gguf").exists()
