"""The keys of the files: what llama.cpp's converter writes, and those of the diffusion heads."""

from __future__ import annotations

import dataclasses
import datetime
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import yaml

from orthrus_converters.encode import Job
from orthrus_converters.file_types import FileType
from orthrus_converters.imatrix import Imatrix
from orthrus_converters.json_file import JsonFile, describe
from orthrus_converters.vocabulary import DEFAULT_TEMPLATE, Vocabulary
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.model.architectures import LLAMA, QWEN3
from orthrus_gguf.model.config import ModelConfig, Rope
from orthrus_gguf.model.hybrid import CONV_KERNEL, Hybrid

#: Files beside config.json that the general metadata comes from.
CARD = "README.md"
GENERATION = "generation_config.json"

_ValueType = gguf.GGUFValueType


def read_card(folder: Path, name: str, n_parameters: int) -> gguf.Metadata:
    """Name, license, origins, sampling defaults …: from the model card, config files, `name`.

    name: what the model is called where the card does not say, as a folder or repository name.
    n_parameters: of the file to be written; the size label follows from it unless the card or the
    name has one. Raises OrthrusError for a card that cannot be read.
    """
    JsonFile.read_if_present(folder / GENERATION)
    try:
        card = _load_card(folder, name, n_parameters)
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise OrthrusError(
            f"{folder / CARD}: the front matter cannot be read ({problem}); correct or delete it"
        ) from error
    for field in dataclasses.fields(card):
        value = getattr(card, field.name)
        if "Optional[str]" in str(field.type):
            setattr(card, field.name, _as_text(value))
        elif "list[str]" in str(field.type) and isinstance(value, list):
            texts = [_as_text(item) for item in value if item is not None]
            setattr(card, field.name, texts or None)
        elif "list[dict]" in str(field.type) and value is not None:
            setattr(card, field.name, [item for item in value if item] or None)
    if isinstance(card.license, list):
        card.license = ",".join(_as_text(item) for item in card.license if item is not None)
    card.name = card.name or name or "model"
    card.size_label = card.size_label or gguf.size_label(n_parameters, n_parameters, 0, 0)
    return card


def _as_text(value: Any) -> Any:
    """What YAML reads as something else: `version: 1.0`, `- 2025-01-01`, `- on`."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float | datetime.date) else value


def _load_card(folder: Path, name: str, n_parameters: int) -> gguf.Metadata:
    """gguf guesses from the folder's name, which in a download cache is a hash."""
    folder = Path(os.path.abspath(folder))
    if folder.name == name:
        return gguf.Metadata.load(model_path=folder, total_params=n_parameters)
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / (name or "model")
        link.symlink_to(folder)
        return gguf.Metadata.load(model_path=link, total_params=n_parameters)


def add_general(writer: gguf.GGUFWriter, card: gguf.Metadata, kind: str) -> None:
    """`general.*` without the file type. kind: one of gguf.GGUFType."""
    writer.add_type(kind)
    card.set_gguf_meta_model(writer)
    for key, item in writer.kv_data[0].items():
        if not _fits(item.value, item.type):
            raise OrthrusError(
                f"{CARD} or {GENERATION}: the value for {key} is {_shown(item.value)}, expected "
                f"{item.type.name}; correct it"
            )


def _fits(value: Any, kind: gguf.GGUFValueType) -> bool:
    """True if gguf can store `value` as `kind` (it would raise all sorts of errors otherwise)."""
    if kind == _ValueType.ARRAY:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == _ValueType.STRING:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind == _ValueType.FLOAT32:
        return abs(value) < 3.4e38
    return isinstance(value, int) and -(2**31) <= value < 2**31


def _shown(value: object) -> str:
    return describe(value) if isinstance(value, dict | list | int | float) else repr(value)[:60]


def add_model(writer: gguf.GGUFWriter, config: ModelConfig, file_type: FileType) -> None:
    """Shape, constants and types, under the writer's architecture."""
    writer.add_block_count(config.n_blocks)
    writer.add_context_length(config.n_ctx_train)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head_kv)
    _add_rope(writer, config.rope)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_file_type(file_type.number)
    if config.architecture is LLAMA:
        writer.add_vocab_size(config.n_vocab)
        writer.add_rope_dimension_count(config.head_dim)
    if config.hybrid is not None:
        _add_hybrid(writer, config.hybrid)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_hybrid(writer: gguf.GGUFWriter, hybrid: Hybrid) -> None:
    """The DeltaNet layers, by the names that state space models have for such things."""
    writer.add_rope_dimension_count(hybrid.rotary_dim)
    writer.add_rope_dimension_sections(hybrid.sections)
    writer.add_ssm_conv_kernel(CONV_KERNEL)
    writer.add_ssm_state_size(hybrid.head_dim)
    writer.add_ssm_group_count(hybrid.n_key_heads)
    writer.add_ssm_time_step_rank(hybrid.n_value_heads)
    writer.add_ssm_inner_size(hybrid.inner)
    writer.add_full_attention_interval(hybrid.attention_every)
    if hybrid.mtp:
        writer.add_nextn_predict_layers(1)


