"""The scheduler: company, turns, prefixes and cancelling change no text."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import VOCAB, ToyModel, greedy_continuation
from toy_server import Heard, alone, toy_scheduler

from orthrus_gguf.drafting.plan import parse
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.protocol import Choices, Segment
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.server.events import BusyError, End, Failed, Job, Progress

GREEDY = SamplingSettings(temperature=0)


def half_right(prefix: Sequence[int], rows: int) -> list[int]:
    right = greedy_continuation(prefix, rows)
    good = len(prefix) % (rows + 1)
    return right[:good] + [(t + 1) % VOCAB for t in right[good:]]


def job(prompt: Sequence[int], plan: str = "ar", sampling: Any = GREEDY, **more: Any) -> Job:
    return Job(tuple(prompt), sampling, parse(plan), Heard(), **more)


def heard(job: Job) -> Heard:
    assert isinstance(job.listener, Heard)
    return job.listener


JOBS = st.builds(
    job,
    # Few first tokens, so that prompts share prefixes.
    prompt=st.builds(
        lambda first, rest: [first] * 40 + rest,
        st.sampled_from([1, 2]),
        st.lists(st.integers(0, 25), min_size=1, max_size=9),
    ),
    plan=st.sampled_from(["ar", "ar+lookup", "two-pass@5", "two-pass@6+tree=10", "fused@5x3+tail"]),
    sampling=st.builds(
        SamplingSettings,
        temperature=st.sampled_from([0.0, 0.8, 1.5]),
        repeat_penalty=st.sampled_from([1.0, 1.3]),
        seed=st.integers(0, 2**64 - 1),
    ),
    max_tokens=st.sampled_from([-1, 0, 1, 7, 30]),
    stop=st.sampled_from([(), ("a",), ("bc", "d")]),
    top=st.sampled_from([0, 2]),
    reuse=st.booleans(),
)


@settings(deadline=None, max_examples=40)
@given(
    jobs=st.lists(JOBS, min_size=3, max_size=10),
    aborted=st.sets(st.integers(0, 9), max_size=3),
    parallel=st.integers(1, 4),
    size=st.integers(4, 6),
    batch=st.sampled_from([5, 512]),
)
def test_text_is_what_it_is_alone(
    jobs: list[Job], aborted: set[int], parallel: int, size: int, batch: int
) -> None:
    """Whatever runs beside it, whose rows it begins with, and who is cancelled on the way."""
    model = ToyModel(half_right, sureness=3.0)
    jobs = [Job(**{**vars(job), "listener": Heard()}) for job in jobs]
    scheduler = toy_scheduler(model, parallel=parallel, size=size, batch=batch)
    for index in aborted & set(range(len(jobs))):
        one = jobs[index]
        heard(one).on_event = lambda event, one=one: scheduler.cancel(one)  # type: ignore[misc]
    scheduler.start()
    for one in jobs:
        scheduler.submit(one)
    scheduler.stop()
    assert scheduler.running == scheduler.waiting == 0
    for index, one in enumerate(jobs):
        found, expected = heard(one), alone(model, one)
        if index in aborted and not isinstance(found.events[-1], End):
            assert expected.text.startswith(found.text)
            continue
        assert found.end.result.output == found.tokens == expected.output
        assert found.end.result.text == found.text == expected.text
        assert found.end.result.finish_reason == expected.finish_reason
        assert found.logprobs == expected.logprobs


def test_those_that_run_share_every_pass() -> None:
    widths: list[int] = []

    class Watched(ToyModel):
        def forward(self, segments: Sequence[Segment]) -> list[Choices]:
            widths.append(len(segments))
            return super().forward(segments)

    model = Watched(logits=lambda prefix: _only(3))
    scheduler = toy_scheduler(model, parallel=3, size=3)
    jobs = [job([1, i], max_tokens=8) for i in range(4)]
    for one in jobs:
        scheduler.submit(one)
    scheduler.start()
    scheduler.stop()
    assert widths == [3] * 8 + [1] * 8
    assert scheduler.counters.passes == 16
    assert scheduler.counters.busy == 32


def _only(token: int) -> Any:
    import numpy as np

    return np.eye(VOCAB, dtype=np.float32)[token]


class TestPrefixes:
    def test_a_conversation_goes_on_where_it_was(self) -> None:
        model = ToyModel()
        scheduler = toy_scheduler(model, parallel=1, size=3)
        scheduler.start()
        prompts = [[1] * 50, [2] * 50, [3] * 50]
        slots = []
        for prompt in prompts * 2:
            one = job(prompt, max_tokens=3)
            scheduler.submit(one)
            slots.append(heard(one).wait().end.slot)
        scheduler.stop()
        assert slots == [0, 1, 2, 0, 1, 2]

    def test_the_oldest_makes_room(self) -> None:
        scheduler = toy_scheduler(ToyModel(), parallel=1, size=2)
        scheduler.start()
        slots = []
        for first in (1, 2, 1, 3, 1, 2):
            one = job([first] * 50, max_tokens=3)
            scheduler.submit(one)
            slots.append(heard(one).wait().end.slot)
        scheduler.stop()
        assert slots == [0, 1, 0, 1, 0, 1]

    def test_what_two_conversations_share_is_copied(self) -> None:
        """Also from one that is under way."""
        model = ToyModel(logits=lambda prefix: _only(3))
        scheduler = toy_scheduler(model, parallel=2, size=2)
        system = [1] * 60
        first, second = job([*system, *[2] * 50], max_tokens=9), job([*system, 4, 5], max_tokens=3)
        heard(first).on_event = lambda event: (
            scheduler.submit(second) if isinstance(event, Progress) else None
        )
        scheduler.start()
        scheduler.submit(first)
        heard(first).wait()
        result = heard(second).wait().end.result
        scheduler.stop()
        assert result.statistics.cached_tokens == 60
        assert heard(second).progress == [Progress(62, 60, 62)]
        assert heard(second).end.slot != heard(first).end.slot

    def test_reuse_may_be_refused(self) -> None:
        scheduler = toy_scheduler(ToyModel(), parallel=1, size=1)
        scheduler.start()
        counts = []
        for reuse in (True, True, False):
            one = job([1] * 50, max_tokens=1, reuse=reuse)
            scheduler.submit(one)
            counts.append(heard(one).wait().end.result.statistics.cached_tokens)
        scheduler.stop()
        assert counts == [0, 49, 0]

    def test_a_slot_may_be_named(self) -> None:
        scheduler = toy_scheduler(ToyModel(), parallel=2, size=2)
        scheduler.start()
        for first in (1, 2):
            scheduler.submit(one := job([first] * 50, max_tokens=1))
            heard(one).wait()
        scheduler.submit(named := job([3], max_tokens=1, slot=1))
        scheduler.submit(unknown := job([3], max_tokens=1, slot=5))
        assert heard(named).wait().end.slot == 1
        (failed,) = heard(unknown).wait().events
        assert isinstance(failed, Failed)
        assert "id_slot" in str(failed.error)
        scheduler.stop()

    def test_slots_stop_growing_where_memory_ends(self) -> None:
        scheduler = toy_scheduler(ToyModel(), parallel=2, size=9)
        made = scheduler.pool._new_session
        left = [1]

        def short() -> Any:
            if not left.pop():
                raise OrthrusError("no memory")
            return made()

        scheduler.pool._new_session = short
        left[:] = [0, 1]
        scheduler.start()
        jobs = [job([i] * 50, max_tokens=5) for i in range(5)]
        for one in jobs:
            scheduler.submit(one)
        scheduler.stop()
        assert {heard(one).end.slot for one in jobs} == {0, 1}


class TestStalls:
    def test_a_long_prompt_is_cut_while_an_answer_runs(self) -> None:
        """A row of a prompt takes a millisecond here, and a pass may take ten."""
        rows: list[tuple[int, ...]] = []

        class Slow(ToyModel):
            def forward(self, segments: Sequence[Segment]) -> list[Choices]:
                rows.append(tuple(len(s) for s in segments))
                time.sleep(sum(len(s) for s in segments if len(s) > 1) * 1e-3)
                return super().forward(segments)

        scheduler = toy_scheduler(Slow(logits=lambda prefix: _only(3)), n_ctx=900, stall=0.04)
        first, second = job([1], max_tokens=100), job([2] * 300, max_tokens=1)
        heard(first).on_event = lambda event: (
            scheduler.submit(second) if isinstance(event, Progress) else None
        )
        scheduler.start()
        scheduler.submit(first)
        heard(second).wait()
        scheduler.stop(now=True)
        prompts = [max(found) for found in rows if max(found) > 1]
        assert sum(prompts) == 300
        assert prompts[:2] == [64, 64]  # the second piece was cut before the first had run
        assert all(16 <= rows <= 40 for rows in prompts[2:-1])
        assert all(len(found) == 2 for found in rows if max(found) > 1)

    def test_alone_a_prompt_is_not(self) -> None:
        scheduler = toy_scheduler(ToyModel(), n_ctx=900, stall=1e-6)
        scheduler.start()
        for _ in range(2):
            scheduler.submit(one := job([2] * 700, max_tokens=1, reuse=False))
            assert [p.held for p in heard(one).wait().progress] == [512, 700]
        scheduler.stop()


class TestEnds:
    def test_the_queue_has_a_bound(self) -> None:
        scheduler = toy_scheduler(ToyModel(), parallel=1, size=1, queue=2)
        jobs = [job([1], max_tokens=1) for _ in range(4)]
        for one in jobs[:3]:
            scheduler.submit(one)
        with pytest.raises(BusyError, match="3 requests wait"):
            scheduler.submit(jobs[3])
        scheduler.start()
        scheduler.stop()
        assert all(heard(one).end for one in jobs[:3])
        with pytest.raises(BusyError):
            scheduler.submit(jobs[3])

    def test_one_that_waits_can_be_cancelled(self) -> None:
        scheduler = toy_scheduler(ToyModel(), parallel=1, size=1)
        jobs = [job([1], max_tokens=5) for _ in range(3)]
        for one in jobs:
            scheduler.submit(one)
        scheduler.cancel(jobs[1])
        scheduler.start()
        scheduler.stop()
        assert heard(jobs[1]).events == []
        assert heard(jobs[0]).end
        assert heard(jobs[2]).end

    def test_stopping_at_once_ends_everything(self) -> None:
        scheduler = toy_scheduler(ToyModel(logits=lambda prefix: _only(3)), n_ctx=100_000)
        started = threading.Event()
        jobs = [job([1]), job([1]), job([1])]
        heard(jobs[0]).on_event = lambda event: started.set()
        scheduler.start()
        for one in jobs:
            scheduler.submit(one)
        assert started.wait(30)
        scheduler.stop(now=True)
        assert scheduler.running == scheduler.waiting == 0

    def test_a_pass_that_fails_ends_those_in_it_and_no_others(self) -> None:
        class Failing(ToyModel):
            fails = True

            def forward(self, segments: Sequence[Segment]) -> list[Choices]:
                if self.fails:
                    self.fails = False
                    raise MemoryError
                return super().forward(segments)

        scheduler = toy_scheduler(Failing(), parallel=2, size=2)
        jobs = [job([1, i], max_tokens=5) for i in range(3)]
        for one in jobs:
            scheduler.submit(one)
        scheduler.start()
        scheduler.stop()
        for one in jobs[:2]:
            (failed,) = heard(one).events
            assert isinstance(failed, Failed)
            assert isinstance(failed.error, MemoryError)
        assert heard(jobs[2]).end.result.statistics.output_tokens == 5

    def test_prompts_that_cannot_be_answered(self) -> None:
        scheduler = toy_scheduler(ToyModel(), n_ctx=20)
        scheduler.start()
        jobs = [job([]), job([1] * 20), job([VOCAB]), job([1], max_tokens=2)]
        for one in jobs:
            scheduler.submit(one)
        scheduler.stop()
        assert all(isinstance(heard(one).events[-1], Failed) for one in jobs[:3])
        assert heard(jobs[3]).end

    def test_errands_run_between_passes(self) -> None:
        scheduler = toy_scheduler(ToyModel())
        scheduler.start()
        assert scheduler.call(lambda: threading.current_thread().name).result(30) == "scheduler"
        with pytest.raises(ZeroDivisionError):
            scheduler.call(lambda: 1 // 0).result(30)
        scheduler.stop()
        with pytest.raises(BusyError):
            scheduler.call(lambda: 1)
