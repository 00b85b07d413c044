"""A hundred thousand damaged files: no crash, no hang, no memory blow-up. Minutes: `make fuzz`."""

from __future__ import annotations

import faulthandler
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuzz.conftest import Check
from tests.fuzz.document import parse
from tests.fuzz.mutations import mutate
from tests.fuzz.seeds import write_seeds

pytestmark = pytest.mark.slow

SEED_CASES, DEMO_CASES = 92_000, 8_000
BATCH = 1000
MAX_SECONDS = 5.0  # of processor time per case; the slowest take a tenth of a second
MAX_BATCH_SECONDS = 1800  # a hang inside C code ends the whole run with a traceback
MEMORY = 512 << 20  # address space that all cases together may add


@contextmanager
def memory_limit() -> Iterator[None]:
    """Have the kernel refuse memory beyond MEMORY (where it does: not on macOS)."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run_cases(
    count: int,
    seed: int,
    next_case: Callable[[random.Random], bytes],
    size: int,
    path: Path,
    checker: Check,
) -> Counter[str]:
    """Check `count` cases, written to `path` and stretched to `size` bytes (zeros) if shorter."""
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with memory_limit():
        for number in range(count):
            if number % BATCH == 0:
                faulthandler.dump_traceback_later(MAX_BATCH_SECONDS, exit=True)
            content = next_case(rng)
            with path.open("wb") as file:
                file.write(content)
                if len(content) < size:
                    file.truncate(size)
            start = time.process_time()
            try:
                outcomes[checker(path)] += 1
            except Exception as error:
                kept = path.with_name(f"finding-{seed}-{number}.gguf")
                path.rename(kept)
                raise AssertionError(f"case {number}: input kept as {kept}") from error
            assert time.process_time() - start < MAX_SECONDS, f"case {number} takes too long"
        faulthandler.cancel_dump_traceback_later()
    return outcomes


@pytest.mark.parametrize("seed", range(4))
def test_small_files(tmp_path: Path, checker: Check, seed: int) -> None:
    """Files of every kind, header and data."""
    seeds = [path.read_bytes() for path in write_seeds(tmp_path)]
    outcomes = run_cases(
        SEED_CASES // 4,
        seed,
        lambda rng: mutate(rng.choice(seeds), rng),
        0,
        tmp_path / "mutation.gguf",
        checker,
    )
    assert min(outcomes[kind] for kind in ("refused", "opened", "used")) > 500


@pytest.mark.parametrize("kind", ["single", "base", "heads"])
def test_demo_model(
    tmp_path: Path, checker: Check, demo_file: Callable[..., Path], kind: str
) -> None:
    """The demo model, whole and in two files. Its weights are left out: zeros stand for them."""
    path = demo_file("q8_0", split=kind != "single")
    if kind == "heads":
        path = path.with_name(f"{path.stem}-heads.gguf")
    content = path.read_bytes()
    document = parse(content)
    assert document is not None
    head = content[: len(content) - len(document.data)]
    outcomes = run_cases(
        DEMO_CASES // 3 + 1,
        7,
        lambda rng: mutate(head, rng),
        len(content),
        tmp_path / "mutation.gguf",
        checker,
    )
    assert min(outcomes[outcome] for outcome in ("refused", "opened")) > 100
