"""What a checkpoint's tokenizer files become in the GGUF: tokens, special ids, chat templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from orthrus_converters.json_file import JsonFile, describe
from orthrus_gguf.errors import OrthrusError

_Type = gguf.TokenType

#: The special tokens that llama.cpp's converter looks for. The mask token is not among them: what
#: the model was trained with is in config.json.
SPECIALS = ("bos", "eos", "unk", "sep", "pad")

DEFAULT_TEMPLATE = "default"

#: How added tokens may be looked for, and what that does.
_MARKS = {
    "lstrip": "drops the blanks before them",
    "rstrip": "drops the blanks behind them",
    "single_word": "finds them as whole words only",
}


@dataclass(frozen=True)
class Token:
    """text: as the vocabulary spells it. type: one of gguf.TokenType. score: SentencePiece only."""

    text: str
    type: int
    score: float = 0.0


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a model.

    model, pre: `tokenizer.ggml.model` and `.pre`.
    tokens: one per row of the embedding. merges: empty unless BPE.
    special: name from SPECIALS -> id. flags: name such as `add_bos_token` -> value.
    templates: name -> chat template; DEFAULT_TEMPLATE is the one to use unless asked otherwise.
    notes: lines about what of the checkpoint's files was left out.
    """

    model: str
    pre: str
    tokens: Sequence[Token]
    merges: Sequence[str]
    special: Mapping[str, int]
    flags: Mapping[str, bool]
    templates: Mapping[str, str]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class AddedToken:
    """A token beside the trained vocabulary, matched before it."""

    id: int
    text: str
    special: bool

    @property
    def type(self) -> int:
        """CONTROL, or USER_DEFINED for tokens that are ordinary text to a reader.

        Tokens in `<|…|>` count as control tokens though some checkpoints do not mark them as
        special: llama.cpp's converter decides so too.
        """
        control = self.special or (self.text.startswith("<|") and self.text.endswith("|>"))
        return _Type.CONTROL if control else _Type.USER_DEFINED


def added_tokens(
    folder: Path, settings: JsonFile, listed: Sequence[Any], texts: Mapping[str, int]
) -> list[AddedToken]:
    """The added tokens of a tokenizer, by id.

    settings: tokenizer_config.json, whose `added_tokens_decoder` adds to `listed`, the entries of
    tokenizer.json, and whose `extra_special_tokens` are special wherever they come from.
    texts: the trained vocabulary.
    """
    found = dict(_added_entries(folder, settings, listed))
    for text in _extra_specials(settings):
        id_ = found[text][0] if text in found else texts.get(text)
        if id_ is None:  # as in transformers: the next id after all others
            id_ = max(len(texts), *(1 + used for used, _ in found.values()), 0)
        found[text] = (id_, True)
    return [
        AddedToken(id_, text, special)
        for text, (id_, special) in sorted(found.items(), key=lambda item: item[1][0])
    ]


def _added_entries(
    folder: Path, settings: JsonFile, listed: Sequence[Any]
) -> Iterator[tuple[str, tuple[int, bool]]]:
    """(text, (id, special)) of every added token, the most trustworthy source last."""
    for text, id_ in JsonFile.read_if_present(folder / "added_tokens.json").values.items():
        yield text, (_token_id(folder / "added_tokens.json", text, id_), False)
    for number, entry in settings.mapping("added_tokens_decoder").items():
        id_ = int(number) if number.isdecimal() else number
        yield _added_entry(settings.path, {"id": id_, **_object(settings.path, entry)})
    for entry in listed:
        yield _added_entry(folder / "tokenizer.json", _object(folder / "tokenizer.json", entry))


def unkept_marks(settings: JsonFile, listed: Sequence[Any]) -> list[str]:
    """A line for each way in which added tokens are looked for that GGUF files cannot say.

    Arguments as added_tokens().
    """
    entries = [*settings.mapping("added_tokens_decoder").values(), *listed]
    notes = []
    for mark, effect in _MARKS.items():
        texts = {
            str(entry.get("content")): None
            for entry in entries
            if isinstance(entry, dict) and entry.get(mark) is True
        }
        if texts:
            first, *others = texts
            more = f" and {len(others)} more" if others else ""
            notes.append(
                f"{settings.path.parent}: {mark} of {first}{more} is left out, there is no place "
                f"for it in GGUF files: transformers {effect}, readers of the file do not"
            )
    return notes


def _added_entry(path: Path, entry: Mapping[str, Any]) -> tuple[str, tuple[int, bool]]:
    text = entry.get("content")
    if not isinstance(text, str) or not text:
        raise _broken(path, f"an added token has the text {describe(text)}")
    return text, (_token_id(path, text, entry.get("id")), entry.get("special") is True)


