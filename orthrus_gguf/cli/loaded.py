"""From parsed flags to a model that is ready to answer."""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace

from tqdm import tqdm

from orthrus_gguf.auto.calibration import MachineCosts
from orthrus_gguf.auto.controller import Controller
from orthrus_gguf.cli import options
from orthrus_gguf.decode import Plan, Strategy, plan_for
from orthrus_gguf.engine import Generation, Request, Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import load_model
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.text.chat import ChatTemplate, Message
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer

#: Flags that shape drafts, beside --draft-width.
DRAFT_FLAGS = ("--draft-blocks", "--draft-cut", "--draft-tail", "--draft-tree")


@dataclass(frozen=True)
class Loaded:
    """A model with everything that the flags settle for all of its generations.

    template: None for a completion model and with `--raw`.
    """

    file: ModelFile
    tokenizer: Tokenizer
    template: ChatTemplate | None
    model: Model
    session: Session
    plan: Plan | Controller
    sampling: SamplingSettings
    max_tokens: int
    stop: tuple[str, ...]
    thinking: bool | None
    seconds: float

    @property
    def banner(self) -> str:
        """Model and runtime."""
        return f"{self.file.config.name} on {self.model.description}"

    def render(self, messages: list[Message]) -> str:
        """The prompt text of a conversation; without a template, its last message as it is."""
        if self.template is None:
            return messages[-1].content
        return self.template.render(messages, thinking=self.thinking)

    def request(self, prompt: str) -> Request:
        """A request to continue `prompt`, with the settings of the command line."""
        return Request(
            prompt=tuple(self.tokenizer.encode(prompt)),
            sampling=self.sampling,
            plan=self.plan,
            max_tokens=self.max_tokens,
            stop=self.stop,
        )

    def start(self, request: Request) -> Generation:
        """Begin a generation, with a progress bar while a long prompt is processed."""
        total = len(request.prompt)
        if total <= self.session.prompt_batch:
            return self.session.generate(request)
        bar = tqdm(total=total, desc="prompt", unit=" tokens", leave=False, disable=None)

        def on_progress(done: int) -> None:
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        return self.session.generate(request, on_progress=on_progress)


def load(path: str, args: argparse.Namespace, resources: ExitStack) -> Loaded:
    """Open `path` and load the model as `args` say; `resources` closes everything again."""
    started = time.perf_counter()
    file = resources.enter_context(ModelFile.open(path, args.heads))
    file.prefetch(heads=_strategy_name(args) not in (options.AUTO, Strategy.AR.value))
    tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
    template = None if args.raw else ChatTemplate.from_metadata(file.metadata, tokenizer)
    _check_template_flags(args, template, file)
    sampling = options.sampling_settings(args, file.metadata, tokenizer.eog)
    n_ctx = args.ctx_size or file.config.n_ctx_train
    settings = replace(options.runtime_settings(args), context=n_ctx)
    with loading_bar() as on_progress:
        model = load_model(file, settings, on_progress=on_progress, say=say)
    resources.enter_context(closing(model))
    session = Session(model, tokenizer, n_ctx, prompt_batch=args.batch_size)
    if args.draft_tree and not session.verifies_trees:
        raise OrthrusError(f"--draft-tree: {model.description} verifies chains only; leave it out")
    return Loaded(
        file=file,
        tokenizer=tokenizer,
        template=template,
        model=model,
        session=session,
        plan=_plan(args, model, file),
        sampling=sampling,
        max_tokens=args.predict,
        stop=tuple(args.stop),
        thinking=args.think,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def loading_bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar for runtimes that copy weights, if that takes more than a second."""
    with tqdm(desc="weights", unit="B", unit_scale=True, delay=1, leave=False, disable=None) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_progress


def say(text: str) -> None:
    """Status output: stderr, so that stdout holds nothing but the answer."""
    print(text, file=sys.stderr, flush=True)


def _strategy_name(args: argparse.Namespace) -> str:
    """The strategy asked for. A width alone asks for drafts."""
    given: str | None = args.strategy
    return given or (options.AUTO if args.draft_width is None else Strategy.TWO_PASS.value)


def _plan(args: argparse.Namespace, model: Model, file: ModelFile) -> Plan | Controller:
    """What the flags ask for."""
    name = _strategy_name(args)
    if name == options.AUTO:
        _refuse(args, name, "--draft-width", *DRAFT_FLAGS)
        costs = MachineCosts(model, identity(file), say)
        costs.prepare()
        return Controller(costs, model.config.block_size, lookup=args.lookup is not False)
    strategy = Strategy(name)
    if strategy is Strategy.AR:
        _refuse(args, name, "--draft-width", *DRAFT_FLAGS)
    else:
        two_pass = strategy is Strategy.TWO_PASS
        _refuse(args, name, "--draft-blocks" if two_pass else "--draft-tree")
    if not 0 <= args.draft_cut < 1:
        raise OrthrusError(f"--draft-cut {args.draft_cut}: expected a probability, 0 <= P < 1")
    plan = plan_for(model, strategy, args.draft_width, blocks=args.draft_blocks)
    return replace(
        plan,
        lookup=bool(args.lookup),
        tail=args.draft_tail,
        cut=args.draft_cut,
        tree=args.draft_tree or 0,
    )


def _refuse(args: argparse.Namespace, strategy: str, *flags: str) -> None:
    """Raise OrthrusError if one of these flags was given, which this strategy has no use for."""
    for flag in flags:
        if getattr(args, flag.removeprefix("--").replace("-", "_")):
            raise OrthrusError(f"{flag}: --strategy {strategy} has no use for it; leave it out")


def identity(file: ModelFile) -> str:
    """Tells model files apart: what is in them, not where they lie."""
    tensors = ((info.name, info.type.name, info.shape) for info in file.tensors.values())
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
