"""The base that heads are trained for: a GGUF as it is, or a checkpoint, converted first."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path

from orthrus_converters.checkpoint import check_folder, open_checkpoint
from orthrus_converters.cli import main as convert
from orthrus_converters.sources import FileSource, resolve
from orthrus_converters.tensor_names import has_heads

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.text.tokenizer import Tokenizer

#: What mask tokens are called.
_MASKS = ("<|mask|>", "<mask>", "[MASK]", "<|MASK|>", "<|reserved_special_token_0|>")


def base_file(name: str, folder: Path) -> Path:
    """The GGUF of a base: the one named, or what becomes of a checkpoint's AR weights, in their own
    type, in `folder`. Raises OrthrusError."""
    source = resolve(name, None)
    if isinstance(source, FileSource):
        return source.path
    check_folder(source.folder)
    path = folder / "base.gguf"
    if not path.exists():
        twins = has_heads(open_checkpoint(source.folder))
        with redirect_stdout(sys.stderr):  # the names of the files are no output of ours
            code = convert([name, str(path), *(["--split"] if twins else [])])
        if code != 0:
            raise OrthrusError(f"{name}: could not be converted; see the line above")
        # Heads that the checkpoint came with are not what is trained here.
        path.with_name("base-heads.gguf").unlink(missing_ok=True)
    return path


def mask_token(file: ModelFile, tokenizer: Tokenizer, given: int | None) -> int:
    """The token that stands for what a block is to say. Raises OrthrusError if there is none."""
    n_vocab = file.config.n_vocab
    if given is not None:
        if not 0 <= given < n_vocab or given in tokenizer.eog:
            raise OrthrusError(
                f"--mask-token {given}: expected an id below {n_vocab} that ends no text"
            )
        return given
    if file.config.mask_token is not None:
        return file.config.mask_token
    named = file.metadata.get(keys.MASK_TOKEN_ID)
    if isinstance(named, int) and 0 <= named < n_vocab:
        return named
    for text in _MASKS:
        found = tokenizer.special_id(text)
        if found is not None:
            return found
    raise OrthrusError(
        f"{file.paths[0]}: its tokenizer has no mask token; name the id of one that texts do not "
        "hold: --mask-token ID"
    )
