"""Text to token ids and back, with the vocabulary that a GGUF file carries.

Two kinds of vocabulary exist in such files: byte-level BPE (`tokenizer.ggml.model` = `gpt2`), left
to Hugging Face's `tokenizers`, and SentencePiece (`llama`), left to `sentencepiece`. Both libraries
see plain text only: tokens that stand for themselves are cut out of the text here, since GGUF files
keep no more about them than text and type, and since whether to look for them is the caller's
choice. Ids become bytes here too, which lets text stream without breaking UTF-8 sequences.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.fields import Fields
from orthrus_gguf.gguf.reader import Value
from orthrus_gguf.text.vocab.vocabulary import Codec, Keys, TokenType, Vocabulary

#: Stands before what spells a token in a guarded text. Unicode promises that it is no character.
_GUARD = "\ufdd0"


class Tokenizer:
    """Text to ids and back. Made by `load_tokenizer`; safe to share between threads.

    n_vocab: number of tokens. bos, eos: their ids, if any. add_bos, add_eos: whether prompts begin
    with bos and end with eos unless told otherwise. eog: every id that ends a generation. notes:
    lines about what had to be mended in the file's vocabulary.
    """

    def __init__(self, vocabulary: Vocabulary, codec: Codec) -> None:
        self.n_vocab = len(vocabulary.tokens)
        self.bos = vocabulary.bos
        self.eos = vocabulary.eos
        self.add_bos = vocabulary.add_bos
        self.add_eos = vocabulary.add_eos
        self.eog = vocabulary.eog
        self.notes = vocabulary.notes
        self.space_prefix = codec.space_prefix
        self._vocabulary = vocabulary
        self._codec = codec
        always = vocabulary.user_defined
        self._cut = _any_of(vocabulary.tokens[i] for i in always)
        self._cut_special = _any_of(vocabulary.tokens[i] for i in always | vocabulary.special)

    def prepare(self) -> None:
        """Whatever many or long texts need, now and not with the first of them."""
        self._codec.prepare()

    def encode(
        self,
        text: str,
        *,
        special: bool = True,
        guarded: bool = False,
        add_bos: bool | None = None,
        add_eos: bool | None = None,
    ) -> list[int]:
        """Token ids of `text`.

        special: whether control tokens that are spelt out in the text become those tokens; pass
            False for text that must not speak for the system. User-defined tokens always do.
        guarded: parts of the text come from guard(), and are plain text whatever they spell.
        add_bos, add_eos: put bos first and eos last, unless the text brings its own; None means as
            the file says.
        Raises OrthrusError for text that no UTF-8 stands for.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise OrthrusError(
                f"the text has a lone surrogate ({text[error.start]!r}) at character {error.start}:"
                " it came from bytes that are not UTF-8; convert the input to UTF-8"
            ) from None
        ids: list[int] = []
        cut = self._cut
        if special:
            cut = self._cut_guarded if guarded else self._cut_special
        # Splitting on a group leaves plain text at the even places and tokens at the odd ones.
        for place, part in enumerate(cut.split(text)):
            if place % 2:
                ids.append(self._vocabulary.index[part])
                continue
            plain = part.replace(_GUARD, "") if guarded else part
            if plain:
                ids += self._codec.encode(plain)
        if self.add_bos if add_bos is None else add_bos:
            bos = _wanted(self.bos, "BOS")
            if ids[:1] != [bos]:
                ids.insert(0, bos)
        if self.add_eos if add_eos is None else add_eos:
            eos = _wanted(self.eos, "EOS")
            if ids[-1:] != [eos]:
                ids.append(eos)
        return ids

    def guard(self, text: str) -> str:
        """`text`, to be put into a prompt that encode() gets with `guarded`: control tokens that
        are spelt out in it stay text, whatever stands around them there."""
        return self._spelt.sub(_GUARD, text.replace(_GUARD, ""))

    @cached_property
    def _spelt(self) -> re.Pattern[str]:
        """Every place where a control token begins, also within another."""
        special = _any_of(self._vocabulary.tokens[i] for i in self._vocabulary.special)
        return re.compile(f"(?={special.pattern})")

    @cached_property
    def _cut_guarded(self) -> re.Pattern[str]:
        return re.compile(f"(?<!{_GUARD}){self._cut_special.pattern}")

    def decode(
        self, ids: Sequence[int], *, skip_special: bool = False, continuation: bool = False
    ) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Arguments as StreamDecoder's."""
        stream = StreamDecoder(self, skip_special=skip_special, continuation=continuation)
        return "".join(map(stream.push, ids)) + stream.flush()

    def token_bytes(self, id: int) -> bytes:
        """Bytes of one token: what llama.cpp's `llama_token_to_piece` gives, special ones included.

        Unused tokens have none. Raises OrthrusError for ids outside the vocabulary.
        """
        if not 0 <= id < self.n_vocab:
            raise OrthrusError(f"token id {id} is outside the vocabulary of {self.n_vocab} tokens")
        text = self._vocabulary.tokens[id]
        kind = self._vocabulary.types[id]
        if kind == TokenType.NORMAL:
            return self._codec.token_bytes(text)
        if kind == TokenType.BYTE:
            return bytes([int(text[3:5], 16)])
        return b"" if kind == TokenType.UNUSED else text.encode()

    def is_special(self, id: int) -> bool:
        """Whether `id` is a control token (or the unknown token) rather than a piece of text."""
        return id in self._vocabulary.special

    def same_ids(self, other: Tokenizer) -> bool:
        """Whether ids mean the same in another vocabulary."""
        return self._vocabulary.tokens == other._vocabulary.tokens

    def special_id(self, text: str) -> int | None:
        """The control token that is spelt `text`, if there is one."""
        id = self._vocabulary.index.get(text)
        return id if id in self._vocabulary.special else None


