"""orthrus-server --prefill-drafter: what is kept of prompts, and that responses say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from live_server import Live, live

CODE = (Path(__file__).parents[2] / "orthrus_gguf" / "sampling.py").read_text("utf-8")[:3000]


def test_prompts_are_shortened_and_responses_say_so(chat_file: Path, tmp_path: Path) -> None:
    flags = ("--prefill-drafter", "self:2", "--prefill-threshold", 100, "--prefill-keep", 0.1)
    with live(chat_file, tmp_path, *flags, "-np", 2, "-c", 2048, "--strategy", "ar") as server:
        body: dict[str, Any] = {"prompt": CODE, "n_predict": 8, "temperature": 0}
        status, found = server.post("/completion", body)
        assert status == 200, found
        kept = found["timings"]["prefill"]
        assert kept["lossy"] is True
        assert found["tokens_evaluated"] == kept["kept_tokens"] < kept["prompt_tokens"] / 3
        for prefill in ({"enabled": False}, {"keep": 1}, {"threshold": 2000}):
            whole = server.post("/completion", {**body, "prefill": prefill})[1]
            assert "prefill" not in whole["timings"]
            assert whole["tokens_evaluated"] == kept["prompt_tokens"]
        half = server.post("/completion", {**body, "prefill": {"keep": 0.5}})[1]
        assert half["timings"]["prefill"]["kept_tokens"] > 2 * kept["kept_tokens"]

        messages = [{"role": "system", "content": CODE[:600]}, {"role": "user", "content": CODE}]
        chat: dict[str, Any] = {"messages": messages, "max_tokens": 6, "temperature": 0}
        first = server.post("/v1/chat/completions", chat)[1]
        assert first["timings"]["prefill"]["scored_tokens"] > 1000
        answer = first["choices"][0]["message"]
        messages += [answer, {"role": "user", "content": "import re"}]
        second = server.post("/v1/chat/completions", chat)[1]
        assert second["timings"]["prefill"]["scored_tokens"] == 0
        assert second["timings"]["cache_n"] >= first["usage"]["prompt_tokens"]
        assert (
            server.post("/v1/completions", {"prompt": CODE, "max_tokens": 2})[1]["timings"][
                "prefill"
            ]["kept_tokens"]
            == kept["kept_tokens"]
        )
        refused(server, {**body, "prefill": {"keep": 0}}, "expected a share")
        refused(server, {**body, "prefill": {"threshold": 2048}}, "no prompt is longer")


def test_a_server_without_it_refuses_the_field(server: Live) -> None:
    body = {"prompt": "x", "n_predict": 1}
    refused(server, {**body, "prefill": {"keep": 0.5}}, "without --prefill-drafter")
    assert server.post("/completion", {**body, "prefill": {"enabled": False}})[0] == 200


def refused(server: Live, body: dict[str, Any], message: str) -> None:
    status, found = server.post("/completion", body)
    assert status == 400
    assert message in found["error"]["message"]
    assert found["error"]["param"] == "prefill"
