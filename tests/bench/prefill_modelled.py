"""What shortened prompts would bring on cards: arithmetic, not a measurement.

    python tests/bench/prefill_modelled.py

Qwen3-8B as the model, Qwen3-0.6B or 18 of the model's own layers as the scorer. A prompt costs the
operations of its products and of causal attention over the card's rate of fp16 products with fp32
sums, of which kernels are taken to reach `SHARE`; loading weights, launches and the head are left
out, as nothing beside them. The scorer attends to all of the prompt, or sparsely as on the CPU
runtime: to 16 blocks of 128, the first block, and up to 640 columns before each row.
"""

from __future__ import annotations

from dataclasses import replace

from orthrus_gguf.bench.prediction.cards import CARDS
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.shapes import SHAPES

SHARE = 0.6
SPARSE = 22 * 128
KEEPS = (0.2, 0.1, 0.05)


def operations(config: ModelConfig, tokens: int, most: int | None = None) -> float:
    """Of a prompt. most: columns that a row attends to at most."""
    c = config
    attention = c.n_embd * (c.n_head + 2 * c.n_head_kv) * c.head_dim
    weights = c.n_layers * (attention + c.n_head * c.head_dim * c.n_embd + 3 * c.n_embd * c.n_ff)
    seen = tokens * tokens / 2
    if most is not None and tokens > most:
        seen = most * most / 2 + (tokens - most) * most
    return 2 * weights * tokens + 4 * c.n_layers * c.n_head * c.head_dim * seen


def main() -> None:
    target, small = SHAPES["qwen3-8b"], SHAPES["qwen3-0.6b"]
    scorers = {"0.6B": small, "self:18": replace(target, n_layers=18)}
    print("| card | prompt | whole | scorer | keep 0.2 | keep 0.1 | keep 0.05 | scoring |")
    print("|---|--:|--:|---|--:|--:|--:|--:|")
    for name in ("rtx-3090",):
        rate = CARDS[name].fp16_mma * SHARE
        for tokens in (32_768, 131_072):
            whole = operations(target, tokens) / rate
            for scorer, config in scorers.items():
                for words, most in (("", None), (", sparse", SPARSE)):
                    score = operations(config, tokens, most) / rate
                    cells = []
                    for keep in KEEPS:
                        first = score + operations(target, int(keep * tokens)) / rate
                        cells.append(f"{first:.1f} s ({whole / first:.1f}×)")
                    print(
                        f"| {CARDS[name].name} | {tokens:,} | {whole:.1f} s | {scorer}{words} |"
                        f" {' | '.join(cells)} | {score:.1f} s |"
                    )


if __name__ == "__main__":
    main()
