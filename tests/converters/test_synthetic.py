"""Synthetic models: types as in a conversion, valid qblocks, a vocabulary that works, a label."""

from __future__ import annotations

import hashlib
import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from orthrus_converters.cli import main
from orthrus_converters.file_types import FILE_TYPES
from orthrus_converters.synthetic import plan_synthetic
from orthrus_converters.synthetic_qblocks import KINDS, RandomWeights, random_qblocks
from orthrus_converters.synthetic_vocabulary import MIN_TOKENS, synthetic_vocabulary
from tokenizers import Tokenizer as Oracle
from tokenizers import models, pre_tokenizers

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.fields import Fields
from orthrus_gguf.gguf.writer import write_files
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.shapes import HYBRID_SHAPES, SHAPES
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment
from orthrus_gguf.text.tokenizer import load_tokenizer

Type = gguf.GGMLQuantizationType

SMALL = replace(
    SHAPES["qwen3-0.6b"],
    name="small",
    n_layers=4,
    n_embd=256,
    n_ff=512,
    n_head=4,
    n_head_kv=2,
    head_dim=64,
    n_vocab=600,
    mask_token=580,
    tied=False,
)


def make(path: Path, config: ModelConfig, type_name: str, seed: int = 0) -> int:
    return write_files([plan_synthetic(path, config, type_name, seed)], lambda n_bytes: None)[0]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "small.gguf"
    size = make(path, SMALL, "Q4_K_M")
    assert size == path.stat().st_size
    return path


#: Released models: tensors of each (shared/published counts), and weights with heads.
@pytest.mark.parametrize(
    ("name", "tensors", "billions"),
    [("qwen3-1.7b", 478, 2.07), ("qwen3-4b", 614, 4.97), ("qwen3-8b", 615, 9.70)],
)
def test_real_shapes(tmp_path: Path, name: str, tensors: int, billions: float) -> None:
    plan = plan_synthetic(tmp_path / "x.gguf", SHAPES[name], "q4_k_m")
    assert len(plan.tensors) == tensors
    assert sum(t.n_elements for t in plan.tensors) / 1e9 == pytest.approx(billions, abs=0.01)


def test_types_of_8b_are_llama_quantizes(tmp_path: Path) -> None:
    """Layer by layer for 36 layers: `use_more_bits`; the twins have the usual type."""
    plan = plan_synthetic(tmp_path / "x.gguf", SHAPES["qwen3-8b"], "Q4_K_M")
    types = {tensor.name: tensor.type for tensor in plan.tensors}
    more = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 31, 32, 33, 34, 35}
    for layer in range(36):
        expected = Type.Q6_K if layer in more else Type.Q4_K
        assert types[f"blk.{layer}.attn_v.weight"] == expected
        assert types[f"blk.{layer}.ffn_down.weight"] == expected
        for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
            assert types[f"blk.{layer}.{part}.weight"] == Type.Q4_K
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            assert types[f"blk.{layer}.{part}_diff.weight"] == Type.Q4_K
        assert types[f"blk.{layer}.attn_q_norm_diff.weight"] == Type.F32
    assert types["output.weight"] == Type.Q6_K
    assert types["token_embd.weight"] == Type.Q4_K
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    assert shapes["blk.7.ffn_down.weight"] == (4096, 12288)
    assert shapes["blk.7.attn_k_diff.weight"] == (1024, 4096)


def test_every_block_is_finite_and_rows_have_unit_length(small: Path) -> None:
    reader = gguf.GGUFReader(small)
    assert {Type.Q4_K, Type.Q6_K, Type.F32} == {t.tensor_type for t in reader.tensors}
    for tensor in reader.tensors:
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.isfinite(values).all(), tensor.name
        if values.ndim == 2:
            lengths = np.linalg.norm(values, axis=1)
            assert np.median(lengths) == pytest.approx(1, rel=0.15), tensor.name
            assert len(np.unique(values, axis=0)) == len(values), tensor.name
        else:
            assert values.mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_qblocks_of_every_type(kind: Type) -> None:
    rng = np.random.default_rng(1)
    qblocks = random_qblocks(rng, kind, 4096, 1 / 64)
    assert qblocks.shape == (4096, gguf.GGML_QUANT_SIZES[kind][1])
    values = quants.dequantize(qblocks, kind).astype(np.float64)
    assert np.isfinite(values).all()
    assert np.sqrt((values**2).mean()) == pytest.approx(1 / 64, rel=0.1)
    assert abs(values.mean()) < 0.15 / 64


def test_a_file_type_without_random_qblocks_is_refused(tmp_path: Path) -> None:
    for name in FILE_TYPES:
        if name != "iq1_m":
            plan_synthetic(tmp_path / "x.gguf", SMALL, name)
    with pytest.raises(OrthrusError, match="no random qblocks can be made of type IQ1_M"):
        plan_synthetic(tmp_path / "x.gguf", SMALL, "iq1_m")
    with pytest.raises(OrthrusError, match="--type q9: expected one of f32, "):
        plan_synthetic(tmp_path / "x.gguf", SMALL, "q9")


