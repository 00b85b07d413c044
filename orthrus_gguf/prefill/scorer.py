"""How much each token of a prompt matters to how it ends, as a model's attention tells it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.prefill.spans import spelt_alike
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.attention import Attentive, attention_layers
from orthrus_gguf.runtime.protocol import Model, ar_segment
from orthrus_gguf.text.tokenizer import Tokenizer

#: Rows at the end of a prompt whose attention counts: a question, and what a chat template puts
#: behind it. More look at what stands beside the question, fewer miss its subject (BENCHMARKS.md).
ROWS = 16

#: Layers at the end of those that run whose attention counts, where a model's first layers score
#: for it: earlier ones look at neighbours, not at what matters.
LAST_LAYERS = 3

#: Rows of a pass. Progress is told, and Ctrl-C heard, between two of them.
BATCH = 512


@dataclass(frozen=True)
class Scorer:
    """A model that reads prompts to say what matters in them.

    name: in words. layers: whose attention counts. own: its tokenizer, where it has another
    vocabulary than `target`, the one that prompts are written in.
    """

    name: str
    model: Model
    layers: tuple[int, ...]
    target: Tokenizer
    own: Tokenizer | None = None

    def scores(
        self, tokens: Sequence[int], on_progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """For each token of a prompt, the mean over its last rows of the largest weight that any
        head of these layers gives to it: float32 [len(tokens)].

        on_progress: is told how many of the tokens have been read. Raises OrthrusError where memory
        is short, and for a text that the scorer's vocabulary cannot spell.
        """
        if self.own is None:
            return self._attention(tokens, on_progress)
        alike = spelt_alike(self.target, tokens, self.own)
        if alike is None:
            raise OrthrusError(
                f"--prefill-drafter: the vocabulary of {self.name} cannot spell this prompt; use a"
                " scorer with the vocabulary of the model, or self:N"
            )
        share = len(tokens) / len(alike.tokens)
        told = None if on_progress is None else lambda n: on_progress(int(n * share))
        return alike.largest(self._attention(alike.tokens, told))

    def _attention(
        self, tokens: Sequence[int], on_progress: Callable[[int], None] | None
    ) -> NDArray[np.float32]:
        model, count = self.model, len(tokens)
        assert isinstance(model, Attentive)
        cache, start = model.new_cache(count), 0
        while True:
            stop = min(start + BATCH, count)
            if count - stop < ROWS:  # the last rows are asked about together
                stop = count
            rows = stop - start
            wanted = range(max(rows - ROWS, 0), rows) if stop == count else range(0)
            found = model.attention(
                ar_segment(cache, tokens[start:stop], start, wanted=wanted), self.layers
            )
            if on_progress is not None:
                on_progress(stop)
            if stop == count:
                mean: NDArray[np.float32] = found.mean(axis=0)
                return mean
            cache.commit(range(rows))
            start = stop


def layers_of(config: ModelConfig, first: int | None) -> tuple[int, ...]:
    """Layers whose attention counts: all that have any, or the last few of the `first` ones.

    Raises OrthrusError where there are fewer than `first` layers, or none with attention.
    """
    layers = attention_layers(config)
    if first is None:
        return tuple(layers)
    if not 1 <= first <= config.n_layers:
        raise OrthrusError(
            f"--prefill-drafter self:{first}: {config.name} has {config.n_layers} layers; expected"
            f" self:1 to self:{config.n_layers}"
        )
    found = [layer for layer in layers if layer < first][-LAST_LAYERS:]
    if not found:
        raise OrthrusError(
            f"--prefill-drafter self:{first}: none of these layers has attention; the first that"
            f" has is layer {layers[0] + 1}"
        )
    return tuple(found)
