"""Vocabularies to test tokenizers with, as GGUF metadata, and texts to try them on."""

from __future__ import annotations

import io
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from orthrus_gguf.gguf.reader import Value

Metadata = dict[str, Value]

STDLIB = Path(sysconfig.get_paths()["stdlib"])


def bpe_metadata(tokenizer_json: dict[str, Any]) -> Metadata:
    """What design/01-format.md makes of a tokenizer.json, written without our converter."""
    model = tokenizer_json["model"]
    added = {token["id"]: token for token in tokenizer_json["added_tokens"]}
    texts = {id: text for text, id in model["vocab"].items()}
    texts |= {id: token["content"] for id, token in added.items()}
    types = np.ones(len(texts), np.int32)
    for id, token in added.items():
        types[id] = 3 if token["special"] else 4
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [texts[id] for id in range(len(texts))],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": min(added),
        "tokenizer.ggml.eos_token_id": min(added),
        "tokenizer.ggml.add_bos_token": False,
    }


def greedy_vocabulary(tokenizer_json: dict[str, Any]) -> dict[str, Any]:
    """`tokenizer_json` with tokens that run across words, so that every cut between words shows.

    (The demo vocabulary was trained on words cut the Qwen way: cut them differently, and most texts
    still give the same tokens.) One token has no merges that make it.
    """
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=8,
    )
    digits = [str(10**20 // n) for n in range(3, 500)]
    trained.train_from_iterator([*library_lines(2000), *random_texts(2000, 3), *digits], trainer)
    model = json.loads(trained.to_str())["model"]
    model["vocab"]["Ġunmergeable"] = len(model["vocab"])
    added = [
        {**token, "id": len(model["vocab"]) + place}
        for place, token in enumerate(tokenizer_json["added_tokens"])
    ]
    return {**tokenizer_json, "model": model, "added_tokens": added}


def train_sentencepiece(texts: Iterable[str], **options: Any) -> Any:
    """A tiny model in the manner of Llama's: BPE, byte fallback, text taken as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(processor: Any, user_defined: Iterable[str] = ()) -> Metadata:
    """The metadata for a sentencepiece model."""
    ids = range(processor.get_piece_size())
    tokens = [processor.id_to_piece(id) for id in ids]
    kinds = [
        (processor.is_unknown, 2),
        (processor.is_control, 3),
        (processor.is_unused, 5),
        (processor.is_byte, 6),
    ]
    types = [next((kind for test, kind in kinds if test(id)), 1) for id in ids]
    for text in user_defined:
        types[tokens.index(text)] = 4
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([processor.get_score(id) for id in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
    }


def library_lines(count: int) -> list[str]:
    """Lines and paragraphs of the running interpreter's standard library."""
    texts: list[str] = []
    for path in sorted(STDLIB.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="ignore")
        texts += text.splitlines(keepends=True)
        texts += text.split("\n\n")[:20]
    return random.Random(0).sample(texts, count)


# Ranges of code points: what texts are made of, and what tokenizers stumble over.
ALPHABETS = [
    [(0x20, 0x7E)],
    [(0x00, 0x1F), (0x7F, 0xA0)],
    [(0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x2000, 0x200D), (0x3000, 0x3000)],
    [(0x30, 0x39), (0x660, 0x669), (0xB2, 0xB3), (0x2160, 0x2188), (0x1D7CE, 0x1D7FF)],
    [(0x41, 0x5A), (0x300, 0x36F), (0x1DC0, 0x1DF5), (0x20D0, 0x20F0)],
    [(0x1100, 0x11FF), (0xAC00, 0xD7A3), (0x4E00, 0x9FA5), (0xF900, 0xFA2D)],
    [(0x5D0, 0x5EA), (0x620, 0x669), (0x905, 0x939), (0xE01, 0xE3A), (0x400, 0x45F)],
    [(0x1F300, 0x1F64F), (0x200D, 0x200D), (0xFE0F, 0xFE0F), (0x1F3FB, 0x1F3FF)],
    [(0x10000, 0x1000B), (0x1D400, 0x1D454), (0x20000, 0x2A6D6), (0xE0020, 0xE007F)],
    [(0xE000, 0xF8FF), (0xFFF9, 0xFFFD), (0x2028, 0x2029), (0x180, 0x24F), (0x100000, 0x10FFFD)],
]
SNIPPETS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|im_end|", "<|im_end|>|>"),
    *("\r\n", "\n\n\n", "    ", "\t", "don't", "I'LL", "x = 10**9", "3.14159", "👩‍💻", "ﬁ", "Å"),
    *("1234567", "12", " unmergeable"),
]


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Texts that mix up to three alphabets and now and then a snippet."""
    rng = random.Random(seed)
    for _ in range(count):
        alphabets = rng.choices(ALPHABETS, k=rng.randint(1, 3))
        parts = []
        for _ in range(rng.randint(0, 30)):
            low, high = rng.choice(rng.choice(alphabets))
            parts.append(chr(rng.randint(low, high)))
            if rng.random() < 0.1:
                parts.append(rng.choice(SNIPPETS))
        yield "".join(parts)
