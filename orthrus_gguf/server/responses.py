"""OpenAI's Responses. Nothing is stored: a conversation comes with every request."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from orthrus_gguf.prefill.compression import label
from orthrus_gguf.server import http
from orthrus_gguf.server.answers import Answer, Stream, timings
from orthrus_gguf.server.api_errors import ApiError, wrong
from orthrus_gguf.server.blocks import Block, Blocks, Change
from orthrus_gguf.server.chat_requests import (
    CalledFunction,
    Chat,
    ChatMessage,
    ChatRequest,
    FunctionTool,
    NamedFunction,
    NamedSchema,
    NamedTool,
    Reasoning,
    ResponseFormat,
    Tool,
    ToolCall,
    prepare,
)
from orthrus_gguf.server.events import End, Progress
from orthrus_gguf.server.fields import Within
from orthrus_gguf.server.openai import whole
from orthrus_gguf.server.service import Prefill, Service, Speculative
from orthrus_gguf.server.splitter import Part


@dataclass(kw_only=True)
class InputText:
    """A part of a message; only texts can be read."""

    type: Literal["input_text", "output_text", "text"]
    text: str


@dataclass(kw_only=True)
class InputMessage:
    """One turn."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]


@dataclass(kw_only=True)
class InputCall:
    """A call of a tool that the assistant made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


@dataclass(kw_only=True)
class InputResult:
    """What a tool gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]


@dataclass(kw_only=True)
class InputReasoning:
    """A thought of the assistant's, which is left out."""

    type: Literal["reasoning"]


@dataclass(kw_only=True)
class FlatTool(FunctionTool):
    """A function that may be called."""

    type: Literal["function"]


@dataclass(kw_only=True)
class ChosenTool:
    """A tool that must be called."""

    type: Literal["function"]
    name: str


@dataclass(kw_only=True)
class TextFormat:
    """What the answer must look like. schema: of json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


@dataclass(kw_only=True)
class TextSettings:
    """Of the answer's text."""

    format: TextFormat | None = None


