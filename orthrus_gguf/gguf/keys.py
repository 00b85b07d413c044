"""Names in an Orthrus GGUF that the `gguf` package does not know (its `gguf.Keys` has the rest)."""

from __future__ import annotations

ARCH_ORTHRUS = "orthrus"
ARCH_QWEN3 = "qwen3"

BLOCK_SIZE = "orthrus.diffusion.block_size"
MASK_TOKEN_ID = "tokenizer.ggml.mask_token_id"

#: Of files with random weights (bool, and the seed they were made from).
SYNTHETIC = "orthrus.synthetic"
SYNTHETIC_SEED = "orthrus.synthetic.seed"

#: `adapter.type` of a file that holds only diffusion heads (its `general.type` is `adapter`).
ADAPTER_HEADS = "orthrus_heads"

#: The six tensors per layer that the diffusion view adds: `blk.N.<name>.weight`.
DIFFUSION_TENSORS = (
    "attn_q_diff",
    "attn_k_diff",
    "attn_v_diff",
    "attn_output_diff",
    "attn_q_norm_diff",
    "attn_k_norm_diff",
)


def model_key(template: str, arch: str) -> str:
    """Fill the architecture into a `gguf.Keys` template such as `{arch}.block_count`."""
    return template.format(arch=arch)
