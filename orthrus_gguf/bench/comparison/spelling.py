"""How strategies and their variants are spelt (`SPELLING`), and what they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orthrus_gguf.decode import Plan, Policy, Strategy, plan_for
from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig

SPELLING = """\
  STRATEGY[@WIDTH[xBLOCKS]][+OPTION…]
  ar, two-pass, fused   a fixed plan
  auto                  the controller, which chooses strategy and widths itself
  @7                    two-pass, fused: verifies at most 7 draft tokens per cycle
  @7x2, @x2             fused: at most 2 blocks ride in a pass
  +lookup               also drafts what followed the last tokens before
  +tail                 also tries what a refused draft said further on
  +tree=16              two-pass: verifies a tree of 16 first and second choices, WIDTH deep
  +cut=0.1              ends a draft where its confidence falls below 0.1
  +no-lookup            auto: without the look-ups that it weighs too"""

AUTO = "auto"
NAMES = (AUTO, *(strategy.value for strategy in Strategy))

#: What is compared unless the caller says otherwise, with diffusion heads and without.
DEFAULT = ("ar", "two-pass", "fused", AUTO)
DEFAULT_WITHOUT_HEADS = ("ar", AUTO)

#: Options that a strategy has a use for; N stands for a number.
OPTIONS = {
    AUTO: ("no-lookup",),
    Strategy.AR.value: ("lookup",),
    Strategy.TWO_PASS.value: ("lookup", "tail", "cut=N", "tree=N"),
    Strategy.FUSED.value: ("lookup", "tail", "cut=N"),
}

_SHAPE = re.compile(
    r"(?P<name>[^@+]*)(?P<at>@(?P<width>\d{0,6})(?:x(?P<blocks>\d{1,6}))?)?(?P<rest>\+.*)?"
)


@dataclass(frozen=True)
class Spelling:
    """A parsed spelling. width, blocks: None where they were left out."""

    name: str
    width: int | None = None
    blocks: int | None = None
    lookup: bool = False
    tail: bool = False
    tree: int = 0
    cut: float = 0.0

    @property
    def text(self) -> str:
        """The canonical spelling."""
        at = "" if self.width is None else str(self.width)
        at += "" if self.blocks is None else f"x{self.blocks}"
        options = ["lookup"] * self.lookup + ["tail"] * self.tail
        options += [f"tree={self.tree}"] if self.tree else []
        options += [f"cut={self.cut}"] if self.cut else []
        if self.name == AUTO:
            options = [] if self.lookup else ["no-lookup"]
        return "+".join([f"{self.name}@{at}" if at else self.name, *options])


@dataclass(frozen=True)
class Entry:
    """A strategy in a comparison, by its full spelling. A controller goes on learning."""

    name: str
    policy: Plan | Policy


def parse(text: str) -> Spelling:
    """Raises OrthrusError, in one line, for anything that is not a spelling or has no effect."""
    found = _SHAPE.fullmatch(text)
    name = found["name"] if found else ""
    if found is None or name not in NAMES or found["at"] == "@":
        raise OrthrusError(
            f"strategy {text!r}: expected NAME[@WIDTH[xBLOCKS]][+OPTION…], the name one of"
            f" {', '.join(NAMES)}"
        )
    if found["at"] and name not in (Strategy.TWO_PASS.value, Strategy.FUSED.value):
        why = "auto chooses widths itself" if name == AUTO else "plain decoding has no width"
        raise OrthrusError(f"strategy {text!r}: {why}; leave {found['at']} out")
    if found["blocks"] and name != Strategy.FUSED.value:
        raise OrthrusError(
            f"strategy {text!r}: only fused passes carry blocks; leave x{found['blocks']} out"
        )
    width = int(found["width"]) if found["width"] else None
    blocks = int(found["blocks"]) if found["blocks"] else None
    if width == 0 or blocks == 0:
        raise OrthrusError(f"strategy {text!r}: widths and blocks are at least 1")
    spelling = Spelling(name, width, blocks, lookup=name == AUTO)
    for option in (found["rest"] or "").split("+")[1:]:
        spelling = _with_option(spelling, option, text)
    return spelling


def _with_option(spelling: Spelling, option: str, text: str) -> Spelling:
    """The spelling with one more option, if its strategy has a use for it."""
    key, equals, value = option.partition("=")
    if f"{key}{equals and '=N'}" not in OPTIONS[spelling.name]:
        known = ", ".join(f"+{name}" for name in OPTIONS[spelling.name])
        raise OrthrusError(f"strategy {text!r}: {spelling.name} takes {known}, not +{option}")
    if key == "tree":
        if not re.fullmatch(r"\d{1,6}", value) or int(value) < 1:
            raise OrthrusError(f"strategy {text!r}: +{option}: expected a number of at least 1")
        return replace(spelling, tree=int(value))
    if key == "cut":
        return replace(spelling, cut=_probability(value, option, text))
    if key == "tail":
        return replace(spelling, tail=True)
    return replace(spelling, lookup=key == "lookup")


def _probability(value: str, option: str, text: str) -> float:
    try:
        cut = float(value)
    except ValueError:
        cut = -1.0
    if not 0 < cut < 1:
        raise OrthrusError(f"strategy {text!r}: +{option}: expected a probability, 0 < P < 1")
    return cut


def parse_all(text: str) -> list[Spelling]:
    """Spellings with commas between them."""
    return [parse(part.strip().lower()) for part in text.split(",")]


def default(config: ModelConfig) -> list[Spelling]:
    """What is compared on this model unless the caller says otherwise."""
    return [parse(name) for name in (DEFAULT if config.has_heads else DEFAULT_WITHOUT_HEADS)]


def spread(spellings: Sequence[Spelling], widths: Sequence[int]) -> list[Spelling]:
    """Every draft strategy that names no width, once per width.

    Raises OrthrusError when there is none.
    """
    open_ones = [s for s in spellings if _drafts(s) and s.width is None]
    if widths and not open_ones:
        raise OrthrusError("--widths: every strategy named has its width, or none; leave it out")
    return [
        replace(spelling, width=width)
        for spelling in spellings
        for width in (widths if widths and spelling in open_ones else (spelling.width,))
    ]


def entries(
    spellings: Sequence[Spelling], session: Session, controller: Callable[[bool], Policy]
) -> list[Entry]:
    """What to compare in this session: plain decoding first, then each spelling once, in order.

    controller: makes one, with look-ups or without. Raises OrthrusError for what the model cannot
    do.
    """
    made: dict[str, Entry] = {}
    for spelling in (Spelling(Strategy.AR.value), *spellings):
        if spelling.name == AUTO:
            name = spelling.text
            if name not in made:
                made[name] = Entry(name, controller(spelling.lookup))
            continue
        plan = _plan(spelling, session)
        drafts = plan.strategy is not Strategy.AR
        full = replace(
            spelling,
            width=plan.width if drafts else None,
            blocks=plan.blocks or None,
        )
        made.setdefault(full.text, Entry(full.text, plan))
    return list(made.values())


def _plan(spelling: Spelling, session: Session) -> Plan:
    model, block = session.model, session.model.config.block_size
    if _drafts(spelling) and not (model.config.has_heads and block):
        raise OrthrusError(
            f"strategy {spelling.text!r}: {model.config.name} has no diffusion heads; name a heads"
            " file with --heads, or compare ar, ar+lookup and auto"
        )
    if spelling.width is not None and block is not None and spelling.width > block:
        raise OrthrusError(
            f"strategy {spelling.text!r}: the width must lie in 1..{block}, the block size of"
            f" {model.config.name}"
        )
    if spelling.tree and not session.verifies_trees:
        raise OrthrusError(
            f"strategy {spelling.text!r}: {model.description} verifies chains only; leave"
            f" +tree={spelling.tree} out"
        )
    plan = plan_for(model, Strategy(spelling.name), spelling.width, blocks=spelling.blocks)
    return replace(
        plan,
        lookup=spelling.lookup,
        tail=spelling.tail,
        cut=spelling.cut,
        tree=spelling.tree,
    )


def _drafts(spelling: Spelling) -> bool:
    return spelling.name in (Strategy.TWO_PASS.value, Strategy.FUSED.value)
