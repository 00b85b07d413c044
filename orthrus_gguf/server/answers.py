"""Answers under way, and what clients hear of how they went."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.prefill.compression import label
from orthrus_gguf.server.api_errors import ApiError
from orthrus_gguf.server.events import End, Event, Failed, Job, Progress, Text
from orthrus_gguf.server.scheduler import Scheduler
from orthrus_gguf.text.tokenizer import Tokenizer

#: Seconds of silence after which a stream says that it is still there.
PING = 15.0


@dataclass
class Answer:
    """A job under way. Iterate `events`, and `cancel` it in the end, which ends what is left."""

    scheduler: Scheduler
    job: Job
    queue: asyncio.Queue[Event]

    async def events(self) -> AsyncIterator[Progress | Text | End | None]:
        """None after a silence. Raises ApiError where the job fails."""
        while True:
            try:
                event = await asyncio.wait_for(self.queue.get(), PING)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event, Failed):
                raise failure(event.error)
            yield event
            if isinstance(event, End):
                return

    async def whole(self) -> tuple[list[Text | End], End]:
        """All of it."""
        found = [event async for event in self.events() if isinstance(event, Text | End)]
        end = found[-1]
        assert isinstance(end, End)
        return found, end


class Stream(NamedTuple):
    """Events for a client, and the answers that they tell of, which end with it."""

    events: AsyncIterator[bytes]
    answers: list[Answer]


def cancel(answers: Sequence[Answer]) -> None:
    """End what is left of them."""
    for answer in answers:
        answer.scheduler.cancel(answer.job)


def failure(error: Exception) -> ApiError:
    """What a client hears of a job that failed."""
    if isinstance(error, OrthrusError):
        return ApiError(str(error))
    if isinstance(error, MemoryError):
        return ApiError("out of memory; try again, or a shorter prompt", status=503)
    return ApiError("internal error: the server's log tells more", status=500)


def usage(end: End) -> dict[str, Any]:
    """Token counts in OpenAI's shape."""
    statistics = end.result.statistics
    prompt, output = statistics.prompt_tokens, statistics.output_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": statistics.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": sum(statistics.confirmed),
            "rejected_prediction_tokens": sum(statistics.offered) - sum(statistics.confirmed),
        },
    }


def timings(end: End) -> dict[str, Any]:
    """Times and drafts, as llama-server reports them, and what the drafts brought."""
    statistics, times = end.result.statistics, end.result.timings
    return {
        "cache_n": statistics.cached_tokens,
        "prompt_n": times.prompt_tokens,
        "prompt_ms": times.prompt * 1e3,
        "prompt_per_second": times.prompt_per_second,
        "predicted_n": statistics.output_tokens,
        "predicted_ms": times.generation * 1e3,
        "predicted_per_second": times.generated_per_second,
        "draft_n": sum(statistics.offered),
        "draft_n_accepted": sum(statistics.confirmed),
        "tokens_per_cycle": statistics.tokens_per_cycle,
        "tokens_per_forward": statistics.tokens_per_forward,
        **label(end.result.selection),
    }


def progress(event: Progress) -> dict[str, Any]:
    """llama-server's `prompt_progress`."""
    return {"total": event.total, "cache": event.cached, "processed": event.held}


def drafting(event: Text, tokens: int) -> dict[str, Any]:
    """How the token came about that released a text, and how many tokens and cycles there were by
    then: (tokens - 1) / cycles is tokens per cycle, as the first token comes out of the prompt."""
    return {"origin": event.origin.value, "tokens": tokens, "cycles": event.cycles}


def tokens_json(
    tokenizer: Tokenizer, events: Sequence[Text | End], top: int
) -> list[dict[str, Any]]:
    """Log-probabilities of the events' tokens in OpenAI's shape; ends of text are left out."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        text = data.decode("utf-8", errors="replace")
        return {"token": text, "id": token, "logprob": logprob, "bytes": list(data)}

    return [
        {
            **one(token, found.chosen),
            "top_logprobs": [one(t, p) for t, p in found.top[:top]],
        }
        for event in events
        for token, found in zip(event.tokens, event.logprobs, strict=False)
        if token not in tokenizer.eog
    ]
