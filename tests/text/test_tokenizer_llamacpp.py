"""The tokenizer against stock llama.cpp, which reads the same vocabulary from the same metadata."""

from __future__ import annotations

import http.client
import json
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gguf
import numpy as np
import pytest
import xllamacpp
from smollm2 import smollm2_file
from vocabularies import (
    Metadata,
    bpe_metadata,
    greedy_vocabulary,
    library_lines,
    random_texts,
    sentencepiece_metadata,
    train_sentencepiece,
)

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer
from orthrus_gguf.text.vocab.pre_tokenizers import PRE_TOKENIZERS

NASTY = [
    *("", " ", "  ", "\n", "\r\n", "\t\t", "a", "don't we'LL I'm", "'s 's\u2019s"),
    *("def f(x):\n    return x**2  # square\n", "for (;;) {\r\n\tx += 0x1F;\r\n}\r\n"),
    *("   leading", "trailing   ", "a  b   c    d", "\n\n\n  \n\t\n", " \n \n x"),
    *("1234567890", "3.14159e-10", "٣٤٥ ²³ Ⅻ ½", "v1.2.3-rc4", "1,000,000", "20th"),
    *("naïve café Ünïcödé", "Ελληνικά кириллица", "עברית العربية", "हिन्दी ไทย"),
    *("日本語 中文 한국어", "a\u0301\u0302\u0303", "ﬁ ﷺ", "𝔘𝔫𝔦 𝟘𝟙𝟚", "\u00a0\u3000x\u2003y"),
    *("👩‍💻👨‍👩‍👧‍👦🏳️‍🌈", "👍🏽 ok", "🇩🇪🇫🇷", "❤️‍🔥", "\U0001f9d1\u200d"),
    *("<|im_start|>user\nhi<|im_end|>\n", "<|im_end|><|im_end|>", "<|im_end|", "x<|mask|>y"),
    *(" <|endoftext|> ", "<|endoftext|>  two", "< |im_end|>", "<think>\n\n</think>\n\n"),
    *("\x00\x01\x7f", "\x0b\x0c\x1c\x85", "\u200b\u200c\ufeff\u2028\u2029", "\ufffd"),
    *("http://x.y/z?a=1&b=%20#c", "{'k': [1, 2]}", "!!!???...", "--- *** ___", "→←⇒ ∀x∈ℝ"),
    *("an unmergeable word", "see </s> here", "a" * 300, "=" * 90, "\U000e0041\U0010fffd"),
]


def corpus() -> list[str]:
    """NFC text: llama.cpp never normalizes. (The last test shows what that means.)"""
    texts = [*NASTY, *random_texts(800, seed=4), *library_lines(400)]
    return [unicodedata.normalize("NFC", text) for text in texts]


@pytest.fixture(scope="module")
def demo(checkpoint: Path) -> Metadata:
    """The demo vocabulary, with a user-defined token instead of a special one."""
    data = json.loads((checkpoint / "tokenizer.json").read_text())
    data["added_tokens"][-1]["special"] = False
    return bpe_metadata(data)


@pytest.fixture(scope="module")
def greedy(checkpoint: Path) -> Metadata:
    return bpe_metadata(greedy_vocabulary(json.loads((checkpoint / "tokenizer.json").read_text())))


@pytest.fixture(scope="module")
def llama() -> Metadata:
    symbols = ["<|mask|>", "<|im_end|>"]
    processor = train_sentencepiece(library_lines(3000), user_defined_symbols=symbols)
    return sentencepiece_metadata(processor, user_defined=symbols)


