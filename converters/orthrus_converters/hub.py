"""Checkpoints from the Hugging Face Hub, through its own client: cached, with progress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orthrus_converters.checkpoint import INDEX
from orthrus_converters.json_file import JsonFile
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.hub import explained

_TEMPLATES = "*.jinja"  # the only files of interest in folders of the repository

#: What a conversion reads besides weights. Nothing else is downloaded: no pickles, no code.
_SMALL = ("*.json", _TEMPLATES, "*.txt", "tokenizer.model", "README.md")
_WEIGHTS = ("*.safetensors",)


def download(repo: str, revision: str | None) -> Path:
    """The folder of a snapshot of `repo`, its weights included.

    The small files come first, so that a model without heads is refused before gigabytes are
    fetched. Raises OrthrusError.
    """
    folder = _snapshot(repo, revision, _SMALL)
    index = JsonFile.read_if_present(folder / INDEX).mapping("weight_map")
    if index and not any("_diff." in name for name in index):
        raise OrthrusError(
            f"{repo}: holds no diffusion heads (no *_diff weights in {INDEX}): not an Orthrus "
            "checkpoint; check the name"
        )
    return _snapshot(repo, revision, (*_SMALL, *_WEIGHTS))


def _snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download what matches, unless it is in the cache. Raises OrthrusError."""
    where = repo if revision is None else f"{repo} (revision {revision})"
    with explained(
        where, also="no such folder here, and ", offline="give a folder that holds the checkpoint"
    ):
        import huggingface_hub  # only when needed: it takes a while, and folders do without

        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*patterns],
                ignore_patterns=[f"*/{pattern}" for pattern in patterns if pattern != _TEMPLATES],
            )
        )
