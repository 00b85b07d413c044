"""Opening the model that flags name, with the diffusion heads that lie beside it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile

_PART = re.compile(r"-\d{5}-of-\d{5}$")


def heads_name(name: str) -> str:
    """What the heads of a base file are called: those of `a/base.gguf` are `a/base-heads.gguf`."""
    return _PART.sub("", name.removesuffix(".gguf")) + "-heads.gguf"


def open_model(path: str, args: argparse.Namespace, say: Callable[[str], None]) -> ModelFile:
    """The model file at `path`, with `--heads`, or else with those beside it, unless `--no-heads`.

    Raises OrthrusError as ModelFile.open does, also where the file beside it is of another model.
    """
    beside = Path(heads_name(path))
    file = ModelFile.open(path, args.heads)
    if args.heads is not None or args.no_heads or file.config.has_heads or not beside.is_file():
        return file
    file.close()
    try:
        pair = ModelFile.open(path, beside)
    except OrthrusError as error:
        raise OrthrusError(f"{error} (found beside {path}; --no-heads leaves it out)") from error
    say(f"{path}: with the diffusion heads beside it, {beside.name} (--no-heads leaves them out)")
    return pair
