"""The model of a pass against the figures that were worked out by hand: kernels/LOG.md's tables and
the roofline that the kernels were designed by."""

from __future__ import annotations

import json
from importlib.resources import files

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthrus_gguf.bench.prediction import passes, shapes
from orthrus_gguf.bench.prediction.cards import CARDS, IDEAL
from orthrus_gguf.bench.prediction.passes import (
    Activations,
    PredictedCurve,
    chain_token,
    fused_step,
    mtp_step,
    two_pass_step,
)
from orthrus_gguf.model.shapes import HYBRID_SHAPES, SHAPES

Type = gguf.GGMLQuantizationType
CONFIG = SHAPES["qwen3-8b"]
N_WEIGHTS = 7_568_000_000  # of 8B's matrices, without the embedding


def curve(
    card: str, activations: Activations = Activations.AUTO, file_type: str = "q4_k_m"
) -> PredictedCurve:
    return PredictedCurve(CARDS[card], CONFIG, file_type, activations, IDEAL)


@pytest.mark.parametrize(
    ("card", "memory", "fp16_32", "fp16_64", "int8_32", "int8_64"),
    [("rtx-3090", 5.09, 6.82, 13.6, 1.71, 3.41), ("h200", 0.99, 0.49, 0.98, None, None)],
)
def test_roofline(
    card: str,
    memory: float,
    fp16_32: float,
    fp16_64: float,
    int8_32: float | None,
    int8_64: float | None,
) -> None:
    """Roofline of Qwen3-8B Q4_K_M: milliseconds of memory, fp16 MMA and int8 MMA."""
    assert curve(card).parts(1, 0, 512).weights == pytest.approx(memory, rel=0.02)
    for tile, fp16, int8 in ((32, fp16_32, int8_32), (64, fp16_64, int8_64)):
        limits = curve(card).limits(Type.Q4_K, N_WEIGHTS, tile, int8=False)
        assert 1e3 * limits.mma == pytest.approx(fp16, rel=0.02)
        if int8 is not None:
            limits = curve(card).limits(Type.Q4_K, N_WEIGHTS, tile, int8=True)
            assert 1e3 * limits.mma == pytest.approx(int8, rel=0.02)


def test_where_fp16_stops_being_free() -> None:
    """About 24 rows at fp16 on an RTX 3090 (LOG.md)."""
    limits = curve("rtx-3090", Activations.FP16).limits(Type.Q4_K, N_WEIGHTS, 32, int8=False)
    whole = curve("rtx-3090", Activations.FP16).parts(1, 0, 512).weights
    assert whole / (1e3 * limits.mma) * 32 == pytest.approx(24, abs=1)


@pytest.mark.parametrize(
    ("card", "int8", "tile", "milliseconds"),
    [
        ("rtx-3090", False, 32, 1.6),
        ("rtx-3090", True, 32, 3.7),
        ("rtx-3090", True, 64, 5.8),
        ("h200", False, 32, 0.8),
    ],
)
def test_issue_slots(card: str, int8: bool, tile: int, milliseconds: float) -> None:
    """LOG.md, "What the model now predicts"."""
    limits = curve(card).limits(Type.Q4_K, N_WEIGHTS, tile, int8=int8)
    assert 1e3 * limits.issue == pytest.approx(milliseconds, rel=0.04)


@pytest.mark.parametrize(
    ("card", "activations", "low", "high"),
    [
        ("rtx-3090", Activations.FP16, 6.8, 7.5),
        ("rtx-3090", Activations.INT8, 5.0, 6.5),
        ("h200", Activations.FP16, 0.97, 1.4),
    ],
)
def test_passes_of_32_rows(card: str, activations: Activations, low: float, high: float) -> None:
    """LOG.md's expectation of the products; here at the card's full rates."""
    assert low < curve(card, activations).parts(32, 0, 512).weights < high


def testattention_step() -> None:
    """LOG.md: about 2,050 cycles of MMA per 32 keys on an RTX 3090, 2,450 of memory for 16 KiB."""
    card = CARDS["rtx-3090"]
    mma = PredictedCurve(card, CONFIG, "q4_k_m").attention_step()
    assert mma == pytest.approx(2050, rel=0.01)
    assert (16 << 10) / (card.memory / card.sms / card.clock) == pytest.approx(2450, rel=0.01)


def test_attention_at_4k() -> None:
    """LOG.md: 18 us a layer for reading the cache at 4k on an RTX 3090."""
    kv = 4096 * 147_456 / 36 / CARDS["rtx-3090"].memory
    assert kv == pytest.approx(18e-6, rel=0.02)
    per_layer = curve("rtx-3090").parts(1, 0, 4096).attention / 36 * 1e-3
    assert kv < per_layer < 2 * kv