def _add_rope(writer: gguf.GGUFWriter, rope: Rope) -> None:
    """The base, and the scaling. (Frequency factors are a tensor.)"""
    if rope.ext_factor:
        _add_yarn(writer, rope)
    elif rope.factor != 1.0:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    writer.add_rope_freq_base(rope.freq_base)


def _add_yarn(writer: gguf.GGUFWriter, rope: Rope) -> None:
    """The magnitude stands under the key that llama.cpp reads for these architectures."""
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope.factor)
    writer.add_rope_scaling_orig_ctx_len(rope.original_context)
    if rope.attn_factor != 1.0:
        writer.add_rope_scaling_attn_factors(rope.attn_factor)


def add_heads(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """What the diffusion view needs beside its tensors."""
    assert config.block_size is not None
    assert config.mask_token is not None
    if config.architecture is not QWEN3:
        writer.add_string(keys.BASE_ARCHITECTURE, config.architecture.name)
    writer.add_uint32(keys.BLOCK_SIZE, config.block_size)
    writer.add_uint32(keys.MASK_TOKEN_ID, config.mask_token)


def imatrix_entries(imatrix: Imatrix | None, jobs: Iterable[Job]) -> dict[str, gguf.GGUFValue]:
    """What llama-quantize writes about the imatrix; nothing if none of `jobs` uses it."""
    if imatrix is None or all(job.importance is None for job in jobs):
        return {}
    entries = {
        "quantize.imatrix.file": gguf.GGUFValue(imatrix.path.name, _ValueType.STRING),
        "quantize.imatrix.entries_count": gguf.GGUFValue(len(imatrix.values), _ValueType.UINT32),
    }
    if imatrix.datasets:
        datasets = ", ".join(imatrix.datasets)
        entries["quantize.imatrix.dataset"] = gguf.GGUFValue(datasets, _ValueType.STRING)
    if imatrix.n_chunks:
        entries["quantize.imatrix.chunks_count"] = gguf.GGUFValue(
            imatrix.n_chunks, _ValueType.UINT32
        )
    return entries


def add_entries(writer: gguf.GGUFWriter, entries: Mapping[str, gguf.GGUFValue]) -> None:
    """Add entries as they are."""
    for key, entry in entries.items():
        writer.add_key_value(key, entry.value, entry.type, entry.sub_type)


def add_adapter_type(writer: gguf.GGUFWriter) -> None:
    """Marks a file that holds nothing but diffusion heads."""
    writer.add_string(gguf.Keys.Adapter.TYPE, keys.ADAPTER_HEADS)


def add_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """`tokenizer.*` without the mask token."""
    names = gguf.Keys.Tokenizer
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([token.text for token in vocabulary.tokens])
    if vocabulary.model == "llama":
        writer.add_token_scores([token.score for token in vocabulary.tokens])
    writer.add_token_types([int(token.type) for token in vocabulary.tokens])
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    ids = {
        "bos": names.BOS_ID,
        "eos": names.EOS_ID,
        "unk": names.UNK_ID,
        "sep": names.SEP_ID,
        "pad": names.PAD_ID,
    }
    for name, id_ in vocabulary.special.items():
        writer.add_uint32(ids[name], id_)
    flags = {
        "add_bos_token": names.ADD_BOS,
        "add_eos_token": names.ADD_EOS,
        "add_space_prefix": names.ADD_PREFIX,
    }
    for name, value in vocabulary.flags.items():
        writer.add_bool(flags[name], value)
    _add_templates(writer, vocabulary)


def _add_templates(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    """The default template, and others by name (GGUFWriter would list them in random order)."""
    named = {
        "".join(char if char.isascii() and char.isalnum() else "_" for char in name): template
        for name, template in vocabulary.templates.items()
        if name != DEFAULT_TEMPLATE
    }
    for name, template in sorted(named.items()):
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE_N.format(name=name), template)
    if named:
        writer.add_array(gguf.Keys.Tokenizer.CHAT_TEMPLATES, sorted(named))
    if DEFAULT_TEMPLATE in vocabulary.templates:
        writer.add_string(gguf.Keys.Tokenizer.CHAT_TEMPLATE, vocabulary.templates[DEFAULT_TEMPLATE])
