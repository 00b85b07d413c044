"""OpenAI's endpoints: chat completions, completions, models."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any

from orthrus_gguf.prefill.compression import label
from orthrus_gguf.server import http
from orthrus_gguf.server.answers import (
    Answer,
    Stream,
    cancel,
    drafting,
    progress,
    timings,
    tokens_json,
    usage,
)
from orthrus_gguf.server.api_errors import ApiError, wrong
from orthrus_gguf.server.chat_requests import Chat, ChatRequest, StreamOptions, prepare, stops
from orthrus_gguf.server.events import End, Progress, Text
from orthrus_gguf.server.fields import Within
from orthrus_gguf.server.service import Prompt, Sampling, Service
from orthrus_gguf.server.splitter import Delta, Part, Splitter

DONE = http.event(b"[DONE]")


@dataclass(kw_only=True)
class CompletionRequest(Sampling):
    """POST /v1/completions. prompt: text, in which control tokens may be spelt, or ids."""

    prompt: str | list[int] | list[str]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Within(-1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Within(1, 16)] = 1
    echo: bool = False
    logprobs: Annotated[int, Within(0, 20)] | None = None


def models(service: Service) -> dict[str, Any]:
    """GET /v1/models."""
    data = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "orthrus-gguf",
        "aliases": list(service.aliases),
        "meta": {
            "n_vocab": service.config.n_vocab,
            "n_ctx_train": service.config.n_ctx_train,
            "n_ctx": service.n_ctx,
            "n_embd": service.config.n_embd,
        },
    }
    return {"object": "list", "data": [data]}


def _head(service: Service, kind: str, prefix: str) -> dict[str, Any]:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": service.name,
    }


class _Message:
    """An assistant's message as it comes about."""

    def __init__(self, chat: Chat) -> None:
        self._splitter = Splitter(thinking=chat.prompt.thinking, tools=chat.tools)
        self.texts = {Part.CONTENT: "", Part.REASONING: ""}
        self.calls: list[dict[str, Any]] = []

    def push(self, event: Text | End) -> list[dict[str, Any]]:
        """Deltas in OpenAI's shape."""
        found = self._splitter
        deltas = found.push(event.text) if isinstance(event, Text) else found.flush()
        return [self._delta(delta) for delta in deltas]

    def _delta(self, delta: Delta) -> dict[str, Any]:
        if delta.part in self.texts:
            self.texts[delta.part] += delta.text
            name = "content" if delta.part is Part.CONTENT else "reasoning_content"
            return {name: delta.text}
        if delta.part is Part.CALL:
            function = {"name": delta.text, "arguments": ""}
            call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
            self.calls.append(call)
            return {"tool_calls": [{"index": delta.index, **call, "function": dict(function)}]}
        self.calls[delta.index]["function"]["arguments"] += delta.text
        return {"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]}

    def finish_reason(self, end: End) -> str:
        return "tool_calls" if self.calls else end.result.finish_reason

    @property
    def json(self) -> dict[str, Any]:
        """The whole message."""
        content: str | None = self.texts[Part.CONTENT]
        found: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self.calls else None,
        }
        if self.texts[Part.REASONING]:
            found["reasoning_content"] = self.texts[Part.REASONING]
        if self.calls:
            found["tool_calls"] = self.calls
        return found


def total(ends: list[End]) -> dict[str, Any]:
    """Usage of several answers to one prompt."""
    found = usage(ends[0])
    for end in ends[1:]:
        more = usage(end)
        found["completion_tokens"] += more["completion_tokens"]
        found["total_tokens"] += more["completion_tokens"]
        for name, count in more["completion_tokens_details"].items():
            found["completion_tokens_details"][name] += count
    return found


async def chat(service: Service, request: ChatRequest) -> dict[str, Any] | Stream:
    """POST /v1/chat/completions: the answer, or events."""
    prepared: Chat = await http.in_thread(prepare, service, request)
    head = _head(service, "chat.completion", "chatcmpl")
    answers = service.submit_all(prepared.jobs)
    if request.stream:
        return Stream(_chat_stream(service, request, prepared, answers, head), answers)
    choices, ends = [], []
    for index, (events, end) in enumerate(await whole(answers)):
        message = _Message(prepared)
        for event in events:
            message.push(event)
        ends.append(end)
        choices.append(
            {
                "index": index,
                "message": message.json,
                "finish_reason": message.finish_reason(end),
                "logprobs": _logprobs(service, events, prepared.top),
            }
        )
    return {**head, "choices": choices, "usage": total(ends), "timings": timings(ends[0])}


def _logprobs(service: Service, events: list[Text | End], top: int | None) -> Any:
    if top is None:
        return None
    return {"content": tokens_json(service.tokenizer, events, top)}


