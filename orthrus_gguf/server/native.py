"""llama-server's own endpoints: completion, tokenize, detokenize, apply-template, props, slots."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.prefill.compression import label
from orthrus_gguf.server import http
from orthrus_gguf.server.answers import Answer, Stream, progress, timings, tokens_json
from orthrus_gguf.server.api_errors import ApiError, wrong
from orthrus_gguf.server.chat_requests import ChatMessage, Tool, template_messages, tool_json
from orthrus_gguf.server.events import End, Job, Progress, Text
from orthrus_gguf.server.fields import Within
from orthrus_gguf.server.openai import whole
from orthrus_gguf.server.service import Prompt, Sampling, Service
from orthrus_gguf.server.slots import Slot


@dataclass(kw_only=True)
class NativeRequest(Sampling):
    """POST /completion. prompt: text, in which control tokens may be spelt, or ids."""

    prompt: str | list[int]
    stream: bool = False
    n_predict: Annotated[int, Within(-1)] | None = None
    stop: list[str] = field(default_factory=list)
    n_probs: Annotated[int, Within(0, 20)] = 0


@dataclass(kw_only=True)
class TokenizeRequest:
    """POST /tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


@dataclass(kw_only=True)
class DetokenizeRequest:
    """POST /detokenize."""

    tokens: list[int]


@dataclass(kw_only=True)
class TemplateRequest:
    """POST /apply-template."""

    messages: Annotated[list[ChatMessage], Within(1)]
    tools: list[Tool] | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)


async def completion(service: Service, request: NativeRequest) -> dict[str, Any] | Stream:
    """The answer, or events, in llama-server's shape."""
    job = service.job(
        await http.in_thread(_prompt, service, request),
        request,
        max_tokens=request.n_predict,
        stop=request.stop,
        top=request.n_probs,
        grammar=await http.in_thread(service.grammar, request),
    )
    answers = service.submit_all([job])
    if request.stream:
        return Stream(_stream(service, request, answers[0]), answers)
    ((events, end),) = await whole(answers)
    found = _final(service, job, end, end.result.text)
    if request.n_probs:
        found["completion_probabilities"] = [
            one
            for event in events
            for one in tokens_json(service.tokenizer, [event], request.n_probs)
        ]
    return found


def _prompt(service: Service, request: NativeRequest) -> Prompt:
    given = request.prompt
    ids = service.encoded(given, "prompt") if isinstance(given, str) else given
    return service.shortened(Prompt(tuple(ids)), request)


async def _stream(
    service: Service,
    request: NativeRequest,
    answer: Answer,
) -> AsyncIterator[bytes]:
    if answer.job.selection is not None:
        yield http.event({"content": "", "stop": False, **label(answer.job.selection)})
    try:
        async with aclosing(answer.events()) as events:  # type: ignore[type-var]
            async for event in events:
                if event is None:
                    yield http.PING_LINE
                elif isinstance(event, Progress):
                    if request.return_progress:
                        yield http.event({"content": "", "prompt_progress": progress(event)})
                elif isinstance(event, Text):
                    piece: dict[str, Any] = {
                        "content": event.text,
                        "tokens": list(event.tokens),
                        "origin": event.origin.value,
                        "stop": False,
                    }
                    if request.n_probs:
                        told = tokens_json(service.tokenizer, [event], request.n_probs)
                        piece["completion_probabilities"] = told
                    yield http.event(piece)
                else:
                    yield http.event(_final(service, None, event, ""))
    except ApiError as error:
        yield http.event(error.openai())


def _final(service: Service, job: Job | None, end: End, text: str) -> dict[str, Any]:
    result = end.result
    return {
        "content": text,
        "tokens": list(result.output) if job is not None else [],
        "stop": True,
        "stop_type": {"stop": "eos", "length": "limit"}.get(result.finish_reason, "none"),
        "id_slot": end.slot,
        "model": service.name,
        "tokens_predicted": result.statistics.output_tokens,
        "tokens_evaluated": result.statistics.prompt_tokens,
        "tokens_cached": result.statistics.cached_tokens,
        "timings": timings(end),
        **({"generation_settings": {"seed": job.sampling.seed}} if job is not None else {}),
    }


async def tokenize(service: Service, request: TokenizeRequest) -> dict[str, Any]:
    """Text to ids."""
    try:
        ids = await http.in_thread(
            service.tokenizer.encode,
            request.content,
            special=request.parse_special,
            add_bos=None if request.add_special else False,
            add_eos=None if request.add_special else False,
        )
    except OrthrusError as error:
        raise wrong("content", str(error)) from error
    if not request.with_pieces:
        return {"tokens": ids}
    return {"tokens": [{"id": id, "piece": _piece(service, id)} for id in ids]}


def _piece(service: Service, id: int) -> str | list[int]:
    """Text of a token, or its bytes where they are no text."""
    data = service.tokenizer.token_bytes(id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return list(data)


async def detokenize(service: Service, request: DetokenizeRequest) -> dict[str, Any]:
    """Ids to text."""
    for place, id in enumerate(request.tokens):
        if not 0 <= id < service.tokenizer.n_vocab:
            raise wrong(f"tokens[{place}]", f"there is no token {id}")
    return {"content": service.tokenizer.decode(request.tokens, continuation=True)}


async def apply_template(service: Service, request: TemplateRequest) -> dict[str, Any]:
    """The prompt that a conversation becomes."""
    _, prompt = await http.in_thread(
        service.chat_prompt,
        template_messages(request.messages),
        tools=[tool_json(tool) for tool in request.tools] if request.tools else None,
        thinking=request.enable_thinking,
        more=request.chat_template_kwargs,
    )
    return {"prompt": service.tokenizer.decode(prompt.ids), "tokens": len(prompt.ids)}


def props(service: Service) -> dict[str, Any]:
    """What runs here. prefill: what becomes of long prompts; null: they are read whole."""
    sampling = service.sampling
    return {
        "default_generation_settings": {
            "n_ctx": service.n_ctx,
            "params": {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "repeat_penalty": sampling.repeat_penalty,
                "repeat_last_n": sampling.repeat_last_n,
                "presence_penalty": sampling.presence_penalty,
                "frequency_penalty": sampling.frequency_penalty,
                "max_tokens": service.max_tokens,
                "speculative": service.plan.text,
            },
        },
        "total_slots": service.scheduler.parallel,
        "model_alias": service.name,
        "model": service.description,
        "chat_template": service.template.source if service.template is not None else "",
        "thinking_switch": service.template is not None and service.template.supports_thinking,
        "block_size": service.config.block_size,
        "prefill": None if service.compressor is None else service.compressor.to_json(),
    }


def slots(service: Service) -> list[dict[str, Any]]:
    """What the slots do, without anybody's text."""
    return [_slot(service, slot) for slot in service.scheduler.pool.slots]


def _slot(service: Service, slot: Slot) -> dict[str, Any]:
    job = slot.job
    return {
        "id": slot.id,
        "n_ctx": service.n_ctx,
        "is_processing": job is not None,
        "n_prompt_tokens": 0 if job is None else len(job.prompt),
        "n_held": slot.session.rows,
        "speculative": service.plan.text if job is None else job.plan.text,
        **label(None if job is None else job.selection),
    }
