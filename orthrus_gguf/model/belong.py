"""Do heads and a base belong together, as far as shapes and constants tell?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import TensorInfo
from orthrus_gguf.model.config import ModelConfig

#: Relative difference of two numbers that are still the same: a GGUF keeps single precision, a
#: checkpoint's config double. (Half the distance of two neighbours in single precision is 6e-8.)
TOLERANCE = 1e-6

#: What must be equal for heads to have been trained on a base. The trained context may differ: it
#: changes no arithmetic.
_IDENTITY = ("n_layers", "n_embd", "n_ff", "n_head", "n_head_kv", "head_dim", "n_vocab", "rms_eps")


def differences(base: ModelConfig, heads: ModelConfig) -> str:
    """What keeps the heads from belonging to the base, in words; empty if nothing does.

    RoPE's frequency factors are a tensor of the base, which files of heads do not repeat: they are
    compared only if both sides have them.
    """
    found = []
    if base.architecture != heads.architecture:
        found.append(
            f"architecture is {heads.architecture.name}, the base has {base.architecture.name}"
        )
    pairs = [(name, getattr(base, name), getattr(heads, name)) for name in _IDENTITY]
    theirs_of = asdict(heads.rope)
    rope = asdict(base.rope).items()
    pairs += [(f"rope {name}", v, theirs_of[name]) for name, v in rope if name != "freq_factors"]
    found += [
        f"{name} is {theirs:.7g}, the base has {ours:.7g}"
        for name, ours, theirs in pairs
        if not _same(ours, theirs)
    ]
    # An MTP block may have come or gone: it is no part of the layers.
    one, other = (config.hybrid and replace(config.hybrid, mtp=False) for config in (base, heads))
    if one and other and one != other:
        found.append("its DeltaNet layers have other sizes")
    ours, theirs = base.rope.freq_factors, heads.rope.freq_factors
    if ours is not None and theirs is not None:
        unlike = [i for i, pair in enumerate(zip(ours, theirs, strict=False)) if not _same(*pair)]
        if unlike:
            i = unlike[0]
            found.append(f"RoPE's factor {i} is {theirs[i]:.7g}, the base has {ours[i]:.7g}")
    return ", ".join(found)


#: Bytes of each tensor that a fingerprint reads at its beginning, middle and end.
_READ = 4096


def fingerprint(tensors: Mapping[str, TensorInfo], data: Callable[[str], NDArray[np.uint8]]) -> str:
    """SHA-256 over name, type, shape and samples of the data of all tensors, in the order of their
    names: tells a base from others, other quantizations of it included, in next to no time."""
    import hashlib

    digest = hashlib.sha256()
    for name in sorted(tensors):
        info, values = tensors[name], data(name)
        digest.update(f"{name} {info.type.name} {info.shape}\n".encode())
        middle = len(values) // 2
        for part in (values[:_READ], values[middle : middle + _READ], values[-_READ:]):
            digest.update(part.tobytes())
    return digest.hexdigest()


def check_trained_on(
    heads: Path,
    wanted: str,
    base: Path,
    tensors: Mapping[str, TensorInfo],
    data: Callable[[str], NDArray[np.uint8]],
) -> None:
    """Raise OrthrusError unless the fingerprint that heads want is that of the base's tensors."""
    if wanted != fingerprint(tensors, data):
        raise OrthrusError(
            f"{heads}: these heads were trained on another file than {base} (their fingerprint "
            "is not its): use that base, or train heads for this one with orthrus-train"
        )


def _same(one: float, two: float) -> bool:
    return abs(one - two) <= TOLERANCE * max(abs(one), abs(two))
