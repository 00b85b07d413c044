"""A made-up vocabulary of any size, as large as a real one to load and to search.

Byte-level BPE like Qwen3's: the 256 bytes, then words of two, four, six and eight letters that
merges build from shorter ones, then the special tokens. It encodes and decodes any text; its tokens
mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import gguf
import numpy as np

from orthrus_converters.vocabulary import Token, Vocabulary

_Type = gguf.TokenType

#: GPT-2's alphabet for bytes: printable ones stand for themselves, the others are moved up.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTES = [chr(i) for i in (*_PRINTABLE, *range(0x100, 0x100 + 256 - len(_PRINTABLE)))]
_SPACE = "Ġ"
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

#: In Qwen3, so many added tokens come between the words and the mask token.
_ADDED = 26

#: A vocabulary has at least the bytes, the added tokens and the mask.
MIN_TOKENS = len(_BYTES) + _ADDED + 1


def synthetic_vocabulary(n_vocab: int, mask_token: int, seed: int) -> Vocabulary:
    """`n_vocab` tokens, the special ones where Qwen3 has them: before `mask_token`.

    Raises ValueError for sizes below MIN_TOKENS.
    """
    if not MIN_TOKENS <= mask_token + 1 <= n_vocab:
        raise ValueError(f"{n_vocab} tokens, mask {mask_token}: expected {MIN_TOKENS} or more")
    n_words = mask_token - _ADDED
    merges = list(islice(_merges(seed), n_words - len(_BYTES)))
    words = [*_BYTES, *map("".join, merges)]
    if len(words) != n_words:
        raise ValueError(f"{n_vocab} tokens: only {len(words)} words can be made up")
    tokens = [Token(word, _Type.NORMAL) for word in words]
    tokens += [Token(text, _Type.CONTROL) for text in _CONTROL]
    tokens += [Token(f"[PAD{i}]", _Type.UNUSED) for i in range(len(tokens), n_vocab)]
    tokens[mask_token] = Token("<|mask|>", _Type.CONTROL)
    return Vocabulary(
        model="gpt2",
        pre="qwen2",
        tokens=tokens,
        merges=list(map(" ".join, merges)),
        special={"bos": n_words, "eos": n_words + 2, "pad": n_words},
        flags={"add_bos_token": False},
        templates={},
    )


def _merges(seed: int) -> Iterable[tuple[str, str]]:
    """Pairs of tokens, best first; what they make is new every time, since lengths tell how it was
    made and pairs are drawn once."""
    rng = np.random.default_rng([seed, 0])
    pairs = [(first, second) for first in (*_LETTERS, _SPACE) for second in _LETTERS]
    twos = list(map("".join, pairs))
    fours = _draw(rng, twos, twos, 60_000)
    sixes = _draw(rng, list(map("".join, fours)), twos, 50_000)
    eights = _draw(rng, list(map("".join, fours)), list(map("".join, fours)), 50_000)
    for level in (pairs, fours, sixes, eights):
        yield from level


def _draw(
    rng: np.random.Generator, firsts: list[str], seconds: list[str], count: int
) -> list[tuple[str, str]]:
    """`count` different pairs; spaces only begin words."""
    seconds = [text for text in seconds if not text.startswith(_SPACE)]
    places = rng.choice(len(firsts) * len(seconds), count, replace=False, shuffle=False)
    at = [divmod(place, len(seconds)) for place in places.tolist()]
    return [(firsts[first], seconds[second]) for first, second in at]
