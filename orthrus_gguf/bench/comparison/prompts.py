"""Prompts by domain: the built-in set, or a JSON file of the user's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orthrus_gguf.bench.comparison.builtin import PROMPTS
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.text.chat import ChatTemplate, Message
from orthrus_gguf.text.tokenizer import Tokenizer

#: Name of the set that comes with the package.
BUILTIN = "builtin"

#: Prompts of this domain, and of those that begin with the word (`chat code`), are questions: they
#: go through the file's chat template, if it has one.
CHAT = "chat"

Texts = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model gets it. name: its domain and number, such as `code 2`."""

    domain: str
    name: str
    tokens: tuple[int, ...]


def read_texts(name: str, domains: Sequence[str]) -> Texts:
    """Domain → prompt texts, from the built-in set or the file `name`; only `domains`, if any.

    Raises OrthrusError for files that hold anything but such an object, and unknown domains.
    """
    texts = PROMPTS if name == BUILTIN else _read(name)
    for domain in domains:
        if domain not in texts:
            known = ", ".join(texts)
            raise OrthrusError(f"--domains {domain}: {name} has prompts for {known}")
    return {domain: texts[domain] for domain in domains or texts}


def encode(texts: Texts, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[Prompt]:
    """The prompts of all texts, domain by domain."""
    prompts = []
    for domain, parts in texts.items():
        for number, text in enumerate(parts, 1):
            if domain.split()[:1] == [CHAT] and template is not None:
                text = template.render([Message("user", text)])
            prompts.append(Prompt(domain, f"{domain} {number}", tuple(tokenizer.encode(text))))
    return prompts


def _read(name: str) -> Texts:
    try:
        data = json.loads(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise OrthrusError(
            f"--prompts {name}: cannot be read ({error.strerror}); name a JSON file, or {BUILTIN}"
        ) from error
    except ValueError as error:
        raise _unexpected(name, f"not JSON ({error})") from error
    if not isinstance(data, dict) or not data:
        raise _unexpected(name, "not an object")
    for domain, texts in data.items():
        if not isinstance(texts, list) or not texts:
            raise _unexpected(name, f"{domain!r} is not a list of prompts")
        if not all(isinstance(text, str) and text for text in texts):
            raise _unexpected(name, f"a prompt of {domain!r} is not a text, or empty")
    return data


def _unexpected(name: str, problem: str) -> OrthrusError:
    return OrthrusError(
        f'--prompts {name}: {problem}; expected {{"domain": ["prompt", …], …}}, where prompts of'
        f" the domains {CHAT}, {CHAT} code and the like go through the chat template"
    )
