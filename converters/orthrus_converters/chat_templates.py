"""Which chat templates a checkpoint has: they may be in several files, of several generations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from orthrus_converters.json_file import JsonFile, describe, read_bytes
from orthrus_converters.vocabulary import DEFAULT_TEMPLATE
from orthrus_gguf.errors import OrthrusError

JINJA = "chat_template.jinja"
OLD_JSON = "chat_template.json"
ADDITIONAL = "additional_chat_templates"

#: Template by name.
Templates = Mapping[str, str]


def read_templates(folder: Path, settings: JsonFile) -> tuple[dict[str, str], list[str]]:
    """Chat templates by name, and a line for each that another one of its name has displaced.

    As in transformers, files of their own come before tokenizer_config.json (`settings`), and, as
    in llama.cpp's converter, a processor's chat_template.json comes last. Raises OrthrusError.
    """
    chosen: dict[str, str] = {}
    places: dict[str, Path] = {}
    notes: list[str] = []
    for path, templates in _sources(folder, settings):
        for name, template in templates.items():
            if name not in chosen:
                chosen[name], places[name] = template, path
            elif chosen[name] != template:
                notes.append(
                    f"{path}: its chat template {name!r} is left out: that of {places[name].name} "
                    "counts, as in transformers"
                )
    return chosen, notes


def _sources(folder: Path, settings: JsonFile) -> Iterator[tuple[Path, Templates]]:
    """The places that templates may be in, the one that counts most first."""
    if (folder / JINJA).exists():
        yield folder / JINJA, {DEFAULT_TEMPLATE: _read(folder / JINJA)}
    for path in sorted((folder / ADDITIONAL).glob("*.jinja")):
        yield path, {path.stem: _read(path)}
    yield settings.path, _listed(settings)
    if (folder / OLD_JSON).exists():
        old = JsonFile.read(folder / OLD_JSON)
        yield old.path, _listed(old)


def _read(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise OrthrusError(f"{path}: is not UTF-8 ({error}); download it again") from error


def _listed(file: JsonFile) -> Templates:
    """Those under `chat_template`: one, or a list of named ones."""
    value = file.values.get("chat_template")
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    if value is not None and not isinstance(value, list):
        raise file.error("chat_template", f"found {describe(value)}", "correct it")
    return dict(_entry(file, entry) for entry in value or [])


def _entry(file: JsonFile, entry: Any) -> tuple[str, str]:
    if isinstance(entry, dict):
        name, template = entry.get("name"), entry.get("template")
        if isinstance(name, str) and isinstance(template, str):
            return name, template
    raise file.error("chat_template", f"found {describe(entry)}", "correct it")
