"""What takes part in a comparison: plans, spread over widths, each with a policy of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from orthrus_gguf.auto.choice import policy_for
from orthrus_gguf.auto.costs import Costs
from orthrus_gguf.drafting.plan import PLAIN, Plan, parse
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig

#: What is compared unless the caller says otherwise, with diffusion heads, with a drafter's network
#: instead, and without either.
DEFAULT = ("ar", "two-pass", "fused", "auto")
DEFAULT_WITH_DRAFTER = ("ar", "two-pass", "auto")
DEFAULT_WITHOUT_HEADS = ("ar", "auto")


@dataclass(frozen=True)
class Entry:
    """A strategy in a comparison, by its full spelling. A controller goes on learning."""

    name: str
    policy: Policy


def default(config: ModelConfig) -> list[Plan]:
    """What is compared on this model unless the caller says otherwise."""
    names: tuple[str, ...] = DEFAULT if config.has_heads else DEFAULT_WITHOUT_HEADS
    if config.beside is not None and not config.has_heads:
        names = DEFAULT_WITH_DRAFTER
    return [parse(name) for name in names]


def spread(plans: Sequence[Plan], widths: Sequence[int]) -> list[Plan]:
    """Every plan that drafts and names no width, once per width.

    Raises OrthrusError when there is none.
    """
    open_ones = [plan for plan in plans if plan.drafts and plan.width is None]
    if widths and not open_ones:
        raise OrthrusError("--widths: every strategy named has its width, or none; leave it out")
    return [
        replace(plan, width=width)
        for plan in plans
        for width in (widths if widths and plan in open_ones else (plan.width,))
    ]


def entries(plans: Sequence[Plan], config: ModelConfig, costs: Callable[[], Costs]) -> list[Entry]:
    """What to compare on this model: plain decoding first, then each plan once, in order.

    costs: new ones, for a controller. Raises OrthrusError for what the model cannot do.
    """
    made: dict[str, Entry] = {}
    for plan in (PLAIN, *plans):
        name = plan.fitted(config).text
        if name not in made:
            made[name] = Entry(name, policy_for(plan, config, costs))
    return list(made.values())
