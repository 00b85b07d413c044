"""What the stages around a byte-level BPE model in tokenizer.json are called in GGUF files.

llama.cpp's converter recognizes pre-tokenizers by a hash of test output; here the definition itself
is looked up in the table that the tokenizer uses. Models of the same definition get the same name,
though llama.cpp may have another one for them that means the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any
from unicodedata import is_normalized

from orthrus_converters.json_file import JsonFile, describe
from orthrus_gguf.text.vocab.pre_tokenizers import GPT2, PRE_TOKENIZERS

_is_nfc = partial(is_normalized, "NFC")

_ADVICE = "no name in GGUF files stands for such a tokenizer"

#: Settings of a BPE model that change its output, with the values under which they do not. (What
#: is unknown to a byte-level model are single bytes, which are left out whatever `unk_token` says.)
_MODEL_SETTINGS: dict[str, tuple[Any, ...]] = {
    "byte_fallback": (None, False),
    "continuing_subword_prefix": (None, ""),
    "dropout": (None, 0),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False, True),
}

#: Patterns that llama.cpp spells in another way, without all of what they mean.
_SPELT_OTHERWISE = {
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": PRE_TOKENIZERS["tekken"].patterns[0],
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+": PRE_TOKENIZERS["deepseek-coder"].patterns[3],
}


def pre_tokenizer_name(tokenizer: JsonFile) -> str:
    """`tokenizer.ggml.pre` of a tokenizer.json. Raises OrthrusError if nothing stands for it."""
    model = tokenizer.mapping("model")
    if model.get("type", "BPE") != "BPE":
        raise tokenizer.error("model.type", f"found {describe(model['type'])}", _ADVICE)
    for key, allowed in _MODEL_SETTINGS.items():
        if model.get(key) not in allowed:
            raise tokenizer.error(f"model.{key}", f"found {describe(model[key])}", _ADVICE)
    wanted = (_patterns(tokenizer), _uses_nfc(tokenizer), model.get("ignore_merges") is True)
    for name, pre in PRE_TOKENIZERS.items():
        if wanted == (pre.patterns, pre.nfc, pre.ignore_merges):
            return name
    raise tokenizer.error(
        "pre_tokenizer",
        f"cuts text with {describe(wanted[0][0] if wanted[0] else None)}, "
        f"{'after' if wanted[1] else 'without'} NFC, "
        f"{'ignoring' if wanted[2] else 'minding'} merges",
        _ADVICE,
    )


def _uses_nfc(tokenizer: JsonFile) -> bool:
    """Whether text is brought into NFC before it is cut. Raises OrthrusError if more is done."""
    normalizer = tokenizer.mapping("normalizer")
    stages = normalizer.get("normalizers") if normalizer.get("type") == "Sequence" else [normalizer]
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise tokenizer.error("normalizer", f"found {describe(stages)}", _ADVICE)
    kinds = [stage.get("type") for stage in stages if stage]
    for kind in kinds:
        if kind != "NFC":
            raise tokenizer.error("normalizer", f"found {describe(kind)}", _ADVICE)
    if kinds:
        _check_normalized(tokenizer)
    return bool(kinds)


def _check_normalized(tokenizer: JsonFile) -> None:
    """Raise OrthrusError for added tokens that are looked for as what NFC makes of them."""
    for entry in tokenizer.array("added_tokens"):
        text = entry.get("content") if isinstance(entry, dict) else None
        if isinstance(text, str) and entry.get("normalized") is True and not _is_nfc(text):
            raise tokenizer.error("added_tokens", f"{describe(text)} is not in NFC", _ADVICE)


def _patterns(tokenizer: JsonFile) -> tuple[str, ...]:
    """The pre-tokenizer as patterns that cut text one after the other."""
    section = tokenizer.mapping("pre_tokenizer")
    stages = section.get("pretokenizers") if section.get("type") == "Sequence" else [section]
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise tokenizer.error("pre_tokenizer", f"found {describe(stages)}", _ADVICE)
    if not stages or stages[-1].get("type") != "ByteLevel":
        raise tokenizer.error("pre_tokenizer", "expected ByteLevel as its last stage", _ADVICE)
    patterns = [_pattern(tokenizer, stage) for stage in stages]
    return tuple(_SPELT_OTHERWISE.get(text, text) for text in patterns if text is not None)


def _pattern(tokenizer: JsonFile, stage: Mapping[str, Any]) -> str | None:
    """What a stage cuts out; None if it does not cut."""
    kind = stage.get("type")
    expected: dict[str, Any]
    if kind == "Split":
        expected = {"behavior": "Isolated", "invert": False}
        pattern = stage.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if not isinstance(regex, str):
            raise tokenizer.error(
                "pre_tokenizer.Split.pattern", f"found {describe(pattern)}", _ADVICE
            )
    elif kind == "Digits":
        expected, regex = {"individual_digits": True}, r"\p{N}"
    elif kind == "ByteLevel":
        expected = {"add_prefix_space": False}
        regex = GPT2 if stage.get("use_regex", True) else None
    else:
        raise tokenizer.error("pre_tokenizer", f"found the stage {describe(kind)}", _ADVICE)
    for key, value in expected.items():
        if stage.get(key) != value:
            raise tokenizer.error(
                f"pre_tokenizer.{kind}.{key}", f"found {describe(stage.get(key))}", _ADVICE
            )
    return regex


def added_around(tokenizer: JsonFile, settings: JsonFile) -> dict[str, bool]:
    """`add_bos_token` and `add_eos_token` as the post-processor has it, if it says.

    Raises OrthrusError if it does anything else to a single text.
    """
    post = tokenizer.mapping("post_processor")
    stages = post.get("processors", [post]) if post else []
    if not isinstance(stages, list):
        raise tokenizer.error("post_processor", f"found {describe(stages)}", _ADVICE)
    flags: dict[str, bool] = {}
    for stage in stages:
        kind = stage.get("type") if isinstance(stage, dict) else None
        if kind == "TemplateProcessing":
            flags |= _around(tokenizer, settings, stage.get("single"))
        elif kind != "ByteLevel":
            raise tokenizer.error("post_processor", f"found {describe(kind)}", _ADVICE)
    return flags


def _around(tokenizer: JsonFile, settings: JsonFile, single: Any) -> dict[str, bool]:
    """The flags for a template: the text, with BOS before it and EOS behind it or without."""
    items = single if isinstance(single, list) else []
    tokens = [
        item["SpecialToken"].get("id") if "SpecialToken" in item else None
        for item in items
        if isinstance(item, dict) and isinstance(item.get("SpecialToken", {}), dict)
    ]
    bos, eos = (_text(settings, f"{name}_token") for name in ("bos", "eos"))
    for has_bos in (False, True):
        for has_eos in (False, True):
            if tokens == [*([bos] if has_bos else []), None, *([eos] if has_eos else [])]:
                return {"add_bos_token": has_bos} | ({"add_eos_token": True} if has_eos else {})
    raise tokenizer.error(
        "post_processor",
        "adds other tokens than BOS and EOS to every text",
        "this is not supported",
    )


def _text(settings: JsonFile, key: str) -> object:
    """The text of a special token, which must not be None: that stands for the text here."""
    entry = settings.values.get(key)
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else ""
