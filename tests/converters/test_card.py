"""`general.*`: what the model card, generation_config.json and the folder's name become."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from hf_checkpoint import write_checkpoint, write_json

CARD = """---
license: apache-2.0
license_link: https://example.org/LICENSE
base_model: Qwen/Qwen3-8B
tags: [diffusion, orthrus]
language: en
pipeline_tag: text-generation
version: 1.5
---
# A card
"""


@pytest.fixture
def general(convert: Callable[..., Any], out: Path) -> Callable[..., dict[str, Any]]:
    """`general(folder, *flags)`: convert, and return the `general.` keys without that prefix."""

    def read(folder: Path, *flags: str) -> dict[str, Any]:
        run = convert(folder, *flags)
        assert run.code == 0, run.stderr
        fields = gguf.GGUFReader(out / "model.gguf").fields
        return {
            key.removeprefix("general."): field.contents()
            for key, field in fields.items()
            if key.startswith("general.")
        }

    return read


def test_without_card(tmp_path: Path, general: Callable[..., dict[str, Any]]) -> None:
    assert general(write_checkpoint(tmp_path / "my-model")) == {
        "architecture": "orthrus",
        "type": "model",
        "name": "My Model",
        "size_label": "170K",
        "file_type": 32,
        "quantization_version": 2,
    }


@pytest.mark.parametrize(("flag", "number"), [("f32", 0), ("f16", 1), ("q8_0", 7), ("bf16", 32)])
def test_file_type(
    flag: str, number: int, tiny: Path, general: Callable[..., dict[str, Any]]
) -> None:
    assert general(tiny, "--type", flag)["file_type"] == number


def test_card_and_sampling(tmp_path: Path, general: Callable[..., dict[str, Any]]) -> None:
    folder = write_checkpoint(tmp_path / "Orthrus-Tiny-v2")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    write_json(
        folder / "generation_config.json",
        {"top_k": 20, "top_p": 0.95, "temperature": 1, "do_sample": True},
    )
    found = general(folder)
    assert found["sampling.top_p"] == pytest.approx(0.95)
    expected = {
        "name": "Orthrus Tiny v2",
        "basename": "Orthrus-Tiny",
        "version": "1.5",
        "license": "apache-2.0",
        "license.link": "https://example.org/LICENSE",
        "tags": ["diffusion", "orthrus", "text-generation"],
        "languages": ["en"],
        "base_model.count": 1,
        "base_model.0.name": "Qwen3 8B",
        "base_model.0.organization": "Qwen",
        "base_model.0.repo_url": "https://huggingface.co/Qwen/Qwen3-8B",
        "sampling.top_k": 20,
        "sampling.temp": 1.0,
    }
    assert {key: found.get(key) for key in expected} == expected


def test_name_of_the_current_folder(
    tmp_path: Path, general: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(write_checkpoint(tmp_path / "here-i-am"))
    assert general(Path())["name"] == "Here I Am"


@pytest.mark.parametrize(
    ("front", "key", "expected"),
    [
        ("tags:\n- 2025\n- 1.5\n- text", "tags", ["2025", "1.5", "text"]),
        ("tags:\n- 2025-01-01\n- on", "tags", ["2025-01-01", "true"]),
        ("tags:\n- \n- text", "tags", ["text"]),
        ("tags:\n- \n- ~", "tags", None),
        ("tags:\nlicense:\nlanguage:", "tags", None),
        ("tags: 2025", "tags", None),
        ("language:\n- en\n- 42\n- no", "languages", ["en", "42", "no"]),
        ("license: 2.0", "license", "2.0"),
        ("license: [mit, ~, 3]", "license", "mit,3"),
        ("model_creator: 2024-05-06", "author", "2024-05-06"),
        ("base_model:\n- ~\n- 7", "base_model.count", None),
    ],
)
def test_values_that_yaml_takes_for_something_else(
    front: str, key: str, expected: object, tiny: Path, general: Callable[..., dict[str, Any]]
) -> None:
    """They are about search on the Hub: no reason not to convert."""
    (tiny / "README.md").write_text(f"---\n{front}\n---\n", encoding="utf-8")
    assert general(tiny).get(key) == expected


def test_several_licenses(tiny: Path, general: Callable[..., dict[str, Any]]) -> None:
    (tiny / "README.md").write_text("---\nlicense: [mit, 2.0]\n---\n", encoding="utf-8")
    assert general(tiny)["license"] == "mit,2.0"
