"""Tokenizers and templates, compared with their files and with the libraries that own them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hf_checkpoint import ADDED, CONFIG, tokenizer, write_checkpoint, write_json
from tokenizers import Tokenizer

from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.text.tokenizer import load_tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
PADS = [f"[PAD{index}]" for index in range(262, 270)]


@pytest.fixture
def keys(convert: Callable[..., Any], out: Path) -> Callable[[Path], dict[str, Any]]:
    """`keys(folder)`: convert, and return the `tokenizer.` keys, without that prefix."""

    def read(folder: Path) -> dict[str, Any]:
        run = convert(folder, "--overwrite")
        assert run.code == 0, run.stderr
        fields = gguf.GGUFReader(out / "model.gguf").fields
        return {
            key.removeprefix("tokenizer.").removeprefix("ggml."): field.contents()
            for key, field in fields.items()
            if key.startswith("tokenizer.")
        }

    return read


def test_gaps_and_types(tiny: Path, keys: Callable[[Path], dict[str, Any]]) -> None:
    found = keys(tiny)
    reference = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert found["tokens"] == [*(reference.id_to_token(i) for i in range(262)), *PADS]
    # `<|end|>` is not marked special, but looks it; `<think>` is meant to be seen.
    assert found["token_type"] == [NORMAL] * 259 + [CONTROL, USER_DEFINED, CONTROL] + [UNUSED] * 8
    assert found["merges"] == ["a b", "Ġ a", "Ġa b"]
    assert found["eos_token_id"] == 259
    assert found["bos_token_id"] == 259  # from config.json
    assert "padding_token_id" not in found
    assert found["mask_token_id"] == 261
    assert found["add_bos_token"] is False


def test_flags_that_nothing_speaks_of_are_left_out(
    tiny: Path, keys: Callable[[Path], dict[str, Any]]
) -> None:
    assert "add_eos_token" not in keys(tiny)


def test_merges_spelled_as_text(tiny: Path, keys: Callable[[Path], dict[str, Any]]) -> None:
    expected = keys(tiny)
    value = tokenizer()
    value["model"]["merges"] = [" ".join(pair) for pair in value["model"]["merges"]]
    write_json(tiny / "tokenizer.json", value)
    assert keys(tiny) == expected


def test_spaces_inside_merges_are_encoded(
    tiny: Path, keys: Callable[[Path], dict[str, Any]]
) -> None:
    """llama.cpp splits merges at the space, so spaces inside are written as Ġ."""
    value = tokenizer()
    vocab = value["model"]["vocab"]
    for index, text in enumerate((" ", " a", "a b")):
        vocab[text] = 262 + index
    value["model"]["merges"] += [[" ", "a"], ["a", " b"]]
    vocab[" b"] = 265
    write_json(tiny / "tokenizer.json", value)
    assert keys(tiny)["merges"][3:] == ["Ġ a", "a Ġb"]


def test_normalizers_that_come_to_nfc(tiny: Path, keys: Callable[[Path], dict[str, Any]]) -> None:
    expected = keys(tiny)
    value = {**tokenizer(), "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}
    for entry in value["added_tokens"]:
        entry["normalized"] = True  # no matter: their texts are in NFC
    write_json(tiny / "tokenizer.json", value)
    assert keys(tiny) == expected


def test_marks_of_added_tokens_are_noted(tiny: Path, convert: Callable[..., Any]) -> None:
    """GGUF files have no place for them."""
    value = tokenizer()
    value["added_tokens"][0]["rstrip"] = True
    value["added_tokens"][1]["single_word"] = True
    write_json(tiny / "tokenizer.json", value)
    decoder = {"261": {"content": "<|mask|>", "rstrip": True, "special": True}}
    settings = {"eos_token": "<|end|>", "added_tokens_decoder": decoder}
    write_json(tiny / "tokenizer_config.json", settings)
    run = convert(tiny)
    assert run.code == 0
    assert "rstrip of <|mask|> and 1 more is left out" in run.stderr
    assert "single_word of <think> is left out" in run.stderr
    assert "lstrip" not in run.stderr


def test_fillers_that_are_taken(tiny: Path, keys: Callable[[Path], dict[str, Any]]) -> None:
    """A checkpoint that calls a token as llama.cpp calls the rows without one."""
    value = tokenizer()
    value["added_tokens"][1]["content"] = "[PAD265]"
    value["added_tokens"][2]["content"] = "[PAD265]_"
    write_json(tiny / "tokenizer.json", value)
    tokens = keys(tiny)["tokens"]
    assert tokens[260:266] == [
        *("[PAD265]", "[PAD265]_", "[PAD262]", "[PAD263]", "[PAD264]", "[PAD265]__")
    ]
    assert len(set(tokens)) == len(tokens)


def test_ids_outside_the_vocabulary_are_left_out(
    tiny: Path, keys: Callable[[Path], dict[str, Any]], convert: Callable[..., Any]
) -> None:
    for value in (270, -1, 2**32 - 1):
        write_json(tiny / "config.json", {**CONFIG, "bos_token_id": value, "pad_token_id": 0})
        found = keys(tiny)
        assert "bos_token_id" not in found
        assert found["padding_token_id"] == 0
        run = convert(tiny, "--overwrite")
        assert f"bos_token_id is {value}, outside the vocabulary of 270: left out" in run.stderr


def test_post_processors_that_add_nothing(
    tiny: Path, keys: Callable[[Path], dict[str, Any]]
) -> None:
    expected = keys(tiny)
    pair = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|end|>"}}]
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}], "pair": pair}
    both = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    for value in ({"type": "ByteLevel"}, template, both):
        write_json(tiny / "tokenizer.json", {**tokenizer(), "post_processor": value})
        assert keys(tiny) == expected


def test_vocab_json_and_merges_txt(tiny: Path, keys: Callable[[Path], dict[str, Any]]) -> None:
    expected = keys(tiny)
    value = tokenizer()
    (tiny / "tokenizer.json").unlink()
    write_json(tiny / "vocab.json", value["model"]["vocab"])
    merges = "".join(f"{left} {right}\n" for left, right in value["model"]["merges"])
    (tiny / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    added = {entry["id"]: entry for entry in value["added_tokens"]}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": {"content": "<|end|>"}}
    write_json(tiny / "tokenizer_config.json", {**settings, "added_tokens_decoder": added})
    assert keys(tiny) == expected
    write_json(tiny / "tokenizer_config.json", settings)
    write_json(tiny / "added_tokens.json", {text: 259 + i for i, text in enumerate(ADDED)})
    assert keys(tiny) == expected


@pytest.mark.parametrize(
    "value", [["<think>", "<new>"], {"a": "<think>", "b": {"content": "<new>"}}]
)
def test_extra_special_tokens(
    value: object, tiny: Path, keys: Callable[[Path], dict[str, Any]]
) -> None:
    """A list or an object: known tokens become special, new ones get the next id."""
    write_json(tiny / "tokenizer_config.json", {"extra_special_tokens": value})
    found = keys(tiny)
    assert found["tokens"][260:263] == ["<think>", "<|mask|>", "<new>"]
    assert found["token_type"][260:264] == [CONTROL, CONTROL, CONTROL, UNUSED]


def test_chat_templates(tiny: Path, keys: Callable[[Path], dict[str, Any]]) -> None:
    assert not any("template" in key for key in keys(tiny))
    (tiny / "chat_template.jinja").write_text("from jinja ü", encoding="utf-8")
    assert keys(tiny)["chat_template"] == "from jinja ü"
    write_json(tiny / "tokenizer_config.json", {"chat_template": "from config"})
    assert keys(tiny)["chat_template"] == "from jinja ü"
    (tiny / "chat_template.jinja").unlink()
    assert keys(tiny)["chat_template"] == "from config"
    several = [{"name": name, "template": f"T {name}"} for name in ("tool use", "default", "rag")]
    write_json(tiny / "tokenizer_config.json", {"chat_template": several})
    found = keys(tiny)
    assert found["chat_template"] == "T default"
    assert found["chat_template.tool_use"] == "T tool use"
    assert found["chat_templates"] == ["rag", "tool_use"]


def test_templates_in_several_files(
    tiny: Path, keys: Callable[[Path], dict[str, Any]], convert: Callable[..., Any]
) -> None:
    """A file of its own counts, as in transformers; what it displaces is said, unless it agrees."""
    named = [{"name": name, "template": f"C {name}"} for name in ("default", "rag", "tools")]
    write_json(tiny / "tokenizer_config.json", {"chat_template": named})
    write_json(tiny / "chat_template.json", {"chat_template": "J"})
    (tiny / "additional_chat_templates").mkdir()
    (tiny / "additional_chat_templates" / "rag.jinja").write_text("A rag")
    (tiny / "chat_template.jinja").write_text("A")
    found = keys(tiny)
    assert found["chat_template"] == "A"
    assert found["chat_template.rag"] == "A rag"
    assert found["chat_template.tools"] == "C tools"
    run = convert(tiny, "--overwrite")
    lines = [line for line in run.stderr.splitlines() if "is left out" in line]
    assert len(lines) == 3
    assert "tokenizer_config.json: its chat template 'default' is left out" in lines[0]
    assert "that of chat_template.jinja counts" in lines[0]
    assert "'rag' is left out: that of rag.jinja counts" in lines[1]
    assert "chat_template.json: its chat template 'default'" in lines[2]
    (tiny / "chat_template.jinja").write_text("C default")
    write_json(tiny / "chat_template.json", {"chat_template": "C default"})
    assert convert(tiny, "--overwrite").stderr.count("is left out") == 1


def test_the_template_of_a_processor(tiny: Path, keys: Callable[[Path], dict[str, Any]]) -> None:
    write_json(tiny / "chat_template.json", {"chat_template": "J"})
    assert keys(tiny)["chat_template"] == "J"


def test_several_eos_tokens(tiny: Path, keys: Callable[[Path], dict[str, Any]]) -> None:
    write_json(tiny / "config.json", {**CONFIG, "eos_token_id": [260, 259]})
    write_json(tiny / "tokenizer_config.json", {"add_bos_token": True})
    found = keys(tiny)
    assert found["eos_token_id"] == 260
    assert found["add_bos_token"] is True


TEXT = "the quick brown fox jumps over the lazy dog. def f(x): return x + 1\n" * 20


@pytest.fixture(scope="module")
def spm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing but a tokenizer.model in the manner of Llama, as its tokenizer."""
    folder = tmp_path_factory.mktemp("spm")
    config = {**CONFIG, "vocab_size": 330, "bos_token_id": 1, "eos_token_id": 2}
    write_checkpoint(folder, {**config, "mask_token_id": 329})
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    train(folder / "tokenizer", remove_extra_whitespaces=False)
    return folder


