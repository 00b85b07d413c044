"""From a base to its heads: prompts, answers, training, files, report."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.belong import fingerprint
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.load import RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.text.chat import ChatTemplate
from orthrus_gguf.text.tokenizer import Tokenizer, load_tokenizer
from orthrus_gguf.training.answers import Answer, Wanted, Writer, read_answers, write_answers
from orthrus_gguf.training.base import base_file, mask_token
from orthrus_gguf.training.device import choose
from orthrus_gguf.training.forecast import forecast
from orthrus_gguf.training.network import Network
from orthrus_gguf.training.output import write_checkpoint, write_sidecar
from orthrus_gguf.training.prompts import Invented, read_prompts
from orthrus_gguf.training.report import decoded
from orthrus_gguf.training.trainer import Recipe, Trainer, losses_noted

Say = Callable[[str], None]

#: What `auto` gains with trained heads, by hardware and kind of text, told from a model with them
#: and texts held out.
Gains = Callable[[ModelFile, Model, Sequence[Answer], Say], dict[str, dict[str, float]]]

_ANSWERS = "answers.jsonl"


@dataclass(frozen=True)
class Settings:
    """What the flags say. prompts: None lets the base write them. heads: to begin with. device,
    dtype: see `device.choose`. minutes: between checkpoints. keep_bytes: see `Trainer`. dry_run:
    end after the forecast. finish: take the heads as the checkpoint has them."""

    base: str
    folder: Path
    prompts: Path | None
    heads: Path | None
    mask: int | None
    wanted: Wanted
    steps: int
    rate: float
    texts: int
    blocks: int
    rows: int
    decay: float
    for_auto: bool
    device: str
    dtype: str
    threads: int | None
    minutes: float
    keep_bytes: int
    dry_run: bool
    finish: bool


def train(settings: Settings, say: Say, gains: Gains) -> dict[str, Any] | None:
    """Do what is left to do in the folder; the report, which is in the folder too, or None after a
    dry run. gains: see `Gains`. Raises OrthrusError."""
    folder = settings.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OrthrusError(f"{folder}: cannot be made: {error.strerror}; name another") from error
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with ExitStack() as stack:
        stack.enter_context(_alone(folder))
        stack.enter_context(_told_where_full(folder))
        path = base_file(settings.base, folder)
        base = stack.enter_context(ModelFile.open(path))
        if base.config.has_heads:
            raise OrthrusError(
                f"{path}: holds heads already; take them off with orthrus-convert --split, and go "
                "on from them with --heads"
            )
        if settings.wanted.context > base.config.n_ctx_train:
            raise OrthrusError(
                f"--context {settings.wanted.context}: {path} was trained on "
                f"{base.config.n_ctx_train} tokens; lower it"
            )
        start = base
        if settings.heads is not None:
            start = stack.enter_context(ModelFile.open(path, settings.heads))
        tokenizer = load_tokenizer(base.metadata, path=path, n_vocab=base.config.n_vocab)
        mask = mask_token(start, tokenizer, settings.mask)
        _same_folder(settings, base)
        return _stages(settings, base, start, tokenizer, mask, say, gains)


def _stages(
    settings: Settings,
    base: ModelFile,
    start: ModelFile,
    tokenizer: Tokenizer,
    mask: int,
    say: Say,
    gains: Gains,
) -> dict[str, Any] | None:
    wanted, folder = settings.wanted, settings.folder
    device = choose(settings.device, settings.dtype, settings.threads, say)
    template = ChatTemplate.from_metadata(base.metadata, tokenizer)
    given = None
    if settings.prompts is not None:
        given = read_prompts(settings.prompts, tokenizer, template, wanted.prompt_tokens)
    invented = Invented(tokenizer, template)
    recipe = Recipe(
        *(settings.steps, settings.rate, settings.texts, settings.blocks, settings.rows),
        *(mask, wanted.seed, settings.decay, str(device.dtype).removeprefix("torch.")),
        settings.for_auto,
    )
    network = Network(start, device.dtype, device.tensors, device.compiler)
    model = load_model(base, device.runtime, say=say)
    try:
        writer = Writer(model, tokenizer, wanted.context)
        left = wanted.count - len(read_answers(folder / _ANSWERS))
        expected = forecast(
            *(writer, network, recipe, wanted),
            texts=max(0, left),
            steps=max(0, settings.steps - len(losses_noted(folder))),
            keep_bytes=settings.keep_bytes,
        )
        say(expected.text)
        if settings.dry_run:
            return None
        progress = _progress(wanted.count, say)
        answers = write_answers(folder / _ANSWERS, writer, wanted, given, invented, progress)
    finally:
        model.close()
    trainer = Trainer(network, answers, recipe, folder, keep_bytes=settings.keep_bytes)
    if trainer.step:
        say(f"going on from step {trainer.step} of {recipe.steps}")
    if not settings.finish:
        trainer.run(settings.minutes, say)
    elif not trainer.step:
        raise OrthrusError(f"{folder}: --finish: there is no checkpoint yet; leave it out")
    return _finish(settings, base, tokenizer, trainer, device.runtime, say, gains)


def _finish(
    settings: Settings,
    base: ModelFile,
    tokenizer: Tokenizer,
    trainer: Trainer,
    runtime: RuntimeSettings,
    say: Say,
    gains: Gains,
) -> dict[str, Any]:
    """Write the heads, open them as anyone would, and count what they are worth."""
    folder, recipe = settings.folder, trainer.recipe
    heads = trainer.heads()
    sidecar = folder / "heads.gguf"
    write_checkpoint(folder, base, heads, recipe.rows, recipe.mask)
    write_sidecar(sidecar, base, heads, recipe.rows, recipe.mask)
    with ModelFile.open(base.paths[0], sidecar) as pair:
        model = load_model(pair, runtime, say=say)
        try:
            found = decoded(model, tokenizer, trainer.held, settings.wanted.context)
            gained = gains(pair, model, trainer.held, say)
        finally:
            model.close()
    expected = asdict(trainer.measure())
    report = {
        "recipe": asdict(recipe),
        "decoded": found,
        "expected": expected,
        "gains": gained,
        "losses": losses_noted(folder),
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    domains = ", ".join(f"{name} {value:.2f}" for name, value in found["by_domain"].items())
    rows = " ".join(f"{100 * share:.0f}" for share in found["by_position"])
    say(
        f"{found['texts']} texts held out, decoded: {found['tokens_per_cycle']:.2f} tokens per "
        f"cycle ({domains}); drafts accepted by position, %: {rows}; text "
        f"{'the same as' if found['same_text'] else 'NOT that of'} plain decoding"
    )
    say(f"orthrus-run -m {base.paths[0]} --heads {sidecar}")
    return report


def _progress(count: int, say: Say) -> Callable[[int, int], None]:
    def progress(texts: int, tokens: int) -> None:
        if texts % 64 == 0 or texts == count:
            say(f"{texts} of {count} texts, {tokens} answer tokens")

    return progress


def _same_folder(settings: Settings, base: ModelFile) -> None:
    """Note what the folder's answers depend on; refuse a folder of another training."""
    wanted = asdict(settings.wanted)
    del wanted["count"]  # more may be asked for later
    prompts = None if settings.prompts is None else str(settings.prompts.resolve())
    mine = {"base": fingerprint(base.tensors, base.data), "prompts": prompts, **wanted}
    path = settings.folder / "training.json"
    if path.exists():
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OrthrusError(f"{path}: is damaged; name another folder") from error
        unlike = [name for name in mine if theirs.get(name) != mine[name]]
        if unlike:
            raise OrthrusError(
                f"{settings.folder}: holds a training with another {unlike[0]}; name another "
                "folder, or give the same settings"
            )
        return
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(mine, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


@contextmanager
def _told_where_full(folder: Path) -> Iterator[None]:
    """What the system says of a full disk names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OrthrusError(
            f"{folder}: cannot be written to: {error.strerror}; what is there is kept: make room "
            "and give the command again"
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other trainings out of the folder."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OrthrusError(f"{folder}: another training is under way there") from error
        yield
