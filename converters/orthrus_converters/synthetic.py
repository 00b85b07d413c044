"""GGUF files of random weights in the shape of real models, made in seconds.

Time and memory do not depend on what weights say, so such a file stands in for one that is not at
hand. What it generates is noise, and how many drafts are accepted means nothing: files are labelled
so, in their name and under the key `orthrus.synthetic`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from orthrus_converters import metadata
from orthrus_converters.file_types import ALIASES, FILE_TYPES, FileType, find_file_type
from orthrus_converters.source_tensor import SourceTensor
from orthrus_converters.synthetic_qblocks import KINDS, RandomWeights
from orthrus_converters.synthetic_vocabulary import synthetic_vocabulary
from orthrus_converters.type_plan import TypeChoice, is_matrix, plan_types
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf import keys
from orthrus_gguf.gguf.writer import PlannedFile, PlannedTensor
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.shapes import HYBRID_SHAPES, MASK_TOKEN, SHAPES
from orthrus_gguf.model.tensors import ROPE_FREQS, base_tensors, diffusion_tensors, original_of

MAX_SEED = 2**32 - 1

#: Follows the name of a synthetic model wherever something is said of it.
LABEL = "synthetic: random weights, so only times mean anything"


def plan_synthetic(path: Path, config: ModelConfig, type_name: str, seed: int = 0) -> PlannedFile:
    """A file of this shape and file type, with its heads and a vocabulary, for write_files().

    type_name: as `--type` takes it; tensors get the types that conversion would give them (without
    an imatrix). config: its name is used in the label; without heads, the file is a stock one. The
    same arguments give the same file. Raises OrthrusError if the type cannot be made.
    """
    file_type = _file_type(type_name)
    if not 0 <= seed <= MAX_SEED:
        raise OrthrusError(f"--seed {seed}: expected 0 to {MAX_SEED}")
    shapes = base_tensors(config) | (diffusion_tensors(config) if config.has_heads else {})
    sources = {
        name: SourceTensor(name, "F32", shape, path, 0, 4 * math.prod(shape))
        for name, shape in shapes.items()
    }
    kinds = plan_types(sources, config, TypeChoice(file_type), has_imatrix=False).types
    missing = {kind.name for kind in kinds.values() if kind not in KINDS}
    if missing:
        raise OrthrusError(
            f"--type {type_name}: no random qblocks can be made of type {min(missing)}; choose "
            "another type"
        )
    data = partial(_data, RandomWeights(seed), config)
    tensors = [
        PlannedTensor(name, shape, kinds[name], partial(data, name, shape, kinds[name]))
        for name, shape in shapes.items()
    ]
    return PlannedFile(path, _metadata(config, file_type, tensors, seed), tensors)


def find_shape(name: str) -> ModelConfig:
    """One of SHAPES and HYBRID_SHAPES. Raises OrthrusError for other names."""
    known = SHAPES | HYBRID_SHAPES
    if name not in known:
        raise OrthrusError(f"--synthetic {name}: expected one of {', '.join(known)}")
    return known[name]


def _file_type(name: str) -> FileType:
    found = find_file_type(name)
    if found is None:
        known = ", ".join((*FILE_TYPES, *ALIASES))
        raise OrthrusError(f"--type {name}: expected one of {known}")
    return found


def _data(
    weights: RandomWeights,
    config: ModelConfig,
    name: str,
    shape: tuple[int, ...],
    kind: gguf.GGMLQuantizationType,
) -> Iterator[NDArray[Any]]:
    if is_matrix(name, shape):
        rows, columns = shape
        return weights.matrix(name, kind, (rows, columns))
    if name == ROPE_FREQS:
        return iter([np.array(config.rope.freq_factors, np.float32)])
    part = original_of(name).rpartition(".")[2]  # decays are below zero, norms about one
    return weights.vector(name, math.prod(shape), mean={"bias": 0.0, "ssm_a": -1.0}.get(part, 1.0))


def _metadata(
    config: ModelConfig, file_type: FileType, tensors: list[PlannedTensor], seed: int
) -> gguf.GGUFWriter:
    n_parameters = sum(tensor.n_elements for tensor in tensors)
    card = gguf.Metadata(
        name=f"synthetic {config.name} {file_type.name.upper()} (random weights)",
        size_label=gguf.size_label(n_parameters, n_parameters, 0, 0),
        description="Random weights in the shape of a real model: only its times mean anything.",
        tags=["synthetic"],
    )
    arch = keys.ARCH_ORTHRUS if config.has_heads else config.architecture.name
    writer = gguf.GGUFWriter(None, arch)
    metadata.add_general(writer, card, gguf.GGUFType.MODEL)
    writer.add_bool(keys.SYNTHETIC, True)
    writer.add_uint32(keys.SYNTHETIC_SEED, seed)
    metadata.add_model(writer, config, file_type)
    last = min(MASK_TOKEN, config.n_vocab - 1) if config.mask_token is None else config.mask_token
    metadata.add_tokenizer(writer, synthetic_vocabulary(config.n_vocab, last, seed))
    if config.has_heads:
        metadata.add_heads(writer, config)
    return writer
