"""The rotary embedding in config.json, in both of its spellings.

Newer: `rope_parameters` with `rope_theta` inside. Older: `rope_theta` beside `rope_scaling`, whose
kind is called `rope_type` or `type`.
"""

from __future__ import annotations

import math
from typing import Any

from orthrus_converters.json_file import JsonFile, describe
from orthrus_gguf.model.config import MAX_CONTEXT, Rope

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_YARN = {
    "factor",
    "original_max_position_embeddings",
    "extrapolation_factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "truncate",
}
_ADVICE = "only plain RoPE and YaRN are supported"


def read_rope(config: JsonFile) -> Rope:
    """Raises OrthrusError for a kind of RoPE, or a setting, that is not supported."""
    key, params = _parameters(config)
    fields = JsonFile(config.path, {f"{key}.{name}": value for name, value in params.items()})
    kind = params.get("rope_type", params.get("type", "default"))
    if kind not in ("default", "none", "yarn"):
        raise fields.error(f"{key}.rope_type", f"found {describe(kind)}", _ADVICE)
    _check_settings(fields, key, params, is_yarn=kind == "yarn")
    freq_base = _freq_base(config, fields, key)
    if kind != "yarn":
        return Rope(freq_base)
    factor = fields.positive(f"{key}.factor")
    if factor < 1:
        raise fields.error(f"{key}.factor", f"expected at least 1, found {factor}", "correct it")
    return Rope(
        freq_base=freq_base,
        factor=factor,
        original_context=fields.integer(f"{key}.original_max_position_embeddings", 1, MAX_CONTEXT),
        ext_factor=fields.positive(f"{key}.extrapolation_factor", default=1.0),
        attn_factor=_attn_factor(fields, key, factor),
        beta_fast=fields.positive(f"{key}.beta_fast", default=32.0),
        beta_slow=fields.positive(f"{key}.beta_slow", default=1.0),
    )


def _parameters(config: JsonFile) -> tuple[str, dict[str, Any]]:
    """The settings and the name of the field that they are in."""
    new, old = config.mapping("rope_parameters"), config.mapping("rope_scaling")
    if new and old and {**new, "rope_theta": 0} != {**old, "rope_theta": 0}:
        raise config.error("rope_parameters", "contradicts rope_scaling", "remove the wrong one")
    return ("rope_parameters", new) if new else ("rope_scaling", old)


def _check_settings(fields: JsonFile, key: str, params: dict[str, Any], *, is_yarn: bool) -> None:
    """Raise OrthrusError for settings that would change the result and that we do not know."""
    known = _COMMON | _YARN if is_yarn else _COMMON
    for name, value in params.items():
        if name not in known and value is not None:
            raise fields.error(f"{key}.{name}", f"found {describe(value)}", _ADVICE)
    if params.get("partial_rotary_factor") not in (None, 1):
        raise fields.error(f"{key}.partial_rotary_factor", "is not 1", _ADVICE)
    if params.get("truncate") not in (None, True):
        raise fields.error(f"{key}.truncate", "is not true", "llama.cpp always truncates")


def _freq_base(config: JsonFile, fields: JsonFile, key: str) -> float:
    inner, outer = fields.values.get(f"{key}.rope_theta"), config.values.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise config.error("rope_theta", f"contradicts {key}", "remove the wrong one")
    return config.positive("rope_theta") if inner is None else fields.positive(f"{key}.rope_theta")


def _attn_factor(fields: JsonFile, key: str, factor: float) -> float:
    """GGUF's attention factor from Hugging Face's.

    In ggml, YaRN scales by `1 + 0.1 ln(factor)` anyway and the attention factor multiplies that;
    in transformers, `attention_factor` replaces it.
    """
    default = 1.0 + 0.1 * math.log(factor)
    return fields.positive(f"{key}.attention_factor", default) / default
