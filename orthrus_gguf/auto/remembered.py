"""Cost curves on disk: measured once per machine, model and settings."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from orthrus_gguf.auto.costs import CostCurve


def cache_folder() -> Path:
    """Where programs of this user keep what can be made again."""
    told = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(told):  # the XDG specification has others ignored
        return Path(told) / "orthrus-gguf"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "orthrus-gguf"
    return Path.home() / ".cache" / "orthrus-gguf"


def curve_path(folder: Path, key: dict[str, str]) -> Path:
    import hashlib  # takes long, for its cryptography

    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"costs-{digest[:16]}.json"


def read_curve(path: Path, key: dict[str, str] | None = None) -> CostCurve:
    """A remembered curve. key: of the only machine and model that it may be from.

    Raises OSError, or ValueError unless the file holds a plausible curve for this key.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or (key is not None and data.get("key") != key):
        raise ValueError("it belongs to another machine, model or version")
    return _curve(data.get("curve"))


def _curve(data: Any) -> CostCurve:
    names = [field.name for field in fields(CostCurve)]
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        raise ValueError("its fields are not those of a cost curve")
    rows, seconds, per_token = data["rows"], data["seconds"], data["per_token"]
    names = ["context", "draft_rows", "draft", "mixed", "threads", "drafter"]
    plain = [data[name] for name in names]
    lists = all(isinstance(values, list) for values in (rows, seconds, per_token))
    if not lists or not all(_number(value) for value in [*rows, *seconds, *per_token, *plain]):
        raise ValueError("its values are not numbers")
    ascending = all(a < b for a, b in itertools.pairwise(rows))
    counts = [*rows, data["context"], data["draft_rows"], data["threads"]]
    if not (
        len(rows) == len(seconds) > 0
        and len(per_token) == 2
        and ascending
        and all(isinstance(value, int) for value in counts)
        and min(*rows, *seconds) > 0
    ):
        raise ValueError("its values are not a cost curve")
    return CostCurve(
        tuple(rows), tuple(seconds), data["context"], (per_token[0], per_token[1]), *plain[1:]
    )


def _number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value >= 0
    )


def write_curve(path: Path, key: dict[str, str], curve: CostCurve) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(json.dumps({"key": key, "curve": asdict(curve)}, indent=1) + "\n", "utf-8")
    beside.replace(path)
