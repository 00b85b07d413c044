"""The training loop: steps, checkpoints, and going on where one was left."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.signals import deferred
from orthrus_gguf.training.answers import Answer
from orthrus_gguf.training.blocks import (
    Acceptance,
    Batch,
    Library,
    acceptance,
    draw_anchors,
    lay,
    loss_and_hits,
    usable,
)
from orthrus_gguf.training.cycles import Cycles
from orthrus_gguf.training.network import Network

_CHECKPOINT = "checkpoint.pt"
_LOSSES = "losses.jsonl"

#: Texts held out that the progress line is about, at most.
_MEASURED = 64


@dataclass(frozen=True)
class Recipe:
    """What the heads that come out depend on, besides base and texts.

    steps: in all; the learning rate rises over the first twentieth of them, and falls as a cosine
    to a twentieth of `rate`. texts, blocks: texts of a step, and blocks on each. rows: of a block.
    dtype: of matrix products. for_auto: blocks are laid where `Cycles` has them, not evenly, and
    rows are weighed by `reach`; otherwise by `decay`, see `loss_and_hits`.
    """

    steps: int
    rate: float
    texts: int
    blocks: int
    rows: int
    mask: int
    seed: int
    decay: float = 0.85
    dtype: str = "float32"
    for_auto: bool = False

    @property
    def weighed(self) -> float | None:
        """How the rows of a block are, see `loss_and_hits`."""
        return None if self.for_auto else self.decay

    @property
    def averaged(self) -> int:
        """Steps that the mean of the heads goes back, roughly."""
        return max(1, self.steps // 20)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.steps // 20))
        return self.rate * warm * max(0.05, (1 + math.cos(math.pi * step / self.steps)) / 2)


class Trainer:
    """Trains the heads of `network` on texts, in `folder`, from where a checkpoint there left off.

    Every step draws from a seed of its own: training that was cut short and resumed gives the same
    losses as training that was not (on the same machine, with as many threads).
    """

    def __init__(
        self,
        network: Network,
        answers: Sequence[Answer],
        recipe: Recipe,
        folder: Path,
        *,
        keep_bytes: int,
    ) -> None:
        """keep_bytes: memory for what the AR view says of texts. Raises OrthrusError."""
        self.network, self.recipe, self._folder = network, recipe, folder
        fit = [answer for answer in answers if usable(answer)]
        self.held = [answer for answer in fit if answer.held]
        self._texts = [answer for answer in fit if not answer.held]
        if not self._texts or not self.held:
            raise OrthrusError(
                f"{folder}: {len(self._texts)} texts to train on and {len(self.held)} held out, "
                "of two tokens and more; ask for more with --texts, or give other --prompts"
            )
        self._library = Library(network, keep_bytes)
        self._cycles = Cycles(self._texts) if recipe.for_auto else None
        self._optimizer = torch.optim.AdamW(
            network.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.0
        )
        self._means = [head.detach().clone() for head in network.parameters()]
        self.step = 0
        self._resume()

    def batch(self, step: int) -> Batch:
        """What is learned from in a step."""
        recipe, cycles = self.recipe, self._cycles
        rng = np.random.default_rng((recipe.seed, step))
        shares = None if cycles is None else cycles.shares
        chosen = rng.choice(len(self._texts), recipe.texts, p=shares)
        texts = [self._library.text(self._texts[i]) for i in chosen]
        draw = draw_anchors if cycles is None else cycles.anchors
        anchors = [draw(text.answer, recipe.blocks, rng) for text in texts]
        return lay(texts, anchors, recipe.rows, recipe.mask)

    def advance(self) -> float:
        """Take a step; its loss. Raises OrthrusError when it is no number."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(self.step)
        batch = self.batch(self.step)
        loss, hits = loss_and_hits(self.network, batch, self.recipe.weighed)
        value = loss.item()
        if not math.isfinite(value):
            raise OrthrusError(
                f"step {self.step}: the loss is {value}; lower --rate and start in a new folder"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._cycles is not None:
            accepted = hits[..., :-1].int().cumprod(-1).sum(-1).cpu().numpy()
            anchors = batch.anchors.cpu().numpy()
            for text, begun, runs in zip(batch.texts, anchors, accepted, strict=True):
                self._cycles.went(text.answer, begun, runs)
        self.step += 1
        share = 1 / min(self.step, self.recipe.averaged)
        with torch.no_grad():
            for mean, head in zip(self._means, self.network.parameters(), strict=True):
                mean.lerp_(head, share)
        with (self._folder / _LOSSES).open("a", encoding="ascii") as file:
            file.write(json.dumps([self.step, value]) + "\n")
        return value

    def measure(self) -> Acceptance:
        """Acceptance of `heads` on the first of the texts held out."""
        recipe, held = self.recipe, self.held[:_MEASURED]
        now = [head.detach().clone() for head in self.network.parameters()]
        try:
            self.network.set_heads(self._means)
            return acceptance(self.network, self._library, held, recipe.rows, recipe.mask)
        finally:
            self.network.set_heads(now)

    def heads(self) -> dict[str, NDArray[np.float32]]:
        """What comes of training: the mean of the heads over the last steps, so that it does not
        depend on which texts came last."""
        names = (name for name, _ in self.network.named_heads())
        return {
            name: self.network.stored(name, mean).cpu().numpy()
            for name, mean in zip(names, self._means, strict=True)
        }

    def run(self, minutes: float, say: Callable[[str], None]) -> None:
        """All steps that are left, with a checkpoint every `minutes`; one is written too where it
        is interrupted. say: hears how it goes."""
        last, started, begun, mean = time.monotonic(), time.monotonic(), self.step, None
        try:
            while self.step < self.recipe.steps:
                with deferred():  # between steps, heads and means and losses belong together
                    loss = self.advance()
                mean = loss if mean is None else 0.95 * mean + 0.05 * loss
                now = time.monotonic()
                if now - last >= 60 * minutes or self.step == self.recipe.steps:
                    self.save()
                    rows = (self.step - begun) * self._rows / (now - started)
                    say(
                        f"step {self.step} of {self.recipe.steps}: loss {mean:.3f}, "
                        f"{self.measure().tokens_per_cycle:.2f} tokens per cycle expected on texts "
                        f"held out, {rows:.0f} block rows per second"
                    )
                    last = time.monotonic()
        except KeyboardInterrupt:
            self.save()
            say(
                f"saved at step {self.step}; the same command goes on from there, and with "
                "--finish writes heads as they are"
            )
            raise

    @property
    def _rows(self) -> int:
        return self.recipe.texts * self.recipe.blocks * self.recipe.rows

    def save(self) -> None:
        """Write the checkpoint, beside the old one until it is whole. Raises OrthrusError."""
        path = self._folder / _CHECKPOINT
        beside = path.with_suffix(".tmp")
        state: dict[str, Any] = {
            "recipe": asdict(self.recipe),
            "step": self.step,
            "heads": [head.detach() for head in self.network.parameters()],
            "means": self._means,
            "optimizer": self._optimizer.state_dict(),
            "places": {} if self._cycles is None else self._cycles.places,
        }
        try:
            with beside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            beside.unlink(missing_ok=True)
            raise OrthrusError(
                f"{path}: cannot be written: {str(error).splitlines()[0]}; the checkpoint before "
                "it is whole: make room and give the command again"
            ) from error

    def _resume(self) -> None:
        path = self._folder / _CHECKPOINT
        if path.exists():
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                recipe, step = {"for_auto": False, **state["recipe"]}, int(state["step"])
                heads, means = state["heads"], state["means"]
                places = state.get("places", {})
            except Exception as error:
                raise OrthrusError(
                    f"{path}: is no checkpoint of ours, or damaged; remove it to begin again"
                ) from error
            mine = asdict(self.recipe)
            unlike = [name for name in mine if recipe.get(name) != mine[name]]
            if unlike:
                name = unlike[0]
                raise OrthrusError(
                    f"{path}: was begun with {name} {recipe.get(name)}, not {mine[name]}; give the "
                    "same settings, or another folder"
                )
            self.network.set_heads(heads)
            self._means = [mean.to(self.network.device) for mean in means]
            self._optimizer.load_state_dict(state["optimizer"])
            self.step = step
            if self._cycles is not None:
                self._cycles.places = places
        self._cut_losses()

    def _cut_losses(self) -> None:
        """Take away the losses of steps behind the checkpoint, which are taken again."""
        path = self._folder / _LOSSES
        if path.exists():
            lines = path.read_text(encoding="ascii").splitlines(keepends=True)[: self.step]
            path.write_text("".join(lines), encoding="ascii")


def losses_noted(folder: Path) -> list[float]:
    """The losses in the folder, step by step; those behind its checkpoint are taken again. Raises
    OrthrusError."""
    path = folder / _LOSSES
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    try:
        return [float(json.loads(line)[1]) for line in lines]
    except (ValueError, TypeError, LookupError) as error:
        raise OrthrusError(f"{path}: is damaged; remove it: only its curve is lost") from error
