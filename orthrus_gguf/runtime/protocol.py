"""Segments go into a pass, choices come out: what every runtime promises.

A forward pass takes a list of segments, of one sequence or of several. Projections and attention
differ by view; norms, MLP, embedding and head are shared, so a runtime may run them over all rows
at once.

- An `View.AR` segment is causal: its row i sits at position `start + i` and sees the rows
  `0 .. start-1` of its cache and the segment's own rows up to itself. Its rows are *pending* until
  `Cache.commit` says which of them stay. Its logits must be *row-invariant*: bit for bit what the
  same row gives in a pass of its own, whatever else shares the pass.
- A `View.DIFFUSION` segment is a block: row i sits at position `start + i` and sees the cache rows
  `0 .. start-1` and the whole block, in both directions. Nothing of it is stored. When the same
  pass holds an AR segment of the same cache, "the cache rows" include that segment's rows, which is
  what lets verification and the next draft share a pass.
- A `View.DRAFTER` segment is a block too, but of a drafter's own network (`beside.py`): it sees
  what that was told of the sequence, and itself.
- An AR segment may be a *tree*: alternatives for the same positions, verified in one pass. Each of
  its rows but the first has a parent in the segment, sees the cache and its ancestors, and sits one
  position after its parent. Row-invariant as ever: the bits of a row are those it gives when its
  path is the text. A tree shares its pass with no block of its own sequence.

What comes out of the wanted rows are `Choices`: tokens drawn where the logits are. Logits
themselves leave only through `Model.logits`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.records import dataclass
from orthrus_gguf.sampling import Choice, Sampler

Logits = NDArray[np.float32]

#: One bit per token, token `v` in bit `v % 32` of word `v // 32` (as llguidance lays masks out).
Masks = NDArray[np.uint32]


class View(Enum):
    """What computes a row: one of the model's two sets of attention weights, or the network of a
    drafter beside it."""

    AR = "ar"
    DIFFUSION = "diffusion"
    DRAFTER = "drafter"


#: Views that a model has weights for.
OWN_VIEWS = (View.AR, View.DIFFUSION)


@dataclass(frozen=True, eq=False)
class Draw:
    """How tokens are drawn from the wanted rows of a segment.

    history: the sequence's committed tokens, by position; it may be longer than the segment needs,
        and is read during the pass only. ahead: tokens taken to follow `history`, where a block is
        drafted on a guess: together they reach to the segment's first row, that row included, so
        that the prefix of its first row is `(history + ahead)[: start + 1]`.
    detail: also the probability of each token and the runner-up, as drafters need them.
    top: also report the log-probabilities of the chosen token and of this many likeliest ones.
    allowed: tokens that may be drawn, a mask of shape [words] per wanted row; None allows all.
    """

    sampler: Sampler
    history: Sequence[int]
    ahead: tuple[int, ...] = ()
    detail: bool = False
    top: int = 0
    allowed: Masks | None = None


@dataclass(frozen=True, eq=False)
class Segment:
    """Rows of one view and one sequence, consecutive unless they are a tree.

    cache: of the sequence; of a drafter's block, what the drafter's network knows of it.
    tokens: token ids, one per row (never empty).
    start: position of the first row; equally the number of cache rows that the first row sees.
    wanted: the rows that are asked about, as a range over the segment's rows. Runtimes skip the
        head for all others.
    parents: of a tree, the row that each row follows, which comes before it; -1 for row 0, the
        only root. None: every row follows the one before it.
    draw: how tokens are drawn; needed by `Model.forward` wherever rows are wanted.
    taps: layers whose input is asked for, see `Choices.taps`.
    """

    cache: Rows
    view: View
    tokens: tuple[int, ...]
    start: int
    wanted: range
    parents: tuple[int, ...] | None = None
    draw: Draw | None = None
    taps: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens or self.start < 0:
            raise ValueError(f"segment needs rows and a start >= 0: {self}")
        if self.wanted.step != 1 or not 0 <= self.wanted.start <= self.wanted.stop <= len(self):
            raise ValueError(f"wanted rows {self.wanted} outside the segment's {len(self)} rows")
        if self.parents is not None and (
            self.view is not View.AR
            or len(self.parents) != len(self)
            or self.parents[0] != -1
            or not all(0 <= parent < i + 1 for i, parent in enumerate(self.parents[1:]))
        ):
            raise ValueError(f"not a tree of {len(self)} AR rows with one root: {self.parents}")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def stop(self) -> int:
        """The position after the last one that a row has."""
        return self.start + (len(self) if self.parents is None else max(depths(self.parents)) + 1)


@dataclass(frozen=True, eq=False)
class Choices:
    """What a pass says of one segment.

    rows: one choice per wanted row. None where the logits are not finite, and where nobody can ask:
        a runtime that draws on the host draws the rows of an AR segment only as long as the tokens
        drawn follow its rows (`drawing.py`).
    taps: float32 [taps, rows, n_embd] for all rows of the segment, one plane per tap asked for: the
        residual stream at the input of that layer; for `n_layers`, before the final norm; for
        `n_layers + 1`, behind it.
    """

    rows: tuple[Choice | None, ...]
    taps: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Choice | None]:
        return iter(self.rows)

    def __getitem__(self, row: int) -> Choice | None:
        return self.rows[row]


def depths(parents: Sequence[int]) -> list[int]:
    """How many ancestors each row of a tree has."""
    found: list[int] = []
    for parent in parents:
        found.append(found[parent] + 1 if parent >= 0 else 0)
    return found


def is_chain(parents: Sequence[int]) -> bool:
    """Whether every row of a tree follows the one before it."""
    return all(parent == row for row, parent in enumerate(parents, -1))


def path_to(row: int, parents: Sequence[int]) -> list[int]:
    """The row of a tree and its ancestors, the root first."""
    path = [row]
    while (row := parents[row]) >= 0:
        path.append(row)
    return path[::-1]


def ar_segment(
    cache: Rows,
    tokens: Sequence[int],
    start: int,
    *,
    wanted: range | None = None,
    parents: Sequence[int] | None = None,
    draw: Draw | None = None,
    taps: tuple[int, ...] = (),
) -> Segment:
    """Causal rows from `start`, or a tree of them. All rows wanted unless said."""
    rows = tuple(tokens)
    tree = None if parents is None else tuple(parents)
    asked = range(len(rows)) if wanted is None else wanted
    return Segment(cache, View.AR, rows, start, asked, tree, draw, taps)


def diffusion_segment(
    cache: Rows,
    anchor: int,
    mask: int,
    rows: int,
    start: int,
    *,
    wanted: range | None = None,
    draw: Draw | None = None,
    view: View = View.DIFFUSION,
) -> Segment:
    """A block `[anchor, mask, ..., mask]` of `rows` rows, its anchor at `start`. view: of the
    model's own heads, or of a drafter's network."""
    tokens = (anchor,) + (mask,) * (rows - 1)
    asked = range(rows) if wanted is None else wanted
    return Segment(cache, view, tokens, start, asked, None, draw)


@dataclass(frozen=True)
class Checkpoint:
    """A place to come back to. length: rows that are committed there."""

    length: int


class Rows(Protocol):
    """What the rows of a segment come behind."""

    @property
    def length(self) -> int:
        """Number of committed rows: positions `0 .. length-1`."""
        ...

    @property
    def capacity(self) -> int:
        """Largest number of rows (the context size)."""
        ...


class Cache(Rows, Protocol):
    """What a sequence has committed of the AR view, shared by both views: keys and values, or the
    state of a recurrent layer."""

    def commit(self, rows: Sequence[int]) -> None:
        """Keep `rows` of the AR segment that the last pass on this cache ran, and drop its others.

        They must be a path of it from its row 0 on (`range(n)` of a chain), or nothing. Raises
        ValueError if they are not, or if nothing is pending; and where a cache with the state of
        recurrent layers would have to keep some rows of more than `fit` says.
        """
        ...

    def checkpoint(self, length: int | None = None) -> Checkpoint:
        """The place where the cache stands, or the last one up to `length` that it can go back to.

        A cache of keys and values can go back anywhere. One with the state of recurrent layers goes
        back to places that it was asked for without `length`, and to some of its own choice; it
        forgets the oldest of many. What is pending is not part of it.
        """
        ...

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint; rows behind it, and what is pending, are gone.

        Raises ValueError for a place that this cache cannot go back to.
        """
        ...

    def fit(self, parents: Sequence[int]) -> int:
        """How many rows of a tree or chain, from the first on, the next pass has room for, if any
        path of them may be committed: at least 1."""
        ...

    def assume(self, rows: int) -> None:
        """Count `rows` more rows as committed, whatever is in them: to time passes."""
        ...


