"""Slots: sessions that serve one conversation after another, and which of them serves the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from orthrus_gguf.drafting.plan import Plan
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.engine import Session, common_prefix
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.server.events import Job

#: Makes a policy that follows a plan, given how many conversations share a pass now. It may keep
#: what it learns from one answer to the next.
Policies = Callable[[Plan, Callable[[], int]], Policy]

#: Rows that are worth copying from another conversation, rather than computing them again.
WORTH_COPYING = 32

#: A prompt goes on with a conversation if it shares this part of it; else it is another one that
#: begins alike, and gets a copy of what they share.
SAME_CONVERSATION = 0.5


@dataclass(eq=False)
class Slot:
    """A session. job: that it serves now. used: when it was last given one; larger is later."""

    id: int
    session: Session
    job: Job | None = None
    used: int = 0
    _policies: dict[str, Policy] = field(default_factory=dict)

    @property
    def tokens(self) -> Sequence[int]:
        """Tokens whose rows the cache holds for certain."""
        if self.job is None:
            return self.session.held
        return self.job.prompt[: self.session.rows]

    def policy(self, plan: Plan, make: Policies, sequences: Callable[[], int]) -> Policy:
        """What follows this plan here. sequences: how many share a pass now."""
        if plan.strategy is not None:  # such a policy learns nothing that it would have to keep
            return make(plan, sequences)
        found = self._policies.get(plan.text)
        if found is None:
            found = self._policies[plan.text] = make(plan, sequences)
        return found


class Pool:
    """At most `size` slots, made when they are needed."""

    def __init__(self, new_session: Callable[[], Session], size: int) -> None:
        """new_session: raises OrthrusError where memory is short: from here for the first slot,
        later the slots there are then have to do."""
        self._new_session, self._size, self._clock = new_session, size, 0
        self.slots = [Slot(0, new_session())]

    def slot(self, id: int) -> Slot:
        """Raises OrthrusError if there is none."""
        if not 0 <= id < len(self.slots):
            raise OrthrusError(f"id_slot: there is no slot {id}, only 0..{len(self.slots) - 1}")
        return self.slots[id]

    def choose(self, job: Job) -> Slot | None:
        """The slot for a job, with what it shares with others in its cache; None if it must wait.

        Raises OrthrusError for a slot that there is not.
        """
        if job.slot is not None:
            slot = self.slot(job.slot)
            if slot.job is not None:
                return None
        else:
            best = self._best(job.prompt if job.reuse else ())
            if best is None:
                return None
            slot = best
        self._clock += 1
        slot.used = self._clock
        if job.reuse:
            self._share(slot, job.prompt)
        else:
            slot.session.keep(())
        slot.job = job
        return slot

    def _best(self, prompt: Sequence[int]) -> Slot | None:
        """The idle slot to take; None if there is none, nor can be one more."""
        idle = [slot for slot in self.slots if slot.job is None]
        shared = {slot: common_prefix(slot.tokens, prompt) for slot in idle}
        going_on = [s for s in idle if shared[s] and shared[s] >= SAME_CONVERSATION * len(s.tokens)]
        if going_on:
            return max(going_on, key=lambda slot: (shared[slot], slot.used))
        empty = [slot for slot in idle if not slot.tokens]
        if empty:
            return empty[0]
        return self._new() or min(idle, key=lambda slot: slot.used, default=None)

    def _new(self) -> Slot | None:
        """One more slot, if there may be one."""
        if len(self.slots) >= self._size:
            return None
        try:
            slot = Slot(len(self.slots), self._new_session())
        except (OrthrusError, MemoryError):
            self._size = len(self.slots)
            return None
        self.slots.append(slot)
        return slot

    def _share(self, slot: Slot, prompt: Sequence[int]) -> None:
        """Put the rows that another slot shares with a prompt into the slot, if they are many."""
        if not slot.session.portable:
            return
        own = slot.session.reachable(common_prefix(slot.tokens, prompt))
        others = [other for other in self.slots if other is not slot]
        shared = {
            other: other.session.reachable(common_prefix(other.tokens, prompt)) for other in others
        }
        best = max(others, key=lambda other: shared[other], default=None)
        if best is not None and shared[best] >= own + WORTH_COPYING:
            rows = shared[best]
            slot.session.put(best.session.take(prompt[:rows]))
