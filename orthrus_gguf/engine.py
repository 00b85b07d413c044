"""Sessions: a prompt goes in, text streams out, and the cache stays usable for the next prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from orthrus_gguf.decode import PROMPT_BATCH, Cycle, Plan, Policy, decode, prefill
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.runtime.protocol import Model, TreeCache
from orthrus_gguf.sampling import Sampler, SamplingSettings
from orthrus_gguf.stats import Statistics, Timings, count
from orthrus_gguf.text.stop import StopStrings
from orthrus_gguf.text.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Request:
    """What to generate: a prompt and every setting that the text depends on, and the plan.

    plan: fixed, or a policy (such as the controller) that decides while decoding.
    max_tokens: limit on output tokens; negative means until the context is full.
    """

    prompt: tuple[int, ...]
    sampling: SamplingSettings
    plan: Plan | Policy
    max_tokens: int = -1
    stop: tuple[str, ...] = ()


class Origin(Enum):
    """How a token came about.

    PLAIN: from the AR view alone. DRAFTED: an accepted draft. CORRECTED: the AR view's token in
    place of a refused draft.
    """

    PLAIN = "plain"
    DRAFTED = "drafted"
    CORRECTED = "corrected"


def origins(cycle: Cycle) -> list[Origin]:
    """Origin of each token that a cycle committed."""
    refused = cycle.accepted < len(cycle.drafts)
    own = Origin.CORRECTED if refused else Origin.PLAIN
    return [Origin.DRAFTED] * cycle.accepted + [own]


@dataclass(frozen=True)
class Result:
    """A finished generation.

    output: generated ids, the end-of-text id included when there was one.
    finish_reason: "stop" (end-of-text id or stop string), "length" (token limit or end of the
        context) or "cancelled".
    """

    output: tuple[int, ...]
    text: str
    finish_reason: str
    cycles: tuple[Cycle, ...]
    statistics: Statistics
    timings: Timings


@runtime_checkable
class DeviceModel(Protocol):
    """A model that can decode on its own device, without waiting for the host between passes."""

    def decodes(self, plan: Plan | Policy) -> bool:
        """Whether it can follow this plan; if not, `decode.decode` can."""
        ...

    def decode(
        self,
        cache: Any,
        settings: SamplingSettings,
        tokens: list[int],
        plan: Any,
        max_tokens: int,
        stop_tokens: Sequence[int],
    ) -> Generator[Cycle, None, None]:
        """The contract of `decode.decode`, ending early after one of `stop_tokens`."""
        ...


class Session:
    """One conversation on one model: owns a cache and remembers which tokens it holds."""

    def __init__(
        self, model: Model, tokenizer: Tokenizer, n_ctx: int, *, prompt_batch: int = PROMPT_BATCH
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.n_ctx = n_ctx
        self.prompt_batch = prompt_batch
        self._cache: Any = model.new_cache(n_ctx)
        self._held: list[int] = []

    @property
    def verifies_trees(self) -> bool:
        """Whether plans may ask for trees of drafts."""
        return isinstance(self._cache, TreeCache)

    def generate(
        self, request: Request, *, on_progress: Callable[[int], None] | None = None
    ) -> Generation:
        """Start a generation; iterate over it to run it. Raises OrthrusError on a bad prompt.

        on_progress: called with the number of prompt tokens processed so far.
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
        return Generation(self, request, on_progress)

    def cycles(
        self, request: Request, sampler: Sampler, tokens: list[int], max_tokens: int
    ) -> Generator[Cycle, None, None]:
        """Decode after `tokens`, where it is fastest: on the model's device, or from here."""
        model, plan = self.model, request.plan
        if isinstance(model, DeviceModel) and model.decodes(plan):
            ends = sorted(self.tokenizer.eog)
            return model.decode(self._cache, request.sampling, tokens, plan, max_tokens, ends)
        return decode(model, self._cache, sampler, tokens, plan, max_tokens)

    def prepare(self, prompt: Sequence[int]) -> int:
        """Rewind the cache to its longest useful prefix of `prompt`; return that length.

        At least the last prompt token is left to be processed, since its logits are needed.
        """
        common = 0
        for held, wanted in zip(self._held, prompt[:-1], strict=False):
            if held != wanted:
                break
            common += 1
        self.keep(prompt[:common])
        return common

    def keep(self, tokens: Sequence[int]) -> None:
        """Rewind the cache to the rows of `tokens`, which must be the first ones that it holds."""
        self._cache.truncate(min(len(tokens), self._cache.length))
        self._held = list(tokens[: self._cache.length])


