"""SentencePiece tokenizers (tokenizer.model) → Vocabulary of GGUF's `llama` kind.

The sentencepiece package loads and checks the model but keeps its settings to itself, and those
decide whether `llama` describes it. They are read from the model's protobuf here. Field numbers:
sentencepiece_model.proto.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import sentencepiece

from orthrus_converters.chat_templates import read_templates
from orthrus_converters.json_file import JsonFile, read_bytes
from orthrus_converters.vocabulary import (
    Token,
    Vocabulary,
    added_tokens,
    check_distinct,
    fill_gaps,
    prompt_flags,
    special_ids,
    unkept_marks,
)
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.text.vocab.protobuf import fields

_Type = gguf.TokenType
_ADDED_SCORE = -1000.0  # as llama.cpp's converter gives added tokens

# Fields of ModelProto
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TYPE = 3
_USER_DEFINED = 4
# (message, field): what it is, its default, the value that `llama` stands for
_SETTINGS: dict[tuple[int, int], tuple[str, int | bytes, int | bytes]] = {
    (_TRAINER, 3): ("model_type", 1, 2),  # BPE: llama.cpp merges by score
    (_TRAINER, 24): ("treat_whitespace_as_suffix", 0, 0),
    (_NORMALIZER, 2): ("precompiled_charsmap", b"", b""),
    (_NORMALIZER, 4): ("remove_extra_whitespaces", 1, 0),
    (_NORMALIZER, 5): ("escape_whitespaces", 1, 1),
}
_DUMMY_PREFIX = 3  # of the normalizer; default true


def read_sentencepiece(
    folder: Path, config: JsonFile, settings: JsonFile, n_vocab: int
) -> Vocabulary:
    """The tokenizer.model in `folder`. settings: tokenizer_config.json.

    Raises OrthrusError if it is damaged, or works in a way that GGUF's `llama` does not describe.
    """
    path = folder / "tokenizer.model"
    data = read_bytes(path)
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(data)
    except RuntimeError as error:
        raise OrthrusError(f"{path}: is no SentencePiece model; download it again") from error
    _check_settings(path, data)
    tokens = _tokens(folder, settings, processor, data, n_vocab)
    special, notes = special_ids(settings, config, tokens)
    templates, template_notes = read_templates(folder, settings)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        merges=[],
        special=special,
        flags={
            # The default of transformers' LlamaTokenizer and of llama.cpp
            **prompt_flags(settings, {"add_bos_token": "bos" in special}),
            "add_space_prefix": bool(_setting(data, _NORMALIZER, _DUMMY_PREFIX, 1)),
        },
        templates=templates,
        notes=[*notes, *unkept_marks(settings, []), *template_notes],
    )


def _tokens(
    folder: Path,
    settings: JsonFile,
    processor: sentencepiece.SentencePieceProcessor,
    data: bytes,
    n_vocab: int,
) -> list[Token]:
    pieces = [_piece(processor, index) for index in range(processor.vocab_size())]
    for index, piece in enumerate(value for number, value in fields(data) if number == _PIECES):
        assert isinstance(piece, bytes)  # a message, in a model that has been loaded
        if dict(fields(piece)).get(_PIECE_TYPE) == _USER_DEFINED:
            pieces[index] = Token(pieces[index].text, _Type.USER_DEFINED, pieces[index].score)
    added = added_tokens(
        folder, settings, [], {piece.text: index for index, piece in enumerate(pieces)}
    )
    slots = dict(enumerate(pieces))
    for token in added:
        old = slots.get(token.id)
        if old is None or old.text != token.text or old.type == _Type.NORMAL:
            slots[token.id] = Token(token.text, token.type, _ADDED_SCORE)
    if max(slots) >= n_vocab:
        raise OrthrusError(
            f"{folder / 'tokenizer.model'}: has the token id {max(slots)}, but the model has only "
            f"{n_vocab} (vocab_size in config.json); the tokenizer belongs to another model"
        )
    tokens = fill_gaps(slots, n_vocab)
    check_distinct(folder / "tokenizer.model", tokens)
    return tokens


def _piece(processor: sentencepiece.SentencePieceProcessor, index: int) -> Token:
    kinds = (
        (processor.IsUnknown, _Type.UNKNOWN),
        (processor.IsControl, _Type.CONTROL),
        (processor.IsUnused, _Type.UNUSED),
        (processor.IsByte, _Type.BYTE),
    )
    kind = next((kind for test, kind in kinds if test(index)), _Type.NORMAL)
    return Token(processor.IdToPiece(index), kind, processor.GetScore(index))


def _check_settings(path: Path, data: bytes) -> None:
    for (message, field), (name, default, expected) in _SETTINGS.items():
        found = _setting(data, message, field, default)
        if found != expected:
            raise OrthrusError(
                f"{path}: {name}: expected {expected!r:.20}, found {found!r:.20}; "
                "only SentencePiece models in the manner of Llama are supported"
            )


def _setting(data: bytes, message: int, field: int, default: int | bytes) -> int | bytes:
    """A field of one of the messages inside the model (the last one counts, as in protobuf)."""
    value = default
    for number, body in fields(data):
        if number == message and isinstance(body, bytes):
            value = dict(fields(body)).get(field, value)
    return value