class StreamDecoder:
    """Decodes ids one by one, releasing text as soon as its UTF-8 sequences are complete.

    skip_special: leave out control tokens.
    continuation: the ids follow other text, so that a leading space is a real one. Otherwise the
        space is dropped that a SentencePiece vocabulary puts before the text when encoding.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = False, continuation: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._drop_space = tokenizer.space_prefix and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """Text that `id` completes; empty while a UTF-8 sequence is unfinished."""
        special = self._tokenizer.is_special(id)
        if special and self._skip_special:
            return ""
        data = self._tokenizer.token_bytes(id)
        if self._drop_space and not special:
            data = data.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What an unfinished sequence at the end amounts to: U+FFFD or nothing."""
        return self._utf8.decode(b"", final=True)


def load_tokenizer(metadata: Mapping[str, Value], *, path: Path, n_vocab: int) -> Tokenizer:
    """Build the tokenizer that `metadata` describes.

    n_vocab: rows of the embedding, which the vocabulary must match. path: for messages.
    Raises OrthrusError for unsupported kinds of vocabulary and for malformed ones.
    """
    fields = Fields(metadata, path)
    model = fields.text(Keys.MODEL)
    # Imported where needed: each library takes a while to load, and one of them is enough.
    if model == "gpt2":
        from orthrus_gguf.text.vocab import bpe

        return Tokenizer(*bpe.load(fields, n_vocab))
    if model == "llama":
        from orthrus_gguf.text.vocab import spm

        return Tokenizer(*spm.load(fields, n_vocab))
    raise fields.error(
        Keys.MODEL,
        f"expected gpt2 (byte-level BPE) or llama (SentencePiece), found {model!r:.80}",
        "this kind of vocabulary is not supported",
    )


def _wanted(id: int | None, name: str) -> int:
    if id is None:
        raise OrthrusError(f"this vocabulary has no {name} token; do not ask for one")
    return id


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A group that matches the leftmost of `texts`, the longest where several begin."""
    ordered = sorted(texts, key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, ordered)) if ordered else r"(?!)") + ")")
