"""Commit on the device: cases by hand, then whole generations against the host's decode loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from orthrus_kernels.elementwise.rows import (
    BAD_LOGITS,
    CYCLES,
    EMITTED,
    LIMIT,
    POSITION,
    STATUS,
    STOPPED,
)
from orthrus_kernels.sampling import plain as reference_sample
from orthrus_kernels.sampling.accept import accept, new_log, write_drafts
from torch import Tensor

from orthrus_gguf.decode import verify
from orthrus_gguf.drafting.draft import Tree
from orthrus_gguf.sampling import Sampler, SamplingSettings

RING, LOG = 8, 4


class Device:
    """The state of one request: 20 positions of history, the anchor (token 50) at position 5."""

    def __init__(self, *, limit: int = 100, stop: tuple[int, ...] = ()) -> None:
        self.history = torch.full((40,), -99, dtype=torch.int32)
        self.history[:6] = torch.arange(45, 51)
        self.state = torch.zeros(8, dtype=torch.int32)
        self.state[POSITION], self.state[LIMIT] = 5, limit
        self.stop = torch.tensor(stop, dtype=torch.int32)
        self.ring = torch.full((RING,), -99, dtype=torch.int32)
        self.log = new_log(LOG, "cpu")

    def cycle(
        self, drafts: list[int], drawn: list[int], function: Callable[..., None] = accept
    ) -> list[int]:
        """Verify `drafts`, given the AR view's tokens; returns what was committed."""
        position, emitted = int(self.state[POSITION]), int(self.state[EMITTED])
        span = slice(position + 1, position + 1 + len(drafts))
        self.history[span] = torch.tensor(drafts, dtype=torch.int32)
        segments = torch.tensor([[0, 0, len(drafts) + 1, 0, -1]], dtype=torch.int32)
        # A bucket has more rows than are in use; what they drew must not matter.
        ar_tokens = torch.tensor([*drawn, 7, 7, 7], dtype=torch.int32)
        function(ar_tokens, segments, self.history, self.stop, self.state, self.ring, self.log)
        count = int(self.state[EMITTED]) - emitted
        assert int(self.state[POSITION]) == position + count
        committed = self.history[position + 1 : position + 1 + count].tolist()
        assert [int(self.ring[(emitted + i) % RING]) for i in range(count)] == committed
        return [int(token) for token in committed]


@pytest.fixture(params=[accept, reference_sample.accept], ids=["kernel", "reference"])
def function(request: pytest.FixtureRequest) -> Callable[..., None]:
    chosen: Callable[..., None] = request.param
    return chosen


@pytest.mark.parametrize(
    ("drafts", "drawn", "committed"),
    [
        ([], [11], [11]),
        ([11, 12, 13], [11, 12, 13, 14], [11, 12, 13, 14]),
        ([11, 12, 13], [11, 99, 13, 14], [11, 99]),
        ([11, 12, 13], [98, 12, 13, 14], [98]),
    ],
)
def test_longest_prefix(
    function: Callable[..., None], drafts: list[int], drawn: list[int], committed: list[int]
) -> None:
    device = Device()
    assert device.cycle(drafts, drawn, function) == committed
    assert device.state[STATUS] == 0
    assert device.log[0].tolist() == [5, len(drafts), len(committed) - 1, len(committed)]


def test_stop_token_inside_a_block(function: Callable[..., None]) -> None:
    device = Device(stop=(77, 12))
    assert device.cycle([11, 12, 13], [11, 12, 13, 14], function) == [11, 12]
    assert device.state[STATUS] == STOPPED
    before = device.state.clone()
    assert device.cycle([1], [1, 2], function) == [], "nothing moves after a stop"
    before[CYCLES] += 1
    assert torch.equal(device.state, before)


def test_stop_token_behind_a_mismatch_does_not_count(function: Callable[..., None]) -> None:
    device = Device(stop=(12,))
    assert device.cycle([11, 12, 13], [10, 12, 13, 14], function) == [10]
    assert device.state[STATUS] == 0


def test_limit_inside_a_block(function: Callable[..., None]) -> None:
    device = Device(limit=2)
    assert device.cycle([11, 12, 13], [11, 12, 13, 14], function) == [11, 12]
    assert device.log[0].tolist() == [5, 3, 3, 2], "the log keeps what was accepted"
    assert device.cycle([13], [13, 14], function) == []
    assert device.state[STATUS] == 0


def test_bad_logits(function: Callable[..., None]) -> None:
    """-1 ends the request where it would have been committed, and only there."""
    device = Device()
    assert device.cycle([11, 12], [10, -1, 3], function) == [10]
    assert device.state[STATUS] == 0
    assert device.cycle([11, 12], [11, -1, 3], function) == [11]
    assert device.state[STATUS] == BAD_LOGITS


def test_ring_and_log_wrap(function: Callable[..., None]) -> None:
    device = Device()
    for step in range(6):
        tokens = [step * 3, step * 3 + 1, step * 3 + 2]
        assert device.cycle(tokens[:2], tokens, function) == tokens
    assert device.state[EMITTED] == 18
    assert sorted(device.ring.tolist()) == list(range(10, 18))
    assert device.log[:, 0].tolist() == [17, 20, 11, 14]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_commits_what_the_decode_loop_commits(data: st.DataObject) -> None:
    """`orthrus_gguf.decode.verify` on logits that make greedy sampling draw `drawn`."""
    token = st.integers(0, 2)
    drafts = data.draw(st.lists(token, max_size=7))
    drawn = data.draw(st.lists(token, min_size=len(drafts) + 1, max_size=len(drafts) + 1))
    logits = torch.nn.functional.one_hot(torch.tensor(drawn), 3).float().numpy()
    greedy = Sampler(SamplingSettings(temperature=0.0))
    assert Device().cycle(drafts, drawn) == verify(greedy, [50], Tree(tuple(drafts)), logits)


@pytest.mark.parametrize("implementation", [write_drafts, reference_sample.write_drafts])
def test_write_drafts(implementation: Callable[..., None]) -> None:
    """Only diffusion rows write, one past themselves; never past the end, never a negative id."""
    tokens, views, positions = (
        torch.tensor(column, dtype=torch.int32)
        for column in ([5, 6, -1, 8, 9], [0, 1, 1, 1, -1], [1, 2, 3, 9, 0])
    )
    history: Tensor = torch.full((10,), -99, dtype=torch.int32)
    implementation(tokens, views, positions, history)
    assert history.tolist() == [-99, -99, -99, 6, 0, *[-99] * 5]
