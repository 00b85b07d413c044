"""Perplexity and KL divergence: llama-perplexity's definition, on figures from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stock import Stock
from toy_model import VOCAB, ToyModel, ar_logits

from orthrus_gguf.bench.perplexity import Estimate, Text, cut, window_logits
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import ar_segment
from orthrus_gguf.runtime.reference import ReferenceModel
from orthrus_gguf.text.tokenizer import load_tokenizer

DemoFile = Callable[..., Path]
TEXT = Path(__file__).read_text(encoding="utf-8")


def demo_tokens(path: Path) -> list[int]:
    with ModelFile.open(path) as file:
        tokenizer = load_tokenizer(file.metadata, path=path, n_vocab=file.config.n_vocab)
        return tokenizer.encode(TEXT)


def score(path: Path, runtime: str, windows: list[list[int]], batch: int) -> Text:
    text = Text(windows, len(windows[0]) // 2)
    with ModelFile.open(path) as file:
        cache = None if runtime == "reference" else "f32"
        settings = RuntimeSettings(RuntimeName(runtime), 1, cache_type_k=cache, cache_type_v=cache)
        model = load_model(file, settings)
        for logits in window_logits(model, windows, text.first, batch=batch):
            text.add(logits)
        model.close()
    return text


def test_the_figure_is_that_of_torch(demo_file: DemoFile) -> None:
    """Cross entropy of whole windows on the reference runtime, cut the way llama.cpp says."""
    path, n_ctx = demo_file("f32"), 24
    tokens = demo_tokens(path)[: 3 * n_ctx + 5]
    losses = []
    with ModelFile.open(path) as file:
        model = ReferenceModel(file)
        for chunk in range(3):
            window = tokens[chunk * n_ctx : (chunk + 1) * n_ctx]
            (logits,) = model.logits([ar_segment(model.new_cache(n_ctx), window, 0)])
            losses.append(
                torch.nn.functional.cross_entropy(
                    torch.from_numpy(logits[n_ctx // 2 : -1]).double(),
                    torch.tensor(window[n_ctx // 2 + 1 :]),
                    reduction="none",
                )
            )
        model.close()
    loss = torch.cat(losses)
    assert len(loss) == 3 * (n_ctx - 1 - n_ctx // 2)
    found = score(path, "reference", cut(tokens, n_ctx), 512)
    assert (found.windows, found.scored) == (3, len(loss))
    assert found.perplexity.value == pytest.approx(float(loss.mean().exp()), rel=1e-9)
    # The error of perplexity.cpp: sqrt((E[x²] - E[x]²) / (n - 1)), times the perplexity.
    spread = float((loss.square().mean() - loss.mean() ** 2) / (len(loss) - 1)) ** 0.5
    assert found.perplexity.error == pytest.approx(found.perplexity.value * spread, rel=1e-6)


def test_the_figure_is_that_of_llamacpp(demo_file: DemoFile) -> None:
    path, n_ctx = demo_file("f32", split=True), 16
    tokens = demo_tokens(path)[: 2 * n_ctx]
    stock = Stock(path, "f32", 64)
    losses = []
    for start in range(0, len(tokens), n_ctx):
        for row in range(n_ctx // 2, n_ctx - 1):
            prefix, target = tokens[start : start + row + 1], tokens[start + row + 1]
            (answer,) = stock.greedy(prefix, 1, 4096)
            (found,) = [t["logprob"] for t in answer["top_logprobs"] if t["id"] == target]
            losses.append(-found)
    ours = score(path, "cpu", cut(tokens, n_ctx), 512)
    assert ours.scored == len(losses) == 14
    assert np.concatenate(ours.nll) == pytest.approx(losses, abs=2e-4)
    assert ours.perplexity.value == pytest.approx(math.exp(sum(losses) / 14), rel=2e-5)


@pytest.mark.parametrize("batch", [1, 7, 12, 20, 40, 1000])
def test_the_rows_of_a_pass_change_nothing(batch: int) -> None:
    """One window in pieces or several side by side: the same rows, and no more than asked for."""
    windows = [[(7 * i + w) % VOCAB for i in range(12)] for w in range(5)]
    model, asked, widest = ToyModel(), 0, 0
    plain = model.logits

    def spy(segments: Any) -> Any:
        nonlocal asked, widest
        asked += sum(len(s.wanted) for s in segments)
        widest = max(widest, sum(map(len, segments)))
        return plain(segments)

    model.logits = spy  # type: ignore[method-assign]
    found = list(window_logits(model, windows, 6, batch=batch))
    assert asked == 5 * 5
    assert widest == (min(batch, 12) if batch < 24 else min(batch // 12, 5) * 12)
    for window, logits in zip(windows, found, strict=True):
        wanted = np.stack([ar_logits(window[: row + 1]) for row in range(6, 11)])
        assert np.array_equal(logits, wanted)


def test_a_comparison_by_hand() -> None:
    windows = [[0, 1, 2, 0], [1, 2, 0, 1]]
    ours = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]], np.float32))
    base = np.log(np.array([[0.25, 0.25, 0.5], [0.1, 0.1, 0.8]], np.float32))
    text = Text(windows, 2)
    for row in range(2):
        text.add(ours[row : row + 1] + 3, base[row : row + 1] - 5)  # logits have no fixed zero
    found = text.comparison()
    kl = 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.25)
    assert found.kl == pytest.approx([kl, 0], abs=1e-6)
    assert found.mean_kl.value == pytest.approx(kl / 2, rel=1e-5)
    assert found.kl_quantile(1) == pytest.approx(kl, rel=1e-5)
    assert text.perplexity.value == pytest.approx((0.5 * 0.1) ** -0.5, rel=1e-5)
    assert found.base_perplexity.value == pytest.approx((0.25 * 0.1) ** -0.5, rel=1e-5)
    assert found.perplexity_ratio.value == pytest.approx(0.5**0.5, rel=1e-5)
    assert found.probability_changes == pytest.approx([0.25, 0], abs=1e-6)
    assert found.rms_change.value == pytest.approx((0.25**2 / 2) ** 0.5, rel=1e-5)
    assert found.same_top == Estimate(0.5, 0.5)
    worst, other = text.largest(5)
    assert (worst.place, worst.token, worst.top, worst.top_base) == (3, 0, 0, 2)
    assert (worst.p, worst.p_base) == pytest.approx((0.5, 0.25), rel=1e-5)
    assert (other.place, other.token) == (7, 1)


def test_windows() -> None:
    assert cut(range(25), 8) == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
    assert cut(range(25), 8, chunks=1) == [list(range(8))]
    with pytest.raises(OrthrusError, match=r"15 tokens, windows of 8 need at least 16"):
        cut(range(15), 8)


def test_logits_that_are_not_finite() -> None:
    text = Text([[0, 1, 2, 0]], 2)
    bad = np.array([[0, np.nan, 1]], np.float32)
    with pytest.raises(OrthrusError, match="window 1: the model's logits are not finite"):
        text.add(bad)
    with pytest.raises(OrthrusError, match="window 1: the base model's logits"):
        text.add(np.zeros((1, 3), np.float32), bad)
