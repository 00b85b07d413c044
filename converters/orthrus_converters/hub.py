"""Checkpoints from the Hugging Face Hub, through its own client: cached, resumable, with progress.

The client reads the token from the environment (`HF_TOKEN`) or from `hf auth login`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orthrus_converters.checkpoint import INDEX
from orthrus_converters.json_file import JsonFile
from orthrus_gguf.errors import OrthrusError

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
    # Imported only when needed: it takes a while, and conversions of folders do without.
    import huggingface_hub
    from huggingface_hub import errors

    where = repo if revision is None else f"{repo} (revision {revision})"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[*patterns],
                ignore_patterns=[f"*/{pattern}" for pattern in patterns if pattern != _TEMPLATES],
            )
        )
    except errors.GatedRepoError:
        advice = "accept its terms on its page and set HF_TOKEN to your access token"
        raise OrthrusError(f"{where}: access is restricted; {advice}") from None
    except errors.RevisionNotFoundError:
        raise OrthrusError(f"{where}: the repository has no such revision; check it") from None
    except errors.RepositoryNotFoundError:
        raise OrthrusError(
            f"{where}: no such folder here, and no such repository on the Hugging Face Hub; check "
            "the name, and set HF_TOKEN if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise OrthrusError(
            f"{where}: no such folder here, and the Hugging Face Hub cannot be reached; go online, "
            "or give a folder that holds the checkpoint"
        ) from None
    except errors.HFValidationError:
        raise OrthrusError(f"{where}: no such folder, and no valid repository id") from None
    except Exception as error:  # the client's network libraries raise all sorts
        if isinstance(error, MemoryError | ImportError):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OrthrusError(
            f"{where}: cannot be downloaded: {reason}; run the same command again, finished parts "
            "are kept"
        ) from error
