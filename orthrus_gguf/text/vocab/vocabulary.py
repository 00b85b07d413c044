"""The vocabulary in a file's metadata, checked once: tokens, their types, and the special ids."""

from __future__ import annotations

import re
from typing import Any, Protocol

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.gguf.fields import Fields, describe
from orthrus_gguf.records import dataclass

Keys = gguf.Keys.Tokenizer
TokenType = gguf.TokenType

#: Ids whose keys end a generation in llama.cpp. The FIM ones separate files and repositories.
_END_KEYS = (
    Keys.EOS_ID,
    Keys.EOT_ID,
    Keys.EOM_ID,
    Keys.FIM_PAD_ID,
    Keys.FIM_REP_ID,
    Keys.FIM_SEP_ID,
)

#: All that name a token; those of no use here are looked at too, for the sake of a note.
_ID_KEYS = (Keys.BOS_ID, *_END_KEYS, Keys.UNK_ID, Keys.SEP_ID, Keys.PAD_ID)

#: Texts by which llama.cpp finds further ends of generation (src/llama-vocab.cpp), except those
#: of architectures that we do not run: files rarely name more than one end by its key. Unlike
#: llama.cpp we leave tokens of type NORMAL alone. Some vocabularies hold `</s>` as a piece of HTML,
#: and Hugging Face's tokenizers, with which the models were trained, see nothing special in it.
_END_TEXTS = frozenset(
    {
        "<|im_end|>",
        "<|endoftext|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",
        "<eos>",
        "</s>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|fim_pad|>",
        "<|repo_name|>",
        "<|fim_repo|>",
        "<|file_sep|>",
    }
)

#: Tokens of these types are found in text as a whole, before anything else looks at the text.
_SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL)
_FOUND_IN_TEXT = (*_SPECIAL, TokenType.USER_DEFINED)

#: Kinds of numbers, as numpy's abstract types.
_Kind = type[np.integer[Any]] | type[np.floating[Any]]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Codec(Protocol):
    """One kind of vocabulary: plain text to ids, and the text of a normal token to its bytes.

    space_prefix: a space is put before plain text when encoding, to be dropped when decoding.
    """

    space_prefix: bool

    def encode(self, text: str) -> list[int]: ...

    def prepare(self) -> None:
        """Whatever many or long texts need, now and not with the first of them."""

    def token_bytes(self, text: str) -> bytes: ...


