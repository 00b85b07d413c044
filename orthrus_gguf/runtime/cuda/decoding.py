"""The decode loop on the device: the contract of `orthrus_gguf.decode.decode`, one step behind.

Policies are asked for steady plans only: whatever looks at a draft's confidences cycle by cycle
(cuts, stale tails, lookups, trees) needs the host in between, and `decode.decode` for it.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace

from orthrus_gguf.drafting.policy import Cycle, Pass, Plan, SteadyPolicy, Strategy
from orthrus_gguf.runtime.cuda.cache import CudaCache
from orthrus_gguf.runtime.cuda.model import CudaModel
from orthrus_gguf.runtime.cuda.stepper import Committed, stepper_of
from orthrus_gguf.runtime.cuda.steps import bucket
from orthrus_gguf.sampling import SamplingSettings

#: Cycles under way while the host handles one: with one more, the device never waits for it.
AHEAD = 2


def decode_on_device(
    model: CudaModel,
    cache: CudaCache,
    settings: SamplingSettings,
    tokens: list[int],
    plan: Plan | SteadyPolicy,
    max_tokens: int,
    stop_tokens: Sequence[int] = (),
) -> Generator[Cycle, None, None]:
    """Yield cycles until `max_tokens` tokens have been committed; stop earlier by closing.

    tokens: the committed tokens, whose last one is the anchor; the cache holds all before it. Each
        cycle's tokens are appended before it is yielded.
    plan: a fixed plan, or a policy that is asked for the plan of each cycle as it is launched.
    stop_tokens: the iteration ends with the cycle that commits one of these.
    A cycle is launched ahead only if it will have room for its full width whatever the ones before
    it commit, so that widths are those of `decode.decode`. Closing at any moment drops what ran
    ahead: the cache then holds all of `tokens` but the last.
    """
    limit = len(tokens) + max_tokens
    stepper = stepper_of(model, cache)
    stepper.begin(tokens, settings, max_tokens, stop_tokens)
    try:
        while (room := limit - len(tokens)) > 0:
            started = time.perf_counter()
            sure = room - (stepper.reach - stepper.position)
            while stepper.in_flight < AHEAD:
                following, width = _following(model, plan, stepper.reach)
                if sure <= width or stepper.reach + width >= cache.capacity:
                    break
                stepper.launch(following)
                sure -= width + 1
            if not stepper.in_flight:
                following, width = _following(model, plan, stepper.reach)
                stepper.launch(replace(following, width=min(width, room - 1)))
            committed = stepper.collect()
            if not committed.tokens:
                raise ValueError(f"nothing was committed after position {committed.start}")
            tokens.extend(committed.tokens)
            cycle = _cycle(committed, time.perf_counter() - started)
            if not isinstance(plan, Plan):
                plan.observe(cycle)
            yield cycle
            if committed.stopped:
                return
    finally:
        stepper.rewind(len(tokens) - 1)


def _following(model: CudaModel, plan: Plan | SteadyPolicy, context: int) -> tuple[Plan, int]:
    """The plan of the next cycle, and its width.

    A policy may ask for any width; those of few buckets need few graphs.
    """
    if not isinstance(plan, Plan):
        plan = plan.steady(context)
        most = model.config.block_size or 0
        plan = replace(plan, width=min(bucket(plan.width + 1) - 1, most))
    return plan, 0 if plan.strategy is Strategy.AR else plan.width


def _cycle(committed: Committed, seconds: float) -> Cycle:
    """seconds: of the whole cycle; its passes are not timed apart, so each gets an equal share."""
    share = seconds / len(committed.passes)
    passes = tuple(
        Pass(ar, block, context=committed.start, seconds=share) for ar, block in committed.passes
    )
    return Cycle(
        committed.start,
        committed.drafts,
        committed.accepted,
        committed.tokens,
        passes=passes,
        seconds=seconds,
    )
