"""MTP drafts: every cycle against the block in numpy (`mtp_models.py`), and the text, which they do
not change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from mtp_cycles import CAPACITY, PROMPTS, TOKENS, check_every_cycle, cycles_of
from mtp_models import LAYERS, loaded_mtp, mtp_block, mtp_model, stock_model
from numpy.typing import NDArray
from same_text import (
    ENDLESS,
    PAUSING,
    check_pairs,
    check_side_by_side,
    finished,
    of_network,
)
from same_text import request as asked_of

from orthrus_gguf.engine import Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.load import RuntimeName

PLANS = ("two-pass", "two-pass@8+lookup", "two-pass@4+tree=6", "ar+mtp+lookup", "auto", PAUSING)


@pytest.fixture(scope="module", params=[RuntimeName.REFERENCE, RuntimeName.CPU])
def model(request: pytest.FixtureRequest) -> Iterator[ModelWithDrafter]:
    """In float32 all through."""
    with loaded_mtp(mtp_model(), request.param, cache_type_k="f32", cache_type_v="f32") as found:
        yield found


def request(model: ModelWithDrafter, plan: str, prompt: Sequence[int], seed: int = 0) -> Request:
    return asked_of(model, plan, prompt, seed, TOKENS)


# --- drafts ---


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_cycle(model: ModelWithDrafter, depth: int) -> None:
    check_every_cycle(model, depth)


@pytest.mark.parametrize("batch", [1, 3])
def test_prompts_in_pieces(model: ModelWithDrafter, batch: int) -> None:
    whole, pieces = (
        cycles_of(model, PROMPTS[3], "two-pass", batch=rows)[1] for rows in (512, batch)
    )
    assert [c.draft.tokens for c in pieces] == [c.draft.tokens for c in whole]


def test_a_block_in_a_file_of_its_own(model: ModelWithDrafter) -> None:
    expected = cycles_of(model, PROMPTS[3], "two-pass@2")[1]
    for target in (stock_model(), mtp_model()):
        with loaded_mtp(target, RuntimeName.REFERENCE, mtp_block()) as other:
            found = cycles_of(other, PROMPTS[3], "two-pass@2")[1]
        assert [(c.draft.tokens, c.accepted) for c in found] == [
            (c.draft.tokens, c.accepted) for c in expected
        ]


# --- the text ---


def test_the_text_is_that_of_plain_decoding(model: ModelWithDrafter) -> None:
    """`tests/test_mtp_text.py` has more of it."""
    accepted = check_pairs(model, PLANS, PROMPTS[3:], (0, 6), TOKENS)
    assert min(accepted.values()) > 4, accepted


@pytest.mark.parametrize(("weights", "cache"), [("q8_0", "q8_0"), ("q4_k_m", "f16")])
def test_quantized(weights: str, cache: str) -> None:
    """On the native kernels, whatever the types are: the text of plain decoding, and drafts that
    are nearly as often right as in float32."""
    types: dict[str, Any] = {"cache_type_k": cache, "cache_type_v": cache}
    accepted = cycles = 0
    with loaded_mtp(mtp_model(weights), RuntimeName.CPU, **types) as model:
        for prompt in PROMPTS:
            plain, _ = cycles_of(model, prompt, "ar", 40)
            text, found = cycles_of(model, prompt, "two-pass@1", 40)
            assert text[: len(plain)] == plain
            accepted += sum(cycle.accepted for cycle in found)
            cycles += len(found)
    assert accepted > 0.45 * cycles


@pytest.mark.parametrize(
    ("runtime", "ids"),
    [*((RuntimeName.CPU, ids) for ids in (1, 100, 256)), (RuntimeName.REFERENCE, 100)],
)
def test_drafts_of_the_first_ids(runtime: RuntimeName, ids: int) -> None:
    """Others are never drafted; with those that the prompts and the text have, all is as it was."""
    caches: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32"}
    with loaded_mtp(mtp_model(), runtime, **caches) as model:
        whole, found = cycles_of(model, PROMPTS[3], "two-pass@2")
    with loaded_mtp(mtp_model(), runtime, ids=ids, **caches) as cut:
        text, cycles = cycles_of(cut, PROMPTS[3], "two-pass@2")
        sampled = finished(
            Session(cut, ENDLESS, CAPACITY).generate(request(cut, "two-pass@3", PROMPTS[3], 5))
        )
    common = min(len(text), len(whole))
    assert text[:common] == whole[:common]
    drafted = [token for cycle in cycles for token in cycle.draft.tokens]
    assert drafted
    assert max(drafted) < ids
    assert max([0, *(token for c in sampled.cycles for token in c.draft.tokens)]) < ids
    if ids == 256:
        assert all(max(c.draft.tokens) < ids for c in found)
        assert [c.draft.tokens for c in cycles] == [c.draft.tokens for c in found]


def test_a_damaged_block_costs_no_text(model: ModelWithDrafter) -> None:
    rng = np.random.default_rng(0)

    def change(tensor: gguf.ReaderTensor) -> NDArray[Any] | None:
        if not tensor.name.startswith(f"blk.{LAYERS}.") or tensor.data.ndim < 2:
            return None
        return rng.integers(0, 2**32, tensor.data.shape, np.uint32).view(np.float32)

    plain = cycles_of(model, PROMPTS[3], "ar")[0]
    with loaded_mtp(stock_model(), RuntimeName.REFERENCE, mtp_block(change)) as other:
        text, _ = cycles_of(other, PROMPTS[3], "two-pass")
    assert text[: len(plain)] == plain


def test_side_by_side(model: ModelWithDrafter) -> None:
    """Chains of other lengths in one pass."""
    plans = ("two-pass@1", "two-pass@5", "ar", "ar+mtp")
    results = check_side_by_side(model, plans, PROMPTS, TOKENS)
    assert of_network(model, results[1]) > 0


# --- the cache ---


def test_a_conversation_keeps_what_the_block_knows(model: ModelWithDrafter) -> None:
    """Only new rows are processed, and the drafts are those of a session that starts afresh; after
    a turn without the block, the rows that it missed run again."""
    session, prompt, told = Session(model, ENDLESS, 256), list(PROMPTS[2]), 0
    prompts: list[int] = []
    for plan in ("two-pass", "two-pass", "ar", "two-pass"):
        result = finished(session.generate(request(model, plan, prompt)))
        again = finished(Session(model, ENDLESS, 256).generate(request(model, plan, prompt)))
        assert result.output == again.output
        assert [c.draft.tokens for c in result.cycles] == [c.draft.tokens for c in again.cycles]
        if plan == "two-pass":
            assert result.statistics.cached_tokens == told
            told = len(prompt) + TOKENS - 1
        else:
            told = prompts[-1]  # the model's own state is kept there, and not where the block was
        prompts.append(len(prompt))
        prompt += [*result.output, *PROMPTS[1]]


def test_it_goes_back_where_the_model_does(
    model: ModelWithDrafter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edited end: both caches go on from the last place that both can come back to."""
    monkeypatch.setattr("orthrus_gguf.runtime.checkpoints.CHECKPOINT_ROWS", 6)
    session = Session(model, ENDLESS, 128)
    first = finished(session.generate(request(model, "two-pass", PROMPTS[2])))
    for edited, places in (
        ([*PROMPTS[2], *first.output[:-3], 9, 8], range(3 + 6, 3 + TOKENS - 2)),
        ([*PROMPTS[2][:2], 9, 8], [0]),
    ):
        result = finished(session.generate(request(model, "two-pass", edited)))
        again = finished(Session(model, ENDLESS, 128).generate(request(model, "two-pass", edited)))
        assert result.output == again.output
        assert [c.draft.tokens for c in result.cycles] == [c.draft.tokens for c in again.cycles]
        assert result.statistics.cached_tokens in places


