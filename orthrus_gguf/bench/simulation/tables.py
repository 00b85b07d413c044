"""What a simulation found, as tables and for programs. Never without its label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orthrus_gguf.bench.simulation.strategies import Outcome

LABEL = "SIMULATION, not a measurement"

#: The controller's promises: its speed beside plain decoding, in any domain; and beside the best
#: fixed strategy, on average.
BESIDE_PLAIN, BESIDE_BEST = 0.97, 0.95

PLAIN, AUTO = "ar", "auto"

#: What holds of every simulation.
ALWAYS = (
    "The decode loop, the policies and the controller are the real ones; passes answer from the"
    " recording, and a virtual clock advances by the cost curve.",
    "The controller is new for each domain and knows of the hardware what its own measurement tells"
    " it on that clock (a few row counts, lines between them).",
    "Only generation is counted: prompts are in the cache, and the host's own work (sampling, the"
    " controller, starting passes) takes no time.",
)


@dataclass(frozen=True)
class Simulation:
    """Outcomes of one recording on one piece of hardware. assumptions: a sentence or two each."""

    hardware: str
    recording: str
    outcomes: Sequence[Outcome]
    assumptions: Sequence[str]

    def by_domain(self) -> dict[str, dict[str, Outcome]]:
        """Domain → strategy → outcome."""
        found: dict[str, dict[str, Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.domain, {})[outcome.strategy] = outcome
        return found


@dataclass(frozen=True)
class Check:
    """The controller of one domain: its speed as a multiple of plain decoding's, and of the best
    fixed strategy's."""

    domain: str
    beside_plain: float
    best: Outcome
    beside_best: float


def checks(simulation: Simulation) -> list[Check]:
    """One per domain; none where `auto` was not simulated."""
    found = []
    for domain, outcomes in simulation.by_domain().items():
        if AUTO not in outcomes:
            continue
        auto = outcomes[AUTO].tokens_per_second
        fixed = [outcome for outcome in outcomes.values() if not outcome.decided]
        best = max(fixed, key=lambda outcome: outcome.tokens_per_second)
        found.append(
            Check(
                domain,
                auto / outcomes[PLAIN].tokens_per_second,
                best,
                auto / best.tokens_per_second,
            )
        )
    return found


def verdict(found: Sequence[Check]) -> str:
    """One line on the promises of the controller."""
    worst = min(found, key=lambda check: check.beside_plain)
    mean = sum(check.beside_best for check in found) / len(found)
    plain, best = (
        "kept" if kept else "BROKEN"
        for kept in (worst.beside_plain >= BESIDE_PLAIN, mean >= BESIDE_BEST)
    )
    return (
        f"Check: auto is never below {worst.beside_plain:.2f}x of plain decoding ({worst.domain};"
        f" promised {BESIDE_PLAIN}x: {plain}) and reaches {mean:.2f}x of the best fixed strategy"
        f" on average (promised {BESIDE_BEST}x: {best})."
    )


def markdown(simulations: Sequence[Simulation]) -> str:
    """Two tables per piece of hardware, and the assumptions of all beneath."""
    lines = [f"**{LABEL}**", ""]
    for simulation in simulations:
        lines += [f"{simulation.hardware}; drafts: {simulation.recording}", ""]
        found = checks(simulation)
        if found:
            lines += [*_summary(simulation, found), "", verdict(found), ""]
        lines += [*_strategies(simulation), ""]
    lines += [f"Assumptions ({LABEL}):", ""]
    sentences = [s for simulation in simulations for s in simulation.assumptions]
    lines += [f"- {sentence}" for sentence in dict.fromkeys([*ALWAYS, *sentences])]
    return "\n".join(lines) + "\n"


def _summary(simulation: Simulation, found: Sequence[Check]) -> list[str]:
    """Domains down, the controller beside plain decoding and the best fixed strategy across."""
    lines = [
        "| domain | ar tok/s | best fixed | × ar | auto tok/s | × ar | × best | per cycle |"
        " per forward |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    outcomes = simulation.by_domain()
    for check in found:
        plain, auto = outcomes[check.domain][PLAIN], outcomes[check.domain][AUTO]
        cells = [
            check.domain,
            f"{plain.tokens_per_second:.0f}",
            check.best.strategy,
            f"{check.best.tokens_per_second / plain.tokens_per_second:.2f}",
            f"{auto.tokens_per_second:.0f}",
            f"{check.beside_plain:.2f}",
            f"{check.beside_best:.2f}",
            f"{auto.statistics.tokens_per_cycle:.2f}",
            f"{auto.statistics.tokens_per_forward:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _strategies(simulation: Simulation) -> list[str]:
    """Strategies down, domains across."""
    outcomes = simulation.by_domain()
    lines = [
        "tokens/s as multiples of plain decoding (tokens per cycle, tokens per forward):",
        "",
        f"| strategy | {' | '.join(outcomes)} |",
        "|---" + "|--:" * len(outcomes) + "|",
    ]
    for name in next(iter(outcomes.values())):
        cells = [name]
        for of_domain in outcomes.values():
            outcome, plain = of_domain[name], of_domain[PLAIN]
            ratio = outcome.tokens_per_second / plain.tokens_per_second
            statistics = outcome.statistics
            cells.append(
                f"{ratio:.2f} ({statistics.tokens_per_cycle:.2f},"
                f" {statistics.tokens_per_forward:.2f})"
            )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def as_json(simulations: Sequence[Simulation]) -> dict[str, Any]:
    """The same for programs."""
    return {"label": LABEL, "simulations": [_record(simulation) for simulation in simulations]}


def _record(simulation: Simulation) -> dict[str, Any]:
    found = checks(simulation)
    return {
        "hardware": simulation.hardware,
        "recording": simulation.recording,
        "assumptions": [*ALWAYS, *simulation.assumptions],
        "check": verdict(found) if found else None,
        "domains": [
            {
                "domain": check.domain,
                "auto_by_ar": check.beside_plain,
                "best_fixed": check.best.strategy,
                "auto_by_best_fixed": check.beside_best,
            }
            for check in found
        ],
        "outcomes": [
            {
                "domain": outcome.domain,
                "strategy": outcome.strategy,
                "tokens_per_second": outcome.tokens_per_second,
                "seconds": outcome.seconds,
                **outcome.statistics.to_json(),
            }
            for outcome in simulation.outcomes
        ],
    }
