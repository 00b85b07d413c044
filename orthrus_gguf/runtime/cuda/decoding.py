"""The decode loop on the device: the contract of `orthrus_gguf.decode.decode`, one step behind."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace

from orthrus_gguf.policy import Cycle, Pass, Plan, Strategy
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.stepper import Committed, stepper_of
from orthrus_gguf.sampling import SamplingSettings

#: Cycles under way while the host handles one: with one more, the device never waits for it.
AHEAD = 2


def decode_on_device(
    model: CudaModel,
    cache: CudaCache,
    settings: SamplingSettings,
    tokens: list[int],
    plan: Plan,
    max_tokens: int,
    stop_tokens: Sequence[int] = (),
) -> Generator[Cycle, None, None]:
    """Yield cycles until `max_tokens` tokens have been committed; stop earlier by closing.

    tokens: the committed tokens, whose last one is the anchor; the cache holds all before it. Each
        cycle's tokens are appended before it is yielded.
    stop_tokens: the iteration ends with the cycle that commits one of these.
    A cycle is launched ahead only if it will have room for its full width whatever the ones before
    it commit, so that widths are those of `decode.decode`. Closing at any moment drops what ran
    ahead: the cache then holds all of `tokens` but the last.
    """
    limit = len(tokens) + max_tokens
    stepper = stepper_of(model, cache)
    stepper.begin(tokens, settings, max_tokens, stop_tokens)
    width = 0 if plan.strategy is Strategy.AR else plan.width
    try:
        while (room := limit - len(tokens)) > 0:
            started = time.perf_counter()
            sure = room - (stepper.reach - stepper.position)
            while stepper.in_flight < AHEAD and sure > width:
                if stepper.reach + width >= cache.capacity:
                    break
                stepper.launch(plan)
                sure -= width + 1
            if not stepper.in_flight:
                stepper.launch(replace(plan, width=min(width, room - 1)))
            committed = stepper.collect()
            if not committed.tokens:
                raise ValueError(f"nothing was committed after position {committed.start}")
            tokens.extend(committed.tokens)
            yield _cycle(committed, time.perf_counter() - started)
            if committed.stopped:
                return
    finally:
        stepper.rewind(len(tokens) - 1)


def _cycle(committed: Committed, seconds: float) -> Cycle:
    """seconds: of the whole cycle; its passes are not timed apart, so each gets an equal share."""
    share = seconds / len(committed.passes)
    passes = tuple(
        Pass(ar, block, context=committed.start, seconds=share) for ar, block in committed.passes
    )
    return Cycle(
        committed.start, committed.drafts, committed.accepted, committed.tokens, passes=passes
    )