def test_rows_move_with_what_the_block_knows(model: ModelWithDrafter) -> None:
    first, second = (Session(model, ENDLESS, 128) for _ in range(2))
    finished(first.generate(request(model, "two-pass", PROMPTS[3])))
    turn = (*first.held, 7, 9)
    rows = first.take(first.held)
    assert rows.drafted == len(first.held)
    second.put(rows)
    found, expected = (
        finished(session.generate(request(model, "two-pass", turn))) for session in (second, first)
    )
    assert found.output == expected.output
    assert [c.draft.tokens for c in found.cycles] == [c.draft.tokens for c in expected.cycles]
    assert found.statistics.cached_tokens == len(rows.tokens)
    with pytest.raises(ValueError, match="rows"):
        second.put(rows._replace(drafter=rows.drafter[:-1]))


# --- what is refused ---


def refusal(block: Path, target: Path) -> str:
    with ModelFile.open(target) as file, pytest.raises(OrthrusError) as caught:
        MtpFile.open(block, file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_blocks_of_other_models(tmp_path: Path) -> None:
    def other_embedding(tensor: gguf.ReaderTensor) -> NDArray[Any] | None:
        return tensor.data[::-1].copy() if tensor.name == "token_embd.weight" else None

    def other_width(tensor: gguf.ReaderTensor) -> NDArray[Any] | None:
        return tensor.data[:, :-1].copy() if "eh_proj" in tensor.name else None

    assert "their embeddings are not alike" in refusal(mtp_block(other_embedding), stock_model())
    assert "eh_proj.weight: expected shape (64, 128)" in refusal(
        mtp_block(other_width), stock_model()
    )
    with pytest.raises(OrthrusError, match=r"holds only an MTP block .*with --drafter"):
        ModelFile.open(mtp_block())