def test_instruction_counts_are_those_of_the_compiled_kernels() -> None:
    """Of each kernel and compute capability: registers, shared memory, instructions per weight."""
    budgets = json.loads(files("orthrus_kernels.tools").joinpath("budgets.json").read_text())["3.7"]
    tables = {
        ("a16", "86"): passes.FP16_SM86,
        ("a16", "90"): passes.FP16_SM90,
        ("a8", "86"): passes.INT8_SM86,
    }
    checked = 0
    for (form, capability), table in tables.items():
        for kind, counts in table.items():
            for rows, expected in zip(passes.TILES, counts, strict=True):
                _, _, count = budgets[f"matmul {kind.name} {form} {rows} rows"][capability]
                assert expected == pytest.approx(count, rel=0.03), (kind, form, rows, capability)
                checked += 1
    assert checked == 3 * (3 + 3 + 2)


def test_plain_decoding_lands_where_others_do() -> None:
    """With the default shares: between stock llama.cpp (111-115 tok/s, 2024-2026, RTX 3090) and
    perfection, at 66-78 % of peak bandwidth like the fastest 4-bit runtimes."""
    expected = PredictedCurve(CARDS["rtx-3090"], CONFIG, "q4_k_m")
    step = expected.milliseconds(1, 0, 512)
    assert 0.66 < 4.67e9 / (step * 1e-3) / CARDS["rtx-3090"].memory < 0.78
    assert 115 < 1e3 / step < 936e9 / 4.67e9


def test_by_hand() -> None:
    """RTX 3090, Q8_0, fp16, one AR row, no context: 8.5 bits per weight and 329 launches."""
    parts = curve("rtx-3090", Activations.FP16, "q8_0").parts(1, 0, 0)
    assert parts.weights == pytest.approx(N_WEIGHTS * 8.5 / 8 / 936e9 * 1e3, rel=1e-3)
    assert parts.attention == 0
    assert parts.launches == pytest.approx(329 * 1.5e-3)
    assert parts.small == pytest.approx(36 * 4 * 1.1e-3)
    assert 0 < parts.tails < 0.05 * parts.weights
    assert parts.total == parts.weights + parts.tails + parts.small + parts.launches


def test_latencies() -> None:
    """What an audit of the kernels expects beside memory, per AR step at 512 (milliseconds): small
    kernels 0.2, nodes 0.45-0.5; attention, two steps of at least a microsecond, 0.1-0.2. On an
    H200, programs that do not fill the card and wait for their wgmmas: 0.15-0.5."""
    for card in ("rtx-3090", "h200"):
        parts = PredictedCurve(CARDS[card], CONFIG, "q4_k_m").parts(1, 0, 512)
        assert parts.small == pytest.approx(0.2, abs=0.05)
        assert 0.45 <= parts.launches <= 0.5
        assert 0.1 <= parts.attention <= 0.2
        assert (0.15 if card == "h200" else 0.05) < parts.tails < 0.5
    at_32k = PredictedCurve(CARDS["h200"], CONFIG, "q4_k_m").parts(1, 0, 32_768)
    assert 60 < 1e3 * at_32k.attention / 36 < 85, "microseconds a layer"


def test_known_cards() -> None:
    """What is derived from SMs and clocks is what NVIDIA states (TFLOPS, TOPS)."""
    stated = {"rtx-3090": (71, 284), "rtx-4090": (165.2, 660.6), "rtx-5090": (209.5, 838)}
    for name, (fp16, int8) in stated.items():
        assert CARDS[name].fp16_mma == pytest.approx(fp16 * 1e12, rel=0.005)
        assert CARDS[name].int8_mma == pytest.approx(int8 * 1e12, rel=0.005)
    for card in CARDS.values():
        assert card.capability >= 80
        assert card.capability not in range(100, 120)


def test_splits_and_chunks_are_those_of_the_kernels() -> None:
    pytest.importorskip("triton")
    from orthrus_kernels.attention import attention
    from orthrus_kernels.products import dispatch

    assert (attention.CHUNK, attention.LANES) == (passes._CHUNK, passes._LANES)
    for config in SHAPES.values():
        for product in shapes.pass_shape(config, "q8_0", ()).products:
            if product.k >= 4096:
                expected = dispatch.split_for(product.columns, product.k)
                assert shapes.split_for(product.columns) == expected


def test_views_have_weights_of_their_own() -> None:
    """A fused pass reads both views' attention and the rest once: 0.6 of two passes on an H200,
    where rows are free. A diffusion pass is a little cheaper, its values being Q4_K throughout."""
    expected = curve("h200")
    draft, verify = (expected.parts(*rows, 0) for rows in ((0, 16), (16, 0)))
    assert 0.98 * verify.weights < draft.weights < verify.weights
    fused = expected.parts(16, 16, 0).weights
    assert fused / (draft.weights + verify.weights) == pytest.approx(0.60, abs=0.01)
    assert two_pass_step(expected, 16, 0) == pytest.approx(draft.total + verify.total)
    assert fused_step(expected, 16, 0) == expected.milliseconds(16, 16, 0)


