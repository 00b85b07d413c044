"""Turns on a hybrid, whose cache cannot go back everywhere: each processes what is new."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mtp_models import loaded_mtp, mtp_model

from orthrus_gguf.cli.server import _cache_identity
from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.engine import Session, common_prefix
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.request import Request, Result
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.chat import ChatTemplate, Message
from orthrus_gguf.text.partings import partings
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer

GREEDY = SamplingSettings(temperature=0)
PLANS = ("ar", "two-pass+lookup")

#: Like Qwen3.5's: what was thought before the last question is left out, and so is its place.
SOURCE = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{{ m.role[0] }}:
{%- if m.role == 'assistant' and loop.index0 > ns.last -%}<think>{%- endif -%}
{{ m.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}a:<think>{%- endif -%}"""  # noqa: E501
SYSTEM = Message("system", "be brief")


@pytest.fixture(scope="module")
def model() -> Iterator[ModelWithDrafter]:
    with loaded_mtp(mtp_model(), RuntimeName.REFERENCE) as found:
        yield found


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with ModelFile.open(mtp_model()) as file:
        return load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)


@pytest.fixture(scope="module")
def template(tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(SOURCE, "", "<|end|>")


def asked(
    template: ChatTemplate, tokenizer: Tokenizer, messages: list[Message]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A prompt, and where others will part from it."""
    text = template.render(messages, guard=tokenizer.guard)
    ids = tokenizer.encode(text, guarded=True)
    return tuple(ids), partings(template, tokenizer, text, ids, messages, guard=tokenizer.guard)


def request(model: ModelWithDrafter, plan: str, prompt: tuple[int, ...]) -> Request:
    return Request(prompt, GREEDY, FixedPolicy(parse(plan), model.config), max_tokens=4)


def answer(session: Session, request: Request) -> Result:
    generation = session.generate(request)
    for _ in generation:
        pass
    return generation.result


def test_partings(template: ChatTemplate, tokenizer: Tokenizer) -> None:
    """Behind the system message, and where the next turn has the answer and not the thought."""
    prompt, places = asked(template, tokenizer, [SYSTEM, Message("user", "why")])
    assert [tokenizer.decode(prompt[:place], continuation=True)[-6:] for place in places] == [
        "brief<|end|>"[-6:],
        "end|>a:"[-6:],
    ]
    later, _ = asked(
        template,
        tokenizer,
        [SYSTEM, Message("user", "why"), Message("assistant", "so"), Message("user", "oh")],
    )
    assert common_prefix(prompt, later) == places[1] == len(prompt) - 1
    refusal = "{% if messages|length > 2 %}{{ raise_exception('no') }}{% endif %}s<|end|>"
    refuses = replace(template, source=refusal + SOURCE)
    assert asked(refuses, tokenizer, [SYSTEM, Message("user", "why")])[1] == (2,)


@pytest.mark.parametrize("plan", PLANS)
def test_ten_turns_whose_thoughts_are_dropped(
    model: ModelWithDrafter, template: ChatTemplate, tokenizer: Tokenizer, plan: str
) -> None:
    """Every turn processes the rows behind what it shares with the last one, and no others."""
    session = Session(model, tokenizer, 512)
    messages = [SYSTEM]
    before: tuple[int, ...] = ()
    for turn in range(10):
        messages.append(Message("user", f"what {turn}"))
        prompt, places = asked(template, tokenizer, messages)
        result = answer(session, replace(request(model, plan, prompt), places=places))
        shared = common_prefix(before, prompt)
        assert result.statistics.cached_tokens == shared
        assert bool(turn) == bool(shared)
        before = (*prompt, *result.output[:-1])
        messages.append(Message("assistant", f"it {turn}"))
    fresh = answer(Session(model, tokenizer, 512), request(model, "ar", prompt))
    assert result.output == fresh.output
    # Another conversation that begins alike; and one turn of this with other words.
    for others in ([SYSTEM, Message("user", "no")], [*messages[:-2], Message("user", "no")]):
        prompt, places = asked(template, tokenizer, others)
        held = session.held
        result = answer(session, request(model, plan, prompt))
        parted = common_prefix(held, prompt)
        assert parted - len("u:") - len("what") <= result.statistics.cached_tokens <= parted
        assert result.statistics.cached_tokens > 0


def test_an_end_among_accepted_drafts(model: ModelWithDrafter, tokenizer: Tokenizer) -> None:
    """Nothing behind it is committed, so that nothing must be taken back."""

    class Ends:
        """The same tokens, of which another one ends the text."""

        def __init__(self, end: int) -> None:
            self.eog = frozenset({end})

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    prompt = (92, 170, 241)
    policy = FixedPolicy(parse("two-pass@4"), model.config)
    asked = replace(request(model, "two-pass@4", prompt), max_tokens=40, policy=policy)
    text = answer(Session(model, Ends(-1), 128), asked)  # type: ignore[arg-type]
    position, ends = 1, 0
    for cycle in text.cycles:
        end = cycle.tokens[0]
        if cycle.accepted >= 2 and end not in text.output[:position]:
            ends += 1
            session = Session(model, Ends(end), 128)  # type: ignore[arg-type]
            result = answer(session, asked)
            assert result.finish_reason == "stop"
            assert result.output == text.output[: position + 1]
            assert session.held == (*prompt, *result.output[:-1])
        position += len(cycle.tokens)
    assert ends


def test_saved_slots_are_of_one_file(model: ModelWithDrafter, tmp_path: Path) -> None:
    """Files of one shape and name with other numbers do not take each other's states."""
    other = bytearray(mtp_model().read_bytes())
    other[-8] ^= 1
    (tmp_path / "other.gguf").write_bytes(other)
    (tmp_path / "copy.gguf").write_bytes(mtp_model().read_bytes())
    flags = argparse.Namespace(cache_type_k=None, cache_type_v=None)
    found = []
    for path in (mtp_model(), tmp_path / "copy.gguf", tmp_path / "other.gguf"):
        with ModelFile.open(path) as file:
            loaded: Any = SimpleNamespace(file=file, drafter=MtpFile.inside(file), model=model)
            found.append(_cache_identity(loaded, flags))
    assert found[0] == found[1] != found[2]
