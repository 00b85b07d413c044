"""From parsed flags to a model that is ready to answer."""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from orthrus_gguf.auto.calibration import MachineCosts
from orthrus_gguf.auto.choice import policy_for
from orthrus_gguf.cli import options
from orthrus_gguf.cli.drafter import open_drafter
from orthrus_gguf.cli.heads import open_model
from orthrus_gguf.cli.prefill import check_prefill_options, open_compressor
from orthrus_gguf.drafting.plan import AUTO, Plan, Strategy, widths
from orthrus_gguf.drafting.policy import Policy
from orthrus_gguf.drafting.registry import lacks, optional_names
from orthrus_gguf.engine import Generation, Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile, WeightFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.records import dataclass
from orthrus_gguf.request import Request
from orthrus_gguf.runtime.load import RuntimeSettings, fitting_context, load_model, resolve
from orthrus_gguf.runtime.protocol import Loading, Model
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text import chat_process
from orthrus_gguf.text.chat import ChatTemplate, Message
from orthrus_gguf.text.partings import partings
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from orthrus_gguf.prefill.compression import Compressor

#: Flags that shape drafts, beside --draft-width.
DRAFT_FLAGS = ("--draft-blocks", "--draft-cut", "--draft-tail", "--draft-tree")


#: Seconds after which progress is shown.
PATIENCE = 1.0

#: Seconds between two looks at it.
REFRESH = 0.25


@dataclass(frozen=True)
class Loaded:
    """A model with everything that the flags settle for all of its generations.

    settings: how it runs, with the runtime that was chosen.
    template: None for a completion model and with `--raw`. plan: what the flags ask for, with the
    defaults of this model; policy: what follows it, for all of its generations. costs: what
    passes cost here, as far as it is known. compressor: what shortens prompts, if anything does.
    """

    file: ModelFile
    drafter: DrafterFile | MtpFile | None
    tokenizer: Tokenizer
    template: ChatTemplate | None
    settings: RuntimeSettings
    model: Model
    session: Session
    plan: Plan
    policy: Policy
    costs: MachineCosts
    sampling: SamplingSettings
    max_tokens: int
    stop: tuple[str, ...]
    thinking: bool | None
    special_in_prompt: bool
    seconds: float
    compressor: Compressor | None = None

    @property
    def banner(self) -> str:
        """Model and runtime."""
        return f"{self.file.config.name} on {self.model.description}"

    def render(self, messages: list[Message]) -> str:
        """The prompt text of a conversation; without a template, its last message as it is."""
        if self.template is None:
            content = messages[-1].content
            return content if self.special_in_prompt else self.tokenizer.guard(content)
        return self.template.render(messages, **self._template_settings)

    @property
    def _template_settings(self) -> dict[str, Any]:
        guard = {} if self.special_in_prompt else {"guard": self.tokenizer.guard}
        return {"thinking": self.thinking, **guard}

    def turn(self, messages: list[Message]) -> Request:
        """A request to answer the last of these messages, such that the next turn can go on from
        it."""
        text = self.render(messages)
        request = self.request(text)
        if self.template is None or self.file.config.hybrid is None:
            return request
        places = partings(
            self.template,
            self.tokenizer,
            text,
            request.prompt,
            messages,
            **self._template_settings,
        )
        return replace(request, places=places)

    def request(self, prompt: str) -> Request:
        """A request to continue `prompt`, as render() gives it, with the settings of the command
        line."""
        return Request(
            prompt=tuple(self.tokenizer.encode(prompt, guarded=not self.special_in_prompt)),
            sampling=self.sampling,
            policy=self.policy,
            max_tokens=self.max_tokens,
            stop=self.stop,
        )

    def shortened(self, request: Request, messages: Sequence[Message]) -> Request:
        """The same request with as much of its prompt as is to be read.

        messages: that it was made of. Raises OrthrusError.
        """
        if self.compressor is None:
            return request
        contents = None
        if self.template is not None:
            from orthrus_gguf.prefill.compression import COMPRESSIBLE

            contents = [m.content for m in messages if m.role in COMPRESSIBLE]
        bar = PromptBar(len(request.prompt), "scoring")
        with bar:
            selection = self.compressor.select(request.prompt, contents, on_progress=bar.update)
        if selection is None:
            return request
        places = selection.places(request.places)
        return replace(request, prompt=selection.tokens, places=places, selection=selection)

    @staticmethod
    def tell(request: Request) -> None:
        """A line about a prompt that was shortened."""
        if request.selection is not None:
            say(f"prompt shortened: {request.selection.words}")

    def start(self, request: Request) -> Generation:
        """Begin a generation, with a progress bar while its prompt takes long."""
        bar = PromptBar(len(request.prompt))
        return self.session.generate(request, on_progress=bar.update, during_prompt=bar)


