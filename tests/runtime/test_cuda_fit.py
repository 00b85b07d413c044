"""What context fits on a card: the table, and the default that is shortened instead of refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

import torch
from drafters import drafter_file, stand_in_pair
from synthetic_model import planned_tensors

from orthrus_gguf.cli.inspect import main as inspect_main
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.shapes import SHAPES
from orthrus_gguf.runtime.cuda import fit
from orthrus_gguf.runtime.cuda.device import Machine
from orthrus_gguf.runtime.cuda.fit import CARDS, TAKEN_BYTES, context_table, fitting_context
from orthrus_gguf.runtime.cuda.kernels import STAND_INS
from orthrus_gguf.runtime.cuda.memory_plan import GIB, plan_memory
from orthrus_gguf.runtime.cuda.weight_plan import plan_weights

DemoFile = Callable[..., Path]


class Card(Machine):
    """A machine with so many bytes free."""

    def free_bytes(self) -> int:
        return int(self.name)


def card(free: int) -> Card:
    return Card(torch.device("cpu"), str(free), 86, STAND_INS, {}, None, False)


def test_128k_on_24_gb() -> None:
    """Qwen3-8B Q4_K_M with heads: not with an f16 cache, but with q8_0; nothing on 8 GB."""
    config = SHAPES["qwen3-8b"]
    table = context_table(config, planned_tensors(config, "q4_k_m"), 131_072)
    fits = {found.cache_types: found for found in table}
    assert fits["f16", "f16"].row == 147_456
    assert fits["f16", "f16"].contexts[-1] < 131_072 < fits["q8_0", "q8_0"].contexts[-1]
    assert fits["f16", "f16"].needs > 24 * GIB > fits["q8_0", "q8_0"].needs
    for found in table:
        assert found.contexts[0] == 0
        assert list(found.contexts) == sorted(found.contexts)
    plan = plan_weights(config, planned_tensors(config, "q4_k_m"), 89)
    largest = fits["q4_0", "q4_0"].contexts[CARDS.index(12)]
    for context, inside in ((largest, True), (largest + 1, False)):
        memory = plan_memory(config, planned_tensors(config, "q4_k_m"), plan, context, "q4_0",
                             "q4_0", 512)  # fmt: skip
        assert (memory.total <= 12 * GIB - TAKEN_BYTES) is inside


def test_the_default_is_shortened_and_said(
    demo_file: DemoFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with ModelFile.open(demo_file("q8_0")) as file:
        config = file.config
        plan = plan_weights(config, file.tensors, 86)
        needs = plan_memory(config, file.tensors, plan, 10_000, "f16", "f16", 512).total

        def fitted(wanted: int, free: int = needs) -> int:
            return fitting_context(file, None, ("f16", "f16"), wanted, said.append, card(free))

        assert fitted(10_000) == 10_000
        assert said == []
        assert fitted(12_000) == 9984
        assert "context of 9984 tokens instead of 12000" in said[0]
        assert "-ctk q8_0 -ctv q8_0 holds 12000; -c N sets it" in said[0]
        assert fitted(10**7) == 9984
        assert not re.search("-ctk", said[1]), "no type of cache holds that"
        assert fitted(10_000, 1 << 20) == 10_000, "loading says what takes the memory"
        monkeypatch.setattr(fit, "find_machine", lambda device: Machine(
            torch.device("cpu"), "CPU", 80, STAND_INS, {}, None, False))  # fmt: skip
        assert fitting_context(file, "cpu", ("f16", "f16"), 10**7, said.append) == 10**7


def test_the_table_of_a_file(demo_file: DemoFile, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(demo_file("q8_0"))
    assert inspect_main([path, "--gpu", "-c", "5000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-9:] == ["8", "GB", "12", "GB", "16", "GB", "24", "GB", "needs"]
    assert [line.split()[0] for line in lines[2:6]] == [
        "f16/f16", "q8_0/q8_0", "q8_0/q4_0", "q4_0/q4_0",
    ]  # fmt: skip
    assert "for 5,000 tokens" in lines[6]
    assert inspect_main([path, "--gpu", "--json"]) == 0
    assert '"cards_gib": [8, 12, 16, 24]' in capsys.readouterr().out


def test_the_table_counts_a_drafter(
    demo_file: DemoFile, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, buffers and cache: what the pair takes that is loaded."""
    target, drafter = demo_file("q8_0"), drafter_file("q8_0")
    argv = [str(target), "--gpu", "-c", "5000", "--json"]
    found = []
    for more in ((), ("--drafter", str(drafter))):
        assert inspect_main([*argv, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    alone, both = (table["caches"][0] for table in found)
    assert "drafter" not in found[0]
    assert found[1]["drafter"]
    with stand_in_pair(target, drafter, capability=89) as model:
        memory = model.model.memory  # type: ignore[attr-defined]
    assert both["row"] == memory.cache_row > alone["row"]
    assert both["needs"] - both["row"] * 5000 == memory.fixed + TAKEN_BYTES
    assert both["needs"] - alone["needs"] > memory.drafter > 1.4e6
    assert all(b < a for a, b in zip(alone["contexts"], both["contexts"], strict=True))
    assert inspect_main([*argv[:-1], "--drafter", str(drafter)]) == 0
    assert f"with drafter {found[1]['drafter']} beside, in tokens" in capsys.readouterr().out


def test_heads_without_kernels_are_one_line() -> None:
    config = replace(SHAPES["qwen3-0.6b"], head_dim=112)
    with pytest.raises(OrthrusError, match="heads of 112 elements have no CUDA kernel"):
        context_table(config, {}, 1000)
