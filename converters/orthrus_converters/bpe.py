"""Byte-level BPE tokenizers (tokenizer.json, or vocab.json + merges.txt) → Vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthrus_converters.json_file import JsonFile, describe, read_bytes
from orthrus_converters.vocabulary import (
    Vocabulary,
    added_tokens,
    chat_templates,
    place_tokens,
    special_ids,
)
from orthrus_gguf.errors import OrthrusError

#: How Qwen2 and Qwen3 split text before BPE: what `tokenizer.ggml.pre` = `qwen2` stands for.
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_ADVICE = "only the tokenizer of Qwen2 and Qwen3 is supported"

#: Settings of a BPE model that change its output, with the values under which they do not.
_MODEL_SETTINGS: dict[str, tuple[Any, ...]] = {
    "byte_fallback": (None, False),
    "continuing_subword_prefix": (None, ""),
    "dropout": (None, 0),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
    "unk_token": (None,),
}


def read_bpe(folder: Path, config: JsonFile, settings: JsonFile, n_vocab: int) -> Vocabulary:
    """The tokenizer in `folder`. settings: tokenizer_config.json.

    Raises OrthrusError if it is damaged, or of a kind that GGUF's `qwen2` does not describe.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        tokenizer = JsonFile.read(path)
        _check_pipeline(tokenizer)
        model = JsonFile(path, tokenizer.mapping("model"))
        texts, pairs = model.mapping("vocab"), _merge_pairs(model)
        listed = _list(tokenizer, "added_tokens")
    else:
        path = folder / "vocab.json"
        _check_class(settings)
        texts, pairs = dict(JsonFile.read(path).values), _merges_txt(folder / "merges.txt")
        listed = []
    _check_texts(path, texts)
    _check_merges(path, texts, pairs)
    tokens = place_tokens(path, texts, added_tokens(folder, settings, listed, texts), n_vocab)
    return Vocabulary(
        model="gpt2",
        pre="qwen2",
        tokens=tokens,
        merges=[" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs],
        special=special_ids(settings, config, tokens),
        flags={"add_bos_token": settings.boolean("add_bos_token", default=False)},
        templates=chat_templates(folder, settings),
    )


def is_byte_level(tokenizer: JsonFile) -> bool:
    """False for tokenizers converted from SentencePiece, which fall back to byte tokens."""
    return tokenizer.mapping("model").get("byte_fallback") is not True


def _check_pipeline(tokenizer: JsonFile) -> None:
    """Raise OrthrusError unless every stage does what `qwen2` means in GGUF."""
    model = tokenizer.mapping("model")
    if model.get("type", "BPE") != "BPE":
        raise tokenizer.error("model.type", f"found {describe(model['type'])}", _ADVICE)
    for key, allowed in _MODEL_SETTINGS.items():
        if model.get(key) not in allowed:
            raise tokenizer.error(f"model.{key}", f"found {describe(model[key])}", _ADVICE)
    normalizer = tokenizer.mapping("normalizer").get("type", "NFC")
    if normalizer != "NFC":
        raise tokenizer.error("normalizer", f"found {describe(normalizer)}", _ADVICE)
    _check_pre_tokenizer(tokenizer)
    post = tokenizer.mapping("post_processor")
    stages = post.get("processors", [post]) if post else []
    if not isinstance(stages, list) or any(map(_adds_tokens, stages)):
        raise tokenizer.error(
            "post_processor", "adds special tokens to every text", "this is not supported"
        )


def _adds_tokens(stage: Any) -> bool:
    """True unless a stage of the post-processor is known to add nothing to a single text."""
    if not isinstance(stage, dict):
        return True
    if stage.get("type") == "TemplateProcessing":
        return "SpecialToken" in str(stage.get("single"))
    return stage.get("type") != "ByteLevel"


def _check_pre_tokenizer(tokenizer: JsonFile) -> None:
    """llama.cpp recognizes pre-tokenizers by a hash of test output; we compare the definition."""
    stages: list[Any] = tokenizer.mapping("pre_tokenizer").get("pretokenizers") or []
    expected: dict[str, dict[str, Any]] = {
        "Split": {"pattern": {"Regex": QWEN2_REGEX}, "behavior": "Isolated", "invert": False},
        "ByteLevel": {"add_prefix_space": False, "use_regex": False},
    }
    kinds = [stage.get("type") for stage in stages if isinstance(stage, dict)]
    if kinds != list(expected):
        raise tokenizer.error(
            "pre_tokenizer", f"expected Split and ByteLevel, found {describe(stages)}", _ADVICE
        )
    for stage in stages:
        for key, value in expected[stage["type"]].items():
            if stage.get(key) != value:
                raise tokenizer.error(
                    f"pre_tokenizer.{stage['type']}.{key}",
                    f"found {describe(stage.get(key))}, which is unknown",
                    _ADVICE,
                )


def _check_class(settings: JsonFile) -> None:
    """Without tokenizer.json, only the class name tells how text is split."""
    name = settings.values.get("tokenizer_class")
    if name not in _QWEN2_CLASSES:
        raise settings.error("tokenizer_class", f"found {describe(name)}", _ADVICE)


def _merge_pairs(model: JsonFile) -> list[tuple[str, str]]:
    """Merges as pairs; older files spell them as `left right`."""
    pairs: list[tuple[str, str]] = []
    for index, entry in enumerate(_list(model, "merges")):
        parts = entry.split(" ") if isinstance(entry, str) else entry
        if (
            not isinstance(parts, list)
            or len(parts) != 2
            or not all(isinstance(part, str) and part for part in parts)
        ):
            raise model.error(
                f"model.merges[{index}]", f"found {describe(entry)}", "download it again"
            )
        pairs.append((parts[0], parts[1]))
    return pairs


def _merges_txt(path: Path) -> list[tuple[str, str]]:
    try:
        lines = read_bytes(path).decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise OrthrusError(f"{path}: is not UTF-8 ({error}); download it again") from error
    if lines[0].startswith("#version"):
        del lines[0]
    pairs = [tuple(line.rstrip("\r").split(" ")) for line in lines if line.strip()]
    for pair in pairs:
        if len(pair) != 2:
            raise OrthrusError(
                f"{path}: expected two tokens in {' '.join(pair)!r}; download it again"
            )
    return [(left, right) for left, right in pairs]


def _check_texts(path: Path, texts: Mapping[str, Any]) -> None:
    for text, id_ in texts.items():
        if type(id_) is not int or id_ < 0:
            raise OrthrusError(
                f"{path}: token {text!r} has the id {describe(id_)}; download it again"
            )


def _check_merges(path: Path, texts: Mapping[str, int], pairs: Sequence[tuple[str, str]]) -> None:
    """Every merge must be of two tokens into one: readers look them up."""
    if not texts or not pairs:
        raise OrthrusError(
            f"{path}: found {len(texts)} tokens and {len(pairs)} merges; download it again"
        )
    for left, right in pairs:
        for text in (left, right, left + right):
            if text not in texts:
                raise OrthrusError(
                    f"{path}: the merge of {left!r} and {right!r} needs the token {text!r}, which "
                    "is not in the vocabulary; download the tokenizer again"
                )


def _list(file: JsonFile, key: str) -> list[Any]:
    value = file.values.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise file.error(key, f"expected a list, found {describe(value)}", "download it again")
    return value
