"""SentencePiece vocabularies (`tokenizer.ggml.model` = `llama`), applied by `sentencepiece`."""

from __future__ import annotations

import struct

import numpy as np
from sentencepiece import SentencePieceProcessor

from orthrus_gguf.gguf.fields import Fields
from orthrus_gguf.text.vocab.vocabulary import (
    Defaults,
    Keys,
    TokenType,
    Vocabulary,
    read_array,
    read_bool,
    read_vocabulary,
)

_SPACE = "▁"  # U+2581: how these vocabularies write a space


class SentencePiece:
    """A `Codec`; see `orthrus_gguf.text.vocab.vocabulary`. Raises RuntimeError for a bad model."""

    def __init__(self, model_proto: bytes, *, space_prefix: bool) -> None:
        self.space_prefix = space_prefix
        self._processor = SentencePieceProcessor(model_proto=model_proto)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def token_bytes(self, text: str) -> bytes:
        return text.replace(_SPACE, " ").encode()


def load(fields: Fields, n_vocab: int) -> tuple[Vocabulary, SentencePiece]:
    """Read, check and build. Raises OrthrusError that names the file and the key at fault."""
    # Where the file is silent: the ids that SentencePiece gives out, as in llama.cpp.
    vocabulary = read_vocabulary(fields, n_vocab, Defaults(add_bos=True, bos=1, eos=2))
    scores = read_array(fields, Keys.SCORES, n_vocab, np.floating)
    if not np.isfinite(scores).all():
        at = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise fields.error(Keys.SCORES, f"expected finite numbers, found {scores[at]} at {at}")
    space_prefix = read_bool(fields, Keys.ADD_PREFIX, True)
    proto = _model_proto(vocabulary, scores.tolist(), space_prefix=space_prefix)
    try:
        return vocabulary, SentencePiece(proto, space_prefix=space_prefix)
    except RuntimeError as error:
        raise fields.error(
            Keys.LIST, f"sentencepiece refuses the vocabulary: {str(error)!r:.200}"
        ) from error


def _model_proto(vocabulary: Vocabulary, scores: list[float], *, space_prefix: bool) -> bytes:
    """The vocabulary as a ModelProto of sentencepiece_model.proto, for a BPE model.

    Text is taken as it is: GGUF files keep no normalization rules for this kind of vocabulary.
    """
    pieces = [
        _message(1, _message(1, text.encode()) + _float(2, score) + _int(3, _piece_type(kind)))
        for text, score, kind in zip(vocabulary.tokens, scores, vocabulary.types, strict=True)
    ]
    byte_fallback = TokenType.BYTE in vocabulary.types
    trainer = _int(3, 2) + _int(35, byte_fallback)  # model_type = BPE, byte_fallback
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _int(3, space_prefix) + _int(4, False) + _int(5, True)
    return b"".join(pieces) + _message(2, trainer) + _message(3, normalizer)


def _piece_type(kind: int) -> int:
    """The numbers are the same; but what is cut out of the text first must not match again."""
    return TokenType.CONTROL if kind == TokenType.USER_DEFINED else kind


def _int(field: int, value: int) -> bytes:
    """A protobuf integer field."""
    return _varint(field << 3) + _varint(value)


def _float(field: int, value: float) -> bytes:
    """A protobuf float field."""
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, data: bytes) -> bytes:
    """A protobuf field of bytes: a string or a message."""
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    groups.append(value)
    return bytes(groups)
