"""A server that many tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, chat_model, live


@pytest.fixture(scope="session")
def chat_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template."""
    return chat_model(checkpoint, tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def server(chat_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a folder for slots, metrics, and the fused strategy."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "slots").mkdir()
    flags = ("-np", 3, "-c", 1024, "--metrics", "--slot-save-path", folder / "slots", "-a", "demo")
    with live(chat_file, folder, *flags, "--strategy", "fused", "--draft-width", 6) as found:
        yield found
