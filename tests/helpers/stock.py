"""Stock llama.cpp (the `xllamacpp` wheel) as an oracle: greedy tokens and their probabilities.

Unless told otherwise, one row per pass, without repacked weights and without flash attention, which
rounds (with it, its own results move by up to 0.007): then its kernels are the plain ones that our
runtime always uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xllamacpp

CACHE_TYPES = {
    "f32": xllamacpp.ggml_type.GGML_TYPE_F32,
    "f16": xllamacpp.ggml_type.GGML_TYPE_F16,
}

_DRAFT_MTP = xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_MTP


class Stock:
    """llama.cpp with a model loaded."""

    def __init__(
        self,
        path: Path,
        cache_type: str,
        context: int,
        *,
        by_default: bool = False,
        mtp: int = 0,
    ) -> None:
        """by_default: with the kernels that it would choose by itself. mtp: draft tokens of its
        `draft-mtp`, at most."""
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.verbosity, params.warmup = context, 1, 0, False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = CACHE_TYPES[cache_type]
        if not by_default:
            params.no_extra_bufts = True
            if not mtp:  # with which one row per pass ends the process
                params.n_ubatch = 1
            flash = xllamacpp.llama_flash_attn_type
            params.flash_attn_type = flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        if mtp:
            params.speculative.types = [_DRAFT_MTP]
            draft = params.speculative.draft
            draft.n_max, draft.n_min, draft.p_min = mtp, 0, 0.0
            draft.cache_type_k = draft.cache_type_v = CACHE_TYPES[cache_type]
        self._server = xllamacpp.Server(params)

    def drafted(self, prompt: Sequence[int], count: int) -> tuple[int, int]:
        """Draft tokens, and accepted ones, of `count` greedy tokens after a prompt."""
        asked = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "ignore_eos": True}
        told = self._server.handle_completions({**asked, "cache_prompt": False})["timings"]
        return told["draft_n"], told["draft_n_accepted"]

    def greedy(
        self,
        prompt: Sequence[int],
        count: int,
        top: int,
        *,
        ignore_eos: bool = False,
        reuse: bool = False,
    ) -> list[dict[str, Any]]:
        """`count` tokens after a prompt: `id`, and `top_logprobs` of the `top` likeliest.
        Tokens that end within a character are left out.

        ignore_eos: never choose a token that ends the text; otherwise there may be fewer.
        reuse: keys and values of what this prompt has in common with the last one.
        """
        answer = self._server.handle_completions(
            {
                "prompt": list(prompt),
                "n_predict": count,
                "temperature": 0,
                "n_probs": top,
                "cache_prompt": reuse,
                "ignore_eos": ignore_eos,
            }
        )
        told = answer["choices"][0]["logprobs"]
        content: list[dict[str, Any]] = [] if told is None else told["content"]
        return content
