"""Find and read the tokenizer of a checkpoint folder."""

from __future__ import annotations

from pathlib import Path

from orthrus_converters.bpe import is_byte_level, read_bpe
from orthrus_converters.chat_templates import JINJA, OLD_JSON
from orthrus_converters.json_file import JsonFile
from orthrus_converters.sentencepiece_model import read_sentencepiece
from orthrus_converters.vocabulary import Vocabulary
from orthrus_gguf.errors import OrthrusError

#: All files that may be read.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    JINJA,
    OLD_JSON,
)


def read_vocabulary(folder: Path, config: JsonFile, n_vocab: int) -> Vocabulary:
    """The tokenizer in `folder`, for an embedding of `n_vocab` rows. config: config.json.

    From tokenizer.json, else vocab.json and merges.txt, else tokenizer.model. A tokenizer.json
    that was made from a tokenizer.model gives way to its original.
    """
    settings = JsonFile.read_if_present(folder / "tokenizer_config.json")
    fast, model = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.exists() and not (model.exists() and not is_byte_level(JsonFile.read(fast))):
        return read_bpe(folder, config, settings, n_vocab)
    if model.exists():
        return read_sentencepiece(folder, config, settings, n_vocab)
    if (folder / "vocab.json").exists():
        return read_bpe(folder, config, settings, n_vocab)
    raise OrthrusError(
        f"{folder}: no tokenizer: expected tokenizer.json, vocab.json with merges.txt, or "
        "tokenizer.model; download it"
    )