async def whole(answers: list[Answer]) -> list[tuple[list[Text | End], End]]:
    """All answers; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(answer.whole()) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        cancel(answers)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(
    answers: list[Answer],
) -> AsyncIterator[tuple[int, Progress | Text | End | None]]:
    """Events of several answers as they come, with the index of each."""
    queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

    async def follow(index: int, answer: Answer) -> None:
        try:
            async for event in answer.events():
                queue.put_nowait((index, event))
        except ApiError as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.ensure_future(follow(i, answer)) for i, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            index, event = await queue.get()
            if isinstance(event, ApiError):
                raise event
            yield index, event
            left -= isinstance(event, End)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _chat_stream(
    service: Service,
    request: ChatRequest,
    chat: Chat,
    answers: list[Answer],
    head: dict[str, Any],
) -> AsyncIterator[bytes]:
    head = {**head, "object": "chat.completion.chunk"}
    messages = [_Message(chat) for _ in answers]
    told = [0] * len(answers)
    ends: list[End] = []

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": None, **more}
        return http.event({**head, "choices": [choice]})

    for index in range(len(answers)):
        opening = {"role": "assistant", "content": ""}
        yield chunk(index, opening, **label(chat.prompt.selection))
    try:
        async with aclosing(merged(answers)) as events:  # type: ignore[type-var]
            async for index, event in events:
                if event is None:
                    yield http.PING_LINE
                elif isinstance(event, Progress):
                    if request.return_progress:
                        read = {"prompt_progress": progress(event)}
                        yield http.event({**head, "choices": [], **read})
                else:
                    deltas = messages[index].push(event)
                    told[index] += len(event.tokens)
                    origin = {}
                    if request.return_origins and isinstance(event, Text):
                        origin["drafting"] = drafting(event, told[index])
                    more = {}
                    if chat.top is not None:
                        more["logprobs"] = _logprobs(service, [event], chat.top)
                        deltas = deltas or ([{}] if more["logprobs"]["content"] else [])
                    for place, delta in enumerate(deltas):
                        yield chunk(index, delta, **origin, **(more if place == 0 else {}))
                    if isinstance(event, End):
                        ends.append(event)
                        reason = messages[index].finish_reason(event)
                        last = {"index": index, "delta": {}, "finish_reason": reason}
                        yield http.event({**head, "choices": [last], "timings": timings(event)})
    except ApiError as error:
        yield http.event(error.openai())
        return
    if request.stream_options is not None and request.stream_options.include_usage:
        yield http.event({**head, "choices": [], "usage": total(ends)})
    yield DONE


def _prompts(service: Service, request: CompletionRequest) -> list[Prompt]:
    """Ids of the prompts of a completion."""
    given = request.prompt
    if isinstance(given, list) and given and isinstance(given[0], int):
        found = [[int(token) for token in given]]
    else:
        texts = [given] if isinstance(given, str) else given
        found = [service.encoded(str(text), "prompt") for text in texts]
    return [service.shortened(Prompt(tuple(ids)), request) for ids in found]


async def completion(service: Service, request: CompletionRequest) -> dict[str, Any] | Stream:
    """POST /v1/completions: the answer, or events."""
    prompts: list[Prompt] = await http.in_thread(_prompts, service, request)
    if not prompts:
        raise wrong("prompt", "is empty")
    grammar = await http.in_thread(service.grammar, request)
    jobs = [
        service.job(
            prompt,
            request,
            max_tokens=request.max_tokens,
            stop=stops(request.stop),
            top=0 if request.logprobs is None else max(request.logprobs, 1),
            grammar=grammar,
            index=index,
        )
        for prompt in prompts
        for index in range(request.n)
    ]
    head = _head(service, "text_completion", "cmpl")
    echoes = [service.tokenizer.decode(job.prompt) if request.echo else "" for job in jobs]
    answers = service.submit_all(jobs)
    if request.stream:
        return Stream(_completion_stream(service, request, answers, head, echoes), answers)
    choices, ends = [], []
    for index, (events, end) in enumerate(await whole(answers)):
        ends.append(end)
        choices.append(
            {
                "index": index,
                "text": echoes[index] + end.result.text,
                "finish_reason": end.result.finish_reason,
                "logprobs": _logprobs(service, events, request.logprobs),
                **label(end.result.selection),
            }
        )
    return {**head, "choices": choices, "usage": total(ends), "timings": timings(ends[0])}


async def _completion_stream(
    service: Service,
    request: CompletionRequest,
    answers: list[Answer],
    head: dict[str, Any],
    echoes: list[str],
) -> AsyncIterator[bytes]:
    ends: list[End] = []

    def chunk(index: int, text: str, event: Text | End | None, reason: str | None) -> bytes:
        found = None if event is None else _logprobs(service, [event], request.logprobs)
        choice = {"index": index, "text": text, "finish_reason": reason, "logprobs": found}
        if event is None:
            choice |= label(answers[index].job.selection)
        more = {"timings": timings(event)} if isinstance(event, End) else {}
        return http.event({**head, "choices": [choice], **more})

    for index, echo in enumerate(echoes):
        if echo or answers[index].job.selection is not None:
            yield chunk(index, echo, None, None)
    try:
        async with aclosing(merged(answers)) as events:  # type: ignore[type-var]
            async for index, event in events:
                if event is None:
                    yield http.PING_LINE
                elif isinstance(event, Progress):
                    if request.return_progress:
                        told = {"prompt_progress": progress(event)}
                        yield http.event({**head, "choices": [], **told})
                elif isinstance(event, Text):
                    yield chunk(index, event.text, event, None)
                else:
                    ends.append(event)
                    yield chunk(index, "", event, event.result.finish_reason)
    except ApiError as error:
        yield http.event(error.openai())
        return
    if request.stream_options is not None and request.stream_options.include_usage:
        yield http.event({**head, "choices": [], "usage": total(ends)})
    yield DONE
