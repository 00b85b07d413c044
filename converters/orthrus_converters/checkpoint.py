"""The weights of a Hugging Face checkpoint folder: one safetensors file, or shards and an index."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from orthrus_converters.json_file import JsonFile
from orthrus_converters.safetensors_file import read_header
from orthrus_converters.source_tensor import SourceTensor
from orthrus_gguf.errors import OrthrusError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by their Hugging Face names. files: what they are read from. notes: lines about
    files that were left out."""

    folder: Path
    tensors: Mapping[str, SourceTensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def check_folder(folder: Path) -> None:
    """Raise OrthrusError unless `folder` is a folder."""
    if folder.is_dir():
        return
    if not folder.exists():
        raise OrthrusError(
            f"{folder}: no such folder; check the name, or download the checkpoint first: "
            "hf download ORG/NAME --local-dir FOLDER"
        )
    raise OrthrusError(f"{folder}: is not a folder; give the folder that holds config.json")


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read all headers of the checkpoint in `folder`. Raises OrthrusError unless it is complete.

    Of a single file and shards, the single file counts, as in transformers, but for one that lacks
    what is in the shards: training with ZeRO-3 leaves an empty one, for example.
    """
    single, index = folder / SINGLE, folder / INDEX
    tensors = read_header(single) if single.exists() else None
    if not index.exists():
        if tensors is None:
            raise _no_weights(folder)
        return Checkpoint(folder, tensors, (single,))
    weight_map = _weight_map(index)
    if tensors is None:
        return _open_shards(folder, weight_map, index)
    lacking = [name for name in weight_map if name not in tensors or not tensors[name].n_elements]
    if not lacking:
        note = f"{folder}: read {SINGLE}, as transformers does, and not the shards of {INDEX}"
        return Checkpoint(folder, tensors, (single,), (note,))
    note = f"{single}: left out: it lacks {lacking[0]}{_more(lacking)}; read the shards of {INDEX}"
    return replace(_open_shards(folder, weight_map, index), notes=(note,))


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index."""
    entries = JsonFile.read(index)
    weight_map = entries.mapping("weight_map")
    if not weight_map:
        raise entries.error("weight_map", "is missing or empty", "download it again")
    for name, shard in weight_map.items():
        # The index may come from anyone: it must not lead out of the folder.
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise entries.error("weight_map", f"{name} is in {shard!r}, no file name", "repair it")
        if not shard.endswith(".safetensors"):
            raise entries.error("weight_map", f"{shard} is no safetensors file", "convert it first")
    return weight_map


def _open_shards(folder: Path, weight_map: Mapping[str, str], index: Path) -> Checkpoint:
    counts = Counter(weight_map.values())
    for shard, count in counts.items():
        if not (folder / shard).exists():
            raise OrthrusError(
                f"{folder / shard}: missing shard ({count} of {len(weight_map)} tensors of the "
                "model); download it"
            )
    tensors: dict[str, SourceTensor] = {}
    for shard in sorted(counts):
        for name, tensor in read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                place = weight_map.get(name, "nowhere")
                raise OrthrusError(
                    f"{folder / shard}: holds tensor {name}, which {INDEX} puts {place}; "
                    "the files do not belong together: download the checkpoint again"
                )
            tensors[name] = tensor
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise OrthrusError(
            f"{folder / weight_map[missing[0]]}: tensor {missing[0]}{_more(missing)} is missing, "
            f"though {INDEX} names it; download the shard again"
        )
    return Checkpoint(folder, tensors, (index, *(folder / shard for shard in sorted(counts))))


def _no_weights(folder: Path) -> OrthrusError:
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if any(name.endswith(".safetensors") for name in names):
        return OrthrusError(f"{folder}: there are safetensors files but no {INDEX}; download it")
    if pickles:
        return OrthrusError(
            f"{folder}: {pickles[0]} is a pickle checkpoint, which can run code when opened and is "
            "never read; get the weights as safetensors"
        )
    return OrthrusError(f"{folder}: no weights: expected {SINGLE} or {INDEX}; download them")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
