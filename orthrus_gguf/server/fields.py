"""Request bodies are dataclasses: they are read from JSON, and described as JSON Schema, by their
types. Unknown fields are ignored, null is as good as absent, and what is wrong is named by its path
(`messages[2].role`)."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from orthrus_gguf.server.api_errors import ApiError, wrong

T = TypeVar("T")


@dataclass(frozen=True)
class Within:
    """Bounds of a number, or of the length of a list or a text; both included."""

    low: float = -math.inf
    high: float = math.inf

    @property
    def words(self) -> str:
        if self.high == math.inf:
            return f"{self.low:g} or more"
        return f"{self.low:g} to {self.high:.20g}"


def read(kind: type[T], data: Any, where: str = "") -> T:
    """The dataclass that `data`, as `json.loads` gives it, stands for. Raises ApiError."""
    if not isinstance(data, dict):
        raise wrong(where or "body", f"expected an object, found {_found(data)}")
    given: dict[str, Any] = {}
    hints = _hints(kind)  # type: ignore[arg-type]
    for field in fields(kind):  # type: ignore[arg-type]
        path = f"{where}.{field.name}" if where else field.name
        if data.get(field.name) is not None:
            given[field.name] = _value(hints[field.name], data[field.name], path)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise wrong(path, "is required")
    return kind(**given)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _value(hint: Any, value: Any, path: str) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Annotated:
        inner, *bounds = get_args(hint)
        found = _value(inner, value, path)
        for bound in bounds:
            _check(bound, found, path)
        return found
    if origin in (Union, types.UnionType):
        return _one_of(hint, value, path)
    if not _is_kind(hint, value):
        raise wrong(path, f"expected {_words(hint)}, found {_found(value)}")
    if origin is list:
        (inner,) = get_args(hint)
        if inner in (int, str) and all(type(item) is inner for item in value):
            return value  # may be long
        return [_value(inner, item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        _, inner = get_args(hint)
        return {key: _value(inner, item, f"{path}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        return read(hint, value, path)  # type: ignore[arg-type]
    return float(value) if hint is float else value


def _one_of(hint: Any, value: Any, path: str) -> Any:
    """The first alternative that fits; if none does, what is wrong with the last of its kind."""
    problem: ApiError | None = None
    for option in get_args(hint):
        if option is type(None) or not _is_kind(option, value):
            continue
        try:
            return _value(option, value, path)
        except ApiError as error:
            problem = error
    raise problem or wrong(path, f"expected {_words(hint)}, found {_found(value)}")


def _is_kind(hint: Any, value: Any) -> bool:
    """Whether JSON of this kind may be meant."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _is_kind(get_args(hint)[0], value)
    if origin is Literal:
        return value in get_args(hint)
    if origin is list:
        return isinstance(value, list)
    if origin is dict or is_dataclass(hint):
        return isinstance(value, dict)
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) < 1e300
    return hint is Any


def _check(bound: Within, value: Any, path: str) -> None:
    measure = len(value) if isinstance(value, list | str | dict) else value
    if not bound.low <= measure <= bound.high:
        what = "" if measure is value else "a length of "
        raise wrong(path, f"expected {what}{bound.words}, found {measure}")


def _words(hint: Any) -> str:
    origin = get_origin(hint)
    if origin is Annotated:
        return _words(get_args(hint)[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_words(o) for o in get_args(hint) if o is not type(None))
    if origin is Literal:
        return " or ".join(repr(o) for o in get_args(hint))
    if origin is list:
        return f"a list of {_words(get_args(hint)[0])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, "an object")


def _found(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return f"{value!r:.60}"


def schema(hint: Any, known: dict[str, Any]) -> dict[str, Any]:
    """JSON Schema of a type; schemas of dataclasses are added to `known` and referred to."""
    origin = get_origin(hint)
    if hint is Any:
        return {}
    if origin is Annotated:
        inner, *bounds = get_args(hint)
        return {**schema(inner, known), **_bounds(inner, bounds)}
    if origin in (Union, types.UnionType):
        options = [schema(o, known) for o in get_args(hint)]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is Literal:
        return {"enum": list(get_args(hint))}
    if origin is list:
        return {"type": "array", "items": schema(get_args(hint)[0], known)}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema(get_args(hint)[1], known)}
    if is_dataclass(hint):
        return _described(hint, known)  # type: ignore[arg-type]
    plain = {int: "integer", float: "number", str: "string", bool: "boolean"}
    return {"type": plain.get(hint, "null")}


def _bounds(inner: Any, bounds: list[Within]) -> dict[str, Any]:
    low, high = "minimum", "maximum"
    if get_origin(inner) is list:
        low, high = "minItems", "maxItems"
    elif inner is str:
        low, high = "minLength", "maxLength"
    found: dict[str, Any] = {}
    for bound in bounds:
        found |= {low: bound.low} if bound.low > -math.inf else {}
        found |= {high: bound.high} if bound.high < math.inf else {}
    return found


def _described(kind: type, known: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in known:
        known[name] = {}  # a type may hold itself
        hints: Mapping[str, Any] = _hints(kind)
        properties: dict[str, Any] = {}
        required = []
        for field in fields(kind):
            properties[field.name] = schema(hints[field.name], known)
            if field.default is MISSING and field.default_factory is MISSING:
                required.append(field.name)
        known[name] = {
            "type": "object",
            "description": " ".join((kind.__doc__ or "").split()),
            "properties": properties,
            "required": required,
        }
    return {"$ref": f"#/components/schemas/{name}"}