def _token_id(path: Path, text: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise _broken(path, f"token {text!r} has the id {describe(value)}")
    return value


def _object(path: Path, entry: object) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise _broken(path, f"expected an object for an added token, found {describe(entry)}")
    return entry


def _extra_specials(settings: JsonFile) -> list[str]:
    """The texts of `extra_special_tokens` or its older name: a list, or an object of named ones."""
    texts: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.values.get(key) or []
        entries = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(entries, list):
            raise settings.error(key, f"expected a list, found {describe(value)}", "correct it")
        for entry in entries:
            text = entry.get("content") if isinstance(entry, dict) else entry
            if not isinstance(text, str):
                raise settings.error(key, f"holds {describe(text)}, no text", "correct it")
            texts.append(text)
    return texts


def place_tokens(
    path: Path, texts: Mapping[str, int], added: Sequence[AddedToken], n_vocab: int
) -> list[Token]:
    """One token per row of the embedding: trained ones, added ones, and fillers in the gaps.

    path: for error messages. Raises OrthrusError if ids collide or do not fit.
    """
    slots: dict[int, Token] = {}
    ids = dict(texts)
    for text, id_ in texts.items():
        _place(path, slots, id_, Token(text, _Type.NORMAL), n_vocab)
    for token in added:
        if ids.get(token.text, token.id) != token.id:
            raise _broken(path, f"token {token.text!r} has the ids {ids[token.text]}, {token.id}")
        slots.pop(ids.get(token.text, -1), None)
        _place(path, slots, token.id, Token(token.text, token.type), n_vocab)
    return fill_gaps(slots, n_vocab)


def fill_gaps(slots: Mapping[int, Token], n_vocab: int) -> list[Token]:
    """Tokens 0 … n_vocab - 1; embedding rows without one get the filler of llama.cpp, or one that
    no other token is called like."""
    taken = {token.text for token in slots.values()}
    score = -10000.0  # llama.cpp's, read by SentencePiece vocabularies only
    tokens = []
    for index in range(n_vocab):
        text = f"[PAD{index}]"
        while index not in slots and text in taken:
            text += "_"
        tokens.append(slots.get(index) or Token(text, _Type.UNUSED, score))
    return tokens


def _place(path: Path, slots: dict[int, Token], id_: int, token: Token, n_vocab: int) -> None:
    if id_ >= n_vocab:
        raise OrthrusError(
            f"{path}: token {token.text!r} has the id {id_}, but the model has only {n_vocab} "
            "(vocab_size in config.json); the tokenizer belongs to another model"
        )
    if id_ in slots:
        raise _broken(path, f"id {id_} belongs to {slots[id_].text!r} and to {token.text!r}")
    slots[id_] = token


def special_ids(
    settings: JsonFile, config: JsonFile, tokens: Sequence[Token]
) -> tuple[dict[str, int], list[str]]:
    """Ids of the SPECIALS: from tokenizer_config.json by text, else from config.json by number;
    and a line for each that is outside the vocabulary, which is left out, as by llama.cpp's
    converter."""
    notes: list[str] = []
    ids = {token.text: index for index, token in enumerate(tokens)}
    found: dict[str, int] = {}
    for name in SPECIALS:
        entry = settings.values.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text in ids:
            found[name] = ids[text]
            continue
        key = f"{name}_token_id"
        number = config.values.get(key)
        if isinstance(number, list) and number:  # several EOS tokens: the first is the main one
            number = number[0]
        if number is None:
            continue
        id_ = JsonFile(config.path, {key: number}).integer(key, -(1 << 63), 1 << 64)
        if 0 <= id_ < len(tokens):
            found[name] = id_
        else:
            notes.append(
                f"{config.path}: {key} is {id_}, outside the vocabulary of {len(tokens)}: left out"
            )
    return found, notes


def prompt_flags(settings: JsonFile, defaults: Mapping[str, bool]) -> dict[str, bool]:
    """`add_bos_token` and `add_eos_token`: from tokenizer_config.json, else from `defaults`."""
    flags = dict(defaults)
    for name in ("add_bos_token", "add_eos_token"):
        if settings.values.get(name) is not None:
            flags[name] = settings.boolean(name, default=False)
    return flags


def check_distinct(path: Path, tokens: Sequence[Token]) -> None:
    """Raise OrthrusError if two tokens have one text: readers could not tell them apart."""
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if ids.setdefault(token.text, index) != index:
            raise _broken(path, f"token {token.text!r} has the ids {ids[token.text]}, {index}")


def _broken(path: Path, problem: str) -> OrthrusError:
    return OrthrusError(f"{path}: {problem}; the tokenizer is damaged: download it again")
