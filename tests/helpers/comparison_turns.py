"""Turns of a comparison, made by hand so that their sums are easy to work out."""

from __future__ import annotations

from orthrus_gguf.bench.comparison.prompts import Prompt
from orthrus_gguf.bench.comparison.runner import Turn
from orthrus_gguf.drafting.block import BLOCK
from orthrus_gguf.drafting.cycle import Cycle, Pass
from orthrus_gguf.drafting.draft import Draft, Source
from orthrus_gguf.drafting.lookup import LOOKUP
from orthrus_gguf.request import Result
from orthrus_gguf.stats import Timings, count


def cycle(accepted: int, drafts: int, *passes: Pass, source: Source = BLOCK) -> Cycle:
    tokens = tuple(range(drafts))
    draft = Draft(source, tokens, (0.5,) * drafts)
    return Cycle(3, tokens, accepted, tuple(range(accepted + 1)), draft, passes)


def turn(entry: str, prompt: str, seconds: float, cycles: list[Cycle], lap: int = 0) -> Turn:
    """A turn that generated what its cycles committed, and one token before."""
    generated = sum(len(c.tokens) for c in cycles)
    output = tuple(range(generated + 1))
    counts = count(cycles, prompt_tokens=3, cached_tokens=0, output_tokens=generated + 1)
    timings = Timings(9.0, seconds, 3, generated)
    result = Result(output, "", "length", tuple(cycles), counts, timings)
    return Turn(entry, Prompt(prompt.split()[0], prompt, (1, 2, 3)), lap, result)


def plain(n: int) -> list[Cycle]:
    return [cycle(0, 0, Pass(1, 0, 10, 0.1))] * n


#: Cycles with 3, 1 and 2 tokens: 0.3 s of drafts, 0.6 s of verification, 0.5 s of a fused pass.
DRAFTED = [
    cycle(2, 2, Pass(0, 3, 10, 0.1), Pass(3, 0, 10, 0.2)),
    cycle(0, 2, Pass(0, 3, 13, 0.2), Pass(3, 0, 13, 0.4)),
    cycle(1, 1, Pass(2, 4, 14, 0.5), source=LOOKUP),
]

TURNS = [
    turn("two-pass@2", "code 1", 2.0, DRAFTED),
    turn("ar", "code 1", 1.0, plain(6)),
    turn("ar", "list 1", 3.0, plain(6)),
    turn("two-pass@2", "list 1", 1.0, DRAFTED),
    turn("ar", "code 1", 2.0, plain(6), lap=1),
    turn("two-pass@2", "code 1", 2.0, DRAFTED, lap=1),
    turn("two-pass@2", "list 1", 3.0, DRAFTED, lap=1),
    turn("ar", "list 1", 2.0, plain(6), lap=1),
]
