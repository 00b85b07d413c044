"""Chat templates: messages to the prompt text that a model was trained on.

A template is a program that comes with the file, so from a stranger. It runs in Jinja's sandbox, in
a process of its own that the kernel limits (`chat_worker.py`). Limits inside the process were not
enough: one step of a template (`'a' * 10**10`, or printing a list that holds itself 2**40 times)
runs in C code that no line budget and no signal handler interrupts. A process ends
whatever it does. The one that imports Jinja stays between messages and forks for each
(`chat_process.py`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import gguf

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.fields import describe
from orthrus_gguf.gguf.reader import Value
from orthrus_gguf.records import dataclass
from orthrus_gguf.text import chat_process
from orthrus_gguf.text.tokenizer import Tokenizer

Keys = gguf.Keys.Tokenizer


@dataclass(frozen=True)
class Limits:
    """What rendering may cost: seconds of processor time and of waiting, bytes, characters.

    macOS and Windows do not enforce limits on memory; there only time and output are bounded.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 30
    memory: int = 1 << 30
    output: int = 16_000_000


@dataclass(frozen=True)
class Message:
    """One turn. role: `system`, `user`, `assistant`, or whatever else the template knows."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and the variables that it gets from the vocabulary."""

    source: str
    bos_token: str
    eos_token: str
    limits: Limits = Limits()

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Value], tokenizer: Tokenizer
    ) -> ChatTemplate | None:
        """The default template of a file; None for a completion model, which has no template.

        Raises OrthrusError when the file names templates but none of them is the default.
        """
        source = metadata.get(Keys.CHAT_TEMPLATE)
        if source is None:
            names = metadata.get(Keys.CHAT_TEMPLATES)
            if names is None:
                return None
            known = ", ".join(names) if isinstance(names, list) else describe(names)
            raise _error(f"{Keys.CHAT_TEMPLATE} is missing, the file only names others ({known})")
        if not isinstance(source, str):
            raise _error(
                f"metadata key {Keys.CHAT_TEMPLATE}: expected a string, found {describe(source)}"
            )
        bos = None if _lacks_bos(metadata, tokenizer) else tokenizer.bos
        return cls(source, _text(tokenizer, bos), _text(tokenizer, tokenizer.eos))

    @property
    def supports_thinking(self) -> bool:
        """Whether the template looks at Qwen3's switch `enable_thinking`."""
        return re.search(r"\benable_thinking\b", self.source) is not None

    def render(
        self,
        messages: Sequence[Message | Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        guard: Callable[[str], str] | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. Encode it with special tokens; it may begin with the BOS token.

        guard: applied to every text that does not come from the template, if it must not speak for
        the system: give `Tokenizer.guard`, and encode what comes of it with `guarded`.

        add_generation_prompt: end where the assistant's answer begins. thinking: Qwen3's switch;
        None leaves it to the template. tools: JSON schemas of functions that the model may call.
        more: further variables. messages: objects of any fields, as far as the template knows them.
        Raises OrthrusError for errors of the template, its own complaints, and exceeded limits.
        """
        outside = partial(_guarded, guard=guard or str)
        variables: dict[str, Any] = {
            **{name: outside(value) for name, value in (more or {}).items()},
            "messages": [
                {name: outside(value) for name, value in _fields(message).items()}
                for message in messages
            ],
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else [outside(tool) for tool in tools],
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        if thinking is not None:
            variables["enable_thinking"] = thinking
        return _run_worker({"source": self.source, "variables": variables}, self.limits)


def _fields(message: Message | Mapping[str, Any]) -> Mapping[str, Any]:
    return asdict(message) if isinstance(message, Message) else message


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    """The same value with every text in it guarded, names of fields included."""
    if isinstance(value, str):
        return guard(value)
    if isinstance(value, list | tuple):
        return [_guarded(item, guard) for item in value]
    if isinstance(value, Mapping):
        return {_guarded(key, guard): _guarded(item, guard) for key, item in value.items()}
    return value


def _lacks_bos(metadata: Mapping[str, Value], tokenizer: Tokenizer) -> bool:
    """Whether the file's BOS is one in name only, so that in transformers templates see none.

    Qwen's tokenizers have none. llama.cpp's converter takes the `bos_token_id` of config.json, an
    end of text, and says that prompts do not begin with it.
    """
    return metadata.get(Keys.PRE) == "qwen2" and not tokenizer.add_bos


def _run_worker(job: dict[str, Any], limits: Limits) -> str:
    """Render in a process of its own, which stays for the next message."""
    try:
        answer = chat_process.render({**job, "limits": asdict(limits)}, limits.wall_seconds)
    except TimeoutError:
        raise _error(f"did not finish within {limits.wall_seconds:g} s") from None
    except chat_process.EndedError as error:
        raise _error(str(error)) from None
    except OSError as error:
        raise _error(f"cannot start {sys.executable}: {error.strerror}") from error
    if "error" in answer:
        raise _error(answer["error"])
    text: str = answer["text"]
    return text


def _error(problem: str) -> OrthrusError:
    """One line, and no control characters: the template may have written part of it."""
    visible = "".join(char if char.isprintable() else " " for char in problem)
    problem = " ".join(visible.split())
    return OrthrusError(f"chat template: {problem}; --raw sends the prompt without a template")


def _text(tokenizer: Tokenizer, id: int | None) -> str:
    return "" if id is None else tokenizer.token_bytes(id).decode(errors="replace")