def write_gguf(path: Path, metadata: Metadata) -> None:
    """A qwen3 model of one tiny layer, which is enough for llama.cpp to load its vocabulary."""
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    width = 32
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(1e-6)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_array(key, np.asarray(value).tolist())
    vectors = ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {f"blk.0.{name}": (width,) for name in vectors}
    shapes |= {f"blk.0.{name}": (width, width) for name in matrices}
    shapes |= {"token_embd": (len(tokens), width), "output_norm": (width,)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """Stock llama.cpp's server, asked over one connection."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)

    def ask(self, path: str, question: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", path, json.dumps(question), headers)
        response = self._connection.getresponse()
        assert response.status == 200, response.read()
        answer: dict[str, Any] = json.loads(response.read())
        return answer

    def encode(self, text: str, *, special: bool, add_bos: bool = False) -> list[int]:
        question = {"content": text, "parse_special": special, "add_special": add_bos}
        ids: list[int] = self.ask("/tokenize", question)["tokens"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.ask("/detokenize", {"tokens": list(ids)})["content"]
        return text


@contextmanager
def served(path: Path) -> Iterator[LlamaCpp]:
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.verbosity = -1
    params.warmup = False
    params.fit_params = False
    params.n_ctx = 64
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = 1
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    yield LlamaCpp(server.listening_address)
    del server


@contextmanager
def both(path: Path, metadata: Metadata) -> Iterator[tuple[Tokenizer, LlamaCpp]]:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    write_gguf(path, metadata)
    with served(path) as theirs:
        yield load_tokenizer(metadata, path=path, n_vocab=len(tokens)), theirs


def test_the_demo_vocabulary_equals_llama_cpp(demo: Metadata, tmp_path: Path) -> None:
    with both(tmp_path / "demo.gguf", demo) as (ours, theirs):
        for text in corpus():
            ids = theirs.encode(text, special=True)
            assert ours.encode(text) == ids, ascii(text)
            assert ours.encode(text, special=False) == theirs.encode(text, special=False)
            assert ours.decode(ids) == theirs.decode(ids) == text


def names_by_meaning() -> list[list[str]]:
    """Names of pre-tokenizers that cut alike, together."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, pre in PRE_TOKENIZERS.items():
        groups.setdefault(pre.patterns, []).append(name)
    return [*groups.values()]


@pytest.mark.parametrize("names", names_by_meaning(), ids=lambda names: str(names[0]))
def test_pre_tokenizers_equal_llama_cpp(greedy: Metadata, tmp_path: Path, names: list[str]) -> None:
    """The first name of each meaning on much text, the others on the start of it."""
    metadata = dict(greedy)
    del metadata["tokenizer.ggml.add_bos_token"]
    texts = corpus() if names[0] in ("qwen2", "llama-bpe", "gpt-2") else corpus()[::3]
    for name in names:
        metadata["tokenizer.ggml.pre"] = name
        with both(tmp_path / f"{name}.gguf", metadata) as (ours, theirs):
            assert ours.encode("hello") == theirs.encode("hello", special=True, add_bos=True)
            for text in texts:
                ids = theirs.encode(text, special=True)
                assert ours.encode(text, add_bos=False) == ids, (name, ascii(text))
        texts = texts[:60]


def test_every_pair_of_pre_tokenizers_cuts_differently(greedy: Metadata) -> None:
    """Otherwise the test above could not tell one from the other."""
    tokens = greedy["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    seen: dict[str, str] = {}
    for names in names_by_meaning():
        metadata = greedy | {"tokenizer.ggml.pre": names[0]}
        ours = load_tokenizer(metadata, path=Path("x"), n_vocab=len(tokens))
        ids = str([ours.encode(text, add_bos=False) for text in corpus()[::3]])
        assert ids not in seen, f"{names[0]} and {seen.get(ids)}"
        seen[ids] = names[0]


def test_eos_is_appended_as_llama_cpp_does(demo: Metadata, tmp_path: Path) -> None:
    metadata = demo | {"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.add_bos_token": True}
    with both(tmp_path / "demo.gguf", metadata) as (ours, theirs):
        assert ours.encode("hello") == theirs.encode("hello", special=True, add_bos=True)
        assert (
            len(ours.encode("hello")) == len(ours.encode("hello", add_bos=False, add_eos=False)) + 2
        )


def test_a_real_vocabulary_equals_llama_cpp() -> None:
    """SmolLM2's, in a file that we did not make. It lacks some bytes, which both leave out."""
    path = smollm2_file()
    with ModelFile.open(path) as file:
        ours = load_tokenizer(file.metadata, path=path, n_vocab=file.config.n_vocab)
    assert not ours.add_bos
    with served(path) as theirs:
        for text in corpus()[::2]:
            ids = theirs.encode(text, special=True, add_bos=True)
            assert ours.encode(text) == ids, ascii(text)
            assert ours.encode(text, special=False) == theirs.encode(text, special=False)
            assert ours.decode(ids) == theirs.decode(ids)
        assert theirs.encode("a\x04b", special=True) == [*ours.encode("a"), *ours.encode("b")]
        assert ours.encode("a\x04b") == theirs.encode("a\x04b", special=True)
        assert len(ours.encode("ab")) == 1


@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece_equals_llama_cpp(
    llama: Metadata, tmp_path: Path, space_prefix: bool
) -> None:
    metadata = llama if space_prefix else llama | {"tokenizer.ggml.add_space_prefix": False}
    with both(tmp_path / "llama.gguf", metadata) as (ours, theirs):
        assert ours.encode("hello") == theirs.encode("hello", special=True, add_bos=True)
        for text in corpus():
            ids = theirs.encode(text, special=True)
            assert ours.encode(text, add_bos=False) == ids, ascii(text)
            plain = theirs.encode(text, special=False)
            assert ours.encode(text, special=False, add_bos=False) == plain, ascii(text)
            # llama.cpp's server never drops the first space, since it decodes continuations.
            assert ours.decode(ids, continuation=True) == theirs.decode(ids)


def test_single_tokens_equal_llama_cpp(demo: Metadata, tmp_path: Path) -> None:
    types = np.array(demo["tokenizer.ggml.token_type"])
    types[3000] = 5
    metadata = demo | {"tokenizer.ggml.token_type": types}
    with both(tmp_path / "demo.gguf", metadata) as (ours, theirs):
        for id in [*range(256, 4092, 37), 3000, 4092, 4093, 4094, 4095]:
            assert ours.decode([id]) == theirs.decode([id])
        assert theirs.decode([3000]) == ""


def test_only_we_normalize_as_qwen_does(demo: Metadata, tmp_path: Path) -> None:
    composed, decomposed = "é", "e\u0301"
    with both(tmp_path / "demo.gguf", demo) as (ours, theirs):
        assert ours.encode(composed) == theirs.encode(composed, special=True)
        # Qwen's tokenizer.json asks for NFC, so the model was trained on the composed form.
        assert ours.encode(decomposed) == ours.encode(composed)
        assert theirs.encode(decomposed, special=True) != theirs.encode(composed, special=True)
