"""Sessions: a prompt goes in, text streams out, and the cache stays usable for the next prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from orthrus_gguf.decode import PROMPT_BATCH, Done, prefill, run_cycle, run_together
from orthrus_gguf.drafting.cycle import Cycle
from orthrus_gguf.drafting.drafter import Drafter
from orthrus_gguf.drafting.forced import ForcedDrafter, Forcing
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.request import Origin, Piece, Request, Result, origins
from orthrus_gguf.runtime.beside import ModelWithDrafter
from orthrus_gguf.runtime.protocol import Model, Portable, Segment
from orthrus_gguf.sampling import Choice, LogProbs, Sampler
from orthrus_gguf.stats import Timings, count
from orthrus_gguf.text.stop import StopStrings
from orthrus_gguf.text.tokenizer import StreamDecoder, Tokenizer


class Rows(NamedTuple):
    """Rows of a session as bytes, for another one of the same model.

    model: of these tokens (`Portable.take`). drafter: of the first `drafted` of them, in the cache
    of a drafter's network, if there is one.
    """

    tokens: tuple[int, ...]
    model: tuple[NDArray[np.uint8], ...]
    drafted: int = 0
    drafter: tuple[NDArray[np.uint8], ...] = ()


class Session:
    """One conversation on one model: owns a cache and remembers which tokens it holds.

    prompt_batch: prompt rows of a pass; may be changed at any time.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, n_ctx: int, *, prompt_batch: int = PROMPT_BATCH
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self.prompt_batch = prompt_batch
        self._cache: Any = model.new_cache(n_ctx)
        self._draft_cache = (
            model.new_draft_cache(n_ctx) if isinstance(model, ModelWithDrafter) else None
        )
        self._held: list[int] = []

    def generate(
        self,
        request: Request,
        *,
        on_progress: Callable[[int], None] | None = None,
        during_prompt: AbstractContextManager[None] | None = None,
    ) -> Generation:
        """Start a generation; iterate over it to run it. Raises OrthrusError on a bad prompt.

        on_progress: called with the number of prompt tokens processed so far. during_prompt: is
        entered before the first of its passes, and left after the last, however it ends.
        """
        n_vocab = self.model.config.n_vocab
        if not request.prompt:
            raise OrthrusError("the prompt is empty: there is no token to continue from")
        if not all(0 <= token < n_vocab for token in request.prompt):
            raise OrthrusError(f"the prompt holds token ids outside the vocabulary of {n_vocab}")
        if len(request.prompt) >= self.n_ctx:
            raise OrthrusError(
                f"the prompt has {len(request.prompt)} tokens and the context {self.n_ctx}: nothing"
                " can be generated; shorten the prompt or raise -c"
            )
        return Generation(self, request, on_progress, during_prompt or nullcontext())

    @property
    def held(self) -> Sequence[int]:
        """Tokens whose rows the cache holds; during a generation those that were there before."""
        return tuple(self._held)

    def prepare(self, prompt: Sequence[int], drafters: Sequence[Drafter] = ()) -> int:
        """Go back to the longest useful prefix of `prompt` that is held; return its length.

        At least the last prompt token is left to be processed, since its logits are needed. What a
        drafter among `drafters` was not told of is left too: it reads taps of every row. So is what
        lies behind the last place that both caches can go back to.
        """
        drafted = self._draft_cache if any(drafter.taps for drafter in drafters) else None
        known = len(prompt) - 1 if drafted is None else drafted.known(prompt)
        wanted = common_prefix(self._held, prompt[: min(known, len(prompt) - 1)])
        place = self.reachable(min(wanted, self.rows))
        while drafted is not None and (common := drafted.reachable(place)) < place:
            place = self.reachable(common)
        return self.keep(prompt[:place])

    @property
    def portable(self) -> bool:
        """Whether rows can be taken out of the cache, and put into it."""
        return isinstance(self._cache, Portable)

    def take(self, tokens: Sequence[int]) -> Rows:
        """The rows of `tokens`, the first ones that the cache holds, `reachable` ones (see
        `Portable.take`); those of a drafter's network with them, as far as it knows them."""
        rows = Rows(tuple(tokens), tuple(self._cache.take(len(tokens))))
        if self._draft_cache is None:
            return rows
        drafted = self._draft_cache.reachable(self._draft_cache.known(tokens))
        return rows._replace(drafted=drafted, drafter=tuple(self._draft_cache.take(drafted)))

    def reachable(self, rows: int) -> int:
        """How many of the first rows of the cache it can give or go back to: `rows`, or as many
        less as its checkpoints ask for."""
        return int(self._cache.checkpoint(rows).length)

    def put(self, rows: Rows) -> None:
        """Hold what `take` gave, and nothing else. Raises ValueError, and goes on holding what it
        held, if it is not of this model (see `Portable.put`)."""
        if self._draft_cache is not None:
            self._draft_cache.put(rows.drafter, rows.tokens[: rows.drafted])
        self._cache.put(rows.model, len(rows.tokens))
        self._held = list(rows.tokens)

    @property
    def rows(self) -> int:
        """Committed rows of the cache."""
        return int(self._cache.length)

    def keep(self, tokens: Sequence[int]) -> int:
        """Go back to the rows of `tokens`, the first ones that the cache holds, or to as many of
        them as it can go back to; returns how many that is."""
        place = self._cache.checkpoint(min(len(tokens), self._cache.length))
        self._cache.restore(place)
        self._held = list(tokens[: place.length])
        return int(place.length)