def test_activations() -> None:
    """AUTO: int8 on GeForce, where 64 rows gain from it; fp16 on an H200, where they would lose."""
    for card, pays in (("rtx-3090", True), ("rtx-4090", True), ("h200", False)):
        auto, fp16, int8 = (curve(card, a).milliseconds(64, 0, 0) for a in Activations)
        assert auto == (int8 if pays else fp16)
        assert (int8 < fp16) is pays


@given(
    st.sampled_from([*CARDS]),
    st.sampled_from(["q4_k_m", "q6_k", "q8_0"]),
    st.integers(1, 200),
    st.integers(0, 200),
    st.integers(0, 100_000),
)
def test_more_never_costs_less(
    card: str, file_type: str, ar: int, diffusion: int, context: int
) -> None:
    expected = curve(card, Activations.AUTO, file_type)
    here = expected.milliseconds(ar, diffusion, context)
    assert here > 0
    assert expected.milliseconds(ar + 64, diffusion, context) >= here
    assert expected.milliseconds(ar, diffusion + 64, context) >= here
    assert expected.milliseconds(ar, diffusion, context + 8192) >= here


def test_27b_lands_where_it_was_seen() -> None:
    """Q4_K_M on an RTX 3090: 35 to 38 tokens a second with llama.cpp; no more than its bandwidth
    gives for the 15.6 GB of its weights and twice its state."""
    expected = PredictedCurve(CARDS["rtx-3090"], HYBRID_SHAPES["qwen3.6-27b"], "q4_k_m")
    assert 35 < 1e3 / expected.milliseconds(1, 0, 512) < 936e9 / 15.9e9


def test_a_state_is_read_and_written_once() -> None:
    """At full rates: 288 MiB for a row of 27B, and hardly more for four; then rows wait for one
    another, each 0.7 us a layer, and 0.4 us where it was accepted before."""
    expected = PredictedCurve(
        CARDS["rtx-3090"], HYBRID_SHAPES["qwen3.6-27b"], "q4_k_m", shares=IDEAL
    )
    one, four, eight, many = (expected.parts(rows, 0, 512).recurrence for rows in (1, 4, 8, 64))
    assert one == pytest.approx(1e3 * 288 * 2**20 / 936e9, rel=0.06)
    assert one < four < 1.1 * one
    assert eight == pytest.approx(48 * 8 * 1.1e-3)
    assert many == pytest.approx(48 * (64 * 0.7 + 16 * 0.4) * 1e-3)
    assert curve("rtx-3090").parts(8, 0, 512).recurrence == 0


def test_a_hybrid_attends_in_a_quarter_of_its_layers() -> None:
    """Its heads of 256 take tiles of their own."""
    pytest.importorskip("triton")
    from orthrus_kernels.attention.attention import attention_tile
    from orthrus_kernels.recurrence import states

    expected = PredictedCurve(CARDS["rtx-3090"], HYBRID_SHAPES["qwen3.5-9b"], "q4_k_m")
    for config, head_dim in ((expected.config, 256), (CONFIG, 128)):
        assert config.head_dim == head_dim
        tile, _ = attention_tile(head_dim)
        found, *_ = PredictedCurve(CARDS["h200"], config, "q4_k_m")._attention_tile
        assert tile == found
    assert passes._COLUMNS == states.COLUMNS
    memory = 8 * 32_768 * 4096 / 936e9 / expected.shares.memory
    assert expected.parts(1, 0, 32_768).attention == pytest.approx(1e3 * memory)


def test_mtp_chains() -> None:
    """A token of 27B's block takes what its bytes say, 8 % of a pass; a step is a pass of four
    rows, three of those, and little else."""
    config = HYBRID_SHAPES["qwen3.6-27b-mtp"]
    expected = PredictedCurve(CARDS["rtx-3090"], config, "q4_k_m")
    token = chain_token(expected, 512)
    assert token / expected.milliseconds(1, 0, 512) == pytest.approx(0.08, abs=0.01)
    rest = mtp_step(expected, 3, 512) - expected.milliseconds(4, 0, 512) - 3 * token
    assert 0 < rest < 0.01 * expected.milliseconds(1, 0, 512)
    assert expected.has_block
    assert not curve("rtx-3090").has_block


@pytest.mark.parametrize("pass_", [(0, 0, 5), (-1, 2, 5), (1, 0, -1)])
def test_impossible_passes(pass_: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="nothing to run"):
        curve("h200").milliseconds(*pass_)
