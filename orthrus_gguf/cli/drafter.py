"""`--drafter`: a drafter's file beside the model."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from dataclasses import replace

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile


def add_drafter_option(parser: argparse.ArgumentParser) -> None:
    """Under llama.cpp's names too."""
    parser.add_argument(
        "--drafter",
        "-md",
        "--model-draft",
        "--spec-draft-model",
        metavar="DRAFTER.gguf",
        help="a DFlash drafter that was trained for this model, in llama.cpp's format; auto uses it"
        " where it pays, two-pass where the model has no diffusion heads",
    )


def open_drafter(
    path: str | None, file: ModelFile, resources: ExitStack
) -> tuple[DrafterFile | None, ModelConfig]:
    """The drafter at `path`, if one is named, and the config of the model with it beside.

    Raises OrthrusError if it is no drafter of this model.
    """
    if path is None:
        return None, file.config
    drafter = resources.enter_context(DrafterFile.open(path, file.config, file.metadata))
    return drafter, replace(file.config, drafter_block=drafter.config.block_size)
