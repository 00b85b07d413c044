"""Sessions on a scripted toy model: ends of text, stop strings, UTF-8, limits, cache reuse."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_model import (
    CONTROL,
    END,
    OTHER_END,
    VOCAB,
    ToyCache,
    ToyModel,
    ToyTokenizer,
    ar_logits,
    one_hot,
)

from orthrus_gguf.drafting.plan import FixedPolicy, parse
from orthrus_gguf.drafting.tree import Tree
from orthrus_gguf.engine import Generation, Session, common_prefix
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.protocol import Masks
from orthrus_gguf.sampling import SamplingSettings

GREEDY = SamplingSettings(temperature=0)
AR = "ar"
PLANS = [
    AR,
    "ar+lookup",
    *(f"two-pass@{width}" for width in (1, 2, 3, 8)),
    "two-pass@3+tree=9",
    "fused@3x2+tail",
    "fused@8x4+lookup+tail",
]


def policy(plan: str) -> FixedPolicy:
    return FixedPolicy(parse(plan), ToyModel().config)


def ids(text: str) -> list[int]:
    """Token ids of letters and of the characters é, 東, 🙂; `.` is END, `!` the other end."""
    out: list[int] = []
    for char in text:
        if char in ".!#":
            out.append({".": END, "!": OTHER_END, "#": CONTROL}[char])
        elif char in "é東🙂":
            at = ToyTokenizer.raw.index(char.encode())
            out += range(26 + at, 26 + at + len(char.encode()))
        else:
            out.append(ord(char) - 97)
    return out


def scripted(script: Sequence[int]) -> ToyModel:
    """A model that continues any prefix with `script` at the same positions, and drafts it too."""

    def at(position: int) -> int:
        return script[position] if position < len(script) else 25

    return ToyModel(
        lambda prefix, rows: [at(len(prefix) + i) for i in range(rows)],
        logits=lambda prefix: one_hot(at(len(prefix))),
    )


def session(model: ToyModel, n_ctx: int = 64, batch: int = 512) -> Session:
    tokenizer: Any = ToyTokenizer()
    return Session(model, tokenizer, n_ctx, prompt_batch=batch)


def generate(text: str, plan: str, *, prompt: int = 2, **request: Any) -> Generation:
    """Run a generation whose right answer is `text` after its first `prompt` tokens."""
    script = ids(text)
    generation = session(scripted(script)).generate(
        Request(tuple(script[:prompt]), GREEDY, policy(plan), **request)
    )
    assert "".join(generation) == generation.result.text
    return generation


@pytest.mark.parametrize("plan", PLANS, ids=str)
class TestEveryPlan:
    @pytest.mark.parametrize("end", [".", "!"])
    @pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9])
    def test_any_end_token_ends_the_text(self, plan: str, end: str, length: int) -> None:
        text = "ab" + "c" * length + end + "ddddddddd"
        result = generate(text, plan).result
        assert result.text == "c" * length
        assert result.output == tuple(ids("c" * length + end))
        assert result.finish_reason == "stop"

    def test_end_token_at_once(self, plan: str) -> None:
        result = generate("ab.", plan).result
        assert (result.text, result.output) == ("", (END,))
        assert result.statistics.tokens_per_cycle is None

    @pytest.mark.parametrize("limit", range(1, 12))
    def test_token_limit(self, plan: str, limit: int) -> None:
        result = generate("ab" + "cdefghijklmnop", plan, max_tokens=limit).result
        assert result.text == "cdefghijklmnop"[:limit]
        assert result.finish_reason == "length"

    def test_no_tokens_asked_for(self, plan: str) -> None:
        result = generate("abc", plan, max_tokens=0).result
        assert (result.text, result.finish_reason) == ("", "length")
        assert result.statistics.forwards == 0

    @pytest.mark.parametrize("n_ctx", range(3, 16))
    def test_end_of_the_context(self, plan: str, n_ctx: int) -> None:
        run = session(scripted(ids("ab" + "c" * 30)), n_ctx)
        generation = run.generate(Request((0, 1), GREEDY, policy(plan)))
        list(generation)
        assert len(generation.result.output) == n_ctx - 2
        assert generation.result.finish_reason == "length"

    @pytest.mark.parametrize("stop", ["fgh", "h", "hi", "cdefgh"])
    def test_stop_strings_across_cycles(self, plan: str, stop: str) -> None:
        result = generate("abcdefghijklmn", plan, stop=("zz", stop)).result
        assert result.text == "cdefghijklmn".split(stop)[0]
        assert result.finish_reason == "stop"
        last = "cdefghijklmn".index(stop) + len(stop)
        assert result.output == tuple(ids("cdefghijklmn"[:last]))

    def test_characters_are_never_torn(self, plan: str) -> None:
        script = ids("abé東c🙂d.")
        pieces = list(session(scripted(script)).generate(Request((0, 1), GREEDY, policy(plan))))
        assert pieces == ["é", "東", "c", "🙂", "d"]

    def test_an_unfinished_character_at_the_limit_is_replaced(self, plan: str) -> None:
        result = generate("abc東", plan, max_tokens=3).result
        assert result.text == "c\N{REPLACEMENT CHARACTER}"

    def test_control_tokens_have_no_text(self, plan: str) -> None:
        result = generate("abc#d.", plan).result
        assert result.text == "cd"
        assert result.output == tuple(ids("c#d."))

    @pytest.mark.parametrize("length", [0, 1, 3, 8])
    def test_a_control_token_as_a_stop_string(self, plan: str, length: int) -> None:
        result = generate("ab" + "c" * length + "#ddddd", plan, stop=("zz", "<control>")).result
        assert result.text == "c" * length
        assert result.output == (*ids("c" * length), CONTROL)
        assert result.finish_reason == "stop"

    def test_the_cache_keeps_what_the_next_prompt_shares(self, plan: str) -> None:
        model = scripted(ids("abcdefghijklmnop."))
        run = session(model)
        list(first := run.generate(Request((0, 1), GREEDY, policy(plan), max_tokens=6)))
        assert first.result.text == "cdefgh"
        prompt = tuple(ids("abcdefgh" + "ij"))
        list(second := run.generate(Request(prompt, GREEDY, policy(plan), max_tokens=3)))
        assert second.result.text == "klm"
        # Everything but the last output token was in the cache: it is never run through the model.
        assert second.result.statistics.cached_tokens in (7, 8)
        list(third := run.generate(Request((0, 5), GREEDY, policy(plan), max_tokens=2)))
        assert third.result.statistics.cached_tokens == 1
        assert third.result.text == "cd"

    def test_cancelling_rewinds_the_cache(self, plan: str) -> None:
        run = session(scripted(ids("abcdefghijklmnop.")))
        generation = run.generate(Request((0, 1), GREEDY, policy(plan)))
        shown = [next(iter(generation)), next(iter(generation))]
        generation.cancel()
        assert shown == ["c", "d"]
        assert generation.result.finish_reason == "cancelled"
        assert generation.result.text == "cd"
        cache: ToyCache = run._cache
        assert cache.tokens == ids("abcd")[: cache.length]
        assert cache.length >= 3

    def test_log_probabilities_are_told_per_output_token(self, plan: str) -> None:
        """The same ones under every plan, and none unless asked for."""
        model = ToyModel()
        prompt = (3, 1)
        request = Request(prompt, GREEDY, policy(plan), max_tokens=20, top=2)
        generation = session(model).generate(request)
        list(generation)
        result = generation.result
        assert len(result.logprobs) == len(result.output) > 2
        tokens = list(prompt)
        for token, found in zip(result.output, result.logprobs, strict=True):
            logits = ar_logits(tokens).astype(float)
            logs = logits - np.log(np.exp(logits).sum())
            assert found.chosen == pytest.approx(logs[token], abs=1e-6)
            assert [v for v, _ in found.top] == np.argsort(-logits)[:2].tolist()
            tokens.append(token)
        silent = session(model).generate(Request(prompt, GREEDY, policy(plan), max_tokens=20))
        list(silent)
        assert silent.result.logprobs == ()
        assert silent.result.output == result.output

    def test_a_constraint_holds_for_every_token(self, plan: str) -> None:
        """Even letters only; the end is one of them (60)."""

        def even(tokens: Sequence[int], tree: Tree) -> Masks:
            return np.full((len(tree.tokens) + 1, VOCAB // 32), 0x55555555, np.uint32)

        outputs = []
        for name in (AR, plan):
            request = Request((3, 1), GREEDY, policy(name), max_tokens=30, constraint=even)
            generation = session(ToyModel()).generate(request)
            list(generation)
            outputs.append(generation.result.output)
        assert outputs[0] == outputs[1]
        assert len(outputs[0]) > 3
        assert {token % 2 for token in outputs[0]} == {0}

    def test_a_failing_pass_leaves_a_usable_session(self, plan: str) -> None:
        model = scripted(ids("abcdefghijklmnop."))
        run = session(model)
        forward, model.forward = model.forward, _interrupted_after(model.forward, 2)  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            list(run.generate(Request((0, 1), GREEDY, policy(plan))))
        model.forward = forward  # type: ignore[method-assign]
        assert "".join(run.generate(Request((0, 1), GREEDY, policy(plan)))) == "cdefghijklmnop"


def _interrupted_after(forward: Any, passes: int) -> Any:
    def wrapped(*args: Any) -> Any:
        nonlocal passes
        passes -= 1
        if passes < 0:
            raise KeyboardInterrupt
        return forward(*args)

    return wrapped


def test_statistics_count_what_happened() -> None:
    """Width 3; from position 11 on the drafter knows one token and guesses the rest wrong."""
    model = scripted(ids("abcdefghijklmnop"))
    right = model.drafter
    model.drafter = lambda prefix, rows: [
        t if len(prefix) < 11 or i == 0 else 0 for i, t in enumerate(right(prefix, rows))
    ]
    generation = session(model).generate(
        Request((0, 1), GREEDY, policy("two-pass@3"), max_tokens=13)
    )
    list(generation)
    stats = generation.result.statistics
    assert [c.start for c in generation.result.cycles] == [2, 6, 10, 12]
    assert [c.accepted for c in generation.result.cycles] == [3, 3, 1, 1]
    assert stats.offered == (4, 3, 3)  # two tokens were left for the last cycle: one draft
    assert stats.confirmed == (4, 2, 2)
    assert stats.acceptance == 8 / 10
    assert stats.tokens_per_cycle == 12 / 4
    assert (stats.forwards, stats.output_tokens) == (model.forwards, 13) == (9, 13)
    assert stats.tokens_per_forward == 13 / 9
    assert stats.acceptance_by_position == (1, 2 / 3, 2 / 3)


def test_prompts_are_processed_in_batches() -> None:
    seen: list[int] = []
    run = session(scripted(ids("abcdefghij.")), batch=3)
    list(run.generate(Request(tuple(ids("abcdefgh")), GREEDY, policy(AR)), on_progress=seen.append))
    assert seen == [3, 6, 8]


def test_a_prompt_that_is_cut_short_counts_what_was_processed() -> None:
    """Ctrl-C comes after the second of three passes; nothing is left running."""
    during = Nesting()

    def interrupt(held: int) -> None:
        if held == 6:
            raise KeyboardInterrupt

    run = session(scripted(ids("abcdefghij.")), batch=3)
    request = Request(tuple(ids("abcdefgh")), GREEDY, policy(AR))
    generation = run.generate(request, on_progress=interrupt, during_prompt=during)
    with pytest.raises(KeyboardInterrupt):
        list(generation)
    stats, timings = generation.result.statistics, generation.result.timings
    assert (stats.prompt_tokens, stats.output_tokens, stats.forwards) == (6, 0, 0)
    assert timings.prompt_tokens == 6
    assert timings.prompt_per_second == 6 / timings.prompt
    assert timings.generated_per_second is None
    assert during.depths == [1, 0]
    during = Nesting()
    text = "".join(run.generate(request, during_prompt=during))
    assert (text, during.depths) == ("ij", [1, 0])


class Nesting(AbstractContextManager[None]):
    """Counts how often it is entered and left."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def __enter__(self) -> None:
        self.depths.append(1)

    def __exit__(self, *_: object) -> None:
        self.depths.append(0)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ((), "the prompt is empty"),
        ((1, 64), "outside the vocabulary of 64"),
        ((-1,), "outside the vocabulary"),
        (tuple(range(16)), "the prompt has 16 tokens and the context 16"),
    ],
)
def test_prompts_that_cannot_be_continued(prompt: tuple[int, ...], message: str) -> None:
    with pytest.raises(OrthrusError, match=message):
        session(scripted([]), n_ctx=16).generate(Request(prompt, GREEDY, policy(AR)))


@given(
    length=st.sampled_from([0, 1, 255, 256, 257, 511, 512, 600]),
    first=st.lists(st.integers(0, 1), max_size=4),
    second=st.lists(st.integers(2, 3), max_size=4),
)
def test_common_prefix(length: int, first: list[int], second: list[int]) -> None:
    """Of lists and tuples, whichever is longer."""
    shared = [1] * length
    assert common_prefix([*shared, *first], (*shared, *second)) == len(shared)
    assert common_prefix((*shared, *second), [*shared, *first]) == len(shared)