#: Tokens that are compared at once.
_STRIDE = 256


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    most = min(len(first), len(second))
    for start in range(0, most, _STRIDE):  # whole slices are compared at once: texts may be long
        some, others = list(first[start : start + _STRIDE]), list(second[start : start + _STRIDE])
        if some != others:
            pairs = enumerate(zip(some, others, strict=False), start)
            return next((i for i, (one, other) in pairs if one != other), most)
    return most


#: Yields text, and segments for passes, of which it is sent what came.
Work = Generator[str | list[Segment], Any, None]

#: Yields choices, and segments for passes, of which it is sent what came.
Tokens = Generator[Choice | list[Segment], Any, None]


class Generation:
    """Iterate to receive text; afterwards (or after closing early) `result` tells the rest.

    The text of a token is only released when its UTF-8 is complete and no stop string can begin
    in it. `origin` tells how the token came about that released the newest piece.
    """

    def __init__(
        self,
        session: Session,
        request: Request,
        on_progress: Callable[[int], None] | None,
        during_prompt: AbstractContextManager[None],
    ) -> None:
        self.session = session
        self._request = request
        self._on_progress = on_progress
        self._during_prompt = during_prompt
        self._decoder = StreamDecoder(session.tokenizer, skip_special=True, continuation=True)
        self._stop = StopStrings(request.stop)
        # Control tokens have no text in the answer: as stop strings they are looked for by id.
        named = map(session.tokenizer.special_id, request.stop)
        self._named = {
            id: text for id, text in zip(named, request.stop, strict=True) if id is not None
        }
        self._ended_by: str | None = None
        self._text: list[str] = []
        self._output: list[int] = []
        self._cycles: list[Cycle] = []
        self._cached = self._prompt_held = 0
        self._started = self._first_token = self._ended = 0.0
        self._finish_reason = "cancelled"
        self.origin = Origin.PLAIN
        #: What ended it among others (`Together`); alone, errors are raised.
        self.error: OrthrusError | None = None
        self._logprobs: list[LogProbs] = []
        self._work = self._run()
        self._pieces = self._alone()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def cancel(self) -> None:
        """End the generation where it is; text that was held back is dropped."""
        self._pieces.close()
        self._work.close()

    @property
    def cached(self) -> int:
        """Prompt tokens whose rows were there when it began."""
        return self._cached

    @property
    def output(self) -> Sequence[int]:
        """Tokens so far. Not to be written to."""
        return self._output

    @property
    def logprobs(self) -> Sequence[LogProbs]:
        """Log-probabilities so far, where they were asked for. Not to be written to."""
        return self._logprobs

    @property
    def in_prompt(self) -> bool:
        """Whether no token has been drawn yet."""
        return not self._first_token

    def advance(self, done: Done | None) -> tuple[list[Piece], list[Segment]]:
        """Go on until a pass is needed: the text that came, and the segments to run (`Together`).

        done: what came of the segments before, None at first. No segments: it has ended, by itself
        or by an error (`error`).
        """
        pieces: list[Piece] = []
        try:
            item = self._work.send(done)
            while isinstance(item, str):
                pieces.append(Piece(item, self.origin, len(self._output), len(self._cycles)))
                item = next(self._work)
        except StopIteration:
            return pieces, []
        except OrthrusError as error:
            self.error = error
            return pieces, []
        return pieces, item

    def _alone(self) -> Generator[str, None, None]:
        """Text, with passes of its own."""
        try:
            item = next(self._work)
            while True:
                if isinstance(item, str):
                    yield item
                    item = next(self._work)
                else:
                    (done,) = run_together(self.session.model, [item])
                    item = self._work.send(done)
        except StopIteration:
            return
        finally:
            self._work.close()

    @property
    def result(self) -> Result:
        """Everything about the generation; complete once the iteration has ended."""
        first, ended = self._first_token or self._ended, self._ended
        return Result(
            output=tuple(self._output),
            text="".join(self._text),
            finish_reason=self._finish_reason,
            cycles=tuple(self._cycles),
            statistics=count(
                self._cycles,
                prompt_tokens=self._prompt_held,
                cached_tokens=self._cached,
                output_tokens=len(self._output),
            ),
            timings=Timings(
                prompt=first - self._started,
                generation=ended - first,
                prompt_tokens=self._prompt_held - self._cached,
                generated_tokens=max(len(self._output) - 1, 0),
            ),
            logprobs=tuple(self._logprobs),
            stop_string=self._stop.hit or self._ended_by,
            selection=self._request.selection,
        )

    def _run(self) -> Work:
        self._started = self._ended = time.perf_counter()
        try:
            with closing(self._tokens()) as tokens:
                yield from self._read(tokens)
            if self._stop.hit is None:
                yield from self._show(self._decoder.flush())
                yield from self._emit(self._stop.flush())
        finally:
            # Whatever a cycle committed beyond the end, or a cancelled pass left, goes. So does the
            # row of the last token, which only some strategies have: where the next prompt starts
            # must not depend on the strategy.
            self.session.keep((*self._request.prompt, *self._output)[:-1])
            self._ended = time.perf_counter()

    def _read(self, tokens: Tokens) -> Work:
        """Tokens → text, up to the first that ends it."""
        done: Done | None = None
        while True:
            try:
                item = tokens.send(done)
            except StopIteration:
                self._finish_reason = "length"
                return
            done = None
            if isinstance(item, list):
                done = yield item
                continue
            self._output.append(item.token)
            if item.logprobs is not None:
                self._logprobs.append(item.logprobs)
            if item.token in self._named or item.token in self.session.tokenizer.eog:
                self._finish_reason = "stop"
                self._ended_by = self._named.get(item.token)
                return
            yield from self._show(self._decoder.push(item.token))
            if self._stop.hit is not None:
                self._finish_reason = "stop"
                return

    def _tokens(self) -> Tokens:
        """Output tokens one by one, whatever the strategy committed them in."""
        session, request = self.session, self._request
        room = session.n_ctx - len(request.prompt)
        limit = room if request.max_tokens < 0 else min(room, request.max_tokens)
        if limit == 0:
            return
        sequence = TokenSequence(
            session.model.config,
            session._cache,
            Sampler(request.sampling),
            list(request.prompt),
            request.top,
            request.constraint,
            session._draft_cache,
            session.tokenizer.eog | self._named.keys(),
        )
        policy = request.policy
        drafters = list(policy.drafters(sequence))
        self._cached = self._prompt_held = session.prepare(request.prompt, drafters)
        if isinstance(request.constraint, Forcing):
            drafters.append(ForcedDrafter(request.constraint))
        end = len(request.prompt) + limit
        with self._during_prompt:
            first = yield from prefill(
                sequence,
                drafters,
                batch=lambda: session.prompt_batch,
                places=request.places if session.model.config.hybrid is not None else (),
                on_progress=self._progress,
            )
        self._first_token = time.perf_counter()
        yield first
        while (most := end - len(sequence.tokens)) > 0:
            cycle, choices = yield from run_cycle(sequence, policy, drafters, most)
            self._cycles.append(cycle)
            for choice, self.origin in zip(choices, origins(cycle), strict=True):
                yield choice

    def _progress(self, held: int) -> None:
        """held: tokens of the prompt that the cache holds by now."""
        self._prompt_held = held
        if self._on_progress is not None:
            self._on_progress(held)

    def _show(self, text: str) -> Work:
        yield from self._emit(self._stop.push(text))

    def _emit(self, text: str) -> Work:
        if text:
            self._text.append(text)
            yield text
