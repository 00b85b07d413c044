"""What shortened prompts cost and lose: needles in Python's own documentation, questions about a
file of its library.

    python tests/bench/prefill_needles.py MODEL.gguf [--length 2000] [--needles 1] [--prompts 6]
    python tests/bench/prefill_needles.py MODEL.gguf --file textwrap

For every scorer and share that is kept: how many answers are right, and what the first token took,
scoring included, beside the whole prompt's in the same run: processor seconds of this process,
which other work on the machine changes little, and seconds of the clock. --own: also what is right
where the kept tokens stay at their positions of the whole prompt (as in arXiv 2502.02789), which
the product does not do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from prefill_prompts import FACTS, QUESTIONS, Case, file_cases, needle_case

from orthrus_gguf.cli.loaded import Loaded, load, say
from orthrus_gguf.cli.prefill import open_compressor
from orthrus_gguf.cli.run import _parser
from orthrus_gguf.prefill.compression import Compression, Compressor
from orthrus_gguf.prefill.scorer import Scorer
from orthrus_gguf.runtime.cpu import model as cpu_model
from orthrus_gguf.text.chat import Message

KEEPS = (0.5, 0.2, 0.1, 0.05)

#: Tokens of an answer: enough for a sentence with one number, and for each more.
ANSWER_TOKENS, MORE_TOKENS = 24, 20


@dataclass
class Clock:
    """What happens while it is entered. processor: seconds of all threads of this process; wall: of
    the clock."""

    processor: float = 0.0
    wall: float = 0.0

    def __enter__(self) -> None:
        self._began = time.process_time(), time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.processor += time.process_time() - self._began[0]
        self.wall += time.perf_counter() - self._began[1]


@contextmanager
def own_positions(kept: tuple[int, ...], full: int) -> Iterator[None]:
    """Kept tokens turn as in the whole prompt, and what follows as it would behind that."""
    place, table = cpu_model._place, np.array([*kept, *range(full, full + 4096)])

    def placed(piece: Any, own: Any) -> Any:
        found = place(piece, own)
        return replace(found, positions=table[found.positions])

    cpu_model._place = placed
    try:
        yield
    finally:
        cpu_model._place = place


def answer(loaded: Loaded, request: Any) -> tuple[str, Clock]:
    """The text, and what its first token took."""
    loaded.session.keep(())
    clock = Clock()
    generation = loaded.session.generate(request, during_prompt=clock)
    for _ in generation:
        pass
    return generation.result.text, clock


def run_case(
    loaded: Loaded,
    case: Case,
    scorers: dict[str, Compressor],
    keeps: tuple[float, ...],
    *,
    own: bool,
    show: bool,
) -> dict[tuple[str, float], tuple[float, ...]]:
    """By scorer and share: right words of all, and those with the kept tokens at their own
    positions (`own`; else NaN), tokens, processor seconds to the first token, those of scoring, and
    seconds of the clock."""
    text, words = case
    request = loaded.turn([Message("user", text)])

    def right(said: str) -> float:
        if show:
            print(f"  {words}: {said!r}", flush=True)
        return sum(word in said for word in words) / len(words)

    said, clock = answer(loaded, request)
    share, count = right(said), len(request.prompt)
    whole = (share, share, count, clock.processor, 0.0, clock.wall)
    found: dict[tuple[str, float], tuple[float, ...]] = {}
    for name, compressor in scorers.items():
        found[name, 1.0] = whole
        scoring = Clock()
        with scoring:
            scores = compressor.scorer.scores(request.prompt)
        ready = Compressor(_Scored(**vars(compressor.scorer), found=scores), compressor.compression)
        for keep in keeps:
            selection = ready.select(request.prompt, [text], Compression(keep, 0))
            assert selection is not None
            shorter = replace(request, prompt=selection.tokens)
            said, clock = answer(loaded, shorter)
            share, there = right(said), np.nan
            if own:
                with own_positions(selection.kept, selection.full):
                    there = right(answer(loaded, shorter)[0])
            seconds = clock.processor + scoring.processor, scoring.processor
            wall = clock.wall + scoring.wall
            found[name, keep] = (share, there, len(selection.tokens), *seconds, wall)
    return found


@dataclass(frozen=True)
class _Scored(Scorer):
    """One that has read the prompt. found: its scores."""

    found: Any = None

    def scores(self, tokens: Any, on_progress: Callable[[int], None] | None = None) -> Any:
        assert len(tokens) == len(self.found)
        return self.found


def table(found: list[dict[tuple[str, float], tuple[float, ...]]]) -> Iterator[str]:
    """Means, as Markdown."""
    yield (
        "| scorer | keep | right | at own positions | tokens | processor seconds | of it scoring"
        " | times less | seconds |"
    )
    yield "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
    for name, keep in found[0]:
        rows = [case[name, keep] for case in found]
        right, own, count, seconds, scoring, wall = np.mean(rows, axis=0)
        whole = np.mean([case[name, 1.0][3] for case in found])
        yield (
            f"| {name} | {keep:g} | {100 * right:.0f} % | {100 * own:.0f} % | {count:.0f}"
            f" | {seconds:.2f} | {100 * scoring / seconds:.0f} % | {whole / seconds:.2f}"
            f" | {wall:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument(
        "--scorer",
        action="append",
        help="as --prefill-drafter takes it; several may be given (default: self:18)",
    )
    parser.add_argument("--facts", choices=list(FACTS), default="unseen")
    parser.add_argument("--length", type=int, default=2000)
    parser.add_argument("--needles", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--only", type=int, help="one of the prompts, counted from 0")
    parser.add_argument("--file", choices=list(QUESTIONS))
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)))
    parser.add_argument("--own", action="store_true", help="also at their own positions")
    parser.add_argument("--show", action="store_true", help="print the answers too")
    parser.add_argument("--threads", default="1")
    args = parser.parse_args()
    names = args.scorer or ["self:18"]
    most = ANSWER_TOKENS + MORE_TOKENS * (args.needles - 1)
    flags = f"-t {args.threads} --temp 0 -n {most} --strategy ar -c 8192"
    words = [args.model, *flags.split(), "--prefill-drafter"]
    keeps = tuple(float(part) for part in args.keeps.split(","))
    with ExitStack() as resources:
        parsed = _parser().parse_args([*words, names[0]])
        loaded = load(args.model, parsed, resources)
        settings = replace(loaded.settings, context=loaded.session.n_ctx)
        scorers = {}
        for name in names:
            parsed.prefill_drafter = name
            parts = loaded.file, loaded.model, loaded.tokenizer, settings
            compressor = open_compressor(parsed, *parts, resources, say)
            assert compressor is not None
            scorers[name.rpartition("/")[2]] = compressor
        if args.file:
            cases = file_cases(args.file)
        else:
            shape = args.length, args.needles
            tokens = lambda text: len(loaded.tokenizer.encode(text, add_bos=False))  # noqa: E731
            facts, count = FACTS[args.facts], args.prompts
            cases = [needle_case(facts, tokens, *shape, i, count) for i in range(count)]
        found = [
            run_case(loaded, case, scorers, keeps, own=args.own, show=args.show)
            for number, case in enumerate(cases[: args.prompts])
            if args.only in (None, number)
        ]
    what = args.file or f"{args.needles} needle(s), {args.facts}, about {args.length} tokens"
    print(f"{what}; {len(found)} prompts, {args.threads} thread(s)")
    print("\n".join(table(found)), flush=True)


if __name__ == "__main__":
    main()