def test_rows_of_the_largest_matrix_differ() -> None:
    """152k rows are cut from a pool that is a tenth of them; none may begin at the same place."""
    weights = RandomWeights(0)
    rows, columns = 151_936, 1024
    data = np.concatenate(list(weights.matrix("output.weight", Type.Q4_0, (rows, columns))))
    digests = {row.tobytes() for row in data.reshape(rows, -1)[:, :36]}
    assert len(digests) == rows


def test_it_runs(small: Path) -> None:
    with (
        ModelFile.open(small) as file,
        closing(load_model(file, RuntimeSettings(RuntimeName.CPU, threads=1))) as model,
    ):
        cache = model.new_cache(64)
        tokens = [int(t) for t in np.random.default_rng(3).integers(0, SMALL.n_vocab, 20)]
        assert SMALL.mask_token is not None
        ar = ar_segment(cache, tokens, 0)
        block = diffusion_segment(cache, tokens[-1], SMALL.mask_token, 8, len(tokens))
        for segment in (ar, block):
            [logits] = model.logits([segment])  # read before the next pass replaces them
            assert np.isfinite(logits).all()
            assert 0.1 < np.std(logits) < 10
            if segment is ar:
                cache.commit(range(len(tokens)))


def test_the_label(small: Path) -> None:
    fields = gguf.GGUFReader(small).fields
    assert fields["general.name"].contents() == "synthetic small Q4_K_M (random weights)"
    assert fields["orthrus.synthetic"].contents() is True
    assert fields["orthrus.synthetic.seed"].contents() == 0
    assert "synthetic" in fields["general.tags"].contents()


def test_a_seed_makes_the_same_file(tmp_path: Path, small: Path) -> None:
    digests = []
    for name, seed in (("a", 0), ("b", 1)):
        make(tmp_path / name, SMALL, "q4_k_m", seed)
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).digest())
    assert digests[0] == hashlib.sha256(small.read_bytes()).digest()
    assert digests[1] != digests[0]


def test_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(OrthrusError, match="exists already"):
        make(path, SMALL, "q8_0")
    assert path.read_bytes() == b"mine"
    path.unlink()

    def fail(n_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_files([plan_synthetic(path, SMALL, "q8_0")], fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "base", "tensors"),
    [
        ("smollm2-135m", "llama", 392),
        ("llama-3.2-1b", "llama", 211),
        ("qwen2.5-0.5b", "qwen2", 458),
    ],
)
def test_shapes_of_other_bases(tmp_path: Path, name: str, base: str, tensors: int) -> None:
    """Made with two of their layers: the config comes back, biases and factors are as they are."""
    assert len(plan_synthetic(tmp_path / "x.gguf", SHAPES[name], "q8_0").tensors) == tensors
    config = replace(SHAPES[name], n_layers=2, n_vocab=400, mask_token=399)
    path = tmp_path / "m.gguf"
    make(path, config, "q8_0")
    with ModelFile.open(path) as file:
        assert file.config == replace(config, name=file.config.name)
        assert file.config.architecture.name == base
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.endswith(".bias"):
            assert tensor.data.mean() == pytest.approx(0, abs=0.05)
            assert tensor.data.std() == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize(
    ("name", "mib", "tensors", "billions"),
    [
        ("qwen3.5-0.8b", 19.3, 320, 0.75),
        ("qwen3.5-2b", 19.3, 320, 1.88),
        ("qwen3.5-4b", 50.3, 426, 4.21),
        ("qwen3.5-9b", 50.3, 427, 8.95),
    ],
)
def test_hybrids_are_stock_files(
    tmp_path: Path, name: str, mib: float, tensors: int, billions: float
) -> None:
    """Without heads; made with four of their layers, they come back."""
    shape = HYBRID_SHAPES[name]
    plan = plan_synthetic(tmp_path / "x.gguf", shape, "q4_k_m").tensors
    assert len(plan) == tensors
    assert sum(t.n_elements for t in plan) / 1e9 == pytest.approx(billions, abs=0.01)
    assert shape.hybrid is not None
    assert shape.hybrid.state_bytes(shape.n_layers) / 2**20 == pytest.approx(mib, abs=0.05)
    config, path = replace(shape, n_layers=4, n_embd=64, n_vocab=400), tmp_path / "m.gguf"
    make(path, config, "q8_0")
    with ModelFile.open(path) as file:
        assert file.config == replace(config, name=file.config.name)
        assert not file.config.has_heads
    values = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    assert max(values["blk.0.ssm_a"]) < 0


