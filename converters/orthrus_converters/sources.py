"""What a source is that the command line names: a folder, a GGUF file, or a repository id."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from orthrus_converters.gguf_source import is_gguf
from orthrus_converters.hub import download
from orthrus_gguf.errors import OrthrusError

#: `organization/name`, as the Hub allows it.
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class FolderSource:
    """A checkpoint folder. name: what to call the model. url, revision: of where it came from."""

    folder: Path
    name: str
    url: str = ""
    revision: str = ""


@dataclass(frozen=True)
class FileSource:
    """A GGUF file."""

    path: Path


def resolve(text: str, revision: str | None) -> FolderSource | FileSource:
    """What `text` names; a repository is downloaded first. Raises OrthrusError.

    Anything that exists is a path, so that a repository id never hides a folder.
    """
    path = Path(text)
    if not path.exists() and _REPO_ID.fullmatch(text) and path.suffix != ".gguf":
        folder = download(text, revision)
        # In the Hub's cache, the folder of a snapshot is called like its commit.
        return FolderSource(
            folder, text.split("/")[1], f"https://huggingface.co/{text}", folder.name
        )
    if revision is not None:
        raise OrthrusError(f"--revision {revision}: only repositories have revisions; leave it out")
    if is_gguf(path):
        return FileSource(path)
    return FolderSource(path, Path(os.path.abspath(path)).name)
