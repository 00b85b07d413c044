"""What a training will take, measured on this machine before it begins."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.training.answers import SLOTS, Answer, Wanted, Writer
from orthrus_gguf.training.blocks import Library, draw_anchors, lay, loss_and_hits
from orthrus_gguf.training.network import Network
from orthrus_gguf.training.trainer import Recipe

_TOKENS = 16  # written by each conversation of the trial


@dataclass(frozen=True)
class Forecast:
    """tokens_per_second: of answers. seconds_per_step, rows_per_second: of training. seconds:
    of all that is to come. n_bytes: memory that all of it takes."""

    tokens_per_second: float
    seconds_per_step: float
    rows_per_second: float
    seconds: float
    n_bytes: int

    @property
    def text(self) -> str:
        return (
            f"{self.tokens_per_second:.0f} answer tokens and {self.rows_per_second:.0f} block rows "
            f"per second here: about {self.seconds / 3600:.1f} hours, "
            f"{self.n_bytes / 1e9:.1f} GB of memory"
        )


def forecast(
    writer: Writer,
    network: Network,
    recipe: Recipe,
    wanted: Wanted,
    *,
    texts: int,
    steps: int,
    keep_bytes: int,
) -> Forecast:
    """Tries both: some tokens by every conversation, and a step that learns nothing. texts, steps:
    what is left to do. keep_bytes: see `Trainer`."""
    n_vocab, rng = network.config.n_vocab, np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, n_vocab, 16).tolist()) for _ in range(SLOTS)]
    greedy = SamplingSettings(temperature=0.0)
    started = time.perf_counter()
    written = writer.run([(i, prompt, greedy, _TOKENS) for i, prompt in enumerate(prompts)])
    n_tokens = sum(len(output) for _, _, output in written)
    per_second = n_tokens / (time.perf_counter() - started)

    library = Library(network, 0)
    n_prompt, length = wanted.context // 4, wanted.context
    trial = Answer(0, "", n_prompt, tuple(rng.integers(0, n_vocab, length).tolist()), held=True)
    started = time.perf_counter()
    text = library.text(trial)
    network.finish()
    read = time.perf_counter() - started
    anchors = [draw_anchors(trial, recipe.blocks, rng) for _ in range(recipe.texts)]
    batch = lay([text] * recipe.texts, anchors, recipe.rows, recipe.mask)
    for _ in range(2):  # the first is slower than the rest
        started = time.perf_counter()
        loss, _ = loss_and_hits(network, batch, recipe.weighed)
        loss.backward()  # type: ignore[no-untyped-call]
        network.finish()
        step = time.perf_counter() - started
    for head in network.parameters():
        head.grad = None
    kept = keep_bytes // text.n_bytes
    again = max(0.0, 1 - kept / wanted.count) * recipe.texts * read
    reading = read * min(kept, wanted.count)
    seconds = texts * wanted.tokens / per_second + steps * (step + again) + reading
    rows = recipe.texts * recipe.blocks * recipe.rows
    kept_bytes = min(keep_bytes, wanted.count * text.n_bytes)
    memory = _most_bytes(network) + 3 * network.head_bytes + kept_bytes
    return Forecast(per_second, step + again, rows / (step + again), seconds, memory)


def _most_bytes(network: Network) -> int:
    """Memory that was in use at most so far: a step, without the means of gradients and heads."""
    if network.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