@dataclass(kw_only=True)
class ResponsesRequest:
    """POST /v1/responses."""

    input: str | list[InputMessage | InputCall | InputResult | InputReasoning]
    model: str | None = None
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: Annotated[int, Within(1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Annotated[int, Within(-1, 2**64 - 1)] | None = None
    tools: list[FlatTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool = True
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    previous_response_id: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    speculative: Speculative | None = None
    prefill: Prefill | None = None


def _chat_request(request: ResponsesRequest) -> ChatRequest:
    """The same in terms of chat completions."""
    if request.previous_response_id is not None:
        raise wrong("previous_response_id", "nothing is stored here; send the whole conversation")
    messages = _messages(request)
    if not messages:
        raise wrong("input", "is empty")
    chat = ChatRequest(messages=messages)
    chat.max_tokens = request.max_output_tokens
    for name in ("temperature", "top_p", "seed", "speculative", "prefill", "reasoning"):
        setattr(chat, name, getattr(request, name))
    chat.parallel_tool_calls = request.parallel_tool_calls
    chat.tools = [Tool(type="function", function=tool) for tool in request.tools or []] or None
    choice = request.tool_choice
    if isinstance(choice, ChosenTool):
        chat.tool_choice = NamedTool(function=NamedFunction(name=choice.name))
    else:
        chat.tool_choice = choice
    wanted = request.text.format if request.text is not None else None
    if wanted is not None:
        schema = NamedSchema(name=wanted.name, schema=wanted.schema, strict=wanted.strict)
        chat.response_format = ResponseFormat(type=wanted.type, json_schema=schema)
        if wanted.type == "json_schema" and wanted.schema is None:
            raise wrong("text.format.schema", "is required")
    return chat


def _messages(request: ResponsesRequest) -> list[ChatMessage]:
    found: list[ChatMessage] = []
    if request.instructions:
        found.append(ChatMessage(role="system", content=request.instructions))
    items = request.input
    if isinstance(items, str):
        return [*found, ChatMessage(role="user", content=items)]
    for item in items:
        if isinstance(item, InputMessage):
            found.append(ChatMessage(role=item.role, content=_text(item.content)))
        elif isinstance(item, InputCall):
            function = CalledFunction(name=item.name, arguments=item.arguments)
            call = ToolCall(id=item.call_id, function=function)
            if found and found[-1].role == "assistant":
                found[-1].tool_calls = [*(found[-1].tool_calls or []), call]
            else:
                found.append(ChatMessage(role="assistant", content="", tool_calls=[call]))
        elif isinstance(item, InputResult):
            text = _text(item.output)
            found.append(ChatMessage(role="tool", content=text, tool_call_id=item.call_id))
    return found


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


async def respond(service: Service, request: ResponsesRequest) -> dict[str, Any] | Stream:
    """An answer, or its events."""
    chat: Chat = await http.in_thread(prepare, service, _chat_request(request))
    head = {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": service.name,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata,
        "parallel_tool_calls": request.parallel_tool_calls,
        "temperature": chat.jobs[0].sampling.temperature,
        "top_p": chat.jobs[0].sampling.top_p,
        "tool_choice": "auto",
        "tools": [],
        "store": False,
        "error": None,
        "incomplete_details": None,
    }
    answers = service.submit_all(chat.jobs)
    if request.stream:
        return Stream(_stream(chat, answers[0], head), answers)
    ((events, end),) = await whole(answers)
    blocks = Blocks(chat)
    for event in events:
        list(blocks.push(event))
    return _finished(head, blocks, end)


def _finished(head: dict[str, Any], blocks: Blocks, end: End) -> dict[str, Any]:
    cut = end.result.finish_reason == "length"
    statistics = end.result.statistics
    return {
        **head,
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [_item(block, cut=cut and block is blocks.blocks[-1]) for block in blocks.blocks],
        "usage": {
            "input_tokens": statistics.prompt_tokens,
            "input_tokens_details": {"cached_tokens": statistics.cached_tokens},
            "output_tokens": statistics.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": statistics.prompt_tokens + statistics.output_tokens,
        },
        "timings": timings(end),
    }


def _part(block: Block) -> dict[str, Any]:
    """What a message, or a thought, consists of."""
    if block.kind is Part.REASONING:
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _item(block: Block, *, cut: bool = False, begun: bool = False) -> dict[str, Any]:
    """A block as an item of the output; begun: there is nothing in it yet."""
    status = "in_progress" if begun else "incomplete" if cut else "completed"
    if block.kind is Part.CALL:
        return {
            "type": "function_call",
            "id": f"fc_{block.id}",
            "call_id": f"call_{block.id}",
            "name": block.name,
            "arguments": block.text,
            "status": status,
        }
    content = [] if begun else [_part(block)]
    if block.kind is Part.REASONING:
        found = {"type": "reasoning", "id": f"rs_{block.id}", "summary": []}
        return {**found, "content": content, "status": status}
    found = {"type": "message", "id": f"msg_{block.id}", "role": "assistant"}
    return {**found, "content": content, "status": status}


async def _stream(chat: Chat, answer: Answer, head: dict[str, Any]) -> AsyncIterator[bytes]:
    blocks, numbers = Blocks(chat), iter(range(2**63))

    def event(kind: str, **more: Any) -> bytes:
        return http.event({"type": kind, "sequence_number": next(numbers), **more}, kind)

    begun = {**head, "status": "in_progress", "output": [], "usage": None}
    begun |= label(answer.job.selection)
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    try:
        async for came in answer.events():
            if came is None:
                yield http.PING_LINE
            elif not isinstance(came, Progress):
                for change, block, text in blocks.push(came):
                    for kind, more in _changed(change, block, text):
                        yield event(kind, output_index=blocks.index, **more)
                if isinstance(came, End):
                    last = _finished(head, blocks, came)
                    yield event(f"response.{last['status']}", response=last)
    except ApiError as error:
        told = {"code": "server_error", "message": error.message}
        failed = {**head, "status": "failed", "output": [], "error": told}
        yield event("response.failed", response=failed)


def _changed(change: Change, block: Block, text: str) -> list[tuple[str, dict[str, Any]]]:
    """The events that tell of a change."""
    item = {"item": _item(block, begun=change is Change.OPENED)}
    own: dict[str, Any] = {"item_id": item["item"]["id"]}
    last: dict[str, Any] = {"text": block.text}
    plain: dict[str, Any] = {}
    if block.kind is Part.CALL:
        stem, last = "function_call_arguments", {"arguments": block.text, "name": block.name}
    else:
        own["content_index"] = 0
        thought = block.kind is Part.REASONING
        stem, plain = ("reasoning_text", {}) if thought else ("output_text", {"logprobs": []})
    if change is Change.GREW:
        return [(f"response.{stem}.delta", {**own, "delta": text, **plain})]
    part = {**own, "part": _part(block)}
    parts = block.kind is Part.CONTENT
    if change is Change.OPENED:
        added = [("response.content_part.added", part)] if parts else []
        return [("response.output_item.added", item), *added]
    found = [(f"response.{stem}.done", {**own, **last, **plain})]
    found += [("response.content_part.done", part)] if parts else []
    return [*found, ("response.output_item.done", item)]
