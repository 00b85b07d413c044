"""Types per tensor: tables written from llama-quantize's rules, for models as they are released.

The tables spell out layers, so that they share no arithmetic with the implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from damage import check_refusal
from hf_checkpoint import CONFIG, write_checkpoint
from orthrus_converters.file_types import FILE_TYPES
from orthrus_converters.source_tensor import SourceTensor
from orthrus_converters.type_plan import TypeChoice, parse_override, plan_types
from synthetic_model import model_shape

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import LLAMA, QWEN2, QWEN3, Architecture
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.tensors import base_tensors, diffusion_tensors

KINDS = gguf.GGMLQuantizationType
PARTS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TWINS = ("attn_q_diff", "attn_k_diff", "attn_v_diff", "attn_output_diff")


def shape(n_layers: int, n_head: int, n_head_kv: int, *, tied: bool) -> ModelConfig:
    return model_shape(
        n_layers=n_layers, n_embd=256, n_ff=512, n_head=n_head, n_head_kv=n_head_kv, tied=tied
    )


MODELS = {
    "1.7B": shape(28, 16, 8, tied=True),
    "4B": shape(36, 32, 8, tied=True),
    "8B": shape(36, 32, 8, tied=False),
    "28 untied": shape(28, 16, 8, tied=False),
}
ALL = {28: range(28), 36: range(36)}
#: The layers to which Q4_K_M and Q5_K_M give more bits, by the number of layers.
MORE_BITS = {
    28: (0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27),
    36: (0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 31, 32, 33, 34, 35),
}
FIRST_EIGHTH = {28: (0, 1, 2), 36: (0, 1, 2, 3)}
FIRST_TWO = {28: (0, 1), 36: (0, 1)}
FIRST_FOUR = {28: (0, 1, 2, 3), 36: (0, 1, 2, 3)}
FIRST_SIXTEENTH = {28: (0,), 36: (0, 1)}
INNER = {28: range(3, 24), 36: range(4, 31)}

#: (type, layers), the first that holds the layer counts; other parts and layers have the default.
Rules = dict[str, list[tuple[str, dict[int, Any]]]]
#: Mix → (default, output and tied embedding, untied embedding, rules).
Table = dict[str, tuple[str, str, str, Rules]]

#: Where two query heads share a KV head, without an imatrix.
NARROW: Table = {
    "q8_0": ("Q8_0", "Q8_0", "Q8_0", {}),
    "q6_k": ("Q6_K", "Q6_K", "Q6_K", {}),
    "q5_k_m": (
        "Q5_K",
        "Q6_K",
        "Q5_K",
        {"attn_v": [("Q6_K", MORE_BITS)], "ffn_down": [("Q6_K", MORE_BITS)]},
    ),
    "q5_k_s": ("Q5_K", "Q6_K", "Q5_K", {}),
    "q4_k_m": (
        "Q4_K",
        "Q6_K",
        "Q4_K",
        {"attn_v": [("Q6_K", MORE_BITS)], "ffn_down": [("Q6_K", MORE_BITS)]},
    ),
    "q4_k_s": (
        "Q4_K",
        "Q6_K",
        "Q4_K",
        {"attn_v": [("Q5_K", FIRST_FOUR)], "ffn_down": [("Q5_K", FIRST_EIGHTH)]},
    ),
    "q5_0": ("Q5_0", "Q6_K", "Q5_0", {}),
    "q5_1": ("Q5_1", "Q6_K", "Q5_1", {}),
    "q4_0": ("Q4_0", "Q6_K", "Q4_0", {}),
    "q4_1": ("Q4_1", "Q6_K", "Q4_1", {}),
    "q3_k_s": ("Q3_K", "Q6_K", "Q3_K", {}),
    "q3_k_m": (
        "Q3_K",
        "Q6_K",
        "Q3_K",
        {
            "attn_v": [("Q5_K", FIRST_TWO), ("Q4_K", ALL)],
            "attn_output": [("Q4_K", ALL)],
            "ffn_down": [("Q5_K", FIRST_SIXTEENTH), ("Q4_K", ALL)],
        },
    ),
    "q3_k_l": (
        "Q3_K",
        "Q6_K",
        "Q3_K",
        {part: [("Q5_K", ALL)] for part in ("attn_v", "attn_output", "ffn_down")},
    ),
    "q2_k": (
        "Q2_K",
        "Q6_K",
        "Q2_K",
        {part: [("Q3_K", ALL)] for part in ("attn_v", "attn_output", "ffn_down")},
    ),
    "q2_k_s": ("Q2_K", "Q6_K", "Q2_K", {"ffn_down": [("Q4_K", FIRST_EIGHTH)]}),
    "iq4_nl": ("IQ4_NL", "Q6_K", "IQ4_NL", {"ffn_down": [("Q5_K", FIRST_EIGHTH)]}),
    "iq4_xs": ("IQ4_XS", "Q6_K", "IQ4_XS", {"ffn_down": [("Q5_K", FIRST_EIGHTH)]}),
    "iq3_s": ("IQ3_S", "Q6_K", "IQ3_S", {}),
    "iq3_m": (
        "IQ3_S",
        "Q6_K",
        "IQ3_S",
        {
            "attn_v": [("Q4_K", ALL)],
            "attn_output": [("Q4_K", ALL)],
            "ffn_down": [("Q4_K", FIRST_EIGHTH)],
        },
    ),
    "iq3_xs": (
        "IQ3_S",
        "Q6_K",
        "IQ3_S",
        {
            "attn_q": [("IQ3_XXS", ALL)],
            "attn_k": [("IQ3_XXS", ALL)],
            "ffn_gate": [("IQ3_XXS", INNER)],
            "ffn_up": [("IQ3_XXS", INNER)],
        },
    ),
    "iq3_xxs": (
        "IQ3_XXS",
        "Q5_K",
        "IQ3_S",
        {
            "attn_q": [("IQ2_S", ALL)],
            "attn_k": [("IQ2_S", ALL)],
            "attn_v": [("IQ3_S", ALL)],
            "attn_output": [("IQ3_S", ALL)],
            "ffn_down": [("Q4_K", FIRST_EIGHTH), ("Q3_K", ALL)],
        },
    ),
    "iq2_xxs": (
        "IQ2_XXS",
        "Q5_K",
        "Q2_K",
        {"attn_v": [("Q2_K", ALL)], "ffn_down": [("Q2_K", FIRST_EIGHTH)]},
    ),
    "iq2_xs": (
        "IQ2_XS",
        "Q5_K",
        "Q2_K",
        {"attn_v": [("Q2_K", ALL)], "ffn_down": [("Q2_K", FIRST_EIGHTH)]},
    ),
    "iq2_s": (
        "IQ2_XS",
        "Q5_K",
        "IQ3_S",
        {
            "attn_v": [("IQ3_S", ALL)],
            "attn_output": [("IQ3_S", ALL)],
            "ffn_down": [("IQ3_S", FIRST_EIGHTH)],
        },
    ),
    "iq2_m": (
        "IQ2_S",
        "Q5_K",
        "IQ3_S",
        {
            "attn_v": [("IQ3_S", ALL)],
            "attn_output": [("IQ3_S", ALL)],
            "ffn_down": [("IQ3_S", FIRST_EIGHTH)],
        },
    ),
    "iq1_s": (
        "IQ1_S",
        "Q5_K",
        "Q2_K",
        {
            "attn_v": [("Q2_K", ALL)],
            "attn_output": [("IQ2_XXS", ALL)],
            "ffn_down": [("Q2_K", FIRST_EIGHTH)],
        },
    ),
    "iq1_m": (
        "IQ1_M",
        "Q5_K",
        "Q2_K",
        {
            "attn_v": [("Q2_K", ALL)],
            "attn_output": [("IQ2_XXS", ALL)],
            "ffn_down": [("Q2_K", FIRST_EIGHTH)],
        },
    ),
}
#: Where four share one, these mixes give attn_v another type in all layers.
SHARED_V = {
    **dict.fromkeys(
        ("q2_k", "q2_k_s", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq2_xxs", "iq2_xs"), "Q4_K"
    ),
    **dict.fromkeys(("iq2_s", "iq2_m", "iq1_s", "iq1_m"), "Q4_K"),
    **dict.fromkeys(("iq4_nl", "iq4_xs", "q3_k_l"), "Q5_K"),
}
#: With an imatrix, ffn_down differs: mix → rules.
WITH_IMATRIX: dict[str, list[tuple[str, dict[int, Any]]]] = {
    "q4_0": [("Q4_1", FIRST_EIGHTH)],
    "q5_0": [("Q5_1", FIRST_EIGHTH)],
    "iq4_nl": [],
    "iq4_xs": [],
    "iq3_xxs": [],
}


def expected_types(mix: str, model: str, *, has_imatrix: bool) -> dict[str, str]:
    config = MODELS[model]
    n_layers = config.n_layers
    default, output, embedding, rules = NARROW[mix]
    rules = dict(rules)
    if config.n_head == 4 * config.n_head_kv and mix in SHARED_V:
        rules["attn_v"] = [(SHARED_V[mix], ALL)]
    elif mix == "iq3_xxs" and has_imatrix:
        rules["attn_v"] = []
    if has_imatrix and mix in WITH_IMATRIX:
        rules["ffn_down"] = WITH_IMATRIX[mix]
    types = {"token_embd.weight": output if config.tied else embedding}
    if not config.tied:
        types["output.weight"] = output
    for layer in range(n_layers):
        for part in PARTS:
            found = [kind for kind, layers in rules.get(part, []) if layer in layers[n_layers]]
            types[f"blk.{layer}.{part}.weight"] = (found or [default])[0]
        types |= {f"blk.{layer}.{part}.weight": default for part in TWINS}
    return types


def planned(model: str, choice: TypeChoice, *, has_imatrix: bool = False) -> dict[str, str]:
    """The plan for the matrices, after a check that everything else is F32."""
    config = MODELS[model]
    tensors = {
        name: SourceTensor(name, "BF16", shape, Path("x"), 0, 0)
        for name, shape in (base_tensors(config) | diffusion_tensors(config)).items()
    }
    types = plan_types(tensors, config, choice, has_imatrix=has_imatrix).types
    norms = [name for name in types if "_norm" in name]
    assert len(norms) == 6 * config.n_layers + 1
    assert choice.file_type is None or {types[name] for name in norms} == {KINDS.F32}
    return {name: kind.name for name, kind in types.items() if name not in norms}


@pytest.mark.parametrize("has_imatrix", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mix", NARROW)
def test_mixes(mix: str, model: str, has_imatrix: bool) -> None:
    found = planned(model, TypeChoice(FILE_TYPES[mix]), has_imatrix=has_imatrix)
    assert found == expected_types(mix, model, has_imatrix=has_imatrix)


def test_the_table_is_complete() -> None:
    assert {*NARROW, "f32", "f16", "bf16"} == set(FILE_TYPES)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_unquantized(name: str) -> None:
    assert set(planned("8B", TypeChoice(FILE_TYPES[name])).values()) == {name.upper()}


def changed(mix: str, model: str, choice: TypeChoice) -> dict[str, str]:
    """What the flags in `choice` change, as compared with the mix."""
    plain = expected_types(mix, model, has_imatrix=False)
    found = planned(model, choice)
    return {name: kind for name, kind in found.items() if kind != plain[name]}


def test_output_and_embedding_flags() -> None:
    q4_k_m = FILE_TYPES["q4_k_m"]
    output = TypeChoice(q4_k_m, output=KINDS.Q8_0)
    assert changed("q4_k_m", "8B", output) == {"output.weight": "Q8_0"}
    assert changed("q4_k_m", "4B", output) == {"token_embd.weight": "Q8_0"}  # it is the output
    both = TypeChoice(q4_k_m, output=KINDS.Q8_0, embedding=KINDS.Q2_K)
    with pytest.raises(OrthrusError, match="--output-tensor-type q8_0: without an output matrix"):
        changed("q4_k_m", "4B", both)  # as the embedding, it has the other type
    assert changed("q4_k_m", "8B", both) == {"output.weight": "Q8_0", "token_embd.weight": "Q2_K"}


@pytest.mark.parametrize("choice", [TypeChoice(), TypeChoice(FILE_TYPES["f16"])])
def test_the_output_flag_counts_without_a_mix(choice: TypeChoice) -> None:
    found = planned("4B", replace(choice, output=KINDS.Q8_0))
    assert found["token_embd.weight"] == "Q8_0"
    assert found["blk.0.attn_q.weight"] == ("BF16" if choice.file_type is None else "F16")


def test_heads_flag_changes_the_twins_only() -> None:
    found = changed("q4_k_m", "1.7B", TypeChoice(FILE_TYPES["q4_k_m"], heads=KINDS.Q2_K))
    assert found == {f"blk.{i}.{part}.weight": "Q2_K" for i in range(28) for part in TWINS}


def test_pure() -> None:
    found = planned("8B", TypeChoice(FILE_TYPES["q4_k_m"], pure=True))
    assert set(found.values()) == {"Q4_K"}


def test_overrides() -> None:
    """The first that matches counts; layers that they take do not count for the mix."""
    overrides = tuple(map(parse_override, (r"blk\.0\.attn_v=q8_0", r"blk\.[01]\.attn_v\.=Q5_0")))
    found = planned("1.7B", TypeChoice(FILE_TYPES["q4_k_s"], overrides))
    values = [found[f"blk.{layer}.attn_v.weight"] for layer in range(8)]
    assert values == ["Q8_0", "Q5_0", "Q5_K", "Q5_K", "Q5_K", "Q5_K", "Q4_K", "Q4_K"]
    assert found["blk.0.attn_v_diff.weight"] == "Q8_0"
    assert found["blk.1.attn_v_diff.weight"] == "Q4_K"


def test_order_of_precedence() -> None:
    choice = TypeChoice(
        FILE_TYPES["f16"],
        (parse_override("attn_q_diff|token_embd=q8_0"),),
        embedding=KINDS.Q6_K,
        heads=KINDS.Q4_0,
    )
    found = planned("8B", choice)
    assert found["token_embd.weight"] == "Q6_K"
    assert found["blk.7.attn_q_diff.weight"] == "Q8_0"
    assert found["blk.7.attn_k_diff.weight"] == "Q4_0"
    assert found["blk.7.attn_q.weight"] == "F16"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("attn_v", "expected REGEX=TYPE"),
        ("=q8_0", "expected REGEX=TYPE"),
        ("attn_v=q4_k_m", "unknown type 'q4_k_m'; choose from f32, f16"),
        ("attn_(=q8_0", "is no regular expression"),
        ("_norm=q8_0", "no matrix has such a name"),
        ("attn_w=q8_0", "no matrix has such a name"),
    ],
)
def test_bad_overrides(text: str, expected: str, tiny: Path, convert: Callable[..., Any]) -> None:
    check_refusal(convert(tiny, "--tensor-type", text), f"--tensor-type {text}", expected)


@pytest.mark.parametrize(
    ("columns", "kind", "expected"),
    [
        (96, "q4_k_m", {"attn_q": "Q5_0", "ffn_down": "Q8_0", "output": "Q8_0"}),
        (96, "q5_k_s", {"attn_q": "Q5_1", "ffn_down": "Q5_1", "output": "Q8_0"}),
        (96, "q6_k", {"attn_q": "Q8_0", "ffn_down": "Q8_0", "output": "Q8_0"}),
        (96, "q3_k_s", {"attn_q": "Q4_0", "ffn_down": "Q4_0", "output": "Q8_0"}),
        (96, "iq4_xs", {"attn_q": "IQ4_NL", "ffn_down": "IQ4_NL", "output": "Q8_0"}),
        (96, "q4_0", {"attn_q": "Q4_0", "ffn_down": "Q4_0", "output": "Q8_0"}),
        (100, "q4_k_m", {"attn_q": "F16", "ffn_down": "F16", "output": "F16"}),
        (100, "q4_0", {"attn_q": "F16", "ffn_down": "F16", "output": "F16"}),
    ],
)
def test_rows_that_do_not_divide(
    columns: int,
    kind: str,
    expected: dict[str, str],
    tmp_path: Path,
    convert: Callable[..., Any],
    out: Path,
) -> None:
    config = {**CONFIG, "hidden_size": columns, "intermediate_size": columns}
    run = convert(write_checkpoint(tmp_path / "m", config), "--type", kind)
    assert run.code == 0
    assert f"rows of {columns} are no multiple of the qblock of" in run.stderr
    found = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
    assert found["blk.1.attn_q.weight"] == expected["attn_q"]
    assert found["blk.1.ffn_down.weight"] == expected["ffn_down"]
    assert found["output.weight"] == expected["output"]


def test_overrides_raise_orthrus_errors() -> None:
    with pytest.raises(OrthrusError, match="expected REGEX=TYPE"):
        parse_override("nothing")


#: Q3_K_M of 80 layers: attn_v as ever, and where llama.cpp takes the model for one of 70B.
OF_80 = {False: ["Q5_K"] * 2 + ["Q4_K"] * 78, True: ["Q5_K"] * 80}


@pytest.mark.parametrize(
    ("architecture", "n_head_kv", "small_v"),
    [(LLAMA, 2, True), (LLAMA, 4, False), (QWEN2, 2, True), (QWEN2, 4, True), (QWEN3, 2, False)],
)
def test_attn_v_of_the_largest_models(
    architecture: Architecture, n_head_kv: int, small_v: bool
) -> None:
    config = replace(shape(80, 4, n_head_kv, tied=False), architecture=architecture)

    def attn_v(config: ModelConfig, mix: str) -> list[str]:
        tensors = {
            name: SourceTensor(name, "BF16", shape, Path("x"), 0, 0)
            for name, shape in base_tensors(config).items()
        }
        choice = TypeChoice(FILE_TYPES[mix])
        types = plan_types(tensors, config, choice, has_imatrix=False).types
        return [types[f"blk.{i}.attn_v.weight"].name for i in range(config.n_layers)]

    assert attn_v(config, "q3_k_m") == OF_80[small_v]
    assert attn_v(config, "q6_k") == ["Q6_K"] * 80
    assert set(attn_v(config, "iq2_s")) == {"IQ3_S"}
    assert attn_v(replace(config, n_layers=79), "q3_k_m") == OF_80[False][:79]
