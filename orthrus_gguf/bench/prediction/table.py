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
    mtp_step,
    two_pass_step,
)
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.shapes import HYBRID_SHAPES, SHAPES

LABEL = "predicted, not measured"

#: Shapes that have predictions.
MODELS = SHAPES | HYBRID_SHAPES

#: Rows of the verify passes that the table shows.
ROWS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Selection:
    """What to predict. models, types: keys of MODELS and FILE_TYPES.

    block: rows of a draft, and of the pass that verifies it. depth: tokens of an MTP block's draft.
    """

    models: Sequence[str]
    cards: Sequence[Card]
    types: Sequence[str]
    contexts: Sequence[int]
    block: int
    depth: int
    activations: Activations
    shares: Shares

    @property
    def configs(self) -> list[ModelConfig]:
        return [MODELS[name] for name in self.models]


@dataclass(frozen=True)
class Prediction:
    """One line: milliseconds of passes and steps. verify_ms: by the rows of ROWS. Steps are None
    for models that have no heads, or no MTP block."""

    model: str
    card: str
    type: str
    context: int
    ar_ms: float
    ar_tokens_per_second: float
    verify_ms: tuple[float, ...]
    two_pass_ms: float | None
    fused_ms: float | None
    mtp_ms: float | None
    weights_ms: float
    tails_ms: float
    attention_ms: float
    recurrence_ms: float
    small_ms: float
    launches_ms: float


def predict(selection: Selection) -> Iterator[Prediction]:
    """All lines that are asked for. The last six figures are the parts of the AR step."""
    for config in selection.configs:
        for card in selection.cards:
            for file_type in selection.types:
                curve = PredictedCurve(
                    card,
                    config,
                    file_type,
                    selection.activations,
                    selection.shares,
                )
                for context in selection.contexts:
                    yield _line(curve, selection, context)


def _has_mtp(config: ModelConfig) -> bool:
    return config.hybrid is not None and config.hybrid.mtp


def _line(curve: PredictedCurve, selection: Selection, context: int) -> Prediction:
    step, block = curve.parts(1, 0, context), selection.block
    heads = curve.config.has_heads
    return Prediction(
        model=curve.config.name,
        card=curve.card.name,
        type=curve.file_type.upper(),
        context=context,
        ar_ms=step.total,
        ar_tokens_per_second=1e3 / step.total,
        verify_ms=tuple(curve.milliseconds(rows, 0, context) for rows in ROWS),
        two_pass_ms=two_pass_step(curve, block, context) if heads else None,
        fused_ms=fused_step(curve, block, context) if heads else None,
        mtp_ms=mtp_step(curve, selection.depth, context) if curve.has_block else None,
        weights_ms=step.weights,
        tails_ms=step.tails,
        attention_ms=step.attention,
        recurrence_ms=step.recurrence,
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
        f"Activations: {_activations(selection.activations)}. KV cache in f16. Launches are those"
        " of the runtime, in one CUDA graph: nine per layer (two more with both views, or where the"
        " inputs of a DeltaNet are two products) and five around them.",
        *_steps(selection),
        "The least certain figures are latencies: from one kernel to the next, of a step of"
        " attention, of a row of a recurrence, of small kernels. They make up a tenth of an AR step"
        " of 8B on an RTX 3090, but a third on an H200, and more than half of it for 1.7B.",
        f"Left out: {TOO_OLD}; {UNSAFE}.",
        "For comparison: stock llama.cpp generates 111-115 tokens/s with an 8B Q4_K_M model on an"
        " RTX 3090, 55-57 % of the card's bandwidth, and about 197 with a 9B one on an H200, about"
        " 20 %.",
    ]


def _steps(selection: Selection) -> Iterator[str]:
    """What is known of the steps that the models take."""
    if any(config.has_heads for config in selection.configs):
        yield (
            f"A two-pass step drafts {selection.block} rows and verifies {selection.block}; a fused"
            " step does both in one pass. How many tokens a step brings depends on the text."
        )
    if any(config.hybrid is not None for config in selection.configs):
        yield (
            "DeltaNet layers read and write their state once per pass; its rows, and as many that"
            " were accepted of the last one, go through them one after the other."
        )
    if any(map(_has_mtp, selection.configs)):
        yield (
            f"An MTP step verifies {selection.depth + 1} rows, learns of them, and drafts"
            f" {selection.depth} tokens, one after the other, with all ids; what the host does"
            " between them is left out."
        )


def _activations(activations: Activations) -> str:
    if activations is Activations.AUTO:
        return "int8 on GeForce cards (Q6_K weights: fp16), fp16 on the others"
    return f"{activations.value}{' (Q6_K weights: fp16)' * (activations is Activations.INT8)}"


def markdown(selection: Selection) -> str:
    """A table under its label, its assumptions beneath."""
    steps = _step_columns(selection)
    header = ["model", "card", "type", "context", "AR ms", "AR tok/s"]
    header += [*(f"{rows} rows" for rows in ROWS), *steps.values()]
    lines = [
        f"**{LABEL}**: milliseconds of an AR step, of AR passes of several rows, of steps",
        "",
        f"| {' | '.join(header)} |",
        "|---|---|---" + "|--:" * (len(header) - 3) + "|",
    ]
    for line in predict(selection):
        figures = [line.ar_ms, line.ar_tokens_per_second, *line.verify_ms]
        figures += [getattr(line, name) for name in steps]
        cells = [line.model, line.card, line.type, f"{line.context:,}", *map(_figure, figures)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Assumptions ({LABEL}):", ""]
    lines += [f"- {sentence}" for sentence in assumptions(selection)]
    return "\n".join(lines) + "\n"


def _step_columns(selection: Selection) -> dict[str, str]:
    """Fields of `Prediction` and their titles: steps that any of the models can take."""
    columns: dict[str, str] = {}
    if any(config.has_heads for config in selection.configs):
        columns |= {
            "two_pass_ms": f"two-pass {selection.block}",
            "fused_ms": f"fused {selection.block}",
        }
    if any(map(_has_mtp, selection.configs)):
        columns["mtp_ms"] = f"MTP {selection.depth}"
    return columns


def _figure(value: float | None) -> str:
    """Three digits: more would claim too much."""
    if value is None:
        return "–"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def as_json(selection: Selection) -> dict[str, Any]:
    """The same for programs."""
    return {
        "label": LABEL,
        "assumptions": assumptions(selection),
        "block": selection.block,
        "depth": selection.depth,
        "rows": list(ROWS),
        "predictions": [asdict(line) for line in predict(selection)],
    }
