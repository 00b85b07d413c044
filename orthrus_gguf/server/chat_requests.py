"""OpenAI's chat completions: the request, and what becomes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from orthrus_gguf.prefill.compression import COMPRESSIBLE
from orthrus_gguf.server.api_errors import wrong
from orthrus_gguf.server.events import Job
from orthrus_gguf.server.fields import Within
from orthrus_gguf.server.grammars import Calls, Thought, reply
from orthrus_gguf.server.service import Prompt, Sampling, Service, compiled


@dataclass(kw_only=True)
class TextPart:
    """A part of a message's content; only texts can be read."""

    type: Literal["text"]
    text: str


@dataclass(kw_only=True)
class CalledFunction:
    """Name and arguments (JSON in a text) of a call."""

    name: str
    arguments: str | dict[str, Any] = "{}"


@dataclass(kw_only=True)
class ToolCall:
    """A call of a tool that the assistant made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


@dataclass(kw_only=True)
class ChatMessage:
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


@dataclass(kw_only=True)
class FunctionTool:
    """A function that may be called. parameters: JSON Schema of its arguments. strict: they keep to
    it also where no call has to come."""

    name: Annotated[str, Within(1, 256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


@dataclass(kw_only=True)
class Tool:
    """A tool; only functions are known."""

    type: Literal["function"]
    function: FunctionTool


@dataclass(kw_only=True)
class NamedFunction:
    """The name of a function."""

    name: str


@dataclass(kw_only=True)
class NamedTool:
    """A tool that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


@dataclass(kw_only=True)
class NamedSchema:
    """A JSON Schema. strict: it is kept to in any case."""

    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


