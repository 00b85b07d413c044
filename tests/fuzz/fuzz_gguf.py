"""Coverage-guided fuzzing of everything that reads GGUF files, with atheris.

    pip install atheris
    python -m tests.fuzz.fuzz_gguf FOLDER -max_total_time=3600

FOLDER holds the inputs found so far, and starts with the seeds; other arguments are libFuzzer's. An
input that raises anything but OrthrusError, takes 5 s or 2 GB, ends the run and is written to the
current folder (`crash-...`). To fix it, copy it to tests/fuzz/corpus, where the tests replay it.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

with atheris.instrument_imports(include=["orthrus_gguf"]):
    import orthrus_gguf.text.vocab.bpe
    import orthrus_gguf.text.vocab.spm  # noqa: F401 - else imported later, without instrumentation
    from tests.fuzz.target import check

from tests.fuzz.document import parse
from tests.fuzz.mutations import mutate
from tests.fuzz.seeds import write_base, write_heads, write_seeds

# libFuzzer's own timeout counts the time that the process was suspended; it is for endless loops
# only, and processor time for slow inputs.
LIMITS = ["-max_len=65536", "-timeout=3600", "-rss_limit_mb=2048", "-len_control=0"]
MAX_SECONDS = 5.0


def main() -> None:
    """Run libFuzzer until it finds something or its time is up."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    corpus = Path(sys.argv[1])
    corpus.mkdir(parents=True, exist_ok=True)
    write_seeds(corpus)
    folder = corpus.with_name(corpus.name + "-files")
    folder.mkdir(exist_ok=True)
    base, heads = write_base(folder / "base.gguf"), write_heads(folder / "heads.gguf")
    path = folder / "input.gguf"

    def one_input(content: bytes) -> None:
        path.write_bytes(content)
        start = time.process_time()
        check(path, base, heads)
        assert time.process_time() - start < MAX_SECONDS

    arguments = [sys.argv[0], str(corpus), *LIMITS, *sys.argv[2:]]
    atheris.Setup(arguments, one_input, custom_mutator=_mutate, custom_crossover=_cross)
    atheris.Fuzz()


def _mutate(content: bytes, max_size: int, seed: int) -> bytes:
    """Mostly mutations that keep the structure, and libFuzzer's own, which follow comparisons."""
    rng = random.Random(seed)
    if rng.random() < 0.8:
        return mutate(bytes(content), rng)[:max_size]
    return bytes(atheris.Mutate(content, min(max_size, max(len(content), 1))))


def _cross(first: bytes, second: bytes, max_size: int, seed: int) -> bytes:
    """The parts of one input with some of another's."""
    rng = random.Random(seed)
    one, two = parse(bytes(first)), parse(bytes(second))
    if one is None or two is None:
        at = rng.randrange(len(first) + 1)
        return (bytes(first[:at]) + bytes(second[at:]))[:max_size]
    for encoded in two.entries:
        if rng.random() < 0.2:
            one.entries.insert(rng.randrange(len(one.entries) + 1), encoded)
    if rng.random() < 0.3:
        one.tensors, one.data = two.tensors, two.data
    return one.encode()[:max_size]


if __name__ == "__main__":
    main()
