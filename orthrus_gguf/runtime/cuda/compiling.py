"""Starts `compile_ahead` beside the loading of weights, and tells how far it is."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

from orthrus_kernels.tools.launches import cache_folder, kernels_digest

from orthrus_gguf.model.drafter import DrafterFile
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.mtp import MtpFile
from orthrus_gguf.runtime.cuda.device import Machine

Say = Callable[[str], None]

#: Seconds between lines that tell how far it is.
INTERVAL = 10.0


@contextmanager
def kernels_compiled(
    file: ModelFile,
    machine: Machine,
    cache_types: tuple[str, str],
    prompt_rows: int,
    say: Say,
    drafter: DrafterFile | MtpFile | None = None,
) -> Iterator[None]:
    """What the passes of the model, and of a drafter beside it, launch is compiled when the block
    ends, on a GPU. What could not be compiled is told, and compiles (or fails) when it is launched.
    """
    arguments = [*map(str, file.paths), "--capability", str(machine.capability)]
    arguments += ["--card", machine.name, "--prompt-rows", str(prompt_rows)]
    arguments += ["--cache-types", *cache_types]
    if drafter is not None:
        inside = drafter.paths == file.paths
        arguments += ["--mtp"] if inside else ["--drafter", str(drafter.paths[0])]
    if isinstance(drafter, MtpFile):
        arguments += ["--draft-ids", str(drafter.ids)]
    what = f"compiling the kernels for {machine.name}"
    with compiled(arguments, what, say) if machine.is_cuda else nullcontext():
        yield


@contextmanager
def compiled(
    arguments: Sequence[str],
    what: str,
    say: Say,
    module: str = "orthrus_gguf.runtime.cuda.compile_ahead",
) -> Iterator[None]:
    """Run `compile_ahead` beside the block, and wait for it; nothing is run if it is known to have
    succeeded with these arguments, kernels and compiler."""
    folder = cache_folder()
    done = folder / f"orthrus-{_digest(arguments)}.done"
    if done.exists():
        yield
        return
    say(f"{what} (once; they are kept in {folder})")
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        try:
            yield
            count = _follow(process, what, say)
            if process.wait() == 0:
                say(f"{count} kernels compiled in {time.monotonic() - began:.0f} s")
                folder.mkdir(parents=True, exist_ok=True)
                done.touch()
            else:
                say(f"{what} ahead failed, they compile when first used: {_last_line(errors)}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _follow(process: subprocess.Popen[str], what: str, say: Say) -> int:
    """Read its lines, `done of all name`, until it ends; how many kernels are done."""
    count, told = 0, time.monotonic()
    for line in process.stdout or ():
        count += 1
        if time.monotonic() - told > INTERVAL:
            told = time.monotonic()
            say(f"{what}: {' '.join(line.split()[:3])}")
    return count


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = errors.read().split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _digest(arguments: Sequence[str]) -> str:
    """Of everything that decides about what is compiled, the sizes of files included."""
    found = hashlib.sha256(kernels_digest().encode())
    for argument in arguments:
        path = Path(argument)
        size = path.stat().st_size if path.is_file() else ""
        found.update(f"{argument} {size}\n".encode())
    return found.hexdigest()[:16]
