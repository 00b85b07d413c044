"""Names in an Orthrus GGUF that the `gguf` package does not know (its `gguf.Keys` has the rest)."""

from __future__ import annotations

ARCH_ORTHRUS = "orthrus"
ARCH_QWEN3 = "qwen3"

#: The architecture of the base that a file's heads belong to; absent means qwen3.
BASE_ARCHITECTURE = "orthrus.base_architecture"

BLOCK_SIZE = "orthrus.diffusion.block_size"
MASK_TOKEN_ID = "tokenizer.ggml.mask_token_id"

#: Of heads that know it: `model.belong.fingerprint` of the base that they were trained on.
BASE_FINGERPRINT = "orthrus.base.fingerprint"

#: Of a drafter (`general.architecture` `dflash`): rows of its block, and the layers of the target
#: whose input it reads (n_layers: what the last one writes).
DFLASH_BLOCK_SIZE = "dflash.block_size"
DFLASH_TARGET_LAYERS = "dflash.target_layers"

#: Of files with random weights (bool, and the seed they were made from).
SYNTHETIC = "orthrus.synthetic"
SYNTHETIC_SEED = "orthrus.synthetic.seed"

#: `adapter.type` of a file that holds only diffusion heads (its `general.type` is `adapter`).
ADAPTER_HEADS = "orthrus_heads"


def model_key(template: str, arch: str) -> str:
    """Fill the architecture into a `gguf.Keys` template such as `{arch}.block_count`."""
    return template.format(arch=arch)
