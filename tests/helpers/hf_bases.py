"""Small random checkpoints of every base and every kind of RoPE.

Hugging Face's own implementation has computed the logits of rows ROWS of TOKENS for each of them
once: tests/golden/bases.npz (its README tells how).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_checkpoint import (
    CONFIG,
    LLAMA_CONFIG,
    QWEN2_CONFIG,
    Weights,
    plain,
    random_weights,
    write_checkpoint,
)


def _with_rope(config: dict[str, Any], **rope: Any) -> dict[str, Any]:
    return {**plain(config), "rope_parameters": {"rope_theta": 10000.0, **rope}}


def _without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


_PLAIN_LLAMA = _with_rope(LLAMA_CONFIG, rope_type="default")

#: Name in the file → config.json. None has heads.
BASES: dict[str, dict[str, Any]] = {
    "qwen3": plain(CONFIG),
    "qwen2": plain(QWEN2_CONFIG),
    "qwen2-untied": {**plain(QWEN2_CONFIG), "tie_word_embeddings": False},
    "llama3": plain(LLAMA_CONFIG),
    "llama-tied": {**_without(_PLAIN_LLAMA, "head_dim"), "tie_word_embeddings": True},
    "llama-linear": _with_rope(LLAMA_CONFIG, rope_type="linear", factor=4.0),
    "llama-yarn": _with_rope(
        LLAMA_CONFIG, rope_type="yarn", factor=4.0, original_max_position_embeddings=16
    ),
    # As old ones are, which leave out what is as they all had it then.
    "llama-1": _without(_PLAIN_LLAMA, "rope_parameters", "num_key_value_heads", "attention_bias"),
    "mistral": {**_PLAIN_LLAMA, **plain({**LLAMA_CONFIG, "model_type": "mistral"})}
    | {"rope_parameters": _PLAIN_LLAMA["rope_parameters"], "sliding_window": None},
}

#: Chosen so that the next token is a printable character everywhere: stock llama.cpp withholds what
#: it says about other bytes.
TOKENS = [
    101,
    130,
    244,
    92,
    170,
    241,
    234,
    191,
    88,
    86,
    118,
    105,
    199,
    64,
    226,
    85,
    153,
    129,
    144,
    155,
]
ROWS = [0, 1, 9, 19]


def weights(name: str) -> Weights:
    """Norms about one, so that activations keep their size and positions matter."""
    return {
        key: values + 1 if "norm" in key else values
        for key, values in random_weights(BASES[name]).items()
    }


def write_base(folder: Path, name: str) -> Path:
    """The checkpoint, in F32. Returns its folder."""
    return write_checkpoint(folder / name, BASES[name], weights(name), dtype="F32")
