"""Byte-level BPE vocabularies (`tokenizer.ggml.model` = `gpt2`), applied by `tokenizers`.

The library takes a tenth of a second and more to take over a vocabulary's merges, which a short
prompt needs some dozens of. So the first texts are cut by the library and merged here; it gets the
merges when there is more to do.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, repeat
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

Merges = dict[str, int]


def _byte_characters() -> dict[int, int]:
    """Code point to byte: GPT-2's alphabet, in which every byte is a printable character."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: byte for byte in shown} | {256 + i: byte for i, byte in enumerate(hidden)}


_BYTE_CHARACTERS = _byte_characters()

#: Characters of a text that other threads are not to wait for: batches let them run meanwhile.
LONG = 1 << 14

#: Characters, of all texts together, that are merged without the library; and of one piece.
FEW, PIECE = 1 << 12, 64

#: Bytes that every vocabulary must have: those of plain text.
_PLAIN = (0x0A, *range(0x20, 0x7F))


class BPE:
    """A `Codec`; see `orthrus_gguf.text.vocab.vocabulary`.

    Bytes that have no token are left out, as in llama.cpp: SmolLM's vocabulary, for one, lacks a
    few control characters and parts of unassigned ones.
    """

    space_prefix = False

    def __init__(self, index: dict[str, int], merges: Merges, pre: PreTokenizer) -> None:
        """merges: "LEFT RIGHT" → its rank, in order; every token of them is in `index`."""
        # With an id of their own they keep what surrounds them from being merged, as there.
        lacking = [char for char in map(chr, _BYTE_CHARACTERS) if char not in index]
        self._first_lacking = len(index) if lacking else None
        if lacking:
            index = index | {char: len(index) + i for i, char in enumerate(lacking)}
        self._index, self._merges, self._ignore_merges = index, merges, pre.ignore_merges
        self._normalizer = normalizers.NFC() if pre.nfc else None
        cuts = [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns
        ]
        self._cut = pre_tokenizers.Sequence(
            [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._encoded = 0  # characters

    def encode(self, text: str) -> list[int]:
        self._encoded += len(text)
        few = self._encoded <= FEW and "library" not in self.__dict__
        ids = self._merged(text) if few else None
        if ids is None:
            ids = self._by_library(text)
        if self._first_lacking is None:
            return ids
        return [id for id in ids if id < self._first_lacking]

    def prepare(self) -> None:
        _ = self.library

    def _by_library(self, text: str) -> list[int]:
        ids: list[int]
        if len(text) < LONG:
            ids = self.library.encode(text, add_special_tokens=False).ids
        else:
            (found,) = self.library.encode_batch_fast([text], add_special_tokens=False)
            ids = found.ids
        return ids

    @cached_property
    def library(self) -> tokenizers.Tokenizer:
        """All of it. Raises whatever `tokenizers` finds wrong with the merges."""
        with _collector_paused():
            pairs: list[Any] = list(map(tuple, map(str.split, self._merges, repeat(" "))))
            model = models.BPE(self._index, pairs, ignore_merges=self._ignore_merges)
        whole = tokenizers.Tokenizer(model)
        if self._normalizer is not None:
            whole.normalizer = self._normalizer
        whole.pre_tokenizer = self._cut
        return whole

    def _merged(self, text: str) -> list[int] | None:
        """The ids without the library's merging; None for what would take long."""
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        pieces = [piece for piece, _ in self._cut.pre_tokenize_str(text)]
        if any(len(piece) > PIECE for piece in pieces):
            return None
        return [id for piece in pieces for id in self._merged_piece(piece)]

    def _merged_piece(self, piece: str) -> list[int]:
        """The best merge first, of several the leftmost, until there is none."""
        if self._ignore_merges and piece in self._index:
            return [self._index[piece]]
        parts, none = list(piece), len(self._merges)
        while len(parts) > 1:
            pairs = map("{} {}".format, parts, parts[1:])
            ranks = [self._merges.get(pair, none) for pair in pairs]
            best = min(ranks)
            if best == none:
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self._index[part] for part in parts]

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
    codec = BPE(index, merges, pre)
    if not _are_of_tokens(merges, index):
        try:
            _ = codec.library
        except Exception as error:  # the library raises nothing narrower
            raise _refusal(fields, merges, index, error) from error
    return codec


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
    """Pairs of words, best first, none twice; whether they are tokens is not looked at."""
    lines = read_strings(fields, Keys.MERGES)
    merges = dict(zip(lines, range(len(lines)), strict=True))
    if len(merges) != len(lines):
        twice = Counter(lines).most_common(1)[0][0]
        raise fields.error(Keys.MERGES, f"merge {twice!r:.80} occurs twice")
    # Whole columns at once: a look at each merge would double the loading time.
    if set(map(str.count, lines, repeat(" "))) - {1}:
        at = next(i for i, line in enumerate(lines) if line.count(" ") != 1)
        raise fields.error(
            Keys.MERGES, f"merge {at}: expected two tokens and a space, found {lines[at]!r:.80}"
        )
    return merges


def _are_of_tokens(merges: Merges, index: dict[str, int]) -> bool:
    """Whether all merges are sure to make tokens of tokens."""
    text = "\n".join(merges)
    if text.count("\n") >= max(len(merges), 1):  # the text of a token
        return False
    words = chain(text.replace(" ", "\n").split("\n"), text.replace(" ", "").split("\n"))
    return not merges or all(map(index.__contains__, words))


def _refusal(
    fields: Fields, merges: Merges, index: dict[str, int], error: Exception
) -> OrthrusError:
    """What to say when `tokenizers` refuses merges: the one at fault, where we can tell."""
    for at, found in enumerate(merges):
        if found.replace(" ", "") not in index:
            return fields.error(
                Keys.MERGES, f"merge {at} ({found!r:.80}) makes a token that {Keys.LIST} lacks"
            )
    return fields.error(Keys.MERGES, f"tokenizers refuses them: {str(error)!r:.200}")
