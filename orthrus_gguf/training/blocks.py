"""Batches of blocks on texts, what they should say, and how far they say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orthrus_gguf.training.answers import Answer
from orthrus_gguf.training.network import Memory, Network

#: Likeliest tokens of the AR view that the drafts are compared with; more say next to nothing.
LIKELIEST = 48


@dataclass(frozen=True)
class Text:
    """A text as the AR view reads it.

    memory: with a batch of one. probabilities, ids: of the likeliest next tokens from `first` on
    [tokens - first, LIKELIEST]. first: the first position that an anchor may have.
    """

    answer: Answer
    tokens: Tensor
    memory: Memory
    probabilities: Tensor
    ids: Tensor

    @property
    def first(self) -> int:
        return self.answer.n_prompt - 1

    @property
    def n_bytes(self) -> int:
        tensors = (self.probabilities, self.ids)
        return self.memory.n_bytes + sum(one.untyped_storage().nbytes() for one in tensors)


class Library:
    """Texts as the AR view reads them, each read alone: what is kept and what is read again are
    the same numbers. limit: bytes kept."""

    def __init__(self, network: Network, limit: int) -> None:
        self._network, self._left = network, limit
        self._kept: dict[int, Text] = {}

    def text(self, answer: Answer) -> Text:
        kept = self._kept.get(answer.index)
        if kept is not None:
            return kept
        tokens = torch.tensor(answer.tokens, device=self._network.device)
        memory, hidden = self._network.read(tokens[None])
        with torch.no_grad():
            logits = self._network.logits(hidden[0, answer.n_prompt - 1 :])
            top, ids = logits.topk(min(LIKELIEST, logits.shape[1]), dim=-1)
            probabilities = (top - logits.logsumexp(-1, keepdim=True)).exp()
        text = Text(answer, tokens, memory, probabilities, ids.to(torch.int32))
        if text.n_bytes <= self._left:
            self._kept[answer.index] = text
            self._left -= text.n_bytes
        return text


@dataclass(frozen=True)
class Batch:
    """Blocks on `texts`.

    tokens: [texts, blocks, rows]. anchors: [texts, blocks]. probabilities, ids: what the AR view
    says where each row drafts [texts, blocks, rows, LIKELIEST]. live: rows that draft what the
    text holds [texts, blocks, rows].
    """

    texts: Sequence[Text]
    tokens: Tensor
    anchors: Tensor
    memory: Memory
    probabilities: Tensor
    ids: Tensor
    live: Tensor


def usable(answer: Answer) -> bool:
    """Whether a block can be laid on it."""
    return len(answer.tokens) - answer.n_prompt >= 2


def draw_anchors(answer: Answer, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Positions for blocks, in the answer or right before it; something follows each."""
    return np.sort(rng.integers(answer.n_prompt - 1, len(answer.tokens) - 1, count))


def lay(texts: Sequence[Text], anchors: Sequence[NDArray[np.int64]], rows: int, mask: int) -> Batch:
    """Blocks of `rows` rows on texts at their anchors (as many on each)."""
    longest, device = max(len(text.tokens) for text in texts), texts[0].tokens.device
    memory = Memory.joined([text.memory for text in texts], longest)
    places = torch.from_numpy(np.stack(anchors)).to(device)
    tokens = torch.full((*places.shape, rows), mask, device=device)
    probabilities, ids, live = [], [], []
    for index, text in enumerate(texts):
        tokens[index, :, 0] = text.tokens[places[index]]
        at = places[index][:, None] + torch.arange(rows, device=device)
        live.append(at < len(text.tokens) - 1)
        at = at.clamp(max=len(text.tokens) - 1) - text.first
        probabilities.append(text.probabilities[at])
        ids.append(text.ids[at].long())
    return Batch(
        texts,
        tokens,
        places,
        memory,
        torch.stack(probabilities),
        torch.stack(ids),
        torch.stack(live),
    )


def loss_and_hits(network: Network, batch: Batch, decay: float | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the AR view's likeliest tokens, and which rows draft its likeliest token
    [texts, blocks, rows] (False where the text has ended).

    decay: what each row counts, times that of the row before it: drafts are of use only if all
    before them were right. None: see `reach`.
    """
    logits = network.logits(network.draft(batch.tokens, batch.anchors, batch.memory))
    said = logits.gather(-1, batch.ids) - logits.logsumexp(-1, keepdim=True)
    row = torch.arange(batch.tokens.shape[2], device=network.device)
    if decay is None:
        weights = reach(said[..., 0].detach().exp(), batch.live)
    else:
        weights = decay**row * batch.live
    loss = -((batch.probabilities * said).sum(-1) * weights).sum() / weights.sum()
    hits = (logits.detach().argmax(-1) == batch.ids[..., 0]) & batch.live
    return loss, hits


def reach(likely: Tensor, live: Tensor) -> Tensor:
    """What each row of blocks counts: how many of the drafts that a cycle verifies (all rows but
    the last) are accepted at this row and behind it, by what the heads think of the AR view's
    likeliest tokens [texts, blocks, rows]. Half of it, and half certainty: heads that are not
    trained yet would learn next to nothing behind the first row. (D-PACE, arXiv 2605.18810.)"""
    verified = live.clone()
    verified[..., -1] = False
    accepted = ((1 + likely) / 2 * verified).cumprod(-1)
    return accepted.flip(-1).cumsum(-1).flip(-1)


@dataclass(frozen=True)
class Acceptance:
    """What blocks on held-out texts come to.

    tokens_per_cycle: accepted drafts and the token behind them, mean over anchors drawn evenly.
    by_row: share of blocks whose drafts up to this one are all right.
    by_domain: tokens per cycle.
    """

    tokens_per_cycle: float
    by_row: tuple[float, ...]
    by_domain: dict[str, float]


@torch.no_grad()
def acceptance(
    network: Network, library: Library, answers: Sequence[Answer], rows: int, mask: int
) -> Acceptance:
    """Measured on blocks at drawn, but always the same, anchors. Of `rows` rows, rows - 1 drafts
    are verified in a cycle, as decoding does."""
    runs, domains = [], []
    for answer in answers:
        text = library.text(answer)
        anchors = draw_anchors(answer, 8, np.random.default_rng(answer.index))
        _, hits = loss_and_hits(network, lay([text], [anchors], rows, mask), 1.0)
        runs.append(hits[0, :, : rows - 1].int().cumprod(1).float())
        domains.append(answer.domain)
    by_domain = {
        domain: 1
        + torch.cat([r for r, d in zip(runs, domains, strict=True) if d == domain])
        .sum(1)
        .mean()
        .item()
        for domain in sorted(set(domains))
    }
    all_runs = torch.cat(runs)
    by_row = tuple(all_runs.mean(0).tolist())
    return Acceptance(1 + all_runs.sum(1).mean().item(), by_row, by_domain)