@dataclass(kw_only=True)
class ResponseFormat:
    """What the answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema: dict[str, Any] | None = None


@dataclass(kw_only=True)
class StreamOptions:
    """include_usage: one more event with the token counts."""

    include_usage: bool = False


@dataclass(kw_only=True)
class Reasoning:
    """How to think. effort: `none` switches it off; templates that know efforts get others.
    max_tokens: of a thought."""

    effort: str | None = None
    max_tokens: Annotated[int, Within(0)] | None = None


@dataclass(kw_only=True)
class ChatRequest(Sampling):
    """POST /v1/chat/completions. reasoning_budget_tokens, thinking_budget_tokens: of a thought, as
    llama-server spells it; -1: any number. return_origins: what streams comes with how its tokens
    came about (`answers.drafting`)."""

    messages: Annotated[list[ChatMessage], Within(1)]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Within(-1)] | None = None
    max_completion_tokens: Annotated[int, Within(-1)] | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Within(1, 16)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int, Within(0, 20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    reasoning: Reasoning | None = None
    reasoning_effort: str | None = None
    reasoning_budget_tokens: Annotated[int, Within(-1)] | None = None
    thinking_budget_tokens: Annotated[int, Within(-1)] | None = None
    return_origins: bool = False


@dataclass
class Chat:
    """A request that is ready to run. top: log-probabilities per token; None: none at all."""

    prompt: Prompt
    jobs: list[Job]
    top: int | None
    tools: bool


def stops(given: str | list[str] | None) -> list[str]:
    """One stop string or several."""
    return [given] if isinstance(given, str) else list(given or [])


def plain_text(content: str | list[TextPart] | None) -> str:
    """The text of a message's content."""
    if isinstance(content, list):
        return "\n".join(part.text for part in content)
    return content or ""


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as templates know them. Raises ApiError."""
    found = []
    for index, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        plain: dict[str, Any] = {"role": role, "content": plain_text(message.content)}
        for name in ("reasoning_content", "name", "tool_call_id"):
            if getattr(message, name) is not None:
                plain[name] = getattr(message, name)
        if message.tool_calls:
            where = f"messages[{index}].tool_calls"
            plain["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments, f"{where}[{i}]"),
                    },
                }
                for i, call in enumerate(message.tool_calls)
            ]
        found.append(plain)
    return found


def _arguments(given: str | dict[str, Any], where: str) -> Any:
    """Arguments as an object, as templates print them."""
    try:
        return json.loads(given or "{}") if isinstance(given, str) else given
    except ValueError as error:
        raise wrong(f"{where}.function.arguments", f"no JSON ({error})") from error


def prepare(service: Service, request: ChatRequest) -> Chat:
    """From a request to jobs. Takes a moment: call it in a thread. Raises ApiError."""
    thought_tokens = _thought_tokens(service, request)
    thinking, more = _thinking(request, thought_tokens)
    tools = request.tools if request.tool_choice != "none" else None
    messages = template_messages(request.messages)
    _, prompt = service.chat_prompt(
        messages,
        tools=[tool_json(tool) for tool in tools] if tools else None,
        thinking=thinking,
        more=more,
    )
    contents = [str(m.get("content") or "") for m in messages if m["role"] in COMPRESSIBLE]
    prompt = service.shortened(prompt, request, contents)
    grammar = _grammar(service, request, prompt, thinking)
    top = (request.top_logprobs or 0) if request.logprobs else None
    if request.top_logprobs and not request.logprobs:
        raise wrong("top_logprobs", "needs logprobs: true")
    most = request.max_tokens
    if request.max_completion_tokens is not None:
        most = request.max_completion_tokens
    jobs = [
        service.job(
            prompt,
            request,
            max_tokens=most,
            stop=stops(request.stop),
            top=0 if top is None else max(top, 1),
            grammar=grammar,
            thought_tokens=thought_tokens,
            index=index,
        )
        for index in range(request.n)
    ]
    return Chat(prompt, jobs, top, bool(tools))


def _thought_tokens(service: Service, request: ChatRequest) -> int:
    """What a thought may have; -1: any number."""
    asked = request.reasoning.max_tokens if request.reasoning is not None else None
    for found in (request.reasoning_budget_tokens, request.thinking_budget_tokens, asked):
        if found is not None:
            return found
    return service.thought_tokens


def _thinking(request: ChatRequest, thought_tokens: int) -> tuple[bool | None, dict[str, Any]]:
    """Whether to think, None where nothing says so, and what templates are told besides."""
    more = dict(request.chat_template_kwargs)
    effort = request.reasoning_effort
    if effort is None and request.reasoning is not None:
        effort = request.reasoning.effort
    if effort is not None:
        more.setdefault("reasoning_effort", effort)
    switch = more.pop("enable_thinking", None)
    if switch is None:
        switch = request.enable_thinking
    if switch is None and effort is not None:
        switch = effort != "none"
    if switch is None and thought_tokens == 0:
        switch = False
    if not isinstance(switch, bool | None):
        raise wrong("chat_template_kwargs.enable_thinking", "expected true or false")
    return switch, more


def tool_json(tool: Tool) -> dict[str, Any]:
    """A tool as templates print it."""
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    function["parameters"] = tool.function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": function}


def _grammar(
    service: Service, request: ChatRequest, prompt: Prompt, thinking: bool | None
) -> str | None:
    """What the answer has to be, if anything is asked for."""
    native, calls, schema = service.grammar(request), _calls(request), _schema(request)
    forced = calls is not None and calls.required
    strict = any(tool.function.strict for tool in request.tools or [])
    field = "tools" if forced or (strict and calls) else "response_format" if schema else None
    if field is None:
        return native
    if native is not None:
        raise wrong(field, "excludes grammar, json_schema and regex")
    if forced and schema is not None:
        raise wrong("response_format", "excludes forced tool calls")
    return compiled(field, lambda: reply(_thought(service, prompt, thinking), calls, schema))


def _thought(service: Service, prompt: Prompt, thinking: bool | None) -> Thought:
    """Whether a thought may come first."""
    if prompt.thinking:
        return Thought.BEGUN
    off = (service.thinking if thinking is None else thinking) is False
    template = service.template
    thinks = template is not None and template.supports_thinking and not off
    return Thought.MAYBE if thinks else Thought.NONE


def _schema(request: ChatRequest) -> dict[str, Any] | None:
    """What `response_format` asks for."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return wanted.schema or {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema is None:
        raise wrong("response_format.json_schema.schema", "is required")
    return wanted.json_schema.schema


def _calls(request: ChatRequest) -> Calls | None:
    """The tools that may be called, or of which one must be."""
    choice, several = request.tool_choice, request.parallel_tool_calls
    tools = {t.function.name: t.function.parameters or {} for t in request.tools or []}
    if choice in (None, "auto"):
        loose = {t.function.name for t in request.tools or [] if not t.function.strict}
        tools = {name: {} if name in loose else schema for name, schema in tools.items()}
        return Calls(tools, several, required=False) if tools else None
    if choice == "none":
        return None
    if not tools:
        raise wrong("tool_choice", "there are no tools")
    if isinstance(choice, NamedTool):
        if choice.function.name not in tools:
            raise wrong("tool_choice.function.name", f"no tool is called {choice.function.name!r}")
        tools = {choice.function.name: tools[choice.function.name]}
    return Calls(tools, several, required=True)
