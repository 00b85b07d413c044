"""Texts to train on: prompts with the base's own answers, generated side by side and kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.engine import Generation, Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.tokenizer import Tokenizer
from orthrus_gguf.together import Together
from orthrus_gguf.training.prompts import Beginning, Invented, Prompt

#: Conversations in a pass.
SLOTS = 16

#: Texts whose prompts are made before they are answered: what a kill can lose.
_CHUNK = 128

#: Rows of prompts in a pass.
_PROMPT_ROWS = 256


@dataclass(frozen=True)
class Answer:
    """A text of the base: `tokens`, of which the first `n_prompt` are the prompt.

    held: kept out of training. Such answers are greedy, so that what the AR view says next is what
    comes next.
    """

    index: int
    domain: str
    n_prompt: int
    tokens: tuple[int, ...]
    held: bool


def is_held(index: int) -> bool:
    """One text of sixteen is kept out of training."""
    return index % 16 == 0


def is_greedy(index: int) -> bool:
    """Two answers of three are greedy, and all that are held out."""
    return is_held(index) or index % 3 != 0


def sampling_of(index: int, seed: int) -> SamplingSettings:
    """How answer `index` is drawn."""
    if is_greedy(index):
        return SamplingSettings(temperature=0.0)
    return SamplingSettings(
        temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, seed=(seed << 20) + index
    )


class Writer:
    """Lets a base write, several texts in every pass."""

    def __init__(self, model: Model, tokenizer: Tokenizer, context: int) -> None:
        self._tokenizer, self._context = tokenizer, context
        self._idle = [Session(model, tokenizer, context) for _ in range(SLOTS)]
        self._together = Together(model)
        self._policy = FixedPolicy(parse("ar"), model.config)

    def run(
        self, work: Iterable[tuple[int, tuple[int, ...], SamplingSettings, int]]
    ) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """work: number, prompt, sampling, most tokens. Yields number, prompt and output, in the
        order in which they end. Raises OrthrusError."""
        waiting = iter(work)
        running: dict[Generation, tuple[int, tuple[int, ...]]] = {}
        while True:
            while self._idle and (item := next(waiting, None)) is not None:
                number, prompt, sampling, most = item
                session = self._idle.pop()
                generation = session.generate(Request(prompt, sampling, self._policy, most))
                running[generation] = (number, prompt)
                self._together.join(generation)
            if not running:
                return
            self._together.step(_PROMPT_ROWS)
            for generation in [g for g in running if g not in self._together]:
                if generation.error is not None:
                    raise generation.error
                number, prompt = running.pop(generation)
                self._idle.append(generation.session)
                yield number, prompt, tuple(generation.output)


@dataclass(frozen=True)
class Wanted:
    """How much is to be written. count: texts. tokens: most of an answer. context: most of a
    text. prompt_tokens: most of an invented prompt. seed: of everything that is drawn."""

    count: int
    tokens: int
    context: int
    prompt_tokens: int
    seed: int


def write_answers(
    path: Path,
    writer: Writer,
    wanted: Wanted,
    given: Sequence[Prompt] | None,
    invented: Invented,
    progress: Callable[[int, int], None],
) -> list[Answer]:
    """Answers to prompts, appended to `path` as they come; those that it holds are kept.

    given: prompts, in turn; None: the base writes them. progress: texts and answer tokens so far.
    Raises OrthrusError.
    """
    found = {answer.index: answer for answer in read_answers(path)}
    n_tokens = sum(len(a.tokens) - a.n_prompt for a in found.values())
    missing = [index for index in range(wanted.count) if index not in found]
    with path.open("a", encoding="ascii") as file:
        for first in range(0, len(missing), _CHUNK):
            prompts = _prompts(writer, wanted, given, invented, missing[first : first + _CHUNK])
            work = [
                (index, tokens, sampling_of(index, wanted.seed), wanted.context - len(tokens))
                for index, prompt in prompts.items()
                for tokens in [prompt.tokens[: wanted.context - 8]]
            ]
            limited = [(i, tokens, s, min(most, wanted.tokens)) for i, tokens, s, most in work]
            for index, prompt_tokens, output in writer.run(limited):
                domain, n_prompt = prompts[index].domain, len(prompt_tokens)
                tokens = prompt_tokens + output
                found[index] = Answer(index, domain, n_prompt, tokens, is_held(index))
                n_tokens += len(output)
                file.write(json.dumps([index, domain, n_prompt, list(tokens)]) + "\n")
                file.flush()
                progress(len(found), n_tokens)
    return [found[index] for index in sorted(found) if index < wanted.count]


def _prompts(
    writer: Writer,
    wanted: Wanted,
    given: Sequence[Prompt] | None,
    invented: Invented,
    missing: Sequence[int],
) -> dict[int, Prompt]:
    """The prompts of the answers that are missing, by their numbers."""
    if given is not None:
        order = np.random.default_rng(wanted.seed).permutation(len(given))
        return {index: given[order[index % len(given)]] for index in missing}
    todo, found = list(missing), dict[int, Prompt]()
    for attempt in range(8):
        begun = dict[int, Beginning]()
        work = []
        for index in todo:
            rng = np.random.default_rng((wanted.seed, index, attempt))
            sampling = SamplingSettings(
                temperature=1.0, top_k=0, top_p=0.95, min_p=0.0, seed=int(rng.integers(1 << 31))
            )
            begun[index] = invented.beginning(rng)
            work.append((index, begun[index].tokens, sampling, wanted.prompt_tokens))
        for index, _, said in writer.run(work):
            prompt = invented.prompt(begun[index], said)
            if prompt is not None:
                found[index] = prompt
        todo = [index for index in todo if index not in found]
        if not todo:
            return dict(sorted(found.items()))
    raise OrthrusError(
        f"the base writes no usable prompt for {len(todo)} of {len(missing)} texts; give --prompts"
    )


def read_answers(path: Path) -> list[Answer]:
    """What `path` holds; a last line that was cut off is taken away. Raises OrthrusError."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [_answer(path, *numbered) for numbered in enumerate(whole.splitlines(), 1)]


def _answer(path: Path, number: int, line: bytes) -> Answer:
    try:
        index, domain, n_prompt, tokens = json.loads(line)
        return Answer(index, domain, n_prompt, tuple(tokens), is_held(index))
    except (ValueError, TypeError) as error:
        raise OrthrusError(
            f"{path}, line {number}: is damaged; take the line out, it is made again"
        ) from error
