"""SentencePiece vocabularies (`tokenizer.ggml.model` = `llama`), applied by `sentencepiece`."""

from __future__ import annotations

import numpy as np
from sentencepiece import SentencePieceProcessor

from orthrus_gguf.gguf.fields import Fields
from orthrus_gguf.text.vocab.protobuf import integer, message, single
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

    def prepare(self) -> None:
        pass  # it is whole

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
    types = _piece_types(vocabulary.types)
    pieces = [
        message(1, message(1, text.encode()) + single(2, score) + integer(3, kind))
        for text, score, kind in zip(vocabulary.tokens, scores, types, strict=True)
    ]
    byte_fallback = TokenType.BYTE in types
    trainer = integer(3, 2) + integer(35, byte_fallback)  # model_type = BPE, byte_fallback
    # add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = integer(3, space_prefix) + integer(4, False) + integer(5, True)
    return b"".join(pieces) + message(2, trainer) + message(3, normalizer)


def _piece_types(types: list[int]) -> list[int]:
    """The numbers are the same; but what is cut out of the text first must not match again, and
    only one token is what sentencepiece falls back to (some families have several)."""
    unknown = types.index(TokenType.UNKNOWN) if TokenType.UNKNOWN in types else -1
    apart = (TokenType.USER_DEFINED, TokenType.UNKNOWN)
    return [
        TokenType.CONTROL if kind in apart and index != unknown else kind
        for index, kind in enumerate(types)
    ]
