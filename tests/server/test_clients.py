"""Clients that are not a vendor's own: LangChain, and `llm` of the command line."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_server import Live

pytestmark = pytest.mark.slow

TEXT = "def read(self, size=-1):"
SETTINGS: Any = {"seed": 3, "temperature": 0.7, "max_tokens": 24}


def said(server: Live, **more: Any) -> Any:
    """The message that the server gives whoever asks by hand."""
    body = {"messages": [{"role": "user", "content": TEXT}], **SETTINGS, **more}
    status, found = server.post("/v1/chat/completions", body)
    assert status == 200, found
    return found["choices"][0]["message"]


class TestLangChain:
    @pytest.fixture
    def chat(self, server: Live) -> Any:
        why = "LangChain is not tried: no langchain-openai here"
        module = pytest.importorskip("langchain_openai", reason=why)
        return module.ChatOpenAI(
            base_url=f"{server.url}/v1", api_key="none", model="demo", max_retries=0, **SETTINGS
        )

    def test_whole_and_streamed(self, chat: Any, server: Live) -> None:
        expected = said(server)["content"]
        whole = chat.invoke(TEXT)
        assert whole.content == expected
        assert whole.usage_metadata["output_tokens"] == 24
        assert whole.response_metadata["finish_reason"] == "length"
        pieces = list(chat.stream(TEXT))
        assert "".join(piece.content for piece in pieces) == expected
        assert len(pieces) > 5

    def test_several_at_once(self, chat: Any, server: Live) -> None:
        assert {one.content for one in chat.batch([TEXT] * 5)} == {said(server)["content"]}

    def test_a_tool(self, chat: Any) -> None:
        schema = {"type": "object", "properties": {"size": {"enum": [1, 2]}}, "required": ["size"]}
        function = {"name": "read", "description": "Read.", "parameters": schema}
        bound = chat.bind_tools([{"type": "function", "function": function}], tool_choice="read")
        bound = bound.bind(max_tokens=200)
        (call,) = bound.invoke(TEXT).tool_calls
        assert call["name"] == "read"
        assert call["args"]["size"] in (1, 2)
        pieces = list(bound.stream(TEXT))
        whole = pieces[0]
        for piece in pieces[1:]:
            whole += piece
        assert whole.tool_calls[0]["args"] == call["args"]

    def test_structured_output(self, chat: Any) -> None:
        schema = {
            "title": "size",
            "type": "object",
            "properties": {"size": {"type": "integer", "enum": [1, 2]}},
            "required": ["size"],
            "additionalProperties": False,
        }
        roomy = {"max_tokens": 300, "extra_body": {"enable_thinking": False}}
        chat = chat.model_copy(update=roomy)
        found = chat.with_structured_output(schema, method="json_schema").invoke(TEXT)
        assert found["size"] in (1, 2)

    def test_an_error(self, chat: Any) -> None:
        with pytest.raises(Exception, match="the prompt has"):
            chat.invoke(TEXT * 2000)


class TestLlm:
    @pytest.fixture
    def folder(self, server: Live, tmp_path: Path) -> Path:
        if importlib.util.find_spec("llm") is None:
            pytest.skip("llm is not tried: it is not installed here")
        (tmp_path / "extra-openai-models.yaml").write_text(
            f"- model_id: here\n  model_name: demo\n  api_base: {server.url}/v1\n"
        )
        return tmp_path

    @pytest.mark.parametrize("flags", [(), ("--no-stream",)])
    def test_a_question(self, folder: Path, server: Live, flags: tuple[str, ...]) -> None:
        options = [word for name, value in SETTINGS.items() for word in ("-o", name, str(value))]
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "here", "--no-log", *options, *flags, TEXT],
            capture_output=True,
            env={**os.environ, "LLM_USER_PATH": str(folder)},
            timeout=120,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().removesuffix("\n") == said(server)["content"]
