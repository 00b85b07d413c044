"""What a finished generation looks like to people (stderr) and to programs (`--json`)."""

from __future__ import annotations

from typing import Any

from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.drafting.plan import AUTO, Plan
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.registry import optional_names
from orthrus_gguf.prefill.compression import label
from orthrus_gguf.request import Request, Result


def describe_plan(plan: Plan) -> str:
    """A plan in a few words: "fused, width 15, 3 blocks, with lookup"."""
    if plan.strategy is None:
        return AUTO
    parts = [plan.strategy.value]
    if plan.width:
        parts.append(f"width {plan.width}")
    if plan.blocks:
        parts.append(f"{plan.blocks} block{'s' if plan.blocks > 1 else ''}")
    if plan.tree:
        parts.append(f"tree of {plan.tree}")
    parts += [f"with {name}" for name in plan.also]
    return ", ".join(parts)


def explain(plan: Plan, policy: Policy) -> str:
    """What the controller did: phases of one prospect, in the order of the text."""
    if not isinstance(policy, Controller):
        return f"nothing was decided while decoding: {describe_plan(plan)}, as the flags say"
    lines = ["what was decided, expected and achieved (tokens per second):"]
    lines += [
        f"  {phase['tokens']:6d} tokens in {phase['cycles']:5d} cycles: expected"
        f" {phase['expected_tokens_per_second']:8.1f}, achieved"
        f" {phase['tokens_per_second']:8.1f}  ({phase['plan']})"
        for phase in explanation_json(policy)
    ]
    return "\n".join(lines)


def explanation_json(policy: Policy) -> list[dict[str, Any]]:
    """The phases of `explain`; none of a policy that decides nothing."""
    phases = policy.phases if isinstance(policy, Controller) else ()
    return [
        {
            "plan": describe_plan(phase.prospect.plan),
            "tokens": phase.tokens,
            "cycles": phase.cycles,
            "expected_tokens_per_second": phase.prospect.rate,
            "tokens_per_second": phase.tokens / phase.seconds,
        }
        for phase in phases
        if phase.seconds > 0
    ]


def statistics_block(
    plan: Plan, request: Request, result: Result, load_seconds: float | None = None
) -> str:
    """The block that ends a run, a line each for load, prompt, output, passes and drafts."""
    stats, timings, sampling = result.statistics, result.timings, request.sampling
    mode = "greedy" if sampling.greedy else f"seed {sampling.seed}"
    lines = [] if load_seconds is None else [f"load:    {_time(load_seconds)}"]
    cached = f", {stats.cached_tokens} of them cached" if stats.cached_tokens else ""
    unread = len(request.prompt) - stats.prompt_tokens
    missing = f" ({unread} more were not processed)" if unread else ""
    if result.selection is not None:
        lines += [f"kept:    {result.selection.words}"]
    lines += [
        f"prompt:  {_count(stats.prompt_tokens, 'token')}{cached}"
        f"{_speed(timings.prompt, timings.prompt_per_second)}{missing}",
        f"output:  {_count(stats.output_tokens, 'token')}"
        f"{_speed(timings.generation, timings.generated_per_second)},"
        f" {describe_plan(plan)}, {mode}",
    ]
    if stats.offered:
        shares = " ".join(f"{100 * share:.0f}" for share in stats.acceptance_by_position)
        lines += [
            f"passes:  {_count(stats.forwards, 'forward pass', 'es')},"
            f" {stats.tokens_per_forward:.2f} tokens per forward pass;"
            f" {_count(stats.cycles, 'cycle')}, {stats.tokens_per_cycle:.2f} tokens per cycle",
            f"drafts:  {_count(sum(stats.offered), 'token')} drafted,"
            f" {sum(stats.confirmed)} accepted ({100 * (stats.acceptance or 0):.0f} %);"
            f" by position in the draft {shares} %",
        ]
    return "\n".join(lines)


def _count(number: int, what: str, ending: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else ending}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _speed(seconds: float, per_second: float | None) -> str:
    """Time and rate; nothing where there is none: a first token comes out of the prompt's pass."""
    return "" if per_second is None else f" in {_time(seconds)} ({per_second:.1f} tok/s)"


def _plan_json(plan: Plan) -> dict[str, Any]:
    if plan.strategy is None:
        return {"strategy": AUTO, "draft_width": None}
    return {
        "strategy": plan.strategy.value,
        "draft_width": plan.width or 0,
        "draft_blocks": plan.blocks or 0,
        "draft_cut": plan.cut,
        "draft_tail": plan.tail,
        "draft_tree": plan.tree,
        **{name: name in plan.also for name in optional_names()},
    }


def result_json(plan: Plan, request: Request, result: Result) -> dict[str, Any]:
    """Everything about a run, in plain JSON types."""
    sampling = request.sampling
    return {
        "prompt_ids": list(request.prompt),
        "output_ids": list(result.output),
        "text": result.text,
        "finish_reason": result.finish_reason,
        "cycle_starts": [cycle.start for cycle in result.cycles],
        "accepted": [cycle.accepted for cycle in result.cycles],
        "stats": result.statistics.to_json(),
        "timings": result.timings.to_json(),
        **label(result.selection),
        "settings": {
            **_plan_json(plan),
            "max_tokens": request.max_tokens,
            "stop": list(request.stop),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repeat_penalty": sampling.repeat_penalty,
            "repeat_last_n": sampling.repeat_last_n,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "seed": sampling.seed,
            "ignore_eos": bool(sampling.banned),
        },
    }
