"""The Hugging Face Hub through its own client, whose errors become lines that help.

The client reads the token from the environment (`HF_TOKEN`) or from `hf auth login`, and keeps what
it fetched in the cache of all Hugging Face programs (`HF_HOME`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from orthrus_gguf.errors import OrthrusError


@contextmanager
def explained(where: str, *, also: str = "", offline: str) -> Iterator[None]:
    """Turn what the client raises into OrthrusErrors that begin with `where`.

    also: what else the name could have meant, such as "no such folder here, and ". offline: what to
    do without a network.
    """
    # Imported only when needed: it takes a while, and most runs do without.
    from huggingface_hub import errors

    try:
        yield
    except (OrthrusError, MemoryError, ImportError):
        raise
    except errors.GatedRepoError:
        advice = "accept its terms on its page and set HF_TOKEN to your access token"
        raise OrthrusError(f"{where}: access is restricted; {advice}") from None
    except errors.RevisionNotFoundError:
        raise OrthrusError(f"{where}: the repository has no such revision; check it") from None
    except errors.RepositoryNotFoundError:
        raise OrthrusError(
            f"{where}: {also}no such repository on the Hugging Face Hub; check the name, and set"
            " HF_TOKEN if it is private"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise OrthrusError(
            f"{where}: {also}the Hugging Face Hub cannot be reached; go online, or {offline}"
        ) from None
    except errors.HFValidationError:
        raise OrthrusError(f"{where}: {also}no valid repository id") from None
    except Exception as error:  # the client's network libraries raise all sorts
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OrthrusError(
            f"{where}: cannot be downloaded: {reason}; run the same command again, finished parts "
            "are kept"
        ) from error