class TestCommand:
    """`orthrus-convert --synthetic NAME OUT.gguf`, on a shape that takes no time."""

    @pytest.fixture(autouse=True)
    def tiny(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setitem(SHAPES, "tiny", SMALL)
        monkeypatch.chdir(tmp_path)

    def test_it_makes_the_file(self, capsys: pytest.CaptureFixture[str], small: Path) -> None:
        assert main(["--synthetic", "tiny", "out.gguf"]) == 0
        out, err = capsys.readouterr()
        assert out == "out.gguf\n"
        assert err.startswith("out.gguf: wrote 0.00 GB in ")
        assert err.endswith("(synthetic: random weights, so only times mean anything)\n")
        assert Path("out.gguf").read_bytes() == small.read_bytes()
        assert main(["--synthetic", "tiny", "out.gguf"]) == 1
        flags = ["--type", "Q8_0", "--seed", "7", "--overwrite"]
        assert main(["--synthetic", "tiny", "out.gguf", *flags]) == 0
        fields = gguf.GGUFReader("out.gguf").fields
        assert fields["orthrus.synthetic.seed"].contents() == 7
        assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0

    def test_dry_run(self, capsys: pytest.CaptureFixture[str], small: Path) -> None:
        assert main(["--synthetic", "tiny", "out.gguf", "--dry-run"]) == 0
        assert capsys.readouterr().out == f"out.gguf: 71 tensors, {small.stat().st_size:,} bytes\n"
        assert not Path("out.gguf").exists()

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--synthetic", "big"], "--synthetic big: expected one of qwen3-0.6b, "),
            (["--synthetic", "tiny", "--type", "iq1_m"], "--type iq1_m: no random qblocks"),
            (["--synthetic", "tiny", "--seed", str(2**32)], "--seed 4294967296: expected 0 to"),
            (["--synthetic", "tiny", "--split"], "--synthetic tiny: makes a whole model"),
            (["--synthetic", "tiny", "--pure"], "--synthetic tiny: makes a whole model"),
            (["--synthetic", "tiny", "--heads", "h.gguf"], "--synthetic tiny: makes a whole model"),
            (["--synthetic", "tiny", "model"], "--synthetic tiny: makes a whole model"),
            (["model", "--seed", "1"], "--seed goes with --synthetic NAME"),
        ],
    )
    def test_errors_are_one_line(
        self, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*flags, "out.gguf"]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"orthrus-convert: error: {message}")
        assert err.count("\n") == 1
        assert list(Path().iterdir()) == []


class TestVocabulary:
    def test_real_size(self) -> None:
        vocabulary = synthetic_vocabulary(151_936, 151_669, 0)
        texts = [token.text for token in vocabulary.tokens]
        assert len(set(texts)) == 151_936
        assert len(vocabulary.merges) == 151_387  # Qwen3's number
        assert texts[151_643] == "<|endoftext|>"
        assert vocabulary.special["eos"] == 151_645
        assert texts[151_669] == "<|mask|>"
        known = set(texts)
        for merge in vocabulary.merges:
            left, right = merge.split(" ")
            assert {left, right, left + right} <= known

    @pytest.mark.parametrize("n_vocab", [MIN_TOKENS, 1000])
    def test_other_sizes(self, n_vocab: int) -> None:
        vocabulary = synthetic_vocabulary(n_vocab, n_vocab - 1, 0)
        assert len(vocabulary.tokens) == n_vocab

    def test_impossible_sizes(self) -> None:
        with pytest.raises(ValueError, match="282 tokens, mask 281: expected 283 or more"):
            synthetic_vocabulary(282, 281, 0)
        with pytest.raises(ValueError, match="words can be made up"):
            synthetic_vocabulary(400_000, 399_999, 0)

    def test_it_encodes_and_decodes(self, small: Path) -> None:
        """Against Hugging Face's tokenizer on the words alone, and back to the text."""
        with ModelFile.open(small) as file:
            tokenizer = load_tokenizer(file.metadata, path=small, n_vocab=SMALL.n_vocab)
            tokens, merges = (file.metadata[f"tokenizer.ggml.{k}"] for k in ("tokens", "merges"))
        assert isinstance(tokens, list)
        assert isinstance(merges, list)
        text = "Hello abAB  world,\n\ttëst 日本 123"
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert len(ids) < len(text.encode())
        index = {str(token): i for i, token in enumerate(tokens)}
        pairs = [
            (left, right) for left, _, right in (str(merge).partition(" ") for merge in merges)
        ]
        oracle = Oracle(models.BPE(index, pairs))
        oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        for word in ("Hello", " world", "abAB"):
            assert tokenizer.encode(word) == oracle.encode(word).ids
        assert tokenizer.encode("a<|im_end|>")[-1] == tokenizer.eos
        assert tokenizer.is_special(580)


def test_fields_are_complete(small: Path) -> None:
    """Nothing that `ModelFile` reads has to be guessed: the config comes back as it was."""
    with ModelFile.open(small) as file:
        assert file.config == replace(SMALL, name="synthetic small Q4_K_M (random weights)")
        fields = Fields(file.metadata, small)
        assert fields.integer("general.file_type", 0, 100) == gguf.LlamaFileType.MOSTLY_Q4_K_M
        sizes = sum(math.prod(info.shape) for info in file.tensors.values())
        assert file.metadata["general.size_label"] == gguf.size_label(sizes, sizes, 0, 0)
