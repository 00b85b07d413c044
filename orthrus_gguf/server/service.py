"""What all endpoints share: the loaded model, and how a request becomes an answer."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple

from orthrus_gguf.drafting.plan import PLAIN, Plan, parse
from orthrus_gguf.drafting.sequence import Constraint
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.prefill.compression import Compression, Compressor, Selection
from orthrus_gguf.sampling import MAX_SEED, SamplingSettings
from orthrus_gguf.server.answers import Answer, cancel
from orthrus_gguf.server.api_errors import ApiError, wrong
from orthrus_gguf.server.events import BusyError, Event, Job
from orthrus_gguf.server.fields import Within
from orthrus_gguf.server.grammars import Grammars, from_gbnf, from_regex, from_schema
from orthrus_gguf.server.scheduler import Scheduler
from orthrus_gguf.server.splitter import THOUGHT
from orthrus_gguf.server.thoughts import Bound, bounded
from orthrus_gguf.text.chat import ChatTemplate
from orthrus_gguf.text.partings import partings
from orthrus_gguf.text.tokenizer import Tokenizer

#: Characters for each token of the context, of which some text may consist (long runs of spaces);
#: and tokens that the place where a text is cut may cost it.
CHARACTERS_PER_TOKEN, AT_THE_CUT = 16, 64

#: Seconds after which a client may try again when the queue is full.
RETRY = 1


@dataclass(kw_only=True)
class Speculative:
    """How to draft; never changes the text. strategy: as the command line spells plans."""

    enabled: bool = True
    strategy: str | None = None
    width: Annotated[int, Within(1, 1024)] | None = None


@dataclass(kw_only=True)
class Prefill:
    """How much of a long prompt to read, on a server with --prefill-drafter. May change the text.
    keep: share; threshold: tokens up to which prompts are read whole."""

    enabled: bool = True
    keep: Annotated[float, Within(0, 1)] | None = None
    threshold: Annotated[int, Within(0)] | None = None

    def over(self, usual: Compression, n_ctx: int) -> Compression:
        """What is asked for, over what is usual here. Raises OrthrusError."""
        if self.threshold is not None and self.threshold >= n_ctx:
            raise OrthrusError(
                f"threshold {self.threshold}: no prompt is longer, since the context of a"
                f" conversation has {n_ctx} tokens"
            )
        keep = usual.keep if self.keep is None else self.keep
        return Compression(keep, usual.threshold if self.threshold is None else self.threshold)


@dataclass(kw_only=True)
class Sampling:
    """Fields that all generating endpoints share. Those not given are as the server was started."""

    temperature: float | None = None
    top_k: Annotated[int, Within(-1, 2**31)] | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: Annotated[int, Within(-1, 2**31)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Annotated[int, Within(-1, MAX_SEED)] | None = None
    ignore_eos: bool = False
    logit_bias: dict[str, Annotated[float, Within(-100, 100)]] | None = None
    speculative: Speculative | None = None
    prefill: Prefill | None = None
    cache_prompt: bool = True
    id_slot: Annotated[int, Within(-1)] | None = None
    return_progress: bool = False
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    regex: str | None = None


class Prompt(NamedTuple):
    """Ids; thinking: whether the answer begins within a thought. places, selection: see
    `engine.Request`."""

    ids: tuple[int, ...]
    thinking: bool = False
    places: tuple[int, ...] = ()
    selection: Selection | None = None


def _nothing(line: str) -> None:
    """Says nothing."""


@dataclass
class Service:
    """The model and what the command line settled. thinking: default of Qwen3's switch.
    thought_tokens: what a thought may have, where a request does not say; -1: any number.
    thought_end: is said in place of more. say: writes a line to the log."""

    name: str
    aliases: tuple[str, ...]
    config: ModelConfig
    description: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    scheduler: Scheduler
    plan: Plan
    sampling: SamplingSettings
    random_seed: bool
    max_tokens: int
    stop: tuple[str, ...]
    thinking: bool | None
    n_ctx: int
    thought_tokens: int = -1
    thought_end: str = ""
    compressor: Compressor | None = None
    say: Callable[[str], None] = _nothing
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.grammars = Grammars(self.tokenizer)
        self._closing = tuple(
            self.tokenizer.encode(self.thought_end + THOUGHT, add_bos=False, add_eos=False)
        )

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
        more: Mapping[str, Any] | None = None,
    ) -> tuple[str, Prompt]:
        """The prompt of a conversation, as text and as ids. Takes a moment: call it in a thread.

        Contents cannot speak for the system. An assistant's message at the end is gone on with.
        """
        if self.template is None:
            raise ApiError(f"{self.name} has no chat template; use /v1/completions")
        begun = ""
        if len(messages) > 1 and messages[-1].get("role") == "assistant":
            if messages[-1].get("tool_calls"):
                raise wrong(f"messages[{len(messages) - 1}]", "a call of a tool needs its result")
            begun = str(messages[-1].get("content") or "")
            messages = messages[:-1]
        # Templates leave out parts of what an assistant said, but of nobody else's: this much is
        # known before they run.
        others = [m.get("content") or "" for m in messages if m.get("role") != "assistant"]
        if sum(map(len, others)) > self.n_ctx * CHARACTERS_PER_TOKEN:
            self.encoded("\n".join(others), "messages")
        settings: dict[str, Any] = {
            "thinking": self.thinking if thinking is None else thinking,
            "tools": tools,
            "guard": self.tokenizer.guard,
            "more": more,
        }
        try:
            text = self.template.render(messages, **settings)
        except OrthrusError as error:
            raise ApiError(str(error), param="messages") from error
        thinks = text.rstrip().endswith("<think>") and not begun
        text += self.tokenizer.guard(begun)
        ids = tuple(self.encoded(text, "messages", guarded=True))
        places: tuple[int, ...] = ()
        if self.config.hybrid is not None and not begun:
            places = partings(self.template, self.tokenizer, text, ids, messages, **settings)
        return text, Prompt(ids, thinks, places)

    def shortened(
        self, prompt: Prompt, given: Sampling, contents: Sequence[str] | None = None
    ) -> Prompt:
        """As much of a prompt as is to be read. May take long: call it in a thread. Raises
        ApiError.

        contents: texts of its messages that may be shortened; None: it is one text.
        """
        asked = given.prefill
        if self.compressor is None:
            if asked is not None and asked.enabled:
                raise wrong("prefill", "this server was started without --prefill-drafter")
            return prompt
        known = all(0 <= token < self.tokenizer.n_vocab for token in prompt.ids)
        if (asked is not None and not asked.enabled) or not known or not prompt.ids:
            return prompt  # `job` refuses what makes no sense
        usual = self.compressor.compression
        try:
            compression = usual if asked is None else asked.over(usual, self.n_ctx)
            selection = self.compressor.select(prompt.ids, contents, compression)
        except OrthrusError as error:
            raise wrong("prefill", str(error)) from error
        if selection is None:
            return prompt
        self.say(f"prompt shortened: {selection.words}")
        places = selection.places(prompt.places)
        return prompt._replace(ids=selection.tokens, places=places, selection=selection)

    def encoded(self, text: str, param: str, *, guarded: bool = False) -> list[int]:
        """Ids of a prompt. Takes a moment: call it in a thread. Raises ApiError, which names
        `param`; for a text that is far too long without reading all of it, which would take
        seconds, and memory."""
        try:
            most = self.n_ctx * CHARACTERS_PER_TOKEN
            if len(text) > most:
                count = len(self.tokenizer.encode(text[:most], guarded=guarded))
                if count > self.n_ctx + AT_THE_CUT:
                    raise self._too_long(count, cut=True)
            return self.tokenizer.encode(text, guarded=guarded)
        except OrthrusError as error:
            raise wrong(param, str(error)) from error

    def _too_long(self, count: int, *, cut: bool = False) -> ApiError:
        """cut: there are more, which nobody counted."""
        return ApiError(
            f"the prompt has {'more than ' if cut else ''}{count} tokens, and the context of a"
            f" conversation {self.n_ctx}; shorten it, or start the server with a larger -c",
            kind="exceed_context_size_error",
            n_prompt_tokens=count,
            n_ctx=self.n_ctx,
        )

    def settings(self, given: Sampling, index: int = 0) -> SamplingSettings:
        """What to sample with; index: of several answers to one request."""
        seed = self.sampling.seed
        if given.seed is not None and given.seed >= 0:
            seed = given.seed
        elif self.random_seed or given.seed == -1:
            seed = secrets.randbits(32)
        changes: dict[str, Any] = {"seed": (seed + index) % (MAX_SEED + 1)}
        for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "repeat_last_n"):
            changes[name] = getattr(given, name)
        for name in ("presence_penalty", "frequency_penalty"):
            changes[name] = getattr(given, name)
        changes = {name: value for name, value in changes.items() if value is not None}
        banned = {*self.sampling.banned, *(self.tokenizer.eog if given.ignore_eos else ())}
        for token, bias in (given.logit_bias or {}).items():
            if not token.isdecimal() or int(token) >= self.tokenizer.n_vocab:
                raise wrong(f"logit_bias.{token}", "expected the id of a token")
            if bias != -100 and bias != 0:
                raise wrong(f"logit_bias.{token}", "only -100, which bans a token, is supported")
            banned |= {int(token)} if bias else set()
        try:
            return replace(self.sampling, **changes, banned=tuple(sorted(banned)))
        except OrthrusError as error:
            raise ApiError(str(error), param=str(error).partition(":")[0]) from error

    def drafting(self, given: Speculative | None) -> Plan:
        """How to draft for a request."""
        if given is None:
            return self.plan
        if not given.enabled:
            return PLAIN
        try:
            plan = self.plan if given.strategy is None else parse(given.strategy)
            if given.width is not None:
                plan = parse("two-pass") if plan.strategy is None else plan
                plan = replace(plan, width=given.width) if plan.drafts else plan
            return plan.fitted(self.config)
        except OrthrusError as error:
            raise wrong("speculative", str(error)) from error

    def grammar(self, given: Sampling) -> str | None:
        """The grammar of llama-server's fields, if one is asked for."""
        asked = {
            "grammar": given.grammar and (lambda: from_gbnf(given.grammar or "")),
            "json_schema": given.json_schema is not None
            and (lambda: from_schema(given.json_schema or {})),
            "regex": given.regex and (lambda: from_regex(given.regex or "")),
        }
        named = [name for name, make in asked.items() if make]
        if len(named) > 1:
            raise wrong(named[1], f"excludes {named[0]}")
        for name, make in asked.items():
            if make:
                return compiled(name, make)
        return None

    def job(
        self,
        prompt: Prompt,
        given: Sampling,
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        top: int = 0,
        grammar: str | None = None,
        thought_tokens: int = -1,
        index: int = 0,
    ) -> Job:
        """A job that nobody listens to yet (`submit_all` has it listened to). thought_tokens: that
        a thought may have; -1: any number. Raises ApiError."""
        count = len(prompt.ids)
        if not count:
            raise wrong("prompt", "is empty: there is no token to continue from")
        if count >= self.n_ctx:
            raise self._too_long(count)
        if not all(stop):
            raise wrong("stop", "a stop string must not be empty")
        if not all(0 <= token < self.tokenizer.n_vocab for token in prompt.ids):
            raise wrong("prompt", "holds ids that are not in the vocabulary")
        constraint: Constraint | None = None
        plan = self.drafting(given.speculative)
        drafts = plan != PLAIN
        if grammar is not None:
            try:
                constraint = self.grammars.constraint(grammar, count, drafts=drafts)
            except OrthrusError as error:
                raise ApiError(str(error), param="grammar") from error
        if thought_tokens >= 0:
            bound = Bound(self.tokenizer, self._closing, thought_tokens)
            constraint = bounded(bound, constraint, count, begun=prompt.thinking, drafts=drafts)
        return Job(
            prompt.ids,
            self.settings(given, index),
            plan,
            _nobody,
            self.max_tokens if max_tokens is None else max_tokens,
            (*self.stop, *stop),
            top,
            constraint,
            None if given.id_slot is None or given.id_slot < 0 else given.id_slot,
            given.cache_prompt,
            prompt.places,
            selection=prompt.selection,
        )

    def submit_all(self, jobs: Sequence[Job]) -> list[Answer]:
        """Let all of them begin, or none. Raises ApiError (429) where too many wait."""
        answers: list[Answer] = []
        try:
            answers.extend(map(self._submit, jobs))
        except ApiError:
            cancel(answers)
            raise
        return answers

    def _submit(self, job: Job) -> Answer:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Event] = asyncio.Queue()

        def listen(event: Event) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, event)

        job.listener = listen
        try:
            self.scheduler.submit(job)
        except BusyError as error:
            raise ApiError(str(error), status=429, retry_after=RETRY) from error
        return Answer(self.scheduler, job, queue)


def _nobody(event: Event) -> None:
    """Listens to nothing."""


def compiled(param: str, make: Any) -> str:
    """A grammar; ApiError names the field that it comes from."""
    try:
        return str(make())
    except OrthrusError as error:
        raise ApiError(f"{param}: {error}", param=param) from error
