"""Anthropic's endpoints: messages, and how many tokens they are."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
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
    NamedTool,
    Tool,
    ToolCall,
    prepare,
)
from orthrus_gguf.server.events import End, Progress
from orthrus_gguf.server.fields import Within
from orthrus_gguf.server.openai import whole
from orthrus_gguf.server.service import Prefill, Service, Speculative
from orthrus_gguf.server.splitter import Part

#: Claude Code puts a block into the system prompt that changes with every request; it would spoil
#: the reuse of everything behind it.
BILLING = "x-anthropic-billing-header"


@dataclass(kw_only=True)
class TextBlock:
    """Text."""

    type: Literal["text"]
    text: str


@dataclass(kw_only=True)
class ThinkingBlock:
    """A thought of the assistant's; templates take it or leave it."""

    type: Literal["thinking"]
    thinking: str


@dataclass(kw_only=True)
class ToolUse:
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


@dataclass(kw_only=True)
class ToolResult:
    """What a tool gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None
    is_error: bool = False


@dataclass(kw_only=True)
class TurnMessage:
    """One turn."""

    role: Literal["user", "assistant"]
    content: str | list[TextBlock | ThinkingBlock | ToolUse | ToolResult]


@dataclass(kw_only=True)
class ClientTool:
    """A tool that may be called. input_schema: JSON Schema of its arguments. strict: see
    `FunctionTool`."""

    name: Annotated[str, Within(1, 256)]
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


@dataclass(kw_only=True)
class ToolChoice:
    """Which tool must be called, if any."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


@dataclass(kw_only=True)
class Thinking:
    """Whether the model thinks before it answers. budget_tokens: of a thought, at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Within(0)] | None = None


@dataclass(kw_only=True)
class CountRequest:
    """POST /v1/messages/count_tokens."""

    messages: Annotated[list[TurnMessage], Within(1)]
    model: str | None = None
    system: str | list[TextBlock] | None = None
    tools: list[ClientTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    prefill: Prefill | None = None


@dataclass(kw_only=True)
class MessagesRequest(CountRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Within(1)]
    stream: bool = False
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_k: Annotated[int, Within(-1, 2**31)] | None = None
    top_p: float | None = None
    seed: Annotated[int, Within(-1, 2**64 - 1)] | None = None
    speculative: Speculative | None = None


def _chat_request(request: CountRequest) -> ChatRequest:
    """The same in OpenAI's terms."""
    found: list[ChatMessage] = []
    if system := _system(request.system):
        found.append(ChatMessage(role="system", content=system))
    for index, turn in enumerate(request.messages):
        found += _turn(turn, f"messages[{index}]")
    chat = ChatRequest(messages=found, prefill=request.prefill)
    chat.tools = [
        Tool(
            type="function",
            function=FunctionTool(
                name=tool.name,
                description=tool.description,
                parameters=tool.input_schema,
                strict=tool.strict,
            ),
        )
        for tool in request.tools or []
    ] or None
    choice = request.tool_choice
    if choice is not None:
        chat.parallel_tool_calls = not choice.disable_parallel_tool_use
        if choice.type == "tool":
            if choice.name is None:
                raise wrong("tool_choice.name", "is required")
            chat.tool_choice = NamedTool(function=NamedFunction(name=choice.name))
        elif choice.type == "any":
            chat.tool_choice = "required"
        else:
            chat.tool_choice = "none" if choice.type == "none" else "auto"
    if request.thinking is not None:
        chat.thinking_budget_tokens = request.thinking.budget_tokens
        if request.thinking.type != "adaptive":
            chat.enable_thinking = request.thinking.type == "enabled"
    if isinstance(request, MessagesRequest):
        chat.max_tokens, chat.stop = request.max_tokens, request.stop_sequences
        for name in ("temperature", "top_k", "top_p", "seed", "speculative"):
            setattr(chat, name, getattr(request, name))
    return chat


def _system(given: str | list[TextBlock] | None) -> str:
    texts = [given] if isinstance(given, str) else [block.text for block in given or []]
    return "\n".join(text for text in texts if not text.startswith(BILLING))


