"""Random, contradictory and damaged models through load and one pass: `fuzz_ggml.py COUNT SEED`.

A program of its own, because what it looks for (GGML_ASSERT, a crash, a hang) would take the test
run down with it. Prints how often each outcome was seen, as JSON; anything but success or an
OrthrusError of one line ends it with a traceback and the number of the case.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
from synthetic_model import TypeRule, model_shape, uniform, write_model

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.ggml.library import load_library
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.runtime.cache_layout import CACHE_TYPES
from orthrus_gguf.runtime.ggml.model import GgmlModel
from orthrus_gguf.runtime.protocol import ar_segment, diffusion_segment

Rng = np.random.Generator
TYPES = gguf.GGMLQuantizationType
PLAIN = (TYPES.F32, TYPES.F16, TYPES.BF16)
BY_32 = (*PLAIN, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q4_1, TYPES.Q5_0, TYPES.Q5_1, TYPES.IQ4_NL)
BY_256 = (*BY_32, TYPES.Q2_K, TYPES.Q3_K, TYPES.Q4_K, TYPES.Q5_K, TYPES.Q6_K, TYPES.IQ4_XS)
NUMBERS = (0, 1, 2, 3, 5, 7, 31, 33, 255, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)
FLOATS = (0.0, -1.0, 1e-45, 1e38, float("inf"), float("nan"))


def random_shape(rng: Rng) -> tuple[ModelConfig, TypeRule]:
    """Any shape that the format allows, with types that fit it."""
    step, types = ((1, PLAIN), (32, BY_32), (256, BY_256))[rng.integers(3)]
    kv = int(rng.integers(1, 4))
    head_dim = int(rng.choice([2, 6, 32, 48, 64, 96, 128] if step == 1 else [32, 64, 128]))
    heads = kv * int(rng.integers(1, 4))
    if heads * head_dim % step:
        heads, kv, head_dim = 4, 2, 64
    config = model_shape(
        n_layers=int(rng.integers(1, 4)),
        n_embd=step * int(rng.integers(1, 3)) if step > 1 else int(rng.integers(1, 70)),
        n_ff=step * int(rng.integers(1, 3)) if step > 1 else int(rng.integers(1, 70)),
        n_head=heads,
        n_head_kv=kv,
        head_dim=head_dim,
        n_vocab=int(rng.integers(260, 330)),
        tied=bool(rng.integers(2)),
        block_size=int(rng.choice([2, 16, 32])) if rng.integers(4) else None,
    )
    return config, uniform(types[rng.integers(len(types))])


def contradict(rng: Rng, raw: bytearray) -> None:
    """Give one number of the metadata another value."""
    keys = [key for key in NUMERIC_KEYS if key in raw]
    key = keys[rng.integers(len(keys))]
    at = raw.index(key) + len(key)
    (kind,) = struct.unpack_from("<I", raw, at)
    if kind == gguf.GGUFValueType.FLOAT32:
        struct.pack_into("<f", raw, at + 4, FLOATS[rng.integers(len(FLOATS))])
    else:
        struct.pack_into("<I", raw, at + 4, NUMBERS[rng.integers(len(NUMBERS))])


NUMERIC_KEYS = (
    b"block_count",
    b"context_length",
    b"embedding_length",
    b"feed_forward_length",
    b"attention.head_count",
    b"attention.head_count_kv",
    b"attention.key_length",
    b"attention.value_length",
    b"attention.layer_norm_rms_epsilon",
    b"rope.freq_base",
    b"diffusion.block_size",
    b"mask_token_id",
)


def retype(rng: Rng, raw: bytearray) -> None:
    """Give one tensor another type, dimension or offset."""
    names = (b"token_embd.weight", b"attn_q.weight", b"ffn_down.weight")
    name = names[rng.integers(len(names))]
    at = raw.index(name) + len(name)
    (n_dims,) = struct.unpack_from("<I", raw, at)
    spot = int(rng.integers(3))
    if spot == 0:
        struct.pack_into("<I", raw, at + 4 + 8 * n_dims, int(rng.integers(0, 45)))
    elif spot == 1:
        size = int(rng.integers(0, 400)) if rng.integers(2) else 1 << int(rng.integers(20, 63))
        struct.pack_into("<Q", raw, at + 4 + 8 * int(rng.integers(n_dims)), size)
    else:
        struct.pack_into("<Q", raw, at + 8 + 8 * n_dims, 8 * int(rng.integers(0, 1 << 16)))


def damage(rng: Rng, raw: bytearray) -> None:
    """Random bytes, anywhere or in the weights only, where they make NaN and infinity."""
    first = len(raw) // 2 if rng.integers(2) else 0
    for _ in range(int(rng.integers(1, 200))):
        raw[rng.integers(first, len(raw))] = int(rng.integers(256))


def shorten(rng: Rng, raw: bytearray) -> None:
    del raw[int(rng.integers(1, len(raw))) :]


def run(rng: Rng, path: Path) -> str:
    """Load the model and run a pass; the outcome in a word or two."""
    k, v = (str(rng.choice(list(CACHE_TYPES))) for _ in range(2))
    try:
        with (
            ModelFile.open(path) as file,
            GgmlModel.load(file, threads=1, cache_type_k=k, cache_type_v=v) as model,
        ):
            tokens = rng.integers(0, model.config.n_vocab, int(rng.integers(1, 80))).tolist()
            cache = model.new_cache(100)
            segments = [ar_segment(cache, tokens, 0)]
            if model.config.mask_token is not None and model.config.block_size is not None:
                start = int(rng.integers(0, len(tokens) + 1))
                rows = min(model.config.block_size, 128)
                segments.append(diffusion_segment(cache, 0, model.config.mask_token, rows, start))
            for logits, segment in zip(model.logits(segments), segments, strict=True):
                assert logits.shape == (len(segment), model.config.n_vocab)
            return "ran"
    except OrthrusError as error:
        return "refused" if "\n" not in str(error) else "refused at length"


def main(count: int, seed: int) -> None:
    outcomes: Counter[str] = Counter()
    changes = (None, contradict, retype, damage, shorten)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            config, rule = random_shape(rng)
            write_model(load_library().api, path, config, rule, seed=number)
            change = changes[number % len(changes)]
            if change is not None:
                raw = bytearray(path.read_bytes())
                change(rng, raw)
                path.write_bytes(raw)
            name = "valid" if change is None else change.__name__
            try:
                outcomes[f"{name}: {run(rng, path)}"] += 1
            except BaseException:
                print(f"case {number} of seed {seed} ({name})", file=sys.stderr)
                raise
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
