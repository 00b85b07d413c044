"""Recordings made up so that they have a published acceptance.

Papers give averages; what a controller meets is a process. Ours has the features of real drafts
that matter here, with constants seen on a recording of the demo model:

- The log-odds that a draft token is right if those before it are: a shift that is fitted to the
  published tokens per cycle, plus or minus `STRETCH` in easy and hard stretches of text, plus noise
  that all blocks share at a position (a hard word is hard for every block), plus noise of each
  block.
- Behind a wrong token of a block, others are right less often: `STALE` times.
- The drafter is less sure than it should be (`plan.prior_acceptance`): its confidence is the
  square of the true probability. Where it is wrong, its second choice is often right (`SECOND`),
  and it gives it a smaller share (`SECOND_CLAIMED`) of what the first choice leaves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.bench.simulation.acceptance_tables import AcceptanceTable
from orthrus_gguf.bench.simulation.recording import COLUMNS, Origin, RecordedRows, Recording, Text
from orthrus_gguf.model.shapes import MASK_TOKEN

TEXTS, LENGTH = 8, 512

#: Tokens in the prompt: it is never looked at.
PROMPT = 4

#: Mean tokens of an easy and of a hard stretch, and half the distance of their log-odds.
EASY, HARD, STRETCH = 32, 8, 1.2

#: Standard deviations of the noise of a position, and of each block at a position.
SHARED, OWN = 1.0, 0.7

STALE, SECOND, SECOND_CLAIMED = 0.3, 0.5, 0.25

#: Steps towards an acceptance that is published by position.
STEPS = 60

#: Domain whose texts change between the easiest and the hardest of the table, every TURN tokens.
MIXED, TURN = "mixed", 64

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Process:
    """What is drawn for one text before the shift is known: [anchors, rows] each.

    odds: log-odds without the shift. luck: uniform; a row is right where its probability is above.
    position: of the drafted tokens, counted from the first token of the output.
    """

    odds: Floats
    luck: Floats
    position: NDArray[np.int64]


def synthesize(name: str, table: AcceptanceTable, seed: int) -> Recording:
    """Texts of random tokens in every domain of `table`, and a mixed one."""
    rng, rows = np.random.default_rng(seed), table.block_size
    domains = dict(table.tokens_per_cycle)
    shifts: dict[str, float | Floats] = {}
    texts = []
    for domain, target in domains.items():
        processes = [_process(rng, rows) for _ in range(TEXTS)]
        shifts[domain] = _fit(processes, target)
        if domain in table.by_position:
            shifts[domain] = _fit_positions(processes, target, table.by_position[domain])
        texts += [_text(rng, domain, process, shifts[domain]) for process in processes]
    if len(domains) > 1:
        easiest, hardest = (shifts[pick(domains, key=domains.__getitem__)] for pick in (max, min))
        for process in (_process(rng, rows) for _ in range(TEXTS)):
            turns = np.where(process.position // TURN % 2 == 0, easiest, hardest)
            texts.append(_text(rng, MIXED, process, turns))
    settings = f"synthetic, seed {seed}, {TEXTS} texts of {LENGTH} tokens per domain"
    origin = Origin(name, False, settings)
    if not table.network:
        return Recording(origin, rows, tuple(texts))
    beside = tuple(replace(t, blocks={}, drafter=t.blocks[rows][:, : rows - 1]) for t in texts)
    return Recording(origin, None, beside, rows, table.chain)


def assumptions(name: str, table: AcceptanceTable) -> list[str]:
    """What synthetic drafts rest on, one sentence or two each."""
    mixed = (
        f" Mixed texts change between the easiest and the hardest domain every {TURN} tokens."
        if len(table.tokens_per_cycle) > 1
        else ""
    )
    return [
        f"Drafts are synthetic ({name}): {'; '.join(table.sources)}.",
        f"Difficulty is a process: easy and hard stretches (on average {EASY} and {HARD} tokens,"
        f" {2 * STRETCH} apart in log-odds), noise of each position shared by all blocks ({SHARED})"
        f" and of each block ({OWN}), shifted until two-pass at full width has the published tokens"
        f" per cycle.{mixed}",
        "Confidence is the square of the true probability, nearly what the demo model's is and just"
        " what the controller supposes at first (which flatters it a little);"
        f" where the first choice is wrong, the second is right in {SECOND:.0%} and gets"
        f" {SECOND_CLAIMED:.0%} of the rest; behind a wrong token drafts are right {STALE} times as"
        " often.",
        f"A block of fewer rows drafts as well as the first rows of one of {table.block_size}."
        " Texts are random tokens, so lookups never find anything.",
    ]


def _process(rng: np.random.Generator, rows: int) -> _Process:
    anchors = LENGTH - 1
    stop = LENGTH + rows
    position = np.arange(anchors)[:, None] + 1 + np.arange(rows)
    of_position = _stretches(rng, stop) + rng.normal(0, SHARED, stop)
    odds = of_position[position] + rng.normal(0, OWN, (anchors, rows))
    return _Process(odds, rng.random((anchors, rows)), position)


def _stretches(rng: np.random.Generator, count: int) -> Floats:
    """Log-odds of easy and hard stretches by turns."""
    found: list[float] = []
    easy = bool(rng.random() < EASY / (EASY + HARD))
    while len(found) < count:
        length = int(rng.geometric(1 / (EASY if easy else HARD)))
        found += [STRETCH if easy else -STRETCH] * length
        easy = not easy
    return np.array(found[:count])


def _fit(processes: list[_Process], target: float) -> float:
    """The shift at which two-pass decoding at full width gets `target` tokens per cycle."""
    low, high = -12.0, 12.0
    for _ in range(30):
        middle = (low + high) / 2
        if 1 + _accepted(processes, middle).mean() < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _fit_positions(processes: list[_Process], target: float, shares: Sequence[float]) -> Floats:
    """A shift for each row, at which two-pass decoding at full width accepts the first rows in
    `shares` of its cycles, and gets `target` tokens per cycle.

    Where a cycle ends decides where the next one begins, so every step shuffles all cycles anew:
    the best of them counts.
    """
    rows, known = processes[0].odds.shape[1], len(shares)
    shifts = best = np.full(rows, _fit(processes, target))
    wanted, least = np.append(shares, target - 1 - sum(shares)), np.inf  # the last: all other rows
    for _ in range(STEPS):
        accepted = _accepted(processes, shifts)
        reached = (accepted[:, None] > np.arange(rows)).mean(0)
        found = np.append(reached[:known], reached[known:].sum())
        if (off := np.abs(found - wanted).max()) < least:
            best, least = shifts, off
        # Each row by the log-odds of what it must keep of those that reach it.
        keep, kept = (x[:known] / np.append(1.0, x[: known - 1]) for x in (wanted, found))
        known_rows = np.log(keep / (1 - keep) * (1 - kept) / kept)
        others = np.zeros(rows - known)
        if known < rows - 1:  # the last row is never verified
            others += np.log(wanted[-1] / found[-1])
        shifts = shifts + np.append(known_rows, others) / 2
    return best


def _accepted(processes: list[_Process], shift: float | Floats) -> NDArray[np.int64]:
    """Draft tokens that each cycle of two-pass decoding at full width accepts."""
    found = []
    for process in processes:
        wrong = process.luck >= _probability(process.odds + shift)
        wrong[:, -1] = True  # full width is a row less than the block
        accepted, at = wrong.argmax(1).tolist(), 0
        while at < len(accepted):
            found.append(accepted[at])
            at += accepted[at] + 1
    return np.array(found)


def _probability(odds: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-odds)))


def _text(rng: np.random.Generator, domain: str, process: _Process, shift: float | Floats) -> Text:
    """A text of random tokens, and the blocks that `process` drafts for it."""
    rows = process.odds.shape[1]
    tokens = rng.integers(0, MASK_TOKEN, PROMPT + LENGTH + rows)
    output = tokens[PROMPT:]
    probability = _probability(process.odds + shift)
    right = process.luck < probability
    stale = np.zeros_like(right)
    stale[:, 1:] = np.logical_or.accumulate(~right, 1)[:, :-1]
    probability = np.where(stale, STALE * probability, probability)
    right = process.luck < probability
    true, wrong = output[process.position], rng.integers(0, MASK_TOKEN, (2, *right.shape))
    second_right = ~right & (rng.random(right.shape) < np.where(stale, SECOND / 2, SECOND))
    sure = probability**2
    choices: RecordedRows = np.empty((*right.shape, COLUMNS), np.float32)
    choices[..., 0] = np.where(right, true, wrong[0])
    choices[..., 1] = sure
    choices[..., 2] = np.where(second_right, true, wrong[1])
    choices[..., 3] = np.minimum((1 - sure) * SECOND_CLAIMED, sure)
    return Text(
        domain,
        tuple(map(int, tokens[:PROMPT])),
        tuple(map(int, output[:LENGTH])),
        {rows: choices},
    )
