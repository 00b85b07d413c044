"""Byte-level BPE vocabularies (`tokenizer.ggml.model` = `gpt2`), applied by `tokenizers`."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.fields import Fields
from orthrus_gguf.text.vocab.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from orthrus_gguf.text.vocab.vocabulary import (
    Defaults,
    Keys,
    Vocabulary,
    read_strings,
    read_vocabulary,
)

Merges = list[tuple[str, str]]


def _byte_characters() -> dict[int, int]:
    """Code point to byte: GPT-2's alphabet, in which every byte is a printable character."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: byte for byte in shown} | {256 + i: byte for i, byte in enumerate(hidden)}


_BYTE_CHARACTERS = _byte_characters()

#: Characters of a text that other threads are not to wait for: batches let them run meanwhile.
LONG = 1 << 14

#: Bytes that every vocabulary must have: those of plain text.
_PLAIN = (0x0A, *range(0x20, 0x7F))


class BPE:
    """A `Codec`; see `orthrus_gguf.text.vocab.vocabulary`.

    Bytes that have no token are left out, as in llama.cpp: SmolLM's vocabulary, for one, lacks a
    few control characters and parts of unassigned ones.
    """

    space_prefix = False

    def __init__(self, index: dict[str, int], merges: Merges, pre: PreTokenizer) -> None:
        # With an id of their own they keep what surrounds them from being merged, as there.
        lacking = [char for char in map(chr, _BYTE_CHARACTERS) if char not in index]
        self._first_lacking = len(index) if lacking else None
        if lacking:
            index = index | {char: len(index) + i for i, char in enumerate(lacking)}
        model = models.BPE(index, merges, ignore_merges=pre.ignore_merges)
        self._tokenizer = tokenizers.Tokenizer(model)
        if pre.nfc:
            self._tokenizer.normalizer = normalizers.NFC()
        cuts = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns
        ]
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int]
        if len(text) < LONG:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        else:
            (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
            ids = found.ids
        if self._first_lacking is None:
            return ids
        return [id for id in ids if id < self._first_lacking]

    def token_bytes(self, text: str) -> bytes:
        try:
            return text.translate(_BYTE_CHARACTERS).encode("latin-1")
        except UnicodeEncodeError:
            return text.encode()  # not in the alphabet: the text itself, as `tokenizers` decodes it


def load(fields: Fields, n_vocab: int) -> tuple[Vocabulary, BPE]:
    """Read, check and build. Raises OrthrusError that names the file and the key at fault."""
    name = fields.text(Keys.PRE)
    if name not in PRE_TOKENIZERS:
        raise fields.error(
            Keys.PRE,
            f"expected one of {len(PRE_TOKENIZERS)} names such as qwen2, llama-bpe, smollm and "
            f"default, found {name!r:.80}",
            "this pre-tokenizer is not supported",
        )
    pre = PRE_TOKENIZERS[name]
    vocabulary = read_vocabulary(fields, n_vocab, Defaults(add_bos=pre.add_bos))
    texts = {byte: chr(char) for char, byte in _BYTE_CHARACTERS.items()}
    missing = [byte for byte in _PLAIN if texts[byte] not in vocabulary.index]
    if missing:
        raise fields.error(
            Keys.LIST,
            f"expected a token for each byte of plain text, found none for {missing[0]}",
        )
    with _collector_paused():
        return vocabulary, _codec(fields, vocabulary.index, pre)


def _codec(fields: Fields, index: dict[str, int], pre: PreTokenizer) -> BPE:
    merges = _read_merges(fields)
    try:
        return BPE(index, merges, pre)
    except Exception as error:  # the library raises nothing narrower
        raise _refusal(fields, merges, index, error) from error


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection: 150,000 pairs, gone at the end, would set it off hundreds of times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_merges(fields: Fields) -> Merges:
    """Pairs of tokens, best first, none twice; `tokenizers` will see whether the tokens exist."""
    lines = read_strings(fields, Keys.MERGES)
    if len(set(lines)) != len(lines):
        twice = Counter(lines).most_common(1)[0][0]
        raise fields.error(Keys.MERGES, f"merge {twice!r:.80} occurs twice")
    # Whole columns at once: a look at each merge would double the loading time.
    merges: list[Any] = list(map(tuple, map(str.split, lines, repeat(" "))))
    if set(map(len, merges)) - {2}:
        at = next(i for i, merge in enumerate(merges) if len(merge) != 2)
        raise fields.error(
            Keys.MERGES, f"merge {at}: expected two tokens and a space, found {lines[at]!r:.80}"
        )
    return merges


def _refusal(
    fields: Fields, merges: Merges, index: dict[str, int], error: Exception
) -> OrthrusError:
    """What to say when `tokenizers` refuses merges: the one at fault, where we can tell."""
    for at, (left, right) in enumerate(merges):
        if left + right not in index:
            found = f"{left} {right}"
            return fields.error(
                Keys.MERGES, f"merge {at} ({found!r:.80}) makes a token that {Keys.LIST} lacks"
            )
    return fields.error(Keys.MERGES, f"tokenizers refuses them: {str(error)!r:.200}")
