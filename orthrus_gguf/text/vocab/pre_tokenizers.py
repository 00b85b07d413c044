"""Pre-tokenizers: how byte-level BPE vocabularies cut text into words, by `tokenizer.ggml.pre`.

The facts are those of llama.cpp's src/llama-vocab.cpp and src/unicode.cpp, since that is what files
are made for and tested with; every name is tested against it. Left out are names of tokenizers that
are no byte-level BPE, and those that only models of architectures have which we do not run.

What a name implies there besides (`clean_spaces`) concerns only how whole texts are decoded for
display, not how text is generated: token by token, as here.
"""

from __future__ import annotations

from collections.abc import Iterator

from orthrus_gguf.records import dataclass


@dataclass(frozen=True)
class PreTokenizer:
    """patterns: each cuts the pieces that the ones before have left, into matches and what is
    between them. nfc: text is normalized first. ignore_merges: a word that is a token needs no
    merges. add_bos: prompts begin with BOS where the file does not say."""

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"

#: GPT-2's own.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

#: Those of Qwen2 and Llama 3, which differ in how many digits stay together.
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"

#: Qwen3.5's: marks belong to letters.
QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)

# llama.cpp knows no case but that of ASCII: every other letter counts as upper and as lower.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_REST_SLASH = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"

_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_REST_SLASH}"
SEED_CODER = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}"
    rf"| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
)
_MINICPM5 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}+|{_REST}"
_NO_PUNCTUATION = r" ?[^(\s|.,!?…。，、।۔،)]+"
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
#: Han and its neighbours, from U+0800 on; llama.cpp does not see the white space among them.
_FROM_0800 = "[[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]&&[^\\s]]+"

_LLAMA_BPE = PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True)
_SPELT_DIGITS = PreTokenizer((r"\p{N}", GPT2))

#: Names that mean the same. The first is what llama.cpp calls the whole group.
_GROUPS: dict[PreTokenizer, tuple[str, ...]] = {
    # llama.cpp never normalizes; Qwen's own tokenizer.json does, and so Qwen's models are trained.
    PreTokenizer((QWEN2,), nfc=True): ("qwen2",),
    PreTokenizer((QWEN35,), nfc=True): ("qwen35",),
    PreTokenizer((QWEN2,)): (
        "deepseek-r1-qwen",
        "kormo",
        "f2llmv2",
        "megrez",
        "stablelm2",
        "hunyuan",
        "solar-open",
        "grok-2",
    ),
    _LLAMA_BPE: (
        "llama-bpe",
        "llama3",
        "llama-v3",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
    ),
    PreTokenizer((LLAMA3,)): ("smaug-bpe", "dbrx"),
    _SPELT_DIGITS: (
        "smollm",
        "starcoder",
        "refact",
        "command-r",
        "codeshell",
        "exaone",
        "minerva-7b",
    ),
    PreTokenizer((GPT2,)): (
        "gpt-2",
        "phi-2",
        "gigachat",
        "a.x-4.0",
        "mellum",
        "exaone4",
        "mpt",
        "olmo",
        "jais",
        "trillion",
        "granite-docling",
    ),
    PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True): ("tekken",),
    PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _FROM_0800, r"\p{N}")): (
        "deepseek-coder",
    ),
    PreTokenizer((_NO_PUNCTUATION, r"\p{N}")): ("viking",),
    PreTokenizer((SEED_CODER,)): ("seed-coder",),
    PreTokenizer((r"\p{N}{1,3}", _MINICPM5), ignore_merges=True): ("minicpm5",),
    PreTokenizer((_PUNCTUATION, GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")): ("default",),
}


def _named() -> Iterator[tuple[str, PreTokenizer]]:
    for pre, names in _GROUPS.items():
        for name in names:
            yield name, pre


#: The values of `tokenizer.ggml.pre` that we support.
PRE_TOKENIZERS = dict(_named())