def train(prefix: Path, *, model_type: str = "bpe", **settings: Any) -> None:
    corpus = prefix.with_suffix(".txt")
    corpus.write_text(TEXT, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(prefix),
        model_type=model_type,
        vocab_size=310,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<tool>"],
        minloglevel=2,
        **settings,
    )


def test_sentencepiece_keys(spm_folder: Path, keys: Callable[[Path], dict[str, Any]]) -> None:
    found = keys(spm_folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    size = model.vocab_size()
    assert found["model"] == "llama"
    assert found["pre"] == "default"
    assert found["tokens"] == [
        *(model.IdToPiece(i) for i in range(size)),
        *(f"[PAD{i}]" for i in range(size, 330)),
    ]
    assert found["scores"][:size] == [model.GetScore(i) for i in range(size)]
    assert found["token_type"][:4] == [2, 3, 3, 4]  # <unk>, <s>, </s>, <tool>
    assert found["token_type"][4:260] == [6] * 256  # bytes
    assert found["token_type"][260:] == [NORMAL] * (size - 260) + [UNUSED] * (330 - size)
    assert (found["bos_token_id"], found["eos_token_id"]) == (1, 2)
    assert found["add_bos_token"] is True
    assert found["add_space_prefix"] is True
    assert "merges" not in found


def test_sentencepiece_tokens_survive(
    spm_folder: Path, convert: Callable[..., Any], out: Path
) -> None:
    """What the runtime reads from the GGUF splits text as the original model does."""
    assert convert(spm_folder).code == 0
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm_folder / "tokenizer.model"))
    with ModelFile.open(out / "model.gguf") as file:
        ours = load_tokenizer(file.metadata, path=out / "model.gguf", n_vocab=file.config.n_vocab)
    for text in ("the lazy fox", "  def f(x):\n\treturn  x", "über 🚀 quick", "jumps over "):
        assert ours.encode(text) == [1, *model.encode(text)]


