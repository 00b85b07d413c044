"""Heads as files: a checkpoint in the official layout, and a GGUF for exactly their base."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from numpy.typing import NDArray
from orthrus_converters import hf_qwen35
from orthrus_converters.checkpoint import SINGLE
from orthrus_converters.convert import CONFIG
from orthrus_converters.graft import TRAINED_ON
from orthrus_converters.tensor_names import LAYER_PARTS

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.writer import PlannedFile, PlannedTensor, write_files
from orthrus_gguf.model.architectures import QWEN3, Pairing
from orthrus_gguf.model.belong import fingerprint
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile

Heads = Mapping[str, NDArray[np.float32]]

_BF16 = gguf.GGMLQuantizationType.BF16

#: Scalars of a base that its heads repeat.
_REPEATED = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length"),
    *("full_attention_interval", "nextn_predict_layers"),
)
_REPEATED_ROOMS = ("attention.", "rope.", "ssm.")


def write_sidecar(path: Path, base: ModelFile, heads: Heads, block_size: int, mask: int) -> None:
    """The heads in BF16 (vectors F32), with the fingerprint of their base. Raises OrthrusError."""
    writer = gguf.GGUFWriter(None, keys.ARCH_ORTHRUS)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(f"{base.config.name} Orthrus heads")
    writer.add_string(gguf.Keys.Adapter.TYPE, keys.ADAPTER_HEADS)
    arch = base.config.architecture
    if arch is not QWEN3:
        writer.add_string(keys.BASE_ARCHITECTURE, arch.name)
    for key, value in base.metadata.items():
        name = key.removeprefix(f"{arch.name}.")
        if name == key or not (name in _REPEATED or name.startswith(_REPEATED_ROOMS)):
            continue
        mine = f"{keys.ARCH_ORTHRUS}.{name}"
        if isinstance(value, bool):
            writer.add_bool(mine, value)
        elif isinstance(value, int):
            writer.add_uint32(mine, value)
        elif isinstance(value, float):
            writer.add_float32(mine, value)
        elif isinstance(value, str):
            writer.add_string(mine, value)
        elif isinstance(value, np.ndarray):
            writer.add_array(mine, value.tolist())
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_uint32(keys.BLOCK_SIZE, block_size)
    writer.add_uint32(keys.MASK_TOKEN_ID, mask)
    writer.add_string(keys.BASE_FINGERPRINT, fingerprint(base.tensors, base.data))
    tensors = [_planned(name, values) for name, values in heads.items()]
    write_files([PlannedFile(path, writer, tensors)], lambda _: None, overwrite=True)


def _planned(name: str, values: NDArray[np.float32]) -> PlannedTensor:
    if values.ndim == 1:
        return PlannedTensor(
            name, values.shape, gguf.GGMLQuantizationType.F32, partial(_once, values)
        )
    return PlannedTensor(name, values.shape, _BF16, partial(_once, quantize(values, _BF16)))


def _once(values: NDArray[np.generic]) -> list[NDArray[np.generic]]:
    return [np.ascontiguousarray(values)]


def write_checkpoint(
    folder: Path, base: ModelFile, heads: Heads, block_size: int, mask: int
) -> None:
    """The heads as a checkpoint that `orthrus-convert` adds to their base: safetensors in the
    official layout, and their config. Raises OrthrusError."""
    _write_beside(folder / SINGLE, _safetensors(base.config, heads))
    config = hf_config(base.config, block_size, mask)
    path = base.paths[0].resolve()
    inside = path.is_relative_to(folder.resolve())
    config[TRAINED_ON] = {
        "file": str(path.relative_to(folder.resolve()) if inside else path),
        "fingerprint": fingerprint(base.tensors, base.data),
    }
    _write_beside(folder / CONFIG, [json.dumps(config, indent=1).encode() + b"\n"])


def hf_config(config: ModelConfig, block_size: int, mask: int) -> dict[str, Any]:
    """A base's config, with heads, as Hugging Face has it. RoPE's frequency factors are left to the
    base, whose file holds them as a tensor."""
    rope = config.rope
    scaling: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.freq_base}
    if rope.factor != 1:
        scaling |= {"rope_type": "linear", "factor": rope.factor}
    if rope.ext_factor:
        magnitude = rope.attn_factor * (1 + 0.1 * math.log(rope.factor))
        scaling |= {"rope_type": "yarn", "factor": rope.factor, "attention_factor": magnitude}
        scaling["original_max_position_embeddings"] = rope.original_context
    hybrid = {} if config.hybrid is None else hf_qwen35.config_of(config.hybrid, config.head_dim)
    scaling |= hybrid.pop("rope_parameters", {})
    return {
        "model_type": config.architecture.name,
        "block_size": block_size,
        "mask_token_id": mask,
        "head_dim": config.head_dim,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_ff,
        "max_position_embeddings": config.n_ctx_train,
        "num_attention_heads": config.n_head,
        "num_hidden_layers": config.n_layers,
        "num_key_value_heads": config.n_head_kv,
        "rms_norm_eps": config.rms_eps,
        "rope_parameters": scaling,
        "tie_word_embeddings": config.tied,
        "vocab_size": config.n_vocab,
        **hybrid,
    }


def _safetensors(config: ModelConfig, heads: Heads) -> list[bytes]:
    """A file of heads under the names, and with the rows, of the official checkpoints, in BF16."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts, end = [], 0
    for name, values in heads.items():
        rows, kind = _unpaired(values, name, config), _BF16
        if config.hybrid is not None:
            rows = hf_qwen35.as_checkpoints_have_it(name.split(".", 2)[2], rows, config.hybrid)
            if rows.ndim == 1:  # logarithms, and norms without their 1, round otherwise
                kind = gguf.GGMLQuantizationType.F32
        data = quantize(np.ascontiguousarray(rows).reshape(1, -1), kind).tobytes()
        header[official_name(name)] = {
            "dtype": kind.name,
            "shape": list(rows.shape),
            "data_offsets": [end, end + len(data)],
        }
        parts.append(data)
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)), text, *parts]


def _write_beside(path: Path, parts: Sequence[bytes]) -> None:
    """Write a file, which gets its name when it is whole. Raises OrthrusError."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OrthrusError(
            f"{path}: cannot be written: {error.strerror or error}; make room and give the command "
            "again"
        ) from error


def official_name(name: str) -> str:
    """`blk.0.attn_q_diff.weight` → `model.layers.0.self_attn.q_proj_diff.weight`."""
    _, layer, within = name.split(".", 2)
    if within in hf_qwen35.PARTS:
        return f"model.layers.{layer}.{hf_qwen35.PARTS[within]}"
    part, kind = within.split(".")
    return f"model.layers.{layer}.{LAYER_PARTS[part]}.{kind}"


def _unpaired(values: NDArray[np.float32], name: str, config: ModelConfig) -> NDArray[np.float32]:
    """Rows in Hugging Face's order: a GGUF of `llama` has those of q and k in adjacent pairs."""
    heads = {"attn_q_diff": config.n_head, "attn_k_diff": config.n_head_kv}.get(name.split(".")[2])
    if heads is None or config.architecture.pairing is not Pairing.ADJACENT:
        return values
    pairs = values.reshape(heads, config.head_dim // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))
