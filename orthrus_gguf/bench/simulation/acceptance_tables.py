"""Published acceptance, as tokens per cycle of two-pass decoding at full width, greedy where the
source says so.

Papers count per forward: their tokens per forward are half of these (two passes per cycle).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orthrus_gguf.model.shapes import BLOCK_SIZE


@dataclass(frozen=True)
class AcceptanceTable:
    """tokens_per_cycle: by domain. sources: where the figures come from, a sentence each.
    block_size: of the blocks, or a token more than the chains have; network: drafted by a network
    of its own, for a stock model; chain: token by token, by an MTP block.
    by_position: of domains where that is known, the share of cycles that accept the first, the
    second, ... draft token; the rest of a block then makes up for what tokens_per_cycle say."""

    tokens_per_cycle: Mapping[str, float]
    sources: tuple[str, ...]
    block_size: int = BLOCK_SIZE
    network: bool = False
    chain: bool = False
    by_position: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


_PAPER_8B = (
    "maths, code: 10.8 tokens per cycle, twice the 5.39 tokens per forward that the paper gives as"
    " Qwen3-8B's average of eight benchmarks, most of them maths and code"
)
_MT_BENCH = "chat: 3.84 tokens per cycle on MT-Bench, Qwen3-4B with 16 drafts, vLLM #46007"
_PROSE = "prose: 2.0, the middle of the 1.6-2.5 tokens per cycle seen on prose, QA and translation"
_PAPER_17B = "average: 7.78, twice the 3.89 tokens per forward that the paper gives for Qwen3-1.7B"

TABLES = {
    "qwen3-8b": AcceptanceTable(
        {"maths": 10.8, "code": 10.8, "chat": 3.84, "prose": 2.0},
        (_PAPER_8B, f"{_MT_BENCH} (taken for 8B too)", _PROSE),
    ),
    "qwen3-4b": AcceptanceTable({"chat": 3.84}, (_MT_BENCH,)),
    "dflash-qwen3-8b": AcceptanceTable(
        {"maths": 6.36, "chat": 2.93},
        ("DFlash for Qwen3-8B (z-lab): 6.36 tokens per cycle on GSM8K, 2.93 on MT-Bench, greedy",),
        block_size=16,
        network=True,
    ),
    "dflash-qwen3-4b": AcceptanceTable(
        {"maths": 5.90},
        (
            "DFlash for Qwen3-4B (z-lab): 5.90 tokens per cycle on GSM8K, greedy; its first seven"
            " draft tokens are accepted in 87, 73, 62, 54, 45, 36 and 31 % of the cycles",
        ),
        block_size=16,
        network=True,
        by_position={"maths": (0.87, 0.73, 0.62, 0.54, 0.45, 0.36, 0.31)},
    ),
    "dflash-qwen3.5-27b": AcceptanceTable(
        {"code": 8.3},
        ("DFlash for Qwen3.5-27B Q4_K_M (Luce DFlash): 8.3 tokens per cycle on HumanEval",),
        block_size=16,
        network=True,
    ),
    "mtp-qwen3.6-27b": AcceptanceTable(
        {"average": 4.75},
        (
            "MTP of the 27B model, chains of six (vLLM): accepted in 92, 84, 65, 54, 45 and 35 % of"
            " the cycles, 4.7 tokens per cycle",
        ),
        block_size=7,
        network=True,
        chain=True,
        by_position={"average": (0.92, 0.84, 0.65, 0.54, 0.45, 0.35)},
    ),
    "mtp-27b-of-3": AcceptanceTable(
        {"code": 3.49, "chat": 3.19, "prose": 2.89},
        (
            "MTP of the 27B model, chains of three (Q8_0, one H800): 83 % of the draft tokens are"
            " accepted in Python, 63 % in creative writing (prose), 73 % over all (chat)",
        ),
        block_size=4,
        network=True,
        chain=True,
    ),
    "mtp-qwen3.5-9b": AcceptanceTable(
        {"average": 1.82},
        ("MTP of the 9B model, one token (Q4_K_M, greedy): 82 % accepted",),
        block_size=2,
        network=True,
        chain=True,
    ),
    "mtp-qwen3.5-4b": AcceptanceTable(
        {"average": 1.94},
        ("MTP of the 4B model, chains of two (MLX): 47 % of the draft tokens accepted",),
        block_size=3,
        network=True,
        chain=True,
    ),
    "qwen3-1.7b": AcceptanceTable({"average": 7.78, "prose": 2.0}, (_PAPER_17B, _PROSE)),
}
