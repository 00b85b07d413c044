"""orthrus-server with a drafter beside a stock model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from drafters import drafter_file
from live_server import live


def test_slots_carry_what_the_drafter_knows(demo_file: Callable[..., Path], tmp_path: Path) -> None:
    """The text is that of plain decoding; rows that are shared, saved and restored draft, and are
    not computed again."""
    (tmp_path / "slots").mkdir()
    body: dict[str, Any] = {"prompt": "import os\n" * 20, "n_predict": 24, "temperature": 0}
    plain = {**body, "speculative": {"enabled": False}, "cache_prompt": False}
    flags = ("--no-heads", "--drafter", drafter_file(), "--draft-width", 5, "-np", 2, "-c", 512)
    model = demo_file("f32", split=True)
    with live(model, tmp_path, *flags, "--slot-save-path", tmp_path / "slots") as server:
        expected = server.post("/completion", {**plain, "id_slot": 0})[1]
        assert expected["timings"]["draft_n"] == 0
        first = server.post("/completion", {**body, "id_slot": 0})[1]
        # Plain decoding told the drafter nothing: all is computed again.
        assert first["tokens_cached"] == 0
        # Another conversation begins alike; its slot gets a copy.
        shared = first["tokens_evaluated"]
        other = server.post("/completion", {**body, "prompt": body["prompt"] + "def f("})[1]
        assert other["tokens_cached"] >= shared - 1
        status, saved = server.post("/slots/0?action=save", {"filename": "a"})
        assert status == 200, saved
        assert server.post("/slots/0?action=erase", {})[0] == 200
        assert server.post("/slots/0?action=restore", {"filename": "a"})[0] == 200
        again = server.post("/completion", {**body, "id_slot": 0})[1]
        assert again["tokens_cached"] == shared - 1
        for answer in (first, again):
            assert answer["content"] == expected["content"]
            assert answer["timings"]["draft_n_accepted"] > 5, answer["timings"]
        assert again["timings"]["draft_n"] == first["timings"]["draft_n"]
