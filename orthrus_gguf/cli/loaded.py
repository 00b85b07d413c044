"""From parsed flags to a model that is ready to answer."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass

from tqdm import tqdm

from orthrus_gguf.chat import ChatTemplate, Message
from orthrus_gguf.cli import options
from orthrus_gguf.decode import Plan, Strategy, plan_for
from orthrus_gguf.engine import Generation, Request, Session
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model_file import ModelFile
from orthrus_gguf.runtime import load_model
from orthrus_gguf.sampling import SamplingSettings
from orthrus_gguf.segments import Model
from orthrus_gguf.tokenizer import Tokenizer, load_tokenizer


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
    plan: Plan
    sampling: SamplingSettings
    max_tokens: int
    stop: tuple[str, ...]
    thinking: bool | None
    seconds: float

    @property
    def banner(self) -> str:
        """Model, runtime, and why its heads are idle if they are."""
        line = f"{self.file.config.name} on {self.model.description}"
        if self.file.config.has_heads and self.plan.strategy is Strategy.AR:
            line += (
                "\nplain decoding: on a CPU drafts cost more than they gain (--strategy two-pass)"
            )
        return line

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
    tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=file.config.n_vocab)
    template = None if args.raw else ChatTemplate.from_metadata(file.metadata, tokenizer)
    _check_template_flags(args, template, file)
    sampling = options.sampling_settings(args, file.metadata, tokenizer.eog)
    model = resources.enter_context(closing(load_model(file, options.runtime_settings(args))))
    n_ctx = args.ctx_size or file.config.n_ctx_train
    return Loaded(
        file=file,
        tokenizer=tokenizer,
        template=template,
        model=model,
        session=Session(model, tokenizer, n_ctx, prompt_batch=args.batch_size),
        plan=plan_for(model, _strategy(args), args.draft_width),
        sampling=sampling,
        max_tokens=args.predict,
        stop=tuple(args.stop),
        thinking=args.think,
        seconds=time.perf_counter() - started,
    )


def say(text: str) -> None:
    """Status output: stderr, so that stdout holds nothing but the answer."""
    print(text, file=sys.stderr, flush=True)


def _strategy(args: argparse.Namespace) -> Strategy:
    """What the flags ask for. A width alone asks for drafts."""
    if args.strategy is not None:
        return Strategy(args.strategy)
    return Strategy.AR if args.draft_width is None else Strategy.TWO_PASS


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
