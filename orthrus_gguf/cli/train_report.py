"""What trained heads gain: drafts on held-out texts, replayed with the real controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orthrus_gguf.auto.calibration import MachineCosts
from orthrus_gguf.auto.costs import Costs
from orthrus_gguf.bench.comparison import plots
from orthrus_gguf.bench.prediction.cards import CARDS
from orthrus_gguf.bench.prediction.passes import PredictedCurve
from orthrus_gguf.bench.prediction.shapes import pass_shape
from orthrus_gguf.bench.simulation.hardware import CardCosts, CurveCosts
from orthrus_gguf.bench.simulation.record import record_text
from orthrus_gguf.bench.simulation.recording import Origin, Recording, Text
from orthrus_gguf.bench.simulation.strategies import GREEDY, Simulator
from orthrus_gguf.bench.simulation.tables import AUTO, PLAIN, Simulation, checks
from orthrus_gguf.cli.loaded import identity
from orthrus_gguf.drafting.plan import parse
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.sampling import Sampler
from orthrus_gguf.training.answers import Answer

#: Texts whose drafts are recorded, at most, of each kind.
_TEXTS = 3

#: Cards that are simulated.
_CARDS = ("rtx-3060", "rtx-4090", "h200")

HERE = "this machine"

#: All texts; and all of them with what the heads draft alone, without lookups.
ALL, HEADS = "all", "heads alone"
_NO_LOOKUP = "auto+no-lookup"

Say = Callable[[str], None]


def gains(
    pair: ModelFile, model: Model, held: Sequence[Answer], say: Say
) -> dict[str, dict[str, float]]:
    """Hardware → kind of text, ALL or HEADS → tokens per second of `auto` as a multiple of plain
    decoding's. Simulated: real drafts, passes as measured here or predicted for a card."""
    texts = _recorded(model, held)
    if not texts:
        return {}
    block_size = model.config.block_size
    assert block_size is not None
    recording = Recording(Origin(pair.config.name, True, "held-out texts"), block_size, texts)
    costs: dict[str, Costs] = {
        HERE: CurveCosts(MachineCosts(model, identity(pair), say).curve, 0),
        **_cards(pair.config, say),
    }
    return {name: _gain(recording, one) for name, one in costs.items()}


def _recorded(model: Model, held: Sequence[Answer]) -> tuple[Text, ...]:
    """The drafts at every position of the first texts of each kind."""
    left = dict.fromkeys((answer.domain for answer in held), _TEXTS)
    block_size = model.config.block_size
    assert block_size is not None
    found = []
    for answer in held:
        if left[answer.domain]:
            left[answer.domain] -= 1
            prompt, said = answer.tokens[: answer.n_prompt], answer.tokens[answer.n_prompt :]
            sampler = Sampler(GREEDY)
            found.append(record_text(model, sampler, answer.domain, prompt, said, (block_size,)))
    return tuple(found)


def _cards(config: ModelConfig, say: Say) -> dict[str, Costs]:
    """Predicted costs, of Q4_K_M where the predictor knows what becomes of it, else of Q8_0."""
    for file_type in ("q4_k_m", "q8_0"):
        try:
            pass_shape(config, file_type, ())
        except OrthrusError as error:
            why = str(error)
            continue
        return {
            f"{CARDS[card].name}, {file_type.upper()}": CardCosts(
                PredictedCurve(CARDS[card], config, file_type), 0
            )
            for card in _CARDS
        }
    say(f"cards are not simulated: {why}")
    return {}


def _gain(recording: Recording, costs: Costs) -> dict[str, float]:
    plans = [parse(AUTO), parse(_NO_LOOKUP)]
    outcomes = list(Simulator(recording, costs).outcomes(plans))
    found = {check.domain: check.beside_plain for check in checks(Simulation("", "", outcomes, ()))}
    spent = {
        name: sum(outcome.seconds for outcome in outcomes if outcome.strategy == name)
        for name in (PLAIN, AUTO, _NO_LOOKUP)
    }
    plain = spent[PLAIN]
    return {**found, ALL: plain / spent[AUTO], HEADS: plain / spent[_NO_LOOKUP]}


def tell(report: Mapping[str, Any], folder: Path, say: Say) -> None:
    """The gains in a line for each piece of hardware, and the report's picture."""
    for name, by_domain in report["gains"].items():
        kinds = ", ".join(
            f"{k} {gain:.2f}" for k, gain in by_domain.items() if k not in (ALL, HEADS)
        )
        say(
            f"auto beside plain decoding, {name}: {by_domain[ALL]:.2f} ({kinds}), "
            f"{by_domain[HEADS]:.2f} without lookups; simulated"
        )
    why = plots.why_unusable()
    if why is None:
        say(f"{plots.draw_training(folder / 'report.svg', folder.resolve().name, report)}: drawn")
    else:
        say(f"no picture: {why}")
