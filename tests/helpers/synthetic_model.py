"""Model files with random weights: any shape, any quantization, for benchmarks and tests.

Speed and memory do not depend on what the weights say, so these stand in for models that are too
large to ship. What they generate is noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import quants
from numpy.typing import NDArray

from orthrus_gguf.bench.prediction.shapes import all_tensors, tensor_types
from orthrus_gguf.ggml.binding import Ggml
from orthrus_gguf.ggml.quantize import quantize
from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.architectures import QWEN3, Architecture
from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.model.mix import Mix
from orthrus_gguf.model.tensors import (
    ROPE_FREQS,
    TOKEN_EMBD,
    base_tensors,
    diffusion_tensors,
    drafter_tensors,
    is_diffusion_tensor,
)

_TYPES = gguf.GGMLQuantizationType

#: Tensor name -> its type.
TypeRule = Callable[[str], gguf.GGMLQuantizationType]

#: Distinct random rows per matrix; the others repeat them in random order. Quantizing 152,000 rows
#: would take minutes and tell the kernels nothing new.
DISTINCT_ROWS = 256

#: Types that take seconds to quantize even a few rows. Any bits are valid in their qblocks, but for
#: a scale in F16, which most have in their first two bytes.
SLOW_TYPES = frozenset({"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"})


def model_shape(
    *,
    n_layers: int = 2,
    n_embd: int = 256,
    n_ff: int = 512,
    n_head: int = 4,
    n_head_kv: int = 2,
    head_dim: int = 64,
    n_vocab: int = 320,
    n_ctx_train: int = 4096,
    rope: Rope | None = None,
    tied: bool = True,
    block_size: int | None = 16,
    architecture: Architecture = QWEN3,
) -> ModelConfig:
    """A config to write; without a block size, one of a plain model of the architecture."""
    return ModelConfig(
        name="synthetic",
        n_layers=n_layers,
        n_ctx_train=n_ctx_train,
        n_embd=n_embd,
        n_ff=n_ff,
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=head_dim,
        n_vocab=n_vocab,
        rms_eps=float(np.float32(1e-6)),
        rope=rope or Rope(1e6),
        tied=tied,
        block_size=block_size,
        mask_token=None if block_size is None else n_vocab - 1,
        architecture=architecture,
    )


def qwen3_0_6b(block_size: int | None = 32) -> ModelConfig:
    """The shape of Qwen3-0.6B."""
    return model_shape(
        n_layers=28,
        n_embd=1024,
        n_ff=3072,
        n_head=16,
        n_head_kv=8,
        head_dim=128,
        n_vocab=151936,
        n_ctx_train=40960,
        block_size=block_size,
    )


def qwen3_1_7b(block_size: int | None = 32) -> ModelConfig:
    """The shape of Qwen3-1.7B."""
    return replace(qwen3_0_6b(block_size), n_embd=2048, n_ff=6144)


def q4_k_m(n_layers: int) -> TypeRule:
    """llama-quantize's Q4_K_M for a tied model: Q4_K, and Q6_K where it counts."""
    mix = Mix("q4_k_m", _TYPES.Q4_K, n_layers, gqa=2, tied=True, has_imatrix=False, small_v=False)

    def rule(name: str) -> gguf.GGMLQuantizationType:
        if name == TOKEN_EMBD:
            return mix.embedding(256)
        if is_diffusion_tensor(name):
            return _TYPES.Q4_K
        _, layer, part, _ = name.split(".")
        return mix.matrix(part, int(layer))

    return rule


