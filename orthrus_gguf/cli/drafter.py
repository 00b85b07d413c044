"""`--drafter`: a drafter's file beside the model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

from orthrus_gguf.cli.options import positive
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile, open_beside
from orthrus_gguf.runtime.load import MTP_RUNTIMES, RuntimeName


def add_drafter_option(parser: argparse.ArgumentParser) -> None:
    """Under llama.cpp's names too."""
    parser.add_argument(
        "--drafter",
        "-md",
        "--model-draft",
        "--spec-draft-model",
        metavar="DRAFTER.gguf",
        help="a DFlash drafter that was trained for this model, in llama.cpp's format, or its MTP"
        " block (mtp-*.gguf) where the model's file holds none; auto uses it where it pays,"
        " two-pass where the model has no diffusion heads",
    )


def add_draft_ids_option(parser: argparse.ArgumentParser) -> None:
    """For commands that generate."""
    parser.add_argument(
        "--draft-ids",
        type=positive,
        metavar="N",
        help="MTP drafts: of the first N ids of the vocabulary only, which are its most frequent"
        " ones mostly; drafting takes less time, other tokens are never drafted (default: all)",
    )


def open_drafter(
    path: str | None,
    file: ModelFile,
    runtime: RuntimeName,
    resources: ExitStack,
    say: Callable[[str], None],
    *,
    mtp: bool = True,
    ids: int | None = None,
) -> tuple[DrafterFile | MtpFile | None, ModelConfig]:
    """The drafter at `path`, if one is named, else with `mtp` the block that the model's own file
    holds; and the config of the model with it beside.

    ids: see `add_draft_ids_option`. runtime: what they will run on; `say` hears that it leaves a
    block unused. Raises OrthrusError if the file is no drafter of this model.
    """
    found: DrafterFile | MtpFile | None = None
    if path is not None:
        found = open_beside(path, file)
        resources.callback(found.close)
    elif mtp and file.config.hybrid is not None and file.config.hybrid.mtp:
        if runtime in MTP_RUNTIMES:
            found = MtpFile.inside(file)
        else:
            say(f"{file.paths[0]}: --runtime {runtime.value} leaves its MTP block unused")
    if ids is not None:
        if not isinstance(found, MtpFile):
            raise OrthrusError("--draft-ids: is for MTP drafts, and there is no MTP block")
        found.cut(ids)
    config = file.config
    return found, config if found is None else replace(config, beside=found.beside)