@dataclass(frozen=True)
class Defaults:
    """What a kind of vocabulary assumes where the file says nothing."""

    add_bos: bool
    bos: int | None = None
    eos: int | None = None


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and what they mean.

    index: id of each token's text. types: a `gguf.TokenType` per token.
    special: ids of control and unknown tokens. user_defined: ids of the other tokens that are found
    in text as a whole. eog: ids that end a generation; those found by their text are special even
    where the file calls them user-defined, as in llama.cpp. add_bos, add_eos: whether prompts
    begin and end so. notes: lines about what was mended, as llama.cpp mends it.
    """

    tokens: list[str]
    index: dict[str, int]
    types: list[int]
    special: frozenset[int]
    user_defined: frozenset[int]
    eog: frozenset[int]
    bos: int | None
    eos: int | None
    add_bos: bool
    add_eos: bool
    notes: tuple[str, ...] = ()


def read_vocabulary(fields: Fields, n_vocab: int, defaults: Defaults) -> Vocabulary:
    """Read and check it. Raises OrthrusError that names the file and the key at fault."""
    tokens = read_strings(fields, Keys.LIST)
    if len(tokens) != n_vocab:
        raise fields.error(
            Keys.LIST, f"expected {n_vocab} tokens as in token_embd.weight, found {len(tokens)}"
        )
    notes: dict[str, None] = {}  # in order, each once
    if "" in tokens:
        empty = [i for i, text in enumerate(tokens) if not text]
        tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(tokens)]
        what = f"{len(empty)} tokens without text, the first is {empty[0]}"
        notes[f"{fields.path}: {Keys.LIST}: {what}; called [EMPTY_{empty[0]}] and so on"] = None
    index = dict(zip(tokens, range(n_vocab), strict=True))
    if len(index) != n_vocab:
        first = next(i for i, text in enumerate(tokens) if index[text] != i)
        twin = index[tokens[first]]
        raise fields.error(
            Keys.LIST, f"token {tokens[first]!r:.80} occurs twice, as {first} and {twin}"
        )
    types = read_array(fields, Keys.TOKEN_TYPE, n_vocab, np.integer)
    _check_types(fields, tokens, types)
    ids = {key: _token_id(fields, key, n_vocab, notes) for key in _ID_KEYS}
    bos = _or_default(ids[Keys.BOS_ID], defaults.bos, n_vocab)
    eos = _or_default(ids[Keys.EOS_ID], defaults.eos, n_vocab)
    add_bos = read_bool(fields, Keys.ADD_BOS, defaults.add_bos)
    if add_bos and bos is None:
        raise fields.error(Keys.BOS_ID, f"is missing, though {Keys.ADD_BOS} asks for it")
    add_eos = read_bool(fields, Keys.ADD_EOS, False)
    if add_eos and eos is None:
        raise fields.error(Keys.EOS_ID, f"is missing, though {Keys.ADD_EOS} asks for it")
    found = np.flatnonzero(np.isin(types, _FOUND_IN_TEXT)).tolist()
    named_ends = frozenset(i for i in found if tokens[i] in _END_TEXTS)
    special = named_ends | {i for i in found if types[i] in _SPECIAL}
    ends = named_ends | {ids[key] for key in _END_KEYS} | {eos}
    return Vocabulary(
        tokens=tokens,
        index=index,
        types=types.tolist(),
        special=special,
        user_defined=frozenset(found) - special,
        eog=frozenset(i for i in ends if i is not None),
        bos=bos,
        eos=eos,
        add_bos=add_bos,
        add_eos=add_eos,
        notes=tuple(notes),
    )


def read_strings(fields: Fields, key: str) -> list[str]:
    """A required array of strings."""
    value = _required(fields, key)
    if not isinstance(value, list):
        raise fields.error(key, f"expected an array of strings, found {describe(value)}")
    return value


def read_array(fields: Fields, key: str, size: int, kind: _Kind) -> NDArray[Any]:
    """A required array of `size` numbers of the numpy kind `np.integer` or `np.floating`."""
    value = _required(fields, key)
    if not isinstance(value, np.ndarray) or not np.issubdtype(value.dtype, kind):
        word = "integers" if kind is np.integer else "floats"
        raise fields.error(key, f"expected an array of {word}, found {describe(value)}")
    if value.size != size:
        raise fields.error(key, f"expected {size} elements, one per token, found {value.size}")
    return value


def read_bool(fields: Fields, key: str, default: bool) -> bool:
    """A bool, or the default where the key is absent."""
    value = fields.metadata.get(key, default)
    if not isinstance(value, bool):
        raise fields.error(key, f"expected a bool, found {describe(value)}")
    return value


def _required(fields: Fields, key: str) -> Any:
    value = fields.metadata.get(key)
    if value is None:
        raise fields.error(key, "is missing")
    return value


def _token_id(fields: Fields, key: str, n_vocab: int, notes: dict[str, None]) -> int | None:
    """The id at `key`; one outside the vocabulary (often -1) is none, with a note."""
    if key not in fields.metadata:
        return None
    id_ = fields.integer(key, -(1 << 63), 1 << 64)
    if 0 <= id_ < n_vocab:
        return id_
    notes[f"{fields.path}: {key} is {id_}, outside the vocabulary of {n_vocab}: ignored"] = None
    return None


def _or_default(id_: int | None, default: int | None, n_vocab: int) -> int | None:
    """The id, else the default where the vocabulary holds it."""
    if id_ is not None or default is None or default >= n_vocab:
        return id_
    return default


def _check_types(fields: Fields, tokens: list[str], types: NDArray[Any]) -> None:
    low, high = TokenType.NORMAL, TokenType.BYTE
    wrong = np.flatnonzero((types < low) | (types > high))
    if wrong.size:
        at = int(wrong[0])
        raise fields.error(
            Keys.TOKEN_TYPE, f"expected types {low:d} to {high:d}, found {types[at]} for token {at}"
        )
    for at in np.flatnonzero(types == TokenType.BYTE).tolist():
        if not _BYTE.fullmatch(tokens[at]):
            raise fields.error(
                Keys.LIST, f"byte token {at}: expected a name like <0x0A>, found {tokens[at]!r:.80}"
            )
