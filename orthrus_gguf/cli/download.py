"""`-hf OWNER/NAME[:QUANT]`: a model file from the Hugging Face Hub, kept in its client's cache.

The client throws away what it has of a file when a download is cut off; files of gigabytes deserve
better. So data is fetched here, into a file that the next try goes on with, and put where the
client's cache has it.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orthrus_gguf.cli.heads import heads_name
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.hub import explained

#: What llama.cpp takes when no quantization is named; failing these, the first file.
PREFERRED = ("Q4_K_M", "Q8_0")

#: Parts of names of GGUF files that are no models (as llama.cpp has it, and our heads files).
NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-", "-heads")

_SPEC = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(:(?P<quant>[\w.-]+))?")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT = 15.0  # seconds until the Hub counts as out of reach
_OFFLINE = "name a file that is here"


def resolve(spec: str) -> Path:
    """The model file of `OWNER/NAME[:QUANT]` on this machine, downloaded unless it is here already.

    All parts of a split file come with it, and the diffusion heads that lie beside it. Without a
    network, what the cache holds has to do. Raises OrthrusError.
    """
    parts = _SPEC.fullmatch(spec)
    if parts is None:
        raise OrthrusError(
            f"-hf {spec}: expected OWNER/NAME or OWNER/NAME:QUANT, for example"
            " Qwen/Qwen3-1.7B-GGUF:Q8_0"
        )
    repo, quant = parts["repo"], parts["quant"]
    with explained(f"-hf {spec}", offline=_OFFLINE):
        import huggingface_hub
        from huggingface_hub import errors

        try:
            info = huggingface_hub.HfApi().model_info(repo, timeout=_TIMEOUT)
        except errors.HFValidationError:
            raise
        except Exception as error:  # the client's network libraries raise all sorts
            status = getattr(getattr(error, "response", None), "status_code", 500)
            if status < 500:
                raise
            return _cached(spec, repo, quant, error)
        names = [sibling.rfilename for sibling in info.siblings or ()]
        wanted = choose(names, quant, f"-hf {spec}")
        first, *_ = [_fetch(repo, name, info.sha) for name in wanted]
        return first


def choose(names: Sequence[str], quant: str | None, where: str) -> list[str]:
    """The files to fetch, the one to open first. Raises OrthrusError if none is meant."""
    files = sorted(name for name in names if name.endswith(".gguf"))
    models = [name for name in files if not any(p in name.rpartition("/")[2] for p in NO_MODEL)]
    if not models:
        raise OrthrusError(f"{where}: the repository holds no GGUF model; check the name")
    tags = PREFERRED if quant is None else (quant,)
    matching = [
        name for tag in tags for name in models if re.search(re.escape(tag) + "[.-]", name, re.I)
    ]
    if not matching and quant is not None:
        shown = ", ".join(models[:12]) + (" …" if len(models) > 12 else "")
        raise OrthrusError(f"{where}: no file of that quantization; there are {shown}")
    first = (matching or models)[0]
    shard = _SHARD.fullmatch(first)
    found = [first]
    if shard is not None:
        count = int(shard["count"])
        found = [f"{shard['stem']}-{i:05}-of-{count:05}.gguf" for i in range(1, count + 1)]
        missing = [name for name in found if name not in files]
        if missing:
            raise OrthrusError(f"{where}: the repository lacks {missing[0]}, a part of {first}")
    heads = heads_name(first)
    return [*found, heads] if heads in files else found


def _cached(spec: str, repo: str, quant: str | None, problem: Exception) -> Path:
    """What an earlier run has downloaded; OrthrusError for the problem if there is nothing."""
    import huggingface_hub
    from huggingface_hub import errors

    reason = " ".join(str(problem).split())[:200] or type(problem).__name__
    try:
        folder = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except errors.LocalEntryNotFoundError:
        raise OrthrusError(
            f"-hf {spec}: the Hugging Face Hub cannot be reached ({reason}); go online, or"
            f" {_OFFLINE}"
        ) from problem
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.gguf")]
    path = folder / choose(names, quant, f"-hf {spec} (offline)")[0]
    print(
        f"-hf {spec}: the Hugging Face Hub cannot be reached; going on with {path}",
        file=sys.stderr,
        flush=True,
    )
    return path


def _fetch(repo: str, name: str, commit: str | None) -> Path:
    """One file of a repository at a commit, in the cache."""
    import huggingface_hub
    from huggingface_hub import constants, file_download

    known = huggingface_hub.try_to_load_from_cache(repo, name, revision=commit)
    if isinstance(known, str):
        return Path(known)
    url = huggingface_hub.hf_hub_url(repo, name)
    metadata = huggingface_hub.get_hf_file_metadata(url)
    folder = file_download.repo_folder_name(repo_id=repo, repo_type="model")
    blob = Path(constants.HF_HUB_CACHE) / folder / "blobs" / str(metadata.etag)
    if not blob.exists():
        _download(url, blob, metadata)
    return Path(huggingface_hub.hf_hub_download(repo, name))  # has it, and notes where it belongs


def _download(url: str, blob: Path, metadata: Any) -> None:
    """Fetch what is missing of a file, check all of it, and put it at `blob`."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        WeakFileLock,
        build_hf_headers,
    )

    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.orthrus-incomplete")
    with WeakFileLock(partial.with_suffix(".lock")):
        with partial.open("ab") as file:
            http_get(
                url,
                file,
                resume_size=file.tell(),
                headers=build_hf_headers(),
                expected_size=metadata.size,
                displayed_filename=url.rpartition("/")[2],
            )
        if _SHA256.fullmatch(blob.name) and _digest(partial) != blob.name:
            partial.unlink()
            raise OrthrusError(
                f"{url}: what came is not what the Hub has (its SHA-256 differs); run the same"
                " command again"
            )
        partial.replace(blob)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()
