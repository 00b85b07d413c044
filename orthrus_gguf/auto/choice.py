"""From a plan to the policy that follows it."""

from __future__ import annotations

from collections.abc import Callable

from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.auto.costs import Costs
from orthrus_gguf.drafting.plan import FixedPolicy, Plan
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.model.config import ModelConfig


def policy_for(plan: Plan, config: ModelConfig, costs: Callable[[], Costs]) -> Policy:
    """A new policy that does as the plan says; a controller, if the plan leaves it to one.

    costs: what passes cost, asked for only where that is decided by. Raises OrthrusError for a plan
    that the model cannot follow (`Plan.fitted`).
    """
    if plan.strategy is None:
        return Controller(costs(), config.block_size, without=plan.also)
    return FixedPolicy(plan, config)