@runtime_checkable
class Portable(Protocol):
    """A cache whose rows can be taken out, and put into another cache of the same model."""

    def take(self, rows: int) -> list[NDArray[np.uint8]]:
        """The first `rows` committed rows, as copies: bytes that mean something to `put` of a cache
        of the same runtime, model and cache types only. Raises ValueError for more than there are,
        and where the cache cannot go back to (`Cache.checkpoint`).
        """
        ...

    def put(self, parts: Sequence[NDArray[np.uint8]], rows: int) -> None:
        """Hold what `take` gave for so many rows, and nothing else.

        Raises ValueError, and changes nothing, if the parts are not of that shape or do not fit.
        """
        ...


@runtime_checkable
class Threaded(Protocol):
    """A model whose number of CPU threads is found by measuring."""

    @property
    def thread_counts(self) -> tuple[int, ...]:
        """Numbers to choose from, beginning with the one in use after loading; empty when the
        number was given."""
        ...

    def use_threads(self, count: int) -> None:
        """Run passes on so many threads from now on. Raises OrthrusError."""
        ...


@runtime_checkable
class Loading(Protocol):
    """A model whose weights are still coming when it has been made."""

    def wait(self) -> None:
        """Return when they are there. Passes wait by themselves."""
        ...


class Model(Protocol):
    """One loaded model on one runtime. Runtimes differ in speed and arithmetic, not in meaning."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def description(self) -> str:
        """One line for status output: runtime, device, threads, weight types."""
        ...

    def close(self) -> None:
        """Free what the model holds; neither it nor its caches may be used afterwards."""
        ...

    def new_cache(self, capacity: int) -> Any:
        """An empty cache for up to `capacity` rows. Raises OrthrusError when it cannot fit."""
        ...

    def forward(self, segments: Sequence[Segment]) -> list[Choices]:
        """Run one pass and return the choices of every segment, in the order of the segments.

        Per cache at most one AR segment, before that cache's blocks; it must start at
        `cache.length` and is pending afterwards, until `Cache.commit` or the next pass on that
        cache. Blocks must start at or before the end of the rows committed and pending in this
        pass. If it raises, the caches are as before, with nothing pending.
        """
        ...

    def logits(self, segments: Sequence[Segment]) -> list[Logits]:
        """The same pass, with the logits of the wanted rows: float32 [len(wanted), n_vocab].

        For perplexity and tests. The arrays are the caller's.
        """
        ...


def check_segments(segments: Sequence[Segment]) -> None:
    """Raise ValueError unless `segments` obey the contract of `Model.forward`."""
    if not segments:
        raise ValueError("a pass needs at least one segment")
    ends: dict[int, int] = {}  # by cache: rows that blocks may see
    trees = set()
    for segment in segments:
        cache = segment.cache
        known = id(cache) in ends
        if segment.view is View.DRAFTER:
            raise ValueError("a drafter's block, and there is no drafter beside the model")
        if segment.view is View.AR:
            if known:
                raise ValueError("an AR segment must be the first and only one of its cache")
            if segment.start != cache.length:
                raise ValueError(
                    f"AR segment starts at {segment.start}, the cache holds {cache.length} rows"
                )
            if segment.stop > cache.capacity:
                raise ValueError(
                    f"AR segment ends at {segment.stop}, the cache has room for {cache.capacity}"
                )
            if segment.parents is not None:
                trees.add(id(cache))
            ends[id(cache)] = segment.stop
            continue
        if id(cache) in trees:
            raise ValueError("a tree shares its pass with no diffusion block of its sequence")
        visible = ends.setdefault(id(cache), cache.length)
        if segment.start > visible:
            raise ValueError(
                f"diffusion block at {segment.start} sees rows that do not exist yet ({visible})"
            )