class Generation:
    """Iterate to receive text; afterwards (or after closing early) `result` tells the rest.

    The text of a token is only released when its UTF-8 is complete and no stop string can begin
    in it. `origin` tells how the token came about that released the newest piece.
    """

    def __init__(
        self, session: Session, request: Request, on_progress: Callable[[int], None] | None
    ) -> None:
        self._session = session
        self._request = request
        self._on_progress = on_progress
        self._decoder = StreamDecoder(session.tokenizer, skip_special=True, continuation=True)
        self._stop = StopStrings(request.stop)
        self._text: list[str] = []
        self._output: list[int] = []
        self._cycles: list[Cycle] = []
        self._cached = 0
        self._started = self._first_token = self._ended = 0.0
        self._finish_reason = "cancelled"
        self.origin = Origin.PLAIN
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def cancel(self) -> None:
        """End the generation where it is; text that was held back is dropped."""
        self._pieces.close()

    @property
    def result(self) -> Result:
        """Everything about the generation; complete once the iteration has ended."""
        prompt = len(self._request.prompt)
        first, ended = self._first_token or self._ended, self._ended
        return Result(
            output=tuple(self._output),
            text="".join(self._text),
            finish_reason=self._finish_reason,
            cycles=tuple(self._cycles),
            statistics=count(
                self._cycles,
                prompt_tokens=prompt,
                cached_tokens=self._cached,
                output_tokens=len(self._output),
            ),
            timings=Timings(
                prompt=first - self._started,
                generation=ended - first,
                prompt_tokens=prompt - self._cached,
                generated_tokens=max(len(self._output) - 1, 0),
            ),
        )

    def _run(self) -> Generator[str, None, None]:
        self._started = self._ended = time.perf_counter()
        try:
            with closing(self._tokens()) as tokens:
                for token in tokens:
                    self._output.append(token)
                    if token in self._session.tokenizer.eog:
                        self._finish_reason = "stop"
                        break
                    yield from self._show(self._decoder.push(token))
                    if self._stop.hit is not None:
                        self._finish_reason = "stop"
                        break
                else:
                    self._finish_reason = "length"
            if self._stop.hit is None:
                yield from self._show(self._decoder.flush())
                yield from self._emit(self._stop.flush())
        finally:
            # Whatever a cycle committed beyond the end, or a cancelled pass left, goes. So does the
            # row of the last token, which only some strategies have: where the next prompt starts
            # must not depend on the strategy.
            self._session.keep((*self._request.prompt, *self._output)[:-1])
            self._ended = time.perf_counter()

    def _tokens(self) -> Generator[int, None, None]:
        """Output tokens one by one, whatever the strategy committed them in."""
        session, request = self._session, self._request
        room = session.n_ctx - len(request.prompt)
        limit = room if request.max_tokens < 0 else min(room, request.max_tokens)
        if limit == 0:
            return
        self._cached = session.prepare(request.prompt)
        cache, sampler = session._cache, Sampler(request.sampling)
        logits = prefill(
            session.model,
            cache,
            request.prompt,
            batch=session.prompt_batch,
            on_progress=self._on_progress,
        )
        tokens = [*request.prompt, sampler.sample(logits, request.prompt)]
        self._first_token = time.perf_counter()
        yield tokens[-1]
        with closing(session.cycles(request, sampler, tokens, limit - 1)) as cycles:
            for cycle in cycles:
                self._cycles.append(cycle)
                for token, self.origin in zip(cycle.tokens, origins(cycle), strict=True):
                    yield token

    def _show(self, text: str) -> Iterator[str]:
        yield from self._emit(self._stop.push(text))

    def _emit(self, text: str) -> Iterator[str]:
        if text:
            self._text.append(text)
            yield text
