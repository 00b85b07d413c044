"""Stock llama.cpp beside us, on files of hybrids with an MTP block: log-probabilities, perplexity,
and what its `draft-mtp` drafts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mtp_models import loaded_mtp, mtp_model
from numpy.typing import NDArray
from same_text import ENDLESS, finished, request
from stock import Stock

from orthrus_gguf.engine import Session
from orthrus_gguf.runtime.load import RuntimeName
from orthrus_gguf.runtime.protocol import ar_segment

_RNG = np.random.default_rng(3)
PROMPTS = [_RNG.integers(0, 256, n).tolist() for n in (1, 2, 3, 3, 4, 5, 17, 21, 40)]
TEXT = _RNG.integers(0, 256, 100).tolist()
CACHE: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}


def logprobs(weights: str) -> NDArray[np.float64]:
    """Ours of what follows each token of TEXT, [rows, vocabulary], in one pass."""
    file = mtp_model(weights, wide=True)
    with loaded_mtp(file, RuntimeName.CPU, **CACHE) as model:
        (logits,) = model.logits([ar_segment(model.new_cache(len(TEXT)), TEXT, 0)])
    found: NDArray[np.float64] = logits.astype(np.float64)
    return found - np.logaddexp.reduce(found, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("weights", "most", "perplexity"),
    [("f32", 1e-3, 1e-4), ("q8_0", 0.1, 5e-3), ("q4_k_m", 0.1, 5e-3)],
)
def test_log_probabilities_and_perplexity(weights: str, most: float, perplexity: float) -> None:
    """Of the whole vocabulary, token by token. Quantized weights meet activations that either
    rounds in its own way."""
    ours, stock = logprobs(weights), Stock(mtp_model(weights, wide=True), "f32", 128)
    losses = []
    for row, token in enumerate(TEXT[1:]):
        for entry in stock.greedy(TEXT[: row + 1], 1, 300, reuse=True):
            theirs = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
            assert len(theirs) == ours.shape[1]
            np.testing.assert_allclose(ours[row, [*theirs]], [*theirs.values()], rtol=0, atol=most)
            losses.append((ours[row, token], theirs[token]))
    assert len(losses) > 60
    mine, their = np.exp(-np.mean(losses, axis=0))
    assert mine == pytest.approx(their, rel=perplexity)


@pytest.mark.parametrize("depth", [1, 3])
def test_what_is_drafted_and_accepted(depth: int) -> None:
    """The same numbers of draft tokens, and of accepted ones, on every prompt."""
    stock = Stock(mtp_model(), "f32", 128, mtp=depth)
    with loaded_mtp(mtp_model(), RuntimeName.CPU, **CACHE) as model:
        for prompt in PROMPTS:
            session = Session(model, ENDLESS, 128)
            asked = request(model, f"two-pass@{depth}", prompt, 0, 49)
            ((source, _, drafted, accepted),) = finished(session.generate(asked)).statistics.sources
            assert source.name == "mtp"
            assert (drafted, accepted) == stock.drafted(prompt, 49), prompt
            assert accepted > 10