def planned_tensors(config: ModelConfig, file_type: str) -> dict[str, TensorInfo]:
    """The tensor table of a model with heads in one of `prediction.shapes.FILE_TYPES`, as the
    converter types them; no file."""
    tensors, kinds = {}, tensor_types(config, file_type)
    for name, shape in all_tensors(config).items():
        kind = kinds.get(name, gguf.GGMLQuantizationType.F32)
        qblock, size = gguf.GGML_QUANT_SIZES[kind]
        tensors[name] = TensorInfo(name, shape, kind, 0, math.prod(shape) // qblock * size)
    return tensors


def write_model(
    api: Ggml,
    path: Path,
    config: ModelConfig,
    rule: TypeRule,
    seed: int = 0,
    *,
    add_tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """Write a model of this shape to `path`, matrices by `rule`, norms and biases in F32.

    add_tokenizer: writes the keys of a vocabulary; by default one without real merges.
    """
    base = config.architecture.name
    writer = gguf.GGUFWriter(path, keys.ARCH_ORTHRUS if config.has_heads else base)
    if config.has_heads and base != keys.ARCH_QWEN3:
        writer.add_string(keys.BASE_ARCHITECTURE, base)
    _write_metadata(writer, config)
    if add_tokenizer is None:
        _add_tokenizer(writer, config.n_vocab)
    else:
        add_tokenizer(writer)
    tensors = base_tensors(config)
    if config.has_heads:
        tensors |= diffusion_tensors(config)
    _write_tensors(api, writer, config, tensors, rule, seed)


def write_drafter(
    api: Ggml,
    path: Path,
    config: ModelConfig,
    rule: TypeRule,
    taps: tuple[int, ...],
    window: int | None = None,
) -> None:
    """Write a drafter of this shape, without tokens, that reads the inputs of layers `taps`.
    window: that its first layer has."""
    assert config.block_size is not None
    assert config.mask_token is not None
    writer = gguf.GGUFWriter(path, "dflash")
    _write_metadata(writer, replace(config, block_size=None))
    writer.add_vocab_size(config.n_vocab)
    writer.add_uint32(keys.DFLASH_BLOCK_SIZE, config.block_size)
    writer.add_uint32(keys.MASK_TOKEN_ID, config.mask_token)
    writer.add_array(keys.DFLASH_TARGET_LAYERS, list(taps))
    if window is not None:
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([not i for i in range(config.n_layers)])
    _write_tensors(api, writer, config, drafter_tensors(config, len(taps)), rule, 1)


def _write_tensors(
    api: Ggml,
    writer: gguf.GGUFWriter,
    config: ModelConfig,
    tensors: Mapping[str, tuple[int, ...]],
    rule: TypeRule,
    seed: int,
) -> None:
    """Random weights; ends the file."""
    rng = np.random.default_rng(seed)
    for name, shape in tensors.items():
        if name == ROPE_FREQS:
            writer.add_tensor(name, np.asarray(config.rope.freq_factors, np.float32))
        elif len(shape) == 1:
            writer.add_tensor(name, (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32))
        else:
            data = _random_matrix(api, rng, shape, rule(name))
            writer.add_tensor(name, data, raw_dtype=rule(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _random_matrix(
    api: Ggml,
    rng: np.random.Generator,
    shape: tuple[int, ...],
    qtype: gguf.GGMLQuantizationType,
) -> NDArray[np.uint8]:
    """Bytes [rows, bytes per row]; rows of about unit length, so that activations keep size."""
    rows, columns = shape
    distinct = min(rows, DISTINCT_ROWS)
    if qtype.name in SLOW_TYPES:
        data = _random_qblocks(rng, distinct, columns, qtype)
    else:
        values = rng.standard_normal((distinct, columns)) / np.sqrt(columns)
        data = quantize(api, values.astype(np.float32), qtype)
    return data if distinct == rows else data[rng.integers(0, distinct, rows)]


def _random_qblocks(
    rng: np.random.Generator, rows: int, columns: int, qtype: gguf.GGMLQuantizationType
) -> NDArray[np.uint8]:
    """Random bits with the scale that gives rows about unit length."""
    qblock, n_bytes = gguf.GGML_QUANT_SIZES[qtype]
    qblocks = rng.integers(0, 256, (rows * columns // qblock, n_bytes), np.uint8)
    _set_scale(qblocks, qtype, 1.0)
    spread = float(quants.dequantize(qblocks, qtype).std())
    _set_scale(qblocks, qtype, 1 / (spread * np.sqrt(columns)))
    return qblocks.reshape(rows, -1)


def _set_scale(qblocks: NDArray[np.uint8], qtype: gguf.GGMLQuantizationType, scale: float) -> None:
    bits = int(np.array(scale, "<f2").view("<u2"))
    if qtype is not _TYPES.IQ1_M:
        qblocks[:, :2] = bits & 255, bits >> 8
        return
    for i in range(4):  # its scale lies in the high nibbles of its last four 16-bit words
        high = qblocks[:, 49 + 2 * i]
        high[:] = high & 15 | (bits >> 4 * i & 15) << 4


def _write_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_name(config.name)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.n_ctx_train)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_rope_freq_base(config.rope.freq_base)
    if config.rope.ext_factor:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.rope.factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope.original_context)
    elif config.rope.factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope.factor)
    if config.block_size is not None and config.mask_token is not None:
        writer.add_uint32(keys.BLOCK_SIZE, config.block_size)
        writer.add_uint32(keys.MASK_TOKEN_ID, config.mask_token)


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    """A byte-level vocabulary: letters that stand for bytes, then made-up words."""
    letters = byte_letters()
    tokens = letters + [f"word{i}" for i in range(len(letters), n_vocab)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens[:n_vocab])
    writer.add_token_types([gguf.TokenType.NORMAL] * n_vocab)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(n_vocab - 2)


def byte_letters() -> list[str]:
    """GPT-2's 256 letters that stand for bytes: the printable ones, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [256 + i for i in range(256 - len(printable))]
    return [chr(code) for code in (*printable, *moved)]


def uniform(qtype: gguf.GGMLQuantizationType) -> TypeRule:
    """The same type for all matrices."""
    return lambda name: qtype


def rules_by_name(
    default: gguf.GGMLQuantizationType, others: Mapping[str, gguf.GGMLQuantizationType]
) -> TypeRule:
    """`default`, except for the tensors named in `others`."""
    return lambda name: others.get(name, default)
