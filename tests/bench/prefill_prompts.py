"""Prompts for `prefill_needles.py`: needles in texts of the standard library, questions about files
of it, and the words that a right answer holds."""

from __future__ import annotations

import inspect
import pydoc_data.topics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np

#: A question's text and the words that a right answer holds.
Case = tuple[str, tuple[str, ...]]

#: Modules whose docstrings are a text.
MODULES = (
    *("argparse", "logging", "decimal", "fractions", "statistics", "datetime", "zipfile", "csv"),
    *("json", "sqlite3", "socket", "email.message", "http.client", "urllib.request", "random"),
    *("collections", "itertools", "functools", "heapq", "pathlib", "shutil", "tempfile", "enum"),
    *("subprocess", "threading", "queue", "asyncio", "inspect", "unittest", "doctest", "dis"),
)


def topics() -> Iterator[str]:
    """Of the language's reference."""
    found = pydoc_data.topics.topics
    return (found[name] for name in sorted(found))


def docstrings() -> Iterator[str]:
    """Of what modules export, and of their classes' methods."""
    for module in map(import_module, MODULES):
        for name, value in sorted(vars(module).items()):
            if not name.startswith("_"):
                yield inspect.getdoc(value) or ""
                if inspect.isclass(value):
                    methods = sorted(vars(value).items())
                    yield from (inspect.getdoc(v) or "" for n, v in methods if n[0] != "_")


@dataclass(frozen=True)
class Facts:
    """Needles. sentence: one, of a name and a code. one, several: how it is asked for. seed: of the
    first prompt."""

    texts: Callable[[], Iterator[str]]
    names: tuple[str, ...]
    sentence: str
    one: str
    several: str
    seed: int

    def paragraphs(self) -> list[str]:
        """Those of more than 20 words, each once."""
        parts = (part.strip() for part in "\n\n".join(self.texts()).split("\n\n"))
        return list(dict.fromkeys(part for part in parts if len(part.split()) > 20))


#: `seen`: of this kind were the prompts on which rows, layers and chunks were chosen. `unseen`:
#: nothing was chosen on these but their wording, one of three: SmolLM2 answers it best from the
#: whole prompt.
FACTS = {
    "seen": Facts(
        topics,
        ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Turin", "Seoul", "Perth"),
        "The secret number of {} is {}.",
        "What is the secret number of {}?",
        "What are the secret numbers of {}?",
        0,
    ),
    "unseen": Facts(
        docstrings,
        ("copper", "walnut", "velvet", "granite", "amber", "bamboo", "marble", "cotton"),
        "The phone number of the {} hotel is {}.",
        "What is the phone number of the {} hotel?",
        "What are the phone numbers of the {} hotels?",
        1000,
    ),
}

#: Of files: questions, and what the answers have to hold.
QUESTIONS = {
    "textwrap": (
        ("What is the default value of the parameter width?", "70"),
        ("What is the default value of the parameter tabsize?", "8"),
        ("What is the default value of the parameter placeholder?", "[...]"),
        ("Which exception is raised for a placeholder that is too large?", "ValueError"),
        ("What does the function dedent remove from every line?", "whitespace"),
    ),
    "csv": (
        ("What is the default value of extrasaction in DictWriter?", '"raise"'),
        ("Which quoting does the unix_dialect use?", "QUOTE_ALL"),
        ("Which error does the Sniffer raise if it finds no delimiter?", "ould not determine"),
    ),
}


def needle_case(
    facts: Facts, tokens: Callable[[str], int], length: int, needles: int, number: int, count: int
) -> Case:
    """A text of about `length` tokens, as `tokens` counts them. One needle: at depths that the
    `count` cases share out evenly."""
    rng, found, total = np.random.default_rng(facts.seed + number), list[str](), 0
    every = facts.paragraphs()
    while total < length:
        found.append(every[rng.integers(len(every))])
        total += tokens(found[-1])
    names = [str(name) for name in rng.permutation(facts.names)[:needles]]
    codes = [str(rng.integers(10000, 99999)) for _ in names]
    depths = [(number + 0.5) / count] if needles == 1 else np.arange(needles) / needles + 0.1
    places = [int(depth * len(found)) for depth in depths]
    for place, name, code in sorted(zip(places, names, codes, strict=True), reverse=True):
        found.insert(place, facts.sentence.format(name, code))
    if needles == 1:
        question = facts.one.format(names[0])
    else:
        question = facts.several.format(f"{', '.join(names[:-1])} and {names[-1]}")
    return "\n\n".join([*found, question]), tuple(codes)


def file_cases(name: str) -> list[Case]:
    """Questions about a module's source."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text("utf-8")
    return [(f"{text}\n\n{question}", (answer,)) for question, answer in QUESTIONS[name]]
