"""Which replica answers: the one that holds most of a prompt, unless it has much more to do."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from orthrus_gguf.cluster.prefixes import Prefix

#: Places that are remembered of a replica: more text than its caches hold.
MOST_PLACES = 1 << 14

#: A prompt that shares this part of itself belongs where that is held, as one does that begins with
#: a whole prompt answered there, however long the answer was. Else it is another conversation, and
#: what it shares with one there (a system prompt) costs less than a replica that idles.
SAME_CONVERSATION = 0.5

#: A place in a prompt (`prefixes.Place.hash`), and whether a prompt ended there.
Mark = tuple[int, bool]


def marks(prompt: Prefix) -> list[Mark]:
    """Of a prompt's places."""
    return [(place.hash, place is prompt[-1]) for place in prompt]


class Held:
    """Places of prompts that a replica has seen, the newest of them."""

    def __init__(self, most: int = MOST_PLACES) -> None:
        self._most, self._ends = most, OrderedDict[int, bool]()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, found: Iterable[Mark]) -> None:
        """Remember them; the oldest are forgotten."""
        for place, end in found:
            self._ends[place] = end or self._ends.get(place, False)
            self._ends.move_to_end(place)
        while len(self._ends) > self._most:
            self._ends.popitem(last=False)

    def newest(self, count: int) -> list[Mark]:
        """At most so many, the oldest of them first."""
        return [*self._ends.items()][-count:]

    def worth(self, prompt: Prefix) -> int:
        """Characters of a prompt that are held, if it belongs here; else 0."""
        shared, belongs = 0, False
        for place in prompt:
            if place.hash not in self._ends:
                break
            shared, belongs = place.end, self._ends[place.hash] or belongs
        return shared if belongs or (shared and shared >= SAME_CONVERSATION * prompt[-1].end) else 0


class Affinity:
    """What is known of the replicas: what they hold, and how many requests they answer now.

    slack: requests that a replica may have more than the one with fewest, and still be given
    another for the sake of what it holds.
    """

    def __init__(self, slack: int = 4) -> None:
        self.slack = slack
        self._held: dict[str, Held] = {}
        self._running = Counter[str]()

    @property
    def replicas(self) -> tuple[str, ...]:
        """Those that take requests."""
        return tuple(self._held)

    def update(self, names: Iterable[str]) -> None:
        """Those that take requests now; what others held is forgotten."""
        self._held = {name: self._held.get(name, Held()) for name in names}
        self._running = Counter({n: c for n, c in self._running.items() if n in self._held})

    def gone(self, name: str) -> None:
        """It has died."""
        self.update(other for other in self._held if other != name)

    def holds(self, name: str, found: Iterable[Mark]) -> None:
        """A replica has seen places of prompts: ours, or those that it tells of."""
        if name in self._held:
            self._held[name].add(found)

    def began(self, name: str) -> None:
        """A request went there."""
        self._running[name] += 1

    def ended(self, name: str) -> None:
        """A request there is over."""
        if self._running[name] > 0:
            self._running[name] -= 1

    def ranked(self, prompt: Prefix) -> list[str]:
        """All replicas, the one that should answer first."""
        least = min((self._running[name] for name in self._held), default=0)

        def rank(name: str) -> tuple[int, int, int]:
            held, running = self._held[name], self._running[name]
            worth = held.worth(prompt) if running - least <= self.slack else 0
            # Where nobody holds it: who has fewest to do, then who has been given least so far.
            return -worth, running, len(held)

        return sorted(self._held, key=rank)


#: Deployment → what its router knows. Ray makes the router itself, in the process that calls the
#: deployment: who calls finds here what there is to know.
_AFFINITIES: dict[str, Affinity] = {}


def affinity(deployment: object) -> Affinity:
    """Of a deployment, whose replicas are not known yet if it is new. deployment: its id."""
    return _AFFINITIES.setdefault(str(deployment), Affinity())