def _turn(turn: TurnMessage, where: str) -> list[ChatMessage]:
    """One turn as messages: results of tools are messages of their own."""
    if isinstance(turn.content, str):
        return [ChatMessage(role=turn.role, content=turn.content)]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    results: list[ChatMessage] = []
    for block in turn.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUse):
            function = CalledFunction(name=block.name, arguments=block.input)
            calls.append(ToolCall(id=block.id, function=function))
        else:
            given = block.content
            text = given if isinstance(given, str) else "\n".join(b.text for b in given or [])
            results.append(ChatMessage(role="tool", content=text, tool_call_id=block.tool_use_id))
    if turn.role == "user" and (calls or thoughts):
        raise wrong(f"{where}.content", "a user neither thinks nor calls tools")
    if turn.role == "assistant" and results:
        raise wrong(f"{where}.content", "results of tools are the user's")
    if not texts and not calls and results:
        return results
    said = ChatMessage(role=turn.role, content="\n".join(texts))
    said.tool_calls, said.reasoning_content = calls or None, "\n".join(thoughts) or None
    return [*results, said]


async def count_tokens(service: Service, request: CountRequest) -> dict[str, Any]:
    """How many tokens the prompt of a conversation has: of a long one, those that are read."""
    chat = _chat_request(request)
    chat.tool_choice = None  # decides about the answer only
    prepared: Chat = await http.in_thread(prepare, service, chat)
    return {"input_tokens": len(prepared.prompt.ids), **label(prepared.prompt.selection)}


async def messages(service: Service, request: MessagesRequest) -> dict[str, Any] | Stream:
    """An answer, or its events."""
    chat: Chat = await http.in_thread(prepare, service, _chat_request(request))
    head = {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": service.name,
    }
    answers = service.submit_all(chat.jobs)
    if request.stream:
        return Stream(_stream(chat, answers[0], head), answers)
    ((events, end),) = await whole(answers)
    blocks = Blocks(chat)
    for event in events:
        list(blocks.push(event))
    return {
        **head,
        "content": [_block(block) for block in blocks.blocks],
        **_stop(blocks, end),
        "usage": _usage(end),
        "timings": timings(end),
    }


def _block(block: Block) -> dict[str, Any]:
    if block.kind is Part.CONTENT:
        return {"type": "text", "text": block.text}
    if block.kind is Part.REASONING:
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {**_call(block), "input": _input(block.text)}


def _call(block: Block) -> dict[str, Any]:
    return {"type": "tool_use", "id": f"toolu_{block.id}", "name": block.name, "input": {}}


def _input(text: str) -> Any:
    """Arguments as an object; those that were cut off, as far as they came, as a text in one."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {"incomplete": text}


def _stop(blocks: Blocks, end: End) -> dict[str, Any]:
    result = end.result
    if result.finish_reason == "length":
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if result.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": result.stop_string}
    return {"stop_reason": "tool_use" if blocks.calls else "end_turn", "stop_sequence": None}


def _usage(end: End) -> dict[str, Any]:
    statistics = end.result.statistics
    return {
        "input_tokens": statistics.prompt_tokens - statistics.cached_tokens,
        "cache_read_input_tokens": statistics.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": statistics.output_tokens,
    }


async def _stream(chat: Chat, answer: Answer, head: dict[str, Any]) -> AsyncIterator[bytes]:
    def event(kind: str, **more: Any) -> bytes:
        return http.event({"type": kind, **more}, kind)

    blocks = Blocks(chat)
    empty: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
    count = len(chat.prompt.ids)
    usage = {"input_tokens": count, "output_tokens": 0}
    opening = {**head, **empty, "usage": usage, **label(answer.job.selection)}
    yield event("message_start", message=opening)
    try:
        async for came in answer.events():
            if came is None or isinstance(came, Progress):
                yield event("ping")
                continue
            for change, block, text in blocks.push(came):
                yield event(**_changed(change, block, text), index=blocks.index)
            if isinstance(came, End):
                told = {"usage": _usage(came), "timings": timings(came)}
                yield event("message_delta", delta=_stop(blocks, came), **told)
                yield event("message_stop")
    except ApiError as error:
        yield http.event(error.anthropic(), "error")


def _changed(change: Change, block: Block, text: str) -> dict[str, Any]:
    if change is Change.CLOSED:
        return {"kind": "content_block_stop"}
    if change is Change.OPENED:
        empty = _call(block) if block.kind is Part.CALL else _block(block)
        return {"kind": "content_block_start", "content_block": empty}
    kind, name = {
        Part.CONTENT: ("text_delta", "text"),
        Part.REASONING: ("thinking_delta", "thinking"),
    }.get(block.kind, ("input_json_delta", "partial_json"))
    return {"kind": "content_block_delta", "delta": {"type": kind, name: text}}