def test_sentencepiece_without_space_prefix_and_with_added_tokens(
    spm_folder: Path, tmp_path: Path, keys: Callable[[Path], dict[str, Any]]
) -> None:
    folder = tmp_path / "m"
    write_checkpoint(folder, json.loads((spm_folder / "config.json").read_text()))
    train(folder / "tokenizer", remove_extra_whitespaces=False, add_dummy_prefix=False)
    # A tokenizer.json made from tokenizer.model adds nothing to it.
    write_json(folder / "tokenizer.json", {"model": {"type": "BPE", "byte_fallback": True}})
    added = {"325": {"content": "<|im_end|>", "special": True}, "326": {"content": "<x>"}}
    settings = {"add_bos_token": False, "add_eos_token": True, "added_tokens_decoder": added}
    write_json(folder / "tokenizer_config.json", settings)
    found = keys(folder)
    assert found["add_space_prefix"] is False
    assert found["add_bos_token"] is False
    assert found["add_eos_token"] is True
    assert found["tokens"][325:328] == ["<|im_end|>", "<x>", "[PAD327]"]
    assert found["token_type"][325:328] == [CONTROL, USER_DEFINED, UNUSED]


def test_a_sentencepiece_model_that_is_too_large(
    spm_folder: Path, tmp_path: Path, convert: Callable[..., Any]
) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    shutil.copy(spm_folder / "tokenizer.model", folder)
    run = convert(folder)
    assert run.code == 1
    assert "tokenizer.model: has the token id" in run.stderr
    assert "but the model has only 270" in run.stderr


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"model_type": "unigram", "remove_extra_whitespaces": False}, "model_type"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        (
            {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False},
            "treat_whitespace_as_suffix",
        ),
    ],
)
def test_other_kinds_of_sentencepiece_are_refused(
    settings: dict[str, Any], name: str, spm_folder: Path, tmp_path: Path, convert: Any
) -> None:
    folder = tmp_path / "m"
    write_checkpoint(folder, json.loads((spm_folder / "config.json").read_text()))
    (folder / "tokenizer.json").unlink()
    train(folder / "tokenizer", **settings)
    run = convert(folder)
    assert run.code == 1
    assert f"tokenizer.model: {name}: expected" in run.stderr
