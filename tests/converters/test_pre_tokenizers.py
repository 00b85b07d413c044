"""tokenizer.json → `tokenizer.ggml.pre`: the name, what comes around a prompt, the same ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hf_checkpoint import CONFIG, LLAMA_CONFIG, write_checkpoint, write_json
from orthrus_converters.cli import main
from vocabularies import greedy_vocabulary, library_lines, random_texts

from orthrus_gguf.gguf.reader import GGUFFile
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer
from orthrus_gguf.text.vocab.pre_tokenizers import PRE_TOKENIZERS

# As llama.cpp's source quotes them from the tokenizer.json of the models that gave the names.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"
    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SEED_CODER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CJK = "[一-龥ࠀ-一가-\ud7ff]+"


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def byte_level(*, use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


DIGITS = {"type": "Digits", "individual_digits": True}
LAST = byte_level(use_regex=False)

#: Name → stages, whether NFC comes first, whether merges are ignored.
DEFINITIONS: dict[str, tuple[list[dict[str, Any]], bool, bool]] = {
    "qwen2": ([split(QWEN2), LAST], True, False),
    "qwen35": ([split(QWEN35), LAST], True, False),
    "deepseek-r1-qwen": ([split(QWEN2), LAST], False, False),
    "llama-bpe": ([split(LLAMA3), LAST], False, True),
    "smaug-bpe": ([split(LLAMA3), LAST], False, False),
    "smollm": ([DIGITS, byte_level(use_regex=True)], False, False),
    "gpt-2": ([byte_level(use_regex=True)], False, False),
    "tekken": ([split(TEKKEN), LAST], False, True),
    "seed-coder": ([split(SEED_CODER), LAST], False, False),
    "minicpm5": (
        [split(r"\p{N}{1,3}"), split(QWEN2.replace(r"|\p{N}|", r"|\p{N}+|")), LAST],
        False,
        True,
    ),
    "deepseek-coder": (
        [
            *map(split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK)),
            DIGITS,
            byte_level(use_regex=False),
        ],
        False,
        False,
    ),
}
#: llama.cpp has another reading of some letters (no case but ASCII's) and of white space.
NOT_TO_THE_LETTER = ("tekken", "deepseek-coder")


def definition(base: dict[str, Any], name: str) -> dict[str, Any]:
    """`base`, a tokenizer.json, with another way of cutting text."""
    stages, nfc, ignore_merges = DEFINITIONS[name]
    data: dict[str, Any] = json.loads(json.dumps(base))
    one = stages[0] if len(stages) == 1 else {"type": "Sequence", "pretokenizers": stages}
    data["pre_tokenizer"] = one
    data["normalizer"] = {"type": "NFC"} if nfc else None
    data["model"]["ignore_merges"] = ignore_merges
    return data


@pytest.fixture(scope="module")
def greedy(checkpoint: Path) -> dict[str, Any]:
    return greedy_vocabulary(json.loads((checkpoint / "tokenizer.json").read_text()))


@pytest.fixture
def convert_tokenizer(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Tokenizer]]:
    """`convert_tokenizer(tokenizer_json, **settings)`: keys of the file, and its tokenizer."""

    def run(data: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], Tokenizer]:
        n_vocab = 1 + max(token["id"] for token in data["added_tokens"])
        config = {**LLAMA_CONFIG, "vocab_size": n_vocab, "num_hidden_layers": 1}
        folder = write_checkpoint(tmp_path / "m", config)
        write_json(folder / "tokenizer.json", data)
        write_json(folder / "tokenizer_config.json", settings)
        path = tmp_path / "m.gguf"
        assert main([str(folder), str(path), "--overwrite"]) == 0
        with GGUFFile.open(path) as file:
            keys = {
                key.removeprefix("tokenizer.ggml."): value for key, value in file.metadata.items()
            }
            return keys, load_tokenizer(file.metadata, path=path, n_vocab=n_vocab)

    return run


@pytest.mark.parametrize("name", DEFINITIONS)
def test_names(name: str, greedy: dict[str, Any], convert_tokenizer: Callable[..., Any]) -> None:
    data = definition(greedy, name)
    keys, ours = convert_tokenizer(data)
    assert keys["pre"] == name
    assert keys["add_bos_token"] is False
    theirs = tokenizers.Tokenizer.from_str(json.dumps(data))
    texts = [*random_texts(400, seed=9), *library_lines(300), " an unmergeable word"]
    different = 0
    for text in texts:
        same = ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        different += not same
        assert same or name in NOT_TO_THE_LETTER, ascii(text)
    assert different < len(texts) / 10


def test_every_meaning_that_is_defined_here_has_its_own_name() -> None:
    meanings = [PRE_TOKENIZERS[name] for name in DEFINITIONS]
    assert len(set(meanings)) == len(DEFINITIONS)


BOS = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
EOS = {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def template(*single: dict[str, Any]) -> dict[str, Any]:
    """A post-processor, as Llama 3's."""
    around = {"type": "TemplateProcessing", "single": [*single], "pair": [], "special_tokens": {}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    return {"type": "Sequence", "processors": [byte_level, around]}


@pytest.mark.parametrize(
    ("single", "settings", "flags"),
    [
        ([BOS, TEXT], {}, {"add_bos_token": True}),
        ([TEXT], {}, {"add_bos_token": False}),
        ([BOS, TEXT, EOS], {}, {"add_bos_token": True, "add_eos_token": True}),
        ([TEXT, EOS], {}, {"add_bos_token": False, "add_eos_token": True}),
        # tokenizer_config.json has the last word, as with llama.cpp's converter.
        ([BOS, TEXT], {"add_bos_token": False}, {"add_bos_token": False}),
        ([TEXT], {"add_bos_token": True, "add_eos_token": False}, {"add_bos_token": True}),
    ],
)
def test_what_stands_around_a_prompt(
    single: list[dict[str, Any]],
    settings: dict[str, bool],
    flags: dict[str, bool],
    greedy: dict[str, Any],
    convert_tokenizer: Callable[..., Any],
) -> None:
    data = {**definition(greedy, "llama-bpe"), "post_processor": template(*single)}
    specials = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    keys, ours = convert_tokenizer(data, **specials, **settings)
    found = {key: value for key, value in keys.items() if key.startswith("add_")}
    assert found == flags | {k: v for k, v in settings.items() if k == "add_eos_token"}
    ids = ours.encode("hello")
    assert (ids[0] == ours.bos) == flags["add_bos_token"]
    assert (ids[-1] == ours.eos) == flags.get("add_eos_token", False)


def test_a_vocabulary_of_a_plain_qwen3_is_named_as_ever(
    greedy: dict[str, Any], tmp_path: Path
) -> None:
    """Without tokenizer.json, its class tells."""
    config = {**CONFIG, "vocab_size": 3005}
    folder = write_checkpoint(tmp_path / "m", config)
    (folder / "tokenizer.json").unlink()
    write_json(folder / "vocab.json", greedy["model"]["vocab"])
    merges = "\n".join(" ".join(pair) for pair in greedy["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    assert main([str(folder), str(tmp_path / "m.gguf")]) == 0
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert file.metadata["tokenizer.ggml.pre"] == "qwen2"