def load(
    path: str, args: argparse.Namespace, resources: ExitStack, *, conversations: int = 1
) -> Loaded:
    """Open `path` and load the model as `args` say; `resources` closes everything again.

    conversations: how many there will be at once, each with a context of its own.
    """
    started = time.perf_counter()
    if not args.raw:
        chat_process.prepare()
    file = resources.enter_context(open_model(path, args, say))
    file.prefetch(heads=_strategy_name(args) not in (AUTO, Strategy.AR.value))
    settings = resolve(options.runtime_settings(args), say, file.config)
    check_prefill_options(args, settings)
    mtp = args.mtp if args.mtp is not None else _strategy_name(args) != Strategy.AR.value
    drafter, config = open_drafter(
        args.drafter, file, settings.name, resources, say, mtp=mtp, ids=args.draft_ids
    )
    plan = _plan(args, config)
    trained = file.config.n_ctx_train
    n_ctx = args.ctx_size or max(
        fitting_context(file, settings, trained * conversations, say, drafter) // conversations, 1
    )
    settings = replace(settings, context=n_ctx * conversations)
    with loading_bar() as on_progress:
        model = load_model(file, settings, drafter=drafter, on_progress=on_progress, say=say)
    resources.enter_context(closing(model))
    # While its weights come (see `Loading`).
    tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
    for note in (*file.notes, *tokenizer.notes):
        say(note)
    template = None if args.raw else ChatTemplate.from_metadata(file.metadata, tokenizer)
    _check_template_flags(args, template, file)
    sampling = options.sampling_settings(args, file.metadata, tokenizer.eog)
    if isinstance(model, Loading):
        model.wait()
    costs = MachineCosts(model, identity(file), say)
    costs.recall()  # the number of threads that was measured serves every strategy
    compressor = open_compressor(
        args, file, model, tokenizer, replace(settings, context=n_ctx), resources, say
    )
    session = Session(model, tokenizer, n_ctx, prompt_batch=args.batch_size)
    if n_ctx > file.config.n_ctx_train:
        say(
            f"-c {n_ctx}: {file.config.name} was trained for {file.config.n_ctx_train} tokens of"
            " context; the text may lose its sense beyond them"
        )
    return Loaded(
        file=file,
        drafter=drafter,
        tokenizer=tokenizer,
        template=template,
        settings=settings,
        model=model,
        session=session,
        plan=plan,
        policy=policy_for(plan, model.config, lambda: _prepared(costs)),
        costs=costs,
        sampling=sampling,
        max_tokens=args.predict,
        stop=tuple(args.stop),
        thinking=args.think,
        special_in_prompt=args.special_in_prompt,
        seconds=time.perf_counter() - started,
        compressor=compressor,
    )


class PromptBar:
    """Progress of a prompt on a terminal, shown when it takes longer than PATIENCE.

    By time, not by passes, one of which may take minutes: a thread shows the bar, and lets its
    clock run. `with` it, while the prompt is processed.
    """

    def __init__(self, total: int, what: str = "prompt") -> None:
        self._total, self._done, self._what = total, 0, what
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> None:
        if sys.stderr.isatty():
            self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def update(self, done: int) -> None:
        """done: tokens of the prompt that are processed."""
        self._done = done

    def _show(self) -> None:
        if self._over.wait(PATIENCE):
            return
        from tqdm import tqdm

        with tqdm(total=self._total, desc=self._what, unit=" tokens", leave=False) as bar:
            while not self._over.wait(REFRESH):
                bar.n = self._done
                bar.refresh()


@contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar for runtimes that copy weights, if that takes more than a second."""
    with ExitStack() as stack:

        @cache
        def bar() -> Any:
            from tqdm import tqdm

            return stack.enter_context(
                tqdm(
                    desc="weights",
                    unit="B",
                    unit_scale=True,
                    delay=PATIENCE,
                    leave=False,
                    disable=None,
                )
            )

        def on_progress(done: int, total: int) -> None:
            bar().total = total
            bar().update(done - bar().n)

        yield on_progress


def say(text: str) -> None:
    """Status output: stderr, so that stdout holds nothing but the answer."""
    print(text, file=sys.stderr, flush=True)


def _strategy_name(args: argparse.Namespace) -> str:
    """The strategy asked for. A width alone asks for drafts."""
    given: str | None = args.strategy
    return given or (AUTO if args.draft_width is None else Strategy.TWO_PASS.value)


def _plan(args: argparse.Namespace, config: ModelConfig) -> Plan:
    """What the flags ask for. Raises OrthrusError for what makes no sense, naming the flag."""
    name = _strategy_name(args)
    wanted = {drafter: getattr(args, drafter.replace("-", "_")) for drafter in optional_names()}
    for drafter, said in wanted.items():
        if said and (needed := lacks(drafter, config)):
            raise OrthrusError(f"--{drafter}: needs {needed}")
    if name == AUTO:
        _refuse(args, name, "--draft-width", *DRAFT_FLAGS)
        return Plan(None, also=tuple(n for n, said in wanted.items() if said is False))
    strategy, width = Strategy(name), args.draft_width
    if strategy is Strategy.AR:
        _refuse(args, name, "--draft-width", *DRAFT_FLAGS)
    else:
        two_pass = strategy is Strategy.TWO_PASS
        _refuse(args, name, "--draft-blocks" if two_pass else "--draft-tree")
        block, _ = widths(config, fused=not two_pass)
        if block is None:
            raise OrthrusError(
                f"strategy {name}: {config.name} has no diffusion heads; use --strategy ar, or name"
                f" a heads file with --heads{', or a drafter with --drafter' if two_pass else ''}"
            )
        if width is not None and not 1 <= width <= block:
            raise OrthrusError(
                f"--draft-width {width}: must lie in 1..{block}, the model's block size"
            )
    if not 0 <= args.draft_cut < 1:
        raise OrthrusError(f"--draft-cut {args.draft_cut}: expected a probability, 0 <= P < 1")
    return Plan(
        strategy,
        width,
        args.draft_blocks,
        also=tuple(n for n, said in wanted.items() if said),
        tail=args.draft_tail,
        tree=args.draft_tree or 0,
        cut=args.draft_cut,
    ).fitted(config)


def _prepared(costs: MachineCosts) -> MachineCosts:
    """What passes cost here, measured now if it is not remembered."""
    costs.prepare()
    return costs


def _refuse(args: argparse.Namespace, strategy: str, *flags: str) -> None:
    """Raise OrthrusError if one of these flags was given, which this strategy has no use for."""
    for flag in flags:
        if getattr(args, flag.removeprefix("--").replace("-", "_")):
            raise OrthrusError(f"{flag}: --strategy {strategy} has no use for it; leave it out")


def identity(file: WeightFile) -> str:
    """Tells model files apart: what is in them, not where they lie."""
    tensors = ((info.name, info.type.name, info.shape) for info in file.tensors.values())
    import hashlib  # takes long, for its cryptography

    digest = hashlib.sha256(repr(sorted(tensors)).encode()).hexdigest()
    return f"{file.config.name} {digest[:16]}"


def _check_template_flags(
    args: argparse.Namespace, template: ChatTemplate | None, file: ModelFile
) -> None:
    name = file.paths[0]
    if template is None and args.system_prompt is not None:
        raise OrthrusError(
            f"-sys: {name} runs without a chat template (a completion model, or --raw); put the"
            " text into the prompt"
        )
    if args.think is not None and (template is None or not template.supports_thinking):
        flag = "--think" if args.think else "--no-think"
        raise OrthrusError(f"{flag}: {name} has no chat template with such a switch; leave it out")
    if template is None and not args.raw:
        say(f"{name}: no chat template, so the prompt is continued as it is")
