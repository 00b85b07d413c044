"""Models with Orthrus heads in numpy float64, straight from the papers: an oracle for runtimes.

It keeps no state and shares no code with any runtime: every row is computed from the tokens it
sees, with explicit loops over heads. What a layer has, it takes from the tensors that there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from gguf.quants import dequantize
from numpy.typing import NDArray

from orthrus_gguf.model.file import ModelFile

Array = NDArray[np.float64]


class NumpyModel:
    """ar(tokens) and block(context, block) give logits of all rows of a sequence, or of a block;
    ar_states and block_states what lies between: the residual stream at the input of each layer,
    before the final norm and behind it, [n_layers + 2, rows, n_embd]."""

    def __init__(self, file: ModelFile) -> None:
        self.config = file.config
        self.weights = {
            name.removesuffix(".weight"): self._dequantized(file, name) for name in file.tensors
        }

    @staticmethod
    def _dequantized(file: ModelFile, name: str) -> Array:
        info = file.tensors[name]
        rows = math.prod(info.shape[:-1])
        values = dequantize(file.data(name).reshape(rows, -1), info.type)
        return values.astype(np.float64).reshape(info.shape)

    def ar(self, tokens: Sequence[int]) -> Array:
        """Logits [len(tokens), n_vocab] of a plain causal sequence."""
        return self._logits(self.ar_states(tokens))

    def ar_states(self, tokens: Sequence[int]) -> Array:
        causal = np.tri(len(tokens), dtype=bool)
        return self._run(list(tokens), list(range(len(tokens))), causal, [""] * len(tokens))

    def block(self, context: Sequence[int], block: Sequence[int]) -> Array:
        """Logits [len(block), n_vocab] of a diffusion block that sees `context` and itself."""
        return self._logits(self.block_states(context, block))

    def block_states(self, context: Sequence[int], block: Sequence[int]) -> Array:
        n, b = len(context), len(block)
        sees = np.tri(n + b, dtype=bool)
        sees[n:, n:] = True
        suffixes = [""] * n + ["_diff"] * b
        return self._run([*context, *block], list(range(n + b)), sees, suffixes)[:, n:]

    def _logits(self, states: Array) -> Array:
        logits: Array = states[-1] @ self.weights["token_embd" if self.config.tied else "output"].T
        return logits

    def _run(
        self, tokens: list[int], positions: list[int], sees: NDArray[np.bool_], suffix: list[str]
    ) -> Array:
        c, w = self.config, self.weights
        x = w["token_embd"][tokens]
        states = [x]
        for layer in range(c.n_layers):
            p = f"blk.{layer}."
            h = self._norm(x, w[p + "attn_norm"])
            q, k, v = (
                self._rows(h, p + "attn_" + n, suffix).reshape(len(x), -1, c.head_dim)
                for n in "qkv"
            )
            if p + "attn_q_norm" in w:
                for row, kind in enumerate(suffix):
                    q[row] = self._norm(q[row], w[f"{p}attn_q_norm{kind}"])
                    k[row] = self._norm(k[row], w[f"{p}attn_k_norm{kind}"])
            q, k = (self._rotate(a, positions) for a in (q, k))
            mixed = np.empty((len(x), c.n_head, c.head_dim))
            for head in range(c.n_head):
                kv = head // (c.n_head // c.n_head_kv)
                scores = q[:, head] @ k[:, kv].T / math.sqrt(c.head_dim)
                weights = np.exp(np.where(sees, scores - scores.max(-1, keepdims=True), -np.inf))
                mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ v[:, kv]
            x = x + self._rows(mixed.reshape(len(x), -1), p + "attn_output", suffix)
            h = self._norm(x, w[p + "ffn_norm"])
            gate = h @ w[p + "ffn_gate"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[p + "ffn_up"].T)) @ w[p + "ffn_down"].T
            states.append(x)
        return np.stack([*states, self._norm(x, w["output_norm"])])

    def _rows(self, h: Array, name: str, suffix: list[str]) -> Array:
        """Each row times the matrix of its view, plus that one's bias if there is one."""
        rows = zip(h, suffix, strict=True)
        product: Array = np.stack(
            [
                self.weights[name + kind] @ row + self.weights.get(f"{name}{kind}.bias", 0.0)
                for row, kind in rows
            ]
        )
        return product

    def _norm(self, x: Array, weight: Array) -> Array:
        normed: Array = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_eps) * weight
        return normed

    def _rotate(self, x: Array, positions: list[int]) -> Array:
        """Pairs (i, i + d/2), or (2i, 2i + 1) in files of llama. Linear scaling divides every
        frequency by the factor; YaRN as in arXiv 2309.00071; llama3 by a factor per pair."""
        rope, half = self.config.rope, self.config.head_dim // 2
        magnitude = 1 + 0.1 * math.log(rope.factor) if rope.ext_factor else 1.0
        adjacent = self.config.architecture.name == "llama"
        out: Array = x.copy()
        for i in range(half):
            speed = rope.freq_base ** (-i / half) / self.weights.get("rope_freqs", np.ones(half))[i]
            kept = 1 - self._yarn_ramp(i) if rope.ext_factor else 0.0
            speed = speed * kept + speed / rope.factor * (1 - kept)
            one, two = (2 * i, 2 * i + 1) if adjacent else (i, i + half)
            for row, position in enumerate(positions):
                cos, sin = (f(position * speed) * magnitude for f in (math.cos, math.sin))
                a, b = x[row, :, one], x[row, :, two]
                out[row, :, one], out[row, :, two] = a * cos - b * sin, b * cos + a * sin
        return out

    def _yarn_ramp(self, pair: int) -> float:
        """0 for pairs that turn beta_fast times or more over the original context, 1 for those that
        turn beta_slow times or less, linear in the pair's index between."""
        rope, half = self.config.rope, self.config.head_dim // 2

        def pair_that_turns(times: float) -> float:
            ratio = rope.original_context / (times * 2 * math.pi)
            return half * math.log(ratio) / math.log(rope.freq_base)

        low = max(0, math.floor(pair_that_turns(rope.beta_fast)))
        high = min(2 * half - 1, math.ceil(pair_that_turns(rope.beta_slow)))
        return min(1.0, max(0.0, (pair - low) / max(0.001, high - low)))
