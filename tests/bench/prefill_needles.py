"""What shortened prompts cost and lose: needles in Python's own documentation, questions about a
file of its library.

    python tests/bench/prefill_needles.py MODEL.gguf [--length 2000] [--needles 1] [--prompts 6]
    python tests/bench/prefill_needles.py MODEL.gguf --file textwrap

For every share that is kept: how many answers are right, and the time to the first token, scoring
included, beside the whole prompt's in the same run. --own: also what is right where the kept tokens
stay at their positions of the whole prompt (as in arXiv 2502.02789), which the product does not do.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from orthrus_gguf.cli.loaded import Loaded, load
from orthrus_gguf.cli.run import _parser
from orthrus_gguf.prefill.compression import Compression
from orthrus_gguf.runtime.cpu import model as cpu_model
from orthrus_gguf.text.chat import Message

CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Turin", "Seoul", "Perth")
KEEPS = (0.5, 0.2, 0.1, 0.05)

#: Of `textwrap`: question, and what the answer has to hold.
QUESTIONS = {
    "textwrap": (
        ("What is the default value of the parameter width?", "70"),
        ("What is the default value of the parameter tabsize?", "8"),
        ("What is the default value of the parameter placeholder?", "[...]"),
        ("Which exception is raised for a placeholder that is too large?", "ValueError"),
        ("What does the function dedent remove from every line?", "whitespace"),
    ),
}

#: A question's text and the words that a right answer holds.
Case = tuple[str, tuple[str, ...]]


def paragraphs() -> list[str]:
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return [part.strip() for part in text.split("\n\n") if len(part.split()) > 20]


def needle_case(loaded: Loaded, length: int, needles: int, number: int, count: int) -> Case:
    """A text of about `length` tokens. One needle: at depths that the cases share out evenly."""
    rng, found, total = np.random.default_rng(number), list[str](), 0
    every = paragraphs()
    while total < length:
        found.append(every[rng.integers(len(every))])
        total += len(loaded.tokenizer.encode(found[-1], add_bos=False))
    cities = [str(city) for city in rng.permutation(CITIES)[:needles]]
    codes = [str(rng.integers(10000, 99999)) for _ in cities]
    depths = [(number + 0.5) / count] if needles == 1 else np.arange(needles) / needles + 0.1
    places = [int(depth * len(found)) for depth in depths]
    for place, city, code in sorted(zip(places, cities, codes, strict=True), reverse=True):
        found.insert(place, f"The secret number of {city} is {code}.")
    if needles == 1:
        question = f"What is the secret number of {cities[0]}?"
    else:
        named = f"{', '.join(cities[:-1])} and {cities[-1]}"
        question = f"What are the secret numbers of {named}?"
    return "\n\n".join([*found, question]), tuple(codes)


def file_cases(name: str) -> list[Case]:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text("utf-8")
    return [(f"{text}\n\n{question}", (answer,)) for question, answer in QUESTIONS[name]]


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


def answer(loaded: Loaded, request: Any) -> tuple[str, float]:
    """The text, and seconds up to its first token."""
    loaded.session.keep(())
    generation = loaded.session.generate(request)
    for _ in generation:
        pass
    return generation.result.text, generation.result.timings.prompt


def run_case(loaded: Loaded, case: Case, keeps: tuple[float, ...], *, own: bool) -> dict[Any, Any]:
    """By share: seconds to the first token, those of scoring, tokens, right words of all, and those
    with the kept tokens at their own positions (`own`; else NaN)."""
    text, words = case
    request, compressor = loaded.turn([Message("user", text)]), loaded.compressor
    assert compressor is not None
    scored: list[Any] = []
    score = compressor.scorer.scores

    def once(tokens: Any, on_progress: Callable[[int], None] | None = None) -> Any:
        if not scored:
            before = time.perf_counter()
            scored.extend((score(tokens, on_progress), time.perf_counter() - before))
        return scored[0]

    def right(said: str) -> float:
        return sum(word in said for word in words) / len(words)

    said, seconds = answer(loaded, request)
    found = {1.0: (seconds, 0.0, len(request.prompt), right(said), right(said))}
    object.__setattr__(compressor.scorer, "scores", once)
    for keep in keeps:
        selection = compressor.select(request.prompt, [text], Compression(keep, 0))
        assert selection is not None
        shorter = replace(request, prompt=selection.tokens)
        said, seconds = answer(loaded, shorter)
        there = np.nan
        if own:
            with own_positions(selection.kept, selection.full):
                there = right(answer(loaded, shorter)[0])
        found[keep] = (seconds + scored[1], scored[1], len(selection.tokens), right(said), there)
    object.__setattr__(compressor.scorer, "scores", score)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--scorer", default="self:18", help="as --prefill-drafter takes it")
    parser.add_argument("--length", type=int, default=2000)
    parser.add_argument("--needles", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--file", choices=list(QUESTIONS))
    parser.add_argument("--keeps", default=",".join(map(str, KEEPS)))
    parser.add_argument("--own", action="store_true", help="also at their own positions")
    parser.add_argument("--threads", default="2")
    args = parser.parse_args()
    flags = f"-t {args.threads} --temp 0 -n 24 --strategy ar -c 8192"
    words = [args.model, *flags.split(), "--prefill-drafter", args.scorer]
    keeps = tuple(float(part) for part in args.keeps.split(","))
    with ExitStack() as resources:
        loaded = load(args.model, _parser().parse_args(words), resources)
        if args.file:
            cases = file_cases(args.file)
        else:
            shape = args.length, args.needles
            cases = [needle_case(loaded, *shape, i, args.prompts) for i in range(args.prompts)]
        cases = cases[: args.prompts]
        found = [run_case(loaded, case, keeps, own=args.own) for case in cases]
    what = args.file or f"{args.needles} needle(s), about {args.length} tokens"
    print(f"{what}, {len(cases)} prompts, scored by {args.scorer}")
    print("| keep | right | at own positions | tokens | first token | scoring | times as fast |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    whole = np.mean([case[1.0][0] for case in found])
    for keep in (1.0, *keeps):
        rows = [case[keep] for case in found]
        seconds, scoring, count, right, own = np.mean(rows, axis=0)
        print(
            f"| {keep:g} | {100 * right:.0f} % | {100 * own:.0f} % | {count:.0f} | {seconds:.2f} s"
            f" | {100 * scoring / seconds:.0f} % | {whole / seconds:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
