"""What to convert, and what will be written: the words that all kinds of conversion share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gguf

from orthrus_converters.encode import Encoder, Job
from orthrus_converters.type_plan import TypeChoice
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.writer import PlannedFile, PlannedTensor, check_target


@dataclass(frozen=True)
class Request:
    """What to convert, as the flags say.

    source: a folder, a GGUF file, or the id of a repository (of revision `revision`). None where
    `base` and `heads` are given instead. heads: like source. target: of a drafter, likewise.
    """

    source: str | None
    output: Path
    choice: TypeChoice = field(default_factory=TypeChoice)
    imatrix: Path | None = None
    split: bool = False
    merge: bool = False
    base: Path | None = None
    heads: str | None = None
    target: str | None = None
    revision: str | None = None
    allow_requantize: bool = False
    overwrite: bool = False

    @property
    def outputs(self) -> list[Path]:
        """The files to write."""
        return [self.output, *([heads_path(self.output)] if self.split else [])]


@dataclass(frozen=True)
class NewFile:
    """A file to be written. `metadata` is a GGUFWriter with all keys added and no tensors."""

    path: Path
    metadata: gguf.GGUFWriter
    jobs: Sequence[Job]

    def with_data(self, encoder: Encoder) -> PlannedFile:
        """The file for write_files(), its data to come from `encoder`."""
        tensors = [
            PlannedTensor(job.name, job.source.shape, job.kind, partial(encoder.encode, job))
            for job in self.jobs
        ]
        return PlannedFile(self.path, self.metadata, tensors)


@dataclass(frozen=True)
class Plan:
    """The files to write, and remarks for the user.

    verify: called with the paths of the finished files before they get their names; raises
    OrthrusError to keep them from it.
    """

    files: Sequence[NewFile]
    notes: Sequence[str]
    verify: Callable[[Sequence[Path]], None] | None = None

    @property
    def jobs(self) -> list[Job]:
        return [job for file in self.files for job in file.jobs]


def heads_path(output: Path) -> Path:
    """Where `--split` puts the heads: OUT.gguf → OUT-heads.gguf."""
    return output.with_name(f"{output.stem}-heads{output.suffix}")


def check_outputs(request: Request, inputs: Sequence[Path]) -> None:
    """Raise OrthrusError if an output may not be written, or is an input by whatever name."""
    for output in request.outputs:
        for path in inputs:
            if output.exists() and path.exists() and output.samefile(path):
                raise OrthrusError(f"{output}: is an input of this conversion; choose another name")
        check_target(output, overwrite=request.overwrite)


def check_headless(name: str, request: Request) -> None:
    """Raise OrthrusError if the flags are about heads, which the model `name` does not hold."""
    flag = "--split" if request.split else "--heads-type" if request.choice.heads else ""
    if flag:
        raise OrthrusError(
            f"{name}: holds no diffusion heads, so there is nothing for {flag}; "
            "leave it out, or add heads with --base MODEL.gguf --heads CHECKPOINT"
        )
