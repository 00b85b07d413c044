"""The rotary embedding in config.json, in both of its spellings.

Newer: `rope_parameters` with `rope_theta` inside. Older: `rope_theta` beside `rope_scaling`, whose
kind is called `rope_type` or `type`.
"""

from __future__ import annotations

import math
from typing import Any

from orthrus_converters.json_file import JsonFile, describe
from orthrus_gguf.model.belong import TOLERANCE
from orthrus_gguf.model.config import MAX_CONTEXT, Rope
from orthrus_gguf.model.rope_factors import llama3_factors

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_ORIGINAL = "original_max_position_embeddings"
#: Kind → the settings that it has besides.
_KINDS = {
    "default": set[str](),
    "none": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL},
    "yarn": {
        "factor",
        _ORIGINAL,
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}
#: Of RoPE with sections.
_MULTIMODAL = {"mrope_section", "mrope_interleaved", "partial_rotary_factor"}
#: Seen in configs with YaRN; transformers reads none of them, and neither does llama.cpp.
_UNREAD = {"attn_factor", "extrapolation_factor", "finetuned"}
#: Settings of YaRN that llama.cpp does not read for any of our architectures, as it has them.
_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_ADVICE = "only plain RoPE, linear scaling, Llama 3's and YaRN are supported"


def read_rope(
    config: JsonFile, head_dim: int, default_base: float | None, *, multimodal: bool = False
) -> Rope:
    """Raises OrthrusError for a kind of RoPE, or a setting, that is not supported.

    default_base: where the config does not say, if it need not. multimodal: pairs come in sections,
    and some elements of a head may not be turned; unscaled only.
    """
    key, params = _parameters(config)
    fields = JsonFile(config.path, {f"{key}.{name}": value for name, value in params.items()})
    kind = params.get("rope_type", params.get("type", "default"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise fields.error(f"{key}.rope_type", f"found {describe(kind)}", _ADVICE)
    if multimodal:
        if kind != "default":
            raise fields.error(f"{key}.rope_type", f"found {kind}", "scaling is not supported here")
        _check_interleaved(fields, key)
        params = {name: value for name, value in params.items() if name not in _MULTIMODAL}
    _check_settings(fields, key, params, _KINDS[kind])
    freq_base = _freq_base(config, fields, key, default_base)
    if "factor" not in _KINDS[kind]:
        return Rope(freq_base)
    factor = _factor(config, fields, key, kind)
    if factor < 1:
        raise fields.error(f"{key}.factor", f"expected at least 1, found {factor}", "correct it")
    if kind == "linear":
        return Rope(freq_base, factor=factor)
    original_context = _original_context(config, fields, key)
    if kind == "llama3":
        bounds = _llama3_bounds(fields, key)
        factors = llama3_factors(freq_base, head_dim, factor, *bounds, original_context)
        return Rope(freq_base, freq_factors=factors)
    return Rope(
        freq_base=freq_base,
        factor=factor,
        original_context=original_context,
        ext_factor=1.0,
        attn_factor=_attn_factor(fields, key, factor),
    )


def _check_interleaved(fields: JsonFile, key: str) -> None:
    """Text gives the same in both layouts of sections, but only one of them is the model's."""
    if not fields.boolean(f"{key}.mrope_interleaved", default=True):
        raise fields.error(f"{key}.mrope_interleaved", "is false", _ADVICE)


def unread_settings(config: JsonFile) -> list[str]:
    """The settings that neither transformers nor llama.cpp looks at."""
    key, params = _parameters(config)
    return sorted(f"{key}.{name}" for name in _UNREAD & set(params))


def _factor(config: JsonFile, fields: JsonFile, key: str, kind: str) -> float:
    """YaRN's may be null: then it is what the contexts tell."""
    name = f"{key}.factor"
    if fields.values.get(name) is not None:
        return fields.positive(name)
    if kind == "yarn" and name in fields.values:
        context = config.integer("max_position_embeddings", 1, MAX_CONTEXT)
        return context / _original_context(config, fields, key)
    advice = (
        f'add it: the context wanted, divided by {_ORIGINAL}, such as "factor": 4.0'
        if kind == "yarn"
        else "download it again"
    )
    raise fields.error(name, f"is missing, though rope_type is {kind}", advice)


def _original_context(config: JsonFile, fields: JsonFile, key: str) -> int:
    """As transformers finds it: beside the settings, in them, or the context of the model."""
    for source, name in ((config, _ORIGINAL), (fields, f"{key}.{_ORIGINAL}")):
        value = source.values.get(name)
        if value is not None:
            whole = isinstance(value, float) and value.is_integer()
            entry = JsonFile(source.path, {name: int(value) if whole else value})
            return entry.integer(name, 1, MAX_CONTEXT)
    return config.integer("max_position_embeddings", 1, MAX_CONTEXT)


def _llama3_bounds(fields: JsonFile, key: str) -> tuple[float, float]:
    """Turns within the original context below and above which nothing is blended."""
    low = fields.positive(f"{key}.low_freq_factor")
    high = fields.positive(f"{key}.high_freq_factor")
    if high <= low:
        raise fields.error(
            f"{key}.high_freq_factor",
            f"expected more than low_freq_factor, {low:g}, found {high:g}",
            "correct it",
        )
    return low, high


def _parameters(config: JsonFile) -> tuple[str, dict[str, Any]]:
    """The settings and the name of the field that they are in."""
    new, old = config.mapping("rope_parameters"), config.mapping("rope_scaling")
    if new and old and {**new, "rope_theta": 0} != {**old, "rope_theta": 0}:
        raise config.error("rope_parameters", "contradicts rope_scaling", "remove the wrong one")
    return ("rope_parameters", new) if new else ("rope_scaling", old)


def _check_settings(fields: JsonFile, key: str, params: dict[str, Any], settings: set[str]) -> None:
    """Raise OrthrusError for settings that would change the result and that we do not know."""
    for name, value in params.items():
        if name not in _COMMON | settings | _UNREAD and value is not None:
            raise fields.error(f"{key}.{name}", f"found {describe(value)}", _ADVICE)
    if params.get("partial_rotary_factor") not in (None, 1):
        raise fields.error(f"{key}.partial_rotary_factor", "is not 1", _ADVICE)
    for name, fixed in _FIXED.items():
        value = params.get(name)
        if name in settings and value is not None and value != fixed:
            raise fields.error(
                f"{key}.{name}",
                f"found {describe(value)}",
                f"GGUF files of this architecture cannot say so: llama.cpp takes {describe(fixed)}",
            )


def _freq_base(config: JsonFile, fields: JsonFile, key: str, default: float | None) -> float:
    inner, outer = fields.values.get(f"{key}.rope_theta"), config.values.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise config.error("rope_theta", f"contradicts {key}", "remove the wrong one")
    if inner is None:
        return config.positive("rope_theta", default)
    return fields.positive(f"{key}.rope_theta")


def _attn_factor(fields: JsonFile, key: str, factor: float) -> float:
    """GGUF's attention factor from Hugging Face's.

    In ggml, YaRN scales by `1 + 0.1 ln(factor)` anyway and the attention factor multiplies that;
    in transformers, `attention_factor` replaces it, or else a ratio of two such expressions does
    (`mscale` and `mscale_all_dim`, where both are there and not 0).
    """
    default = 1.0 + 0.1 * math.log(factor)
    if fields.values.get(f"{key}.attention_factor") is not None:
        ratio = fields.positive(f"{key}.attention_factor") / default
        return 1.0 if abs(ratio - 1) < TOLERANCE else ratio  # the default, spelt out
    names = (f"{key}.mscale", f"{key}.mscale_all_dim")
    if not all(fields.values.get(name) for name in names):
        return 1.0
    above, below = (1.0 + 0.1 * fields.positive(name) * math.log(factor) for name in names)
    return above / below / default
