"""Plans: strategies and their shapes, how they are spelt, and the policy that follows one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from orthrus_gguf.drafting import registry
from orthrus_gguf.drafting.block import BLOCK
from orthrus_gguf.drafting.carried_blocks import hypotheses
from orthrus_gguf.drafting.cycle import Cycle, Guess, Hypothesis
from orthrus_gguf.drafting.draft import NO_DRAFT, Draft
from orthrus_gguf.drafting.drafter import Drafter, DraftPass
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.drafting.tail import TAIL
from orthrus_gguf.drafting.tree import NO_TREE, Tree, best_first
from orthrus_gguf.errors import OrthrusError, did_you_mean
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.records import dataclass

#: Blocks that a fused pass carries unless the caller says otherwise.
FUSED_BLOCKS = 3

#: Most tokens of a draft at hand that plain decoding verifies at once.
MOST_AT_HAND = 32

#: A stale tail is preferred to a draft pass if its first token is this sure. (A carried draft
#: always is: on the demo model, drafting again after a doubtful one costs 13 % of the tokens per
#: forward.)
SURE = 0.3

#: What a draft under guess A is worth beside one under guess B: its block spends a row on a token
#: that is known by then, and may have been written for another one.
WORTH_OF_LAST = 0.8

#: Name of the policy that chooses by itself.
AUTO = "auto"


class Strategy(Enum):
    """How a cycle finds its tokens."""

    AR = "ar"
    TWO_PASS = "two-pass"
    FUSED = "fused"


NAMES = (AUTO, *(strategy.value for strategy in Strategy))


def _named(spelling: str, words: str) -> str:
    """Lines of `SPELLING`, one for each drafter that plans name."""
    return "".join(
        f"\n  {spelling.format(name):<22}{words.format(registry.KINDS[name].words)}"
        for name in registry.optional_names()
    )


SPELLING = f"""\
  STRATEGY[@WIDTH[xBLOCKS]][+OPTION…]
  ar, two-pass, fused   a fixed plan
  auto                  the controller, which chooses strategy and widths itself
  @7                    two-pass, fused: verifies at most 7 draft tokens per cycle
  @7x2, @x2             fused: at most 2 blocks ride in a pass{_named("+{}", "also drafts {}")}
  +tail                 also tries what a refused draft said further on
  +tree=16              two-pass: verifies a tree of 16 first and second choices, WIDTH deep
  +cut=0.1              ends a draft where its confidence falls below 0.1\
{_named("+no-{}", "auto: does not draft {}")}"""

_SHAPE = re.compile(
    r"(?P<name>[^@+]*)(?P<at>@(?P<width>\d{0,6})(?:x(?P<blocks>\d{1,6}))?)?(?P<rest>\+.*)?"
)


@dataclass(frozen=True)
class Plan:
    """A strategy and its shape; `auto` where `strategy` is None.

    width: the most draft tokens verified per cycle; None: the official one, block size - 1.
    blocks: the most blocks that ride in a verify pass (fused); None: FUSED_BLOCKS.
    also: drafters beside the strategy's own, by name; of `auto`, those that it goes without.
    tail: also use what a refused draft said further on. cut: a draft ends where the product of its
    confidences falls below this. tree: draft tokens of a tree of a draft's first and second choices
    (two-pass), which is then at most `width` deep; 0 verifies chains.
    """

    strategy: Strategy | None
    width: int | None = None
    blocks: int | None = None
    also: tuple[str, ...] = ()
    tail: bool = False
    tree: int = 0
    cut: float = 0.0

    @property
    def drafts(self) -> bool:
        """Whether it is a fixed plan that drafts in passes of its own."""
        return self.strategy in (Strategy.TWO_PASS, Strategy.FUSED)

    @property
    def text(self) -> str:
        """The canonical spelling."""
        if self.strategy is None:
            return "+".join([AUTO, *(f"no-{name}" for name in self.also)])
        at = "" if self.width is None else str(self.width)
        at += "" if self.blocks is None else f"x{self.blocks}"
        options = [*self.also, *["tail"] * self.tail]
        options += [f"tree={self.tree}"] if self.tree else []
        options += [f"cut={self.cut}"] if self.cut else []
        name = self.strategy.value
        return "+".join([f"{name}@{at}" if at else name, *options])

    def fitted(self, config: ModelConfig) -> Plan:
        """The plan with its defaults for this model filled in.

        Two-pass drafts with a drafter's network where there are no diffusion heads. Raises
        OrthrusError when the model has neither, or the width fits no block.
        """
        for name in self.also if self.strategy is not None else ():
            if wanted := registry.lacks(name, config):
                raise OrthrusError(f"strategy {self.text!r}: +{name} needs {wanted}")
        if not self.drafts:
            return self
        fused = self.strategy is Strategy.FUSED
        block, usual = widths(config, fused=fused)
        if block is None:
            other = "" if fused else ", or a drafter with --drafter"
            raise OrthrusError(
                f"strategy {self.text!r}: {config.name} has no diffusion heads; name a heads file"
                f" with --heads{other}, or use ar or auto"
            )
        if self.width is not None and not 1 <= self.width <= block:
            raise OrthrusError(
                f"strategy {self.text!r}: the width must lie in 1..{block}, the block size of"
                f" {config.name}"
            )
        return replace(
            self,
            width=usual if self.width is None else self.width,
            blocks=(self.blocks or FUSED_BLOCKS) if fused else None,
        )


def widths(config: ModelConfig, *, fused: bool) -> tuple[int | None, int]:
    """The widest draft that a plan may ask a model for, None where it has nothing to draft with;
    and how wide one is if the plan does not say."""
    if config.has_heads or fused or config.beside is None:
        return config.block_size, (config.block_size or 0) - 1
    return config.beside.block, config.beside.width


#: Plain decoding.
PLAIN = Plan(Strategy.AR)


def parse(text: str) -> Plan:
    """The plan that is spelt so (`SPELLING`).

    Raises OrthrusError, in one line, for anything that is not a spelling or has no effect.
    """
    found = _SHAPE.fullmatch(text)
    name = found["name"] if found else ""
    if found is None or name not in NAMES or found["at"] == "@":
        raise OrthrusError(
            f"strategy {text!r}: expected NAME[@WIDTH[xBLOCKS]][+OPTION…], the name one of"
            f" {', '.join(NAMES)}{did_you_mean(name, NAMES) if name not in NAMES else ''}"
        )
    strategy = None if name == AUTO else Strategy(name)
    if found["at"] and strategy in (None, Strategy.AR):
        why = "auto chooses widths itself" if name == AUTO else "plain decoding has no width"
        raise OrthrusError(f"strategy {text!r}: {why}; leave {found['at']} out")
    if found["blocks"] and strategy is not Strategy.FUSED:
        raise OrthrusError(
            f"strategy {text!r}: only fused passes carry blocks; leave x{found['blocks']} out"
        )
    width = int(found["width"]) if found["width"] else None
    blocks = int(found["blocks"]) if found["blocks"] else None
    if width == 0 or blocks == 0:
        raise OrthrusError(f"strategy {text!r}: widths and blocks are at least 1")
    plan = Plan(strategy, width, blocks)
    for option in (found["rest"] or "").split("+")[1:]:
        plan = _with_option(plan, option, text)
    return plan


def parse_all(text: str) -> list[Plan]:
    """Spellings with commas between them."""
    return [parse(part.strip().lower()) for part in text.split(",")]


def options_of(plan: Plan) -> tuple[str, ...]:
    """Options that a strategy has a use for; N stands for a number."""
    names = registry.optional_names()
    if plan.strategy is None:
        return tuple(f"no-{name}" for name in names)
    if plan.strategy is Strategy.AR:
        return names
    tree = ("tree=N",) if plan.strategy is Strategy.TWO_PASS else ()
    return (*names, "tail", "cut=N", *tree)


def _with_option(plan: Plan, option: str, text: str) -> Plan:
    """The plan with one more option, if its strategy has a use for it."""
    key, equals, value = option.partition("=")
    if f"{key}{equals and '=N'}" not in options_of(plan):
        known = ", ".join(f"+{name}" for name in options_of(plan))
        name = AUTO if plan.strategy is None else plan.strategy.value
        raise OrthrusError(f"strategy {text!r}: {name} takes {known}, not +{option}")
    if key == "tree":
        if not re.fullmatch(r"\d{1,6}", value) or int(value) < 1:
            raise OrthrusError(f"strategy {text!r}: +{option}: expected a number of at least 1")
        return replace(plan, tree=int(value))
    if key == "cut":
        return replace(plan, cut=_probability(value, option, text))
    if key == "tail":
        return replace(plan, tail=True)
    name = key.removeprefix("no-") if plan.strategy is None else key
    wanted = {*plan.also, name}
    return replace(plan, also=tuple(n for n in registry.optional_names() if n in wanted))


def _probability(value: str, option: str, text: str) -> float:
    try:
        cut = float(value)
    except ValueError:
        cut = -1.0
    if not 0 < cut < 1:
        raise OrthrusError(f"strategy {text!r}: +{option}: expected a probability, 0 < P < 1")
    return cut


class FixedPolicy:
    """Does what a plan says, cycle after cycle."""

    def __init__(self, plan: Plan, config: ModelConfig) -> None:
        """Raises OrthrusError for a plan that the model cannot follow (`Plan.fitted`)."""
        if plan.strategy is None:
            raise ValueError("auto is no fixed plan")
        self.plan = plan.fitted(config)
        self._width = self.plan.width or MOST_AT_HAND
        self._tail_failed = False

    def drafters(self, sequence: TokenSequence) -> list[Drafter]:
        plan = self.plan
        self._tail_failed = False
        names = set(plan.also)
        if plan.drafts:
            names |= {"block", "tail"}
            if not sequence.config.has_heads:
                names |= {name for name, kind in registry.KINDS.items() if kind.network}
        if plan.strategy is Strategy.FUSED:
            names.add("carried")
        return registry.make_drafters(sequence, names | {"tail"} if names else names)

    def choose(
        self, drafts: Sequence[Draft], passes: Sequence[DraftPass], room: int, context: int
    ) -> Draft | DraftPass:
        rests = {TAIL, BLOCK, *(offer.source for offer in passes)}
        usable = [draft for draft in drafts if draft.source not in rests or self._may_go_on(draft)]
        if room == 0:
            return NO_DRAFT
        if usable:
            most = min(self._width, room)
            return max(
                usable, key=lambda d: expected([prior_acceptance(c) for c in d.confidence[:most]])
            )
        if not passes:
            return NO_DRAFT
        return passes[0].ordered(min(self._width, room))

    def _may_go_on(self, rest: Draft) -> bool:
        """Whether what an earlier draft left is used, rather than drafting again."""
        return self.plan.tail and rest.confidence[0] >= SURE and not self._tail_failed

    def shape(
        self, draft: Draft, anchor: int, room: int, context: int
    ) -> tuple[Tree, Sequence[Hypothesis]]:
        plan = self.plan
        if not draft.tokens and plan.strategy is not Strategy.FUSED:
            return NO_TREE, ()
        width = cut_width(draft.confidence[: min(self._width, room)], plan.cut)
        accept = [prior_acceptance(value) for value in draft.confidence]
        if plan.tree:
            branches = best_first(accept[:width], draft.second_shares(width), plan.tree)
            return draft.tree(branches, plan.tree), ()
        chain = Tree(draft.tokens[:width])
        if plan.strategy is not Strategy.FUSED:
            return chain, ()
        guesses = [
            guess
            for guess in hypotheses(draft, width, accept, anchor)
            if block_rows(guess, self._width, room) > 0
        ]
        guesses.sort(key=worth, reverse=True)
        return chain, [
            guess.sized(block_rows(guess, self._width, room)) for guess in guesses[: plan.blocks]
        ]

    def observe(self, cycle: Cycle) -> None:
        """A tail that was refused at once leaves another tail: draft anew before trying that."""
        self._tail_failed = cycle.source == TAIL and not cycle.accepted


def prior_acceptance(confidence: float) -> float:
    """Acceptance that a drafter's confidence suggests before anything is known about it.

    The diffusion view is less sure than it should be: on the demo model, tokens it gives 15 % are
    accepted in half of the cases, those it gives 50 % in nine of ten.
    """
    return math.sqrt(confidence)


def worth(guess: Hypothesis) -> float:
    """How much good the block of this guess may do, relative to the others of its pass."""
    return guess.probability * (WORTH_OF_LAST if guess.guess is Guess.LAST else 1.0)


def block_rows(guess: Hypothesis, width: int, room: int) -> int:
    """Rows of a block that drafts `width` tokens, and one to go on with, for the next cycle.

    room: draft tokens that the current cycle could use. 0 if the next one could use none.
    """
    tokens = min(width, room - guess.accepted - 1)
    return tokens + 1 + (guess.guess is Guess.LAST) if tokens > 0 else 0


def cut_width(confidence: Sequence[float], cut: float) -> int:
    """Tokens of a draft until the product of their confidences falls below `cut`."""
    product = 1.0
    for width, value in enumerate(confidence):
        product *= value
        if product < cut:
            return width
    return len(confidence)


def expected(accept: Sequence[float]) -> float:
    """Draft tokens that will be accepted, given the probability of each if those before are."""
    total, product = 0.0, 1.0
    for value in accept:
        product *= value
        total += product
    return total
