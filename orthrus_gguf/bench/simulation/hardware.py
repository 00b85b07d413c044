"""What passes cost on the hardware that is simulated."""

from __future__ import annotations

from orthrus_gguf.auto.costs import CostCurve
from orthrus_gguf.bench.prediction.passes import PredictedCurve, chain_token
from orthrus_gguf.drafting.cycle import Pass
from orthrus_gguf.model.beside import Beside
from orthrus_gguf.model.mtp import MtpFile

#: Seconds of every pass on hardware where rows are free. Only ratios matter there.
FLAT = 1e-3

#: What a block of a drafter's network takes, in passes of one row, where it was not measured: what
#: DFlash's authors give. And what a token of an MTP block's chain takes: the bytes of block and
#: output matrix beside all those that a pass reads, of the 27B shape in Q4_K_M.
DRAFTER_SHARE, CHAIN_SHARE = 0.15, 0.08


def drafter_share(beside: Beside | None) -> float:
    """Of the longest draft, in passes of one row."""
    if beside is None or not beside.chain:
        return DRAFTER_SHARE
    return CHAIN_SHARE * beside.most


class FlatCosts:
    """Rows are free, so tokens per second are tokens per forward, but for a drafter's network."""

    def __init__(self, beside: Beside | None = None) -> None:
        """beside: what drafts, if a network does."""
        self.drafter = drafter_share(beside) * FLAT

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return FLAT

    def observe(self, done: Pass, times: int = 1) -> None:
        """What is simulated does not change."""


class CurveCosts:
    """A measured curve, taken as the truth. before: tokens that come before the recorded text.
    beside: what drafts there; a longest chain of it takes its share of the one that was timed."""

    def __init__(self, curve: CostCurve, before: int, beside: Beside | None = None) -> None:
        self._curve, self._before = curve, before
        timed = curve.drafter
        if beside is not None and beside.chain:
            timed *= beside.most / MtpFile.beside.most
        self.drafter = timed or drafter_share(beside) * curve.at(1, 0, before)

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        return self._curve.at(ar_rows, diffusion_rows, context + self._before)

    def observe(self, done: Pass, times: int = 1) -> None:
        """What is simulated does not change."""


class CardCosts:
    """A predicted curve. before: tokens that come before the recorded text. beside: what drafts, if
    a network does; chains of the model's own MTP block are predicted, too."""

    #: Predictions barely move within so many tokens of context.
    _STEP = 64

    def __init__(self, curve: PredictedCurve, before: int, beside: Beside | None = None) -> None:
        self._curve, self._before = curve, before
        self.drafter = drafter_share(beside) * curve.milliseconds(1, 0, before) / 1e3
        if beside is not None and beside.chain and curve.has_block:
            self.drafter = beside.most * chain_token(curve, before) / 1e3
        self._known: dict[tuple[int, int, int], float] = {}

    def seconds(self, ar_rows: int, diffusion_rows: int, context: int) -> float:
        key = (ar_rows, diffusion_rows, (context + self._before) // self._STEP)
        if key not in self._known:
            middle = key[2] * self._STEP + self._STEP // 2
            self._known[key] = self._curve.milliseconds(ar_rows, diffusion_rows, middle) / 1e3
        return self._known[key]

    def observe(self, done: Pass, times: int = 1) -> None:
        """What is simulated does not change."""
