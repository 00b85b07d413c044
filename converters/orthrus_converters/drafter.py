"""A drafter's checkpoint in z-lab's layout → the plan of its GGUF, in mainline llama.cpp's format.

Such a checkpoint is a Qwen3 without embedding and head, which are its target's, and mostly without
a tokenizer: `--target` names the model whose vocabulary it gets.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

import gguf

from orthrus_converters import metadata, tokenizer_files
from orthrus_converters.checkpoint import open_checkpoint
from orthrus_converters.file_types import lossless_type
from orthrus_converters.gguf_source import open_model
from orthrus_converters.hf_config import read_config, read_config_file, unknown_fields
from orthrus_converters.imatrix import Imatrix
from orthrus_converters.jobs import plan_jobs
from orthrus_converters.json_file import JsonFile, describe
from orthrus_converters.plan import NewFile, Plan, Request, check_headless, check_outputs
from orthrus_converters.sources import FileSource, FolderSource, resolve
from orthrus_converters.tensor_names import LAYER_PARTS, check_weight
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.model.architectures import DFLASH
from orthrus_gguf.model.config import BLOCK_SIZES, MAX_CONTEXT, ModelConfig
from orthrus_gguf.model.tensors import FEATURES, FEATURES_NORM, OUTPUT_NORM, drafter_tensors
from orthrus_gguf.model.window import Window

#: What config.json calls the class of such a model, and its own settings there.
CLASS, SETTINGS = "DFlashDraftModel", "dflash_config"

#: Classes of other formats, and what they are.
OTHERS = {
    "DFlash2DraftModel": "DFlash 2, with convolutions and selectors",
    "DSparkDraftModel": "DSpark, with a Markov head",
}

#: What is said of its layers' attention.
_ATTENTION = {"is_causal", "layer_types", "sliding_window", "use_sliding_window"}
_FULL, _SLIDING = "full_attention", "sliding_attention"

_NAMES = {
    FEATURES: "fc.weight",
    FEATURES_NORM: "hidden_norm.weight",
    OUTPUT_NORM: "norm.weight",
}
_KNOWN = {SETTINGS, "num_target_layers"}
_TOKENIZER = "tokenizer."


def is_drafter(config: JsonFile) -> bool:
    """Whether a config.json is of a drafter. Raises OrthrusError for one of another format."""
    classes = config.values.get("architectures")
    if not isinstance(classes, list):
        return False
    for other, what in OTHERS.items():
        if other in classes:
            raise config.error("architectures", f"is {other} ({what})", "only DFlash is supported")
    return CLASS in classes


def plan_drafter(
    request: Request, source: FolderSource, config_file: JsonFile, imatrix: Imatrix | None
) -> Plan:
    """Read and check everything but the weights' values; decide all names, types and sizes.

    Raises OrthrusError if the checkpoint cannot be converted or the output may not be written.
    """
    folder = source.folder
    check_headless(str(folder), request)
    checkpoint = open_checkpoint(folder)
    check_outputs(request, checkpoint.files)
    config, layers = _read(config_file, source.name)
    window = _window(config_file, config)
    shapes = drafter_tensors(config, len(layers))
    names = {name: _hf_name(name) for name in shapes}
    missing = [theirs for theirs in names.values() if theirs not in checkpoint.tensors]
    unused = sorted(set(checkpoint.tensors) - set(names.values()))
    if missing or unused:
        problem = f"{missing[0]} is missing" if missing else f"{unused[0]} has no place in it"
        raise OrthrusError(
            f"{folder}: weight {problem}; the checkpoint is no drafter of this kind"
            " (DFlash as z-lab publishes it), or incomplete"
        )
    weights = {name: checkpoint.tensors[theirs] for name, theirs in names.items()}
    for name, weight in weights.items():
        check_weight(weight, shapes[name])
    file_type = request.choice.file_type or lossless_type(
        weight.dtype for weight in weights.values() if len(weight.shape) > 1
    )
    choice = replace(request.choice, file_type=file_type)
    jobs, notes = plan_jobs(weights, config, choice, imatrix)

    writer = gguf.GGUFWriter(None, DFLASH.name)
    n_parameters = sum(weight.n_elements for weight in weights.values())
    metadata.add_general(
        writer, metadata.read_card(folder, source.name, n_parameters), gguf.GGUFType.MODEL
    )
    metadata.add_model(writer, config, file_type)
    writer.add_vocab_size(config.n_vocab)
    assert config.block_size is not None
    assert config.mask_token is not None
    writer.add_uint32(keys.DFLASH_BLOCK_SIZE, config.block_size)
    writer.add_array(keys.DFLASH_TARGET_LAYERS, list(layers))
    if window is not None:
        writer.add_sliding_window(window.size)
        writer.add_sliding_window_pattern(window.layers)
        if not window.causal:
            writer.add_causal_attention(False)
    notes += _add_vocabulary(writer, request, folder, config_file, config)
    writer.add_uint32(keys.MASK_TOKEN_ID, config.mask_token)
    metadata.add_entries(writer, metadata.imatrix_entries(imatrix, jobs.values()))
    unknown = sorted(set(unknown_fields(config_file)) - _KNOWN)
    if unknown:
        notes.append(f"{config_file.path}: ignored unknown fields: {', '.join(unknown)}")
    new = NewFile(request.output, writer, list(jobs.values()))
    return Plan([new], [*checkpoint.notes, *notes])


def _read(file: JsonFile, name: str) -> tuple[ModelConfig, tuple[int, ...]]:
    """Shape and constants, and the target's layers as GGUF files count them: by what they read,
    where config.json names the layer that writes it."""
    plain = {key: value for key, value in file.values.items() if key not in _ATTENTION}
    config = read_config(JsonFile(file.path, plain), name, has_heads=False)
    settings = file.values.get(SETTINGS)
    if not isinstance(settings, dict):
        raise file.error(SETTINGS, f"expected an object, found {describe(settings)}", "correct it")
    mask, ids = settings.get("mask_token_id"), settings.get("target_layer_ids")
    if not _natural(mask) or mask >= config.n_vocab:
        raise file.error(
            f"{SETTINGS}.mask_token_id",
            f"expected a token below {config.n_vocab}, found {describe(mask)}",
            "correct it",
        )
    if not isinstance(ids, list) or not ids or not all(map(_natural, ids)):
        raise file.error(
            f"{SETTINGS}.target_layer_ids",
            f"expected a list of layers, found {describe(ids)}",
            "correct it",
        )
    config = replace(
        config,
        architecture=DFLASH,
        block_size=file.integer("block_size", *BLOCK_SIZES),
        mask_token=mask,
        tied=True,
    )
    return config, tuple(layer + 1 for layer in ids)


def _window(file: JsonFile, config: ModelConfig) -> Window | None:
    """What some layers see; None if all see everything. Sliding layers are causal where nothing is
    said of that."""
    kinds = file.array("layer_types") or [_FULL] * config.n_layers
    if len(kinds) != config.n_layers or any(kind not in (_FULL, _SLIDING) for kind in kinds):
        raise file.error(
            "layer_types",
            f'expected "{_FULL}" or "{_SLIDING}" for each of {config.n_layers} layers',
            "correct it",
        )
    causal = file.values.get("is_causal")
    if causal not in (None, False):
        raise file.error(
            "is_causal", f"expected false or nothing, found {describe(causal)}", "correct it"
        )
    if _SLIDING not in kinds:
        return None
    size = file.integer("sliding_window", config.block_size or 1, MAX_CONTEXT)
    return Window(size, tuple(kind == _SLIDING for kind in kinds), causal is None)


def _natural(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _hf_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"layers.{layer}.{LAYER_PARTS[part]}.{kind}"


def _add_vocabulary(
    writer: gguf.GGUFWriter,
    request: Request,
    folder: Path,
    config_file: JsonFile,
    config: ModelConfig,
) -> list[str]:
    """The target's tokens, from `--target` or from the folder itself; lines to say."""
    if request.target is None and not any(
        (folder / name).exists() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")
    ):
        return [
            f"{folder}: holds no tokenizer, so the file says only how many tokens there are;"
            " llama.cpp wants them all: name the model that it drafts for with --target"
        ]
    source = FolderSource(folder, "") if request.target is None else resolve(request.target, None)
    if isinstance(source, FileSource):
        check_outputs(request, [source.path])
        target = open_model(source.path)
        assert target.config is not None
        _check_size(request.target, target.config.n_vocab, target.config.n_embd, config)
        entries = {
            key: entry
            for key, entry in target.entries.items()
            if key.startswith(_TOKENIZER) and key != keys.MASK_TOKEN_ID
        }
        metadata.add_entries(writer, entries)
        return []
    if request.target is not None:
        config_file = read_config_file(source.folder / "config.json")
        theirs = read_config(config_file, source.name, has_heads=False)
        _check_size(request.target, theirs.n_vocab, theirs.n_embd, config)
    vocabulary = tokenizer_files.read_vocabulary(source.folder, config_file, config.n_vocab)
    metadata.add_tokenizer(writer, vocabulary)
    return list(vocabulary.notes)


def _check_size(target: str | None, n_vocab: int, n_embd: int, config: ModelConfig) -> None:
    for what, theirs, ours in (
        ("tokens", n_vocab, config.n_vocab),
        ("elements a row", n_embd, config.n_embd),
    ):
        if theirs != ours:
            raise OrthrusError(
                f"--target {target}: has {theirs} {what}, the drafter {ours}; name the model that"
                " it was trained for"
            )
