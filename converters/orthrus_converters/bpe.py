"""Byte-level BPE tokenizers (tokenizer.json, or vocab.json + merges.txt) → Vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orthrus_converters.bpe_pipeline import added_around, pre_tokenizer_name
from orthrus_converters.chat_templates import read_templates
from orthrus_converters.json_file import JsonFile, describe, read_bytes
from orthrus_converters.vocabulary import (
    Vocabulary,
    added_tokens,
    place_tokens,
    prompt_flags,
    special_ids,
    unkept_marks,
)
from orthrus_gguf.errors import OrthrusError

_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")


def read_bpe(folder: Path, config: JsonFile, settings: JsonFile, n_vocab: int) -> Vocabulary:
    """The tokenizer in `folder`. settings: tokenizer_config.json.

    Raises OrthrusError if it is damaged, or cuts text as no name in GGUF files stands for.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        tokenizer = JsonFile.read(path)
        pre = pre_tokenizer_name(tokenizer)
        around = added_around(tokenizer, settings)
        model = JsonFile(path, tokenizer.mapping("model"))
        texts, pairs = model.mapping("vocab"), _merge_pairs(model)
        listed = tokenizer.array("added_tokens")
    else:
        path = folder / "vocab.json"
        _check_class(settings)
        pre, around = "qwen2", {}
        texts, pairs = dict(JsonFile.read(path).values), _merges_txt(folder / "merges.txt")
        listed = []
    _check_texts(path, texts)
    _check_merges(path, texts, pairs)
    tokens = place_tokens(path, texts, added_tokens(folder, settings, listed, texts), n_vocab)
    special, notes = special_ids(settings, config, tokens)
    templates, template_notes = read_templates(folder, settings)
    return Vocabulary(
        model="gpt2",
        pre=pre,
        tokens=tokens,
        merges=[" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs],
        special=special,
        flags=prompt_flags(settings, {"add_bos_token": False} | around),
        templates=templates,
        notes=[*notes, *unkept_marks(settings, listed), *template_notes],
    )


def is_byte_level(tokenizer: JsonFile) -> bool:
    """False for tokenizers converted from SentencePiece, which fall back to byte tokens."""
    return tokenizer.mapping("model").get("byte_fallback") is not True


def _check_class(settings: JsonFile) -> None:
    """Without tokenizer.json, only the class name tells how text is split."""
    name = settings.values.get("tokenizer_class")
    if name not in _QWEN2_CLASSES:
        raise settings.error(
            "tokenizer_class",
            f"found {describe(name)}, which does not tell how text is cut",
            "get the tokenizer.json",
        )


def _merge_pairs(model: JsonFile) -> list[tuple[str, str]]:
    """Merges as pairs; older files spell them as `left right`."""
    pairs: list[tuple[str, str]] = []
    for index, entry in enumerate(model.array("merges")):
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
