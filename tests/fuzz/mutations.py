"""Damage to GGUF files that knows where their lengths, counts, types and offsets lie.

Shared by the mutation tests and the coverage-guided target.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import replace

from tests.fuzz.document import QBLOCKS, WIDTHS, Document, parse, split_entry, strings_at
from tests.gguf.builder import ARRAY, STRING, array, entry, string, u64

KEYS = (
    *("general.architecture", "general.alignment", "general.type", "general.name", "split.count"),
    *("adapter.type", "orthrus.block_count", "qwen3.block_count", "orthrus.context_length"),
    *("orthrus.embedding_length", "orthrus.attention.head_count", "orthrus.rope.scaling.type"),
    *("orthrus.attention.key_length", "orthrus.attention.sliding_window", "orthrus.rope.freq_base"),
    *("orthrus.rope.scaling.factor", "orthrus.diffusion.block_size", "tokenizer.chat_template"),
    *("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"),
    *("tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.ggml.scores"),
    *("tokenizer.ggml.mask_token_id", "tokenizer.ggml.add_bos_token"),
    *("tokenizer.ggml.eos_token_id", "tokenizer.ggml.add_space_prefix", "imatrix.datasets"),
    *("orthrus.base_architecture", "llama.block_count", "llama.rope.scaling.factor"),
)
TEXTS = (
    *("", "a", "orthrus", "qwen3", "llama", "gpt2", "qwen2", "adapter", "orthrus_heads", "yarn"),
    *("token_embd.weight", "output.weight", "blk.0.attn_q_diff.weight", "blk.9.attn_q.weight"),
    *("rope_freqs.weight", "blk.0.attn_k_diff.bias", "linear"),
    *("blk.0.attn_q.bias", "blk.99999999999999999999.attn_q.weight", "blk..attn_q.weight", "blk."),
    *("\n\x1b[2J", "é" * 31, "n" * 64, "k" * 65536, "\0", "\u202e", "<0x0A>", "</s>", "▁", "Ġ"),
)
NUMBERS = (
    *(0, 1, 2, 3, 4, 7, 8, 13, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 1023, 1024),
    *((1 << 15) - 1, 1 << 16, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32),
    *(1 << 53, 1 << 60, 1 << 61, (1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 32),
    (1 << 64) - 1,
)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """`content` with one to four mutations: of parts, of numbers, or of bytes anywhere."""
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        document = parse(content)
        kind = rng.random()
        if document is not None and kind < 0.45:
            rng.choice(PART_MUTATIONS)(document, rng)
            content = document.encode()
        elif document is not None and document.numbers and kind < 0.8:
            content = change_number(content, *rng.choice(document.numbers), rng)
        elif content:
            content = rng.choice(BYTE_MUTATIONS)(content, rng)
    return content


def change_number(content: bytes, at: int, width: int, rng: random.Random) -> bytes:
    """Another value for the number at `at`: a notorious one, or one close to what is there."""
    old = int.from_bytes(content[at : at + width], "little")
    new = rng.choice(
        (
            rng.choice(NUMBERS),
            old + rng.choice((-1, 1, -32, 32)),
            old ^ 1 << rng.randrange(8 * width),
            len(content) - at + rng.choice((-width, 0, 1)),
            old * rng.choice((2, 8, 1 << 16)),
            rng.getrandbits(8 * width),
        )
    )
    changed = (new % (1 << 8 * width)).to_bytes(width, "little")
    return content[:at] + changed + content[at + width :]


def random_text(rng: random.Random) -> str:
    return rng.choice((*KEYS, *TEXTS))


def random_entry(rng: random.Random) -> bytes:
    """A well-formed metadata entry, often of the wrong type for its key."""
    key, kind = random_text(rng), rng.choice((STRING, ARRAY, *WIDTHS))
    if kind == STRING:
        return entry(key, STRING, string(random_text(rng)))
    if kind in WIDTHS:
        return entry(key, kind, _number(kind, rng))
    element = rng.choice((STRING, *WIDTHS))
    count = rng.choice((0, 1, 2, 40, 259, 260))
    if element == STRING:
        return array(key, STRING, count, b"".join(string(f"t{i}") for i in range(count)))
    return array(key, element, count, _number(element, rng) * count)


def _number(kind: int, rng: random.Random) -> bytes:
    if kind in (6, 12):
        number = rng.choice((0.0, -0.0, 1.0, 1e-6, 1e30, -1.0, float("inf"), float("nan")))
        return struct.pack("<f" if kind == 6 else "<d", number)
    width = WIDTHS[kind]
    return (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")


def _drop_entry(document: Document, rng: random.Random) -> None:
    if document.entries:
        del document.entries[rng.randrange(len(document.entries))]


def _copy_entry(document: Document, rng: random.Random) -> None:
    if document.entries:
        document.entries.insert(
            rng.randrange(len(document.entries) + 1), rng.choice(document.entries)
        )


def _add_entry(document: Document, rng: random.Random) -> None:
    document.entries.insert(rng.randrange(len(document.entries) + 1), random_entry(rng))


def _swap_values(document: Document, rng: random.Random) -> None:
    """Put one entry's value under another's key."""
    if len(document.entries) > 1:
        to, source = rng.sample(range(len(document.entries)), 2)
        key, _ = split_entry(document.entries[to])
        _, value = split_entry(document.entries[source])
        document.entries[to] = key + value


def _replace_value(document: Document, rng: random.Random) -> None:
    """Keep a key, and give it a value of any type."""
    if document.entries:
        at = rng.randrange(len(document.entries))
        document.entries[at] = (
            split_entry(document.entries[at])[0] + split_entry(random_entry(rng))[1]
        )


def _change_string(document: Document, rng: random.Random) -> None:
    """Change one string of an array of strings, or a whole string, with its length."""
    choices = [i for i, encoded in enumerate(document.entries) if strings_at(encoded)]
    if not choices:
        return
    index = rng.choice(choices)
    encoded = document.entries[index]
    at, length = rng.choice(strings_at(encoded))
    other, other_length = rng.choice(strings_at(encoded))
    old = encoded[at + 8 : at + 8 + length]
    twin = encoded[other + 8 : other + 8 + other_length]
    new = rng.choice((random_text(rng).encode(), b"\xff", old * 2, twin, old + twin, old[:-1]))
    document.entries[index] = encoded[:at] + u64(len(new)) + new + encoded[at + 8 + length :]


def _drop_tensor(document: Document, rng: random.Random) -> None:
    if document.tensors:
        del document.tensors[rng.randrange(len(document.tensors))]
        document.pack_tensors()


def _copy_tensor(document: Document, rng: random.Random) -> None:
    if document.tensors:
        copy = rng.choice(document.tensors)
        document.tensors.append(replace(copy, name=rng.choice((copy.name, b"x", copy.name + b"x"))))
        document.pack_tensors()


def _change_tensor(document: Document, rng: random.Random) -> None:
    """Another name, shape or type for a tensor; the offsets follow, mostly."""
    if not document.tensors:
        return
    at = rng.randrange(len(document.tensors))
    one = document.tensors[at]
    kind = rng.randrange(4)
    if kind == 0:
        one = replace(one, name=random_text(rng).encode())
    elif kind == 1:
        one = replace(one, type=rng.choice((*QBLOCKS, *range(45))))
    elif kind == 2:
        one = replace(one, dims=one.dims[::-1] if rng.random() < 0.5 else (*one.dims, 1)[:5])
    else:
        dims = list(one.dims) or [1]
        dims[rng.randrange(len(dims))] = rng.choice((1, 2, 32, 33, 40, 64, 256, 260, -32, 1 << 62))
        one = replace(one, dims=tuple(dims))
    document.tensors[at] = one
    if rng.random() < 0.8:
        document.pack_tensors()


def _swap_tensors(document: Document, rng: random.Random) -> None:
    if len(document.tensors) > 1:
        a, b = rng.sample(range(len(document.tensors)), 2)
        tensors = document.tensors
        tensors[a], tensors[b] = tensors[b], tensors[a]
        if rng.random() < 0.5:
            document.pack_tensors()


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _delete(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + content[at + rng.randrange(1, 64) :]


def _splice(content: bytes, rng: random.Random) -> bytes:
    """Copy a piece to somewhere else, over what is there or between."""
    source, target = rng.randrange(len(content)), rng.randrange(len(content))
    piece = content[source : source + rng.choice((1, 4, 8, 64, 512))]
    over = len(piece) if rng.random() < 0.5 else 0
    return content[:target] + piece + content[target + over :]


def _write(content: bytes, rng: random.Random) -> bytes:
    at, width = rng.randrange(len(content)), rng.choice((1, 4, 8))
    number = (rng.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
    return content[:at] + number + content[at + width :]


PART_MUTATIONS: tuple[Callable[[Document, random.Random], None], ...] = (
    *(_drop_entry, _copy_entry, _add_entry, _swap_values, _replace_value, _replace_value),
    *(_change_string, _change_string, _drop_tensor, _copy_tensor, _change_tensor, _change_tensor),
    _swap_tensors,
)
BYTE_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _truncate, _delete, _splice, _write),
)
