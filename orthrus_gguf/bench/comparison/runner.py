"""Runs every strategy on every prompt, in turns, and insists that the text is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from orthrus_gguf.bench.comparison.entries import Entry
from orthrus_gguf.bench.comparison.prompts import Prompt
from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.request import Request, Result
from orthrus_gguf.sampling import SamplingSettings

#: Tokens of the generations before the first turn, which wake the machine and do not count.
WARM_UP = 8


@dataclass(frozen=True)
class Turn:
    """One generation: what the strategy `entry` made of `prompt` in one of the rounds."""

    entry: str
    prompt: Prompt
    round: int
    result: Result


def run_turns(
    session: Session,
    entries: Sequence[Entry],
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
    *,
    max_tokens: int,
    rounds: int,
) -> Iterator[Turn]:
    """Yield each turn as it is done.

    A prompt is done by all strategies, one after the other, before the next one is; who begins
    moves on from prompt to prompt. A machine that grows warm, or busy, thus does so for all of them
    alike. Raises OrthrusError when a strategy's text differs from that of another.
    """
    first: dict[str, Turn] = {}
    for lap in range(rounds):
        for number, prompt in enumerate(prompts):
            shift = (number + lap) % len(entries)
            for entry in (*entries[shift:], *entries[:shift]):
                request = Request(prompt.tokens, sampling, entry.policy, max_tokens)
                turn = Turn(entry.name, prompt, lap, finish(session, request))
                check_same(turn, first.setdefault(prompt.name, turn))
                yield turn


def warm_up(
    session: Session, entries: Sequence[Entry], prompt: Prompt, sampling: SamplingSettings
) -> None:
    """Run every strategy for a few tokens: first passes are slow, whoever runs them.

    Controllers see these cycles as any others; they have learned hardly anything then.
    """
    for entry in entries:
        finish(session, Request(prompt.tokens, sampling, entry.policy, WARM_UP))


def finish(session: Session, request: Request) -> Result:
    """The whole answer at once."""
    generation = session.generate(request)
    for _ in generation:
        pass
    return generation.result


def check_same(turn: Turn, first: Turn) -> None:
    """Raise OrthrusError unless both turns gave the same tokens, text and end."""
    ours, theirs = turn.result, first.result
    if (ours.output, ours.text, ours.finish_reason) == (
        theirs.output,
        theirs.text,
        theirs.finish_reason,
    ):
        return
    same = 0
    while ours.output[same : same + 1] == theirs.output[same : same + 1] != ():
        same += 1
    raise OrthrusError(
        f"prompt {turn.prompt.name!r}: {turn.entry} and {first.entry} differ from output token"
        f" {same} on ({_shown(ours, same)} and {_shown(theirs, same)}); no strategy may change the"
        " text, so this is a bug of orthrus-gguf or of the runtime: please report it"
    )


def _shown(result: Result, position: int) -> str:
    """The id at a position of the output, or how the output ended there."""
    ids = result.output[position : position + 1]
    return f"id {ids[0]}" if ids else f"the end, {result.finish_reason}"
