"""The table of `orthrus-bench predict`: passes and steps of models on cards, with assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orthrus_gguf.bench.prediction.cards import TOO_OLD, UNSAFE, Card, Shares
from orthrus_gguf.bench.prediction.passes import (
    Activations,
    PredictedCurve,
    fused_step,
    two_pass_step,
)
from orthrus_gguf.bench.prediction.shapes import (
    LAUNCHES_PER_LAYER,
    LAUNCHES_PER_LAYER_BOTH,
    LAUNCHES_PER_PASS,
)
from orthrus_gguf.model.shapes import SHAPES

LABEL = "predicted, not measured"

#: Rows of the verify passes that the table shows.
ROWS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Selection:
    """What to predict. models, types: keys of SHAPES and FILE_TYPES.

    block: rows of a draft, and of the pass that verifies it.
    """

    models: Sequence[str]
    cards: Sequence[Card]
    types: Sequence[str]
    contexts: Sequence[int]
    block: int
    activations: Activations
    shares: Shares


@dataclass(frozen=True)
class Prediction:
    """One line: milliseconds of passes and steps. verify_ms: by the rows of ROWS."""

    model: str
    card: str
    type: str
    context: int
    ar_ms: float
    ar_tokens_per_second: float
    verify_ms: tuple[float, ...]
    two_pass_ms: float
    fused_ms: float
    weights_ms: float
    tails_ms: float
    attention_ms: float
    small_ms: float
    launches_ms: float


def predict(selection: Selection) -> Iterator[Prediction]:
    """All lines that are asked for. The last five figures are the parts of the AR step."""
    for model in selection.models:
        for card in selection.cards:
            for file_type in selection.types:
                curve = PredictedCurve(
                    card,
                    SHAPES[model],
                    file_type,
                    selection.activations,
                    selection.shares,
                )
                for context in selection.contexts:
                    yield _line(curve, selection.block, context)


def _line(curve: PredictedCurve, block: int, context: int) -> Prediction:
    step = curve.parts(1, 0, context)
    return Prediction(
        model=curve.config.name,
        card=curve.card.name,
        type=curve.file_type.upper(),
        context=context,
        ar_ms=step.total,
        ar_tokens_per_second=1e3 / step.total,
        verify_ms=tuple(curve.milliseconds(rows, 0, context) for rows in ROWS),
        two_pass_ms=two_pass_step(curve, block, context),
        fused_ms=fused_step(curve, block, context),
        weights_ms=step.weights,
        tails_ms=step.tails,
        attention_ms=step.attention,
        small_ms=step.small,
        launches_ms=step.launches,
    )


def assumptions(selection: Selection) -> list[str]:
    """What the figures rest on, one sentence or two each."""
    rates = "; ".join(
        f"{card.name} {card.memory / 1e9:,.0f} GB/s, {card.fp16_mma / 1e12:.0f} TFLOPS fp16 with"
        f" fp32 sums, {card.int8_mma / 1e12:.0f} TOPS int8, {card.issue / 1e12:.1f}e12"
        f" instructions/s, {card.launch * 1e6:.1f} µs per launch"
        for card in selection.cards
    )
    shares = selection.shares
    return [
        f"Cards: {rates}.",
        f"Kernels reach {shares.memory:.0%} of the bandwidth and {shares.compute:.0%} of MMA and"
        " issue rates: a guess, at which plain decoding lands where the fastest runtimes of others"
        " are seen (--memory-share 1 --compute-share 1 gives the floor).",
        "A product takes as long as its slowest limit (packed weights read once per 64 rows,"
        " instructions counted in compiled kernels, MMA over whole row tiles); the tails of grids,"
        " attention with the latency of its steps, small kernels and launches come on top.",
        f"Activations: {_activations(selection.activations)}. KV cache in f16. "
        f"{LAUNCHES_PER_LAYER} launches per layer ({LAUNCHES_PER_LAYER_BOTH} with both views) and"
        f" {LAUNCHES_PER_PASS} per pass, in one CUDA graph.",
        f"A two-pass step drafts {selection.block} rows and verifies {selection.block}; a fused"
        " step does both in one pass. How many tokens a step brings depends on the text.",
        "The least certain figures are latencies: from one kernel to the next, of a step of"
        " attention, of small kernels. They make up a tenth of an AR step of 8B on an RTX 3090, but"
        " a third on an H200, and more than half of it for 1.7B.",
        f"Left out: {TOO_OLD}; {UNSAFE}.",
        "For comparison: stock llama.cpp generates 111-115 tokens/s with an 8B Q4_K_M model on an"
        " RTX 3090, 55-57 % of the card's bandwidth, and about 197 with a 9B one on an H200, about"
        " 20 %.",
    ]


def _activations(activations: Activations) -> str:
    if activations is Activations.AUTO:
        return "int8 on GeForce cards (Q6_K weights: fp16), fp16 on the others"
    return f"{activations.value}{' (Q6_K weights: fp16)' * (activations is Activations.INT8)}"


def markdown(selection: Selection) -> str:
    """A table under its label, its assumptions beneath."""
    block = selection.block
    header = ["model", "card", "type", "context", "AR ms", "AR tok/s"]
    header += [f"{rows} rows" for rows in ROWS]
    header += [f"two-pass {block}", f"fused {block}"]
    lines = [
        f"**{LABEL}**: milliseconds of an AR step, of AR passes of several rows, of steps",
        "",
        f"| {' | '.join(header)} |",
        "|---|---|---" + "|--:" * (len(header) - 3) + "|",
    ]
    for line in predict(selection):
        figures = [line.ar_ms, line.ar_tokens_per_second, *line.verify_ms]
        figures += [line.two_pass_ms, line.fused_ms]
        cells = [line.model, line.card, line.type, f"{line.context:,}", *map(_figure, figures)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Assumptions ({LABEL}):", ""]
    lines += [f"- {sentence}" for sentence in assumptions(selection)]
    return "\n".join(lines) + "\n"


def _figure(value: float) -> str:
    """Three digits: more would claim too much."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def as_json(selection: Selection) -> dict[str, Any]:
    """The same for programs."""
    return {
        "label": LABEL,
        "assumptions": assumptions(selection),
        "block": selection.block,
        "rows": list(ROWS),
        "predictions": [asdict(line) for line in predict(selection)],
    }
