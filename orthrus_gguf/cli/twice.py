"""`--twice`: one answer plainly and then with drafts, and what both took."""

from __future__ import annotations

import sys
from dataclasses import replace

from orthrus_gguf.cli.drafts_view import has_colours, legend, painted
from orthrus_gguf.cli.loaded import Loaded, say
from orthrus_gguf.drafting.plan import PLAIN, FixedPolicy
from orthrus_gguf.engine import Generation
from orthrus_gguf.request import Request, Result


def answer_twice(loaded: Loaded, request: Request) -> int:
    """Show both answers, then whether they are the same, and their passes and rates."""
    plain = replace(request, policy=FixedPolicy(PLAIN, loaded.model.config))
    say("--- plain decoding, one token a pass ---")
    first = _shown(loaded.start(plain))
    say(f"\n--- with drafts{legend(colours=has_colours(sys.stdout, sys.stderr))} ---")
    second = _shown(loaded.start(request))
    say(f"\n{loaded.banner}")
    say(verdict(first, second))
    return 0 if first.output == second.output else 1


def _shown(generation: Generation) -> Result:
    for piece in painted(generation, sys.stdout):
        print(piece, end="", flush=True)
    print(flush=True)
    return generation.result


def verdict(plain: Result, drafted: Result) -> str:
    """Same text or not; passes; tokens per second, and where the difference comes from."""
    same = "yes" if plain.output == drafted.output else "NO: this is a bug, please report it"
    few, many = drafted.statistics.forwards, plain.statistics.forwards
    lines = [f"same text: {same}", f"passes:    {many} plainly, {few} with drafts"]
    before, after = plain.timings.generated_per_second, drafted.timings.generated_per_second
    if before and after:
        passes = many / few
        cost = passes * before / after
        lines.append(
            f"speed:     {before:.0f} and {after:.0f} tokens per second, {after / before:.2f} times"
            f" as fast: {passes:.2f} times fewer passes, each {cost:.2f} times as long"
        )
    return "\n".join(lines)
