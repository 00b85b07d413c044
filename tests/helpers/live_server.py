"""orthrus-server as a process of its own, serving the demo model with a chat template."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from make_file import make_file

#: What Qwen3's template does, as far as the tests need it.
TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\n' + (tools | tojson) + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{ '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- if enable_thinking is defined and enable_thinking is true %}{{ '<think>\\n' }}{%- endif %}
{%- endif %}"""


def chat_model(checkpoint: Path, folder: Path) -> Path:
    """The demo checkpoint with a chat template, as a GGUF."""
    source = folder / "checkpoint"
    source.mkdir()
    for file in checkpoint.iterdir():
        if file.name != "tokenizer_config.json":
            (source / file.name).symlink_to(file)
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config["chat_template"] = TEMPLATE
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    path = folder / "chat.gguf"
    make_file(source, path, "--type", "q8_0")
    shutil.rmtree(source)
    return path


@dataclass
class Live:
    """A server that runs."""

    port: int
    process: subprocess.Popen[str]
    log: IO[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        return self._call(urllib.request.Request(self.url + path, headers=headers))

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method="POST")
        status, text = self._call(request)
        return status, json.loads(text)

    @staticmethod
    def _call(request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal, and wait for the end; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def said(self) -> str:
        """Its stderr."""
        self.log.seek(0)
        return self.log.read()

    def wait(self) -> None:
        """Until the model is there."""
        for _ in range(600):
            assert self.process.poll() is None, self.said()
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.05)
        raise AssertionError("it does not answer")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@contextmanager
def live(model: Path, folder: Path, *flags: object, ready: bool = True) -> Iterator[Live]:
    """A server process with these flags; killed in the end if it still runs."""
    port = free_port()
    words = [model, "--port", port, "-t", 1, *flags]
    command = [sys.executable, "-m", "orthrus_gguf.cli.server", *map(str, words)]
    with (folder / f"{port}.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True)
        server = Live(port, process, log)
        try:
            if ready:
                server.wait()
            yield server
        finally:
            process.kill()
            process.wait()
