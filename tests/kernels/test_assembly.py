"""The inline assembly of the products, run by a small emulator of the few PTX instructions it uses.

The interpreter has no assembly and the offline compiler runs nothing, so this is what shows without
a GPU that the assembly computes what the plain form does: codes in the order of quant_tensor.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import numpy as np
import pytest
from orthrus_kernels.packing.quant_tensor import IQ4_VALUES
from orthrus_kernels.products import weights as a16
from orthrus_kernels.products import weights_a8 as a8

WORD = 0xFFFFFFFF
RANDOM = np.random.default_rng(0)


def byte_permute(a: int, b: int, select: int) -> int:
    """PRMT in its default mode: the top bit of a selector repeats the sign of the byte."""
    data = (a | b << 32).to_bytes(8, "little")
    result = 0
    for position in range(4):
        nibble = select >> (4 * position) & 15
        byte = data[nibble & 7]
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << (8 * position)
    return result


def and_or(a: int, b: int, c: int, table: int) -> int:
    """LOP3 with the one truth table that is used."""
    assert table == 0xEA
    return a & b | c


def funnel(low: int, high: int, count: int) -> int:
    """SHF.R.WRAP: the low word of a 64-bit right shift by count modulo 32."""
    return ((high << 32 | low) >> (count % 32)) & WORD


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "sub.u32": lambda a, b: a - b,
    "shr.u32": lambda a, b: a >> b,
    "shr.b32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "shf.r.wrap.b32": funnel,
    "lop3.b32": and_or,
    "prmt.b32": byte_permute,
}


def run(text: str, **registers: int) -> dict[str, int]:
    """All registers after the instructions; `r0` stands for $0."""
    state = {name.replace("r", "$"): value for name, value in registers.items()}
    for statement in re.sub(r"[{}]", " ", text).split(";"):
        words = statement.split(None, 1)
        if not words or words[0] == ".reg":
            continue
        target, *operands = (part.strip() for part in words[1].split(","))
        values = [state[o] if o in state else int(o, 0) for o in operands]
        state[target] = INSTRUCTIONS[words[0]](*values) & WORD
    return {name.replace("$", "r"): value for name, value in state.items()}


def halves(word: int) -> list[float]:
    """Two fp16 numbers."""
    return [float(v) for v in np.array([word], np.uint32).view(np.float16)]


def signed_bytes(word: int) -> list[int]:
    """Four int8 numbers."""
    return [int(v) for v in np.array([word], np.uint32).view(np.int8)]


def words(count: int) -> list[int]:
    """Random words, and the two extremes."""
    return [0, WORD, *(int(v) for v in RANDOM.integers(0, 1 << 32, count))]


def element_code(element: int, h: int, bits: int, shift: int = 0) -> int:
    """A16: the code of dot h = 2j + h: byte h % 2, and inside it `bits` at bits * j + shift."""
    return element >> (8 * (h % 2) + bits * (h // 2) + shift) & ((1 << bits) - 1)


@pytest.mark.parametrize(
    ("texts", "main_bits", "high_bits", "outer"),
    [
        (a16._ASM_8, 8, 0, 1),
        (a16._ASM_4, 4, 0, 1),
        (a16._ASM_41, 4, 1, 4),
        (a16._ASM_42, 4, 2, 2),
        (a16._ASM_2, 2, 0, 2),
        (a16._ASM_21, 2, 1, 4),
    ],
)
def test_fp16_codes(texts: object, main_bits: int, high_bits: int, outer: int) -> None:
    all_texts = texts.value  # type: ignore[attr-defined]
    for o, h in itertools.product(range(outer), range(4)):
        for main, high in zip(words(20), reversed(words(20)), strict=True):
            registers = run(all_texts[o * 4 + h], r1=main, r2=high)
            expected = []
            for shift in (0, 16):
                element, low = main >> shift & 0xFFFF, high >> shift & 0xFFFF
                if main_bits == 8:
                    code = element >> (8 * (h % 2)) & 255
                elif main_bits == 2:
                    code = element_code(element, h, 2, 4 * (o // 2 if high_bits else o))
                else:
                    code = element_code(element, h, 4)
                if high_bits:
                    code = code << high_bits | element_code(low, h, high_bits, 2 * high_bits * o)
                expected.append(1024.0 + code)
            assert halves(registers["r0"]) == expected


def test_fp16_table() -> None:
    for main in words(50):
        registers = run(a16._ASM_TABLE.value, r4=main)
        for h in range(4):
            codes = [element_code(main >> shift & 0xFFFF, h, 4) for shift in (0, 16)]
            expected = [1024.0 + 128 + IQ4_VALUES[code] for code in codes]
            assert halves(registers[f"r{h}"]) == expected


def byte_codes(main: int, high: int, main_bits: int, high_bits: int, r: int, j: int) -> list[int]:
    """A8: the codes of group (r, j) of four bytes, as quant_tensor.py has them."""
    codes = []
    for shift in range(0, 32, 8):
        m, x = main >> shift & 255, high >> shift & 255
        code = m >> (0 if main_bits == 8 else 4 * j if main_bits == 4 else 4 * (r % 2) + 2 * j)
        code &= (1 << main_bits) - 1
        if high_bits:
            low = x >> (2 * r + j if high_bits == 1 else 4 * (r % 2) + 2 * j)
            code = code << high_bits | low & ((1 << high_bits) - 1)
        codes.append(code)
    return codes


@pytest.mark.parametrize(
    ("texts", "main_bits", "high_bits", "bias"),
    [
        (a8._ASM_8, 8, 0, 128),
        (a8._ASM_4, 4, 0, 0),
        (a8._ASM_4_BIAS, 4, 0, 8),
        (a8._ASM_41, 4, 1, 0),
        (a8._ASM_41_BIAS, 4, 1, 16),
        (a8._ASM_42, 4, 2, 32),
    ],
)
def test_int8_codes(texts: object, main_bits: int, high_bits: int, bias: int) -> None:
    all_texts = texts.value  # type: ignore[attr-defined]
    for r, j in itertools.product(range(4), range(2)):
        for main, high in zip(words(20), reversed(words(20)), strict=True):
            registers = run(all_texts[r * 2 + j], r1=main, r2=high)
            codes = byte_codes(main, high, main_bits, high_bits, r, j)
            assert signed_bytes(registers["r0"]) == [code - bias for code in codes]


def test_int8_table() -> None:
    for main in words(50):
        registers = run(a8._ASM_TABLE.value, r2=main)
        for j in range(2):
            codes = byte_codes(main, 0, 4, 0, 0, j)
            assert signed_bytes(registers[f"r{j}"]) == [IQ4_VALUES[code] for code in codes]


def test_int8_products() -> None:
    """Every scale of Q2_K and of Q3_K, whose products fill the range of int8."""
    for r, j, scale in itertools.product(range(4), range(2), range(64)):
        for main, high in zip(words(4), words(4), strict=True):
            if scale < 16:
                registers = run(a8._ASM_Q2.value[r * 2 + j], r1=main, r2=scale)
                codes = byte_codes(main, 0, 2, 0, r, j)
                assert signed_bytes(registers["r0"]) == [code * scale for code in codes]
            term = (128 + 4 * scale) * 0x00010001
            registers = run(a8._ASM_Q3.value[r * 2 + j], r1=main, r2=high, r3=288 - scale, r7=term)
            codes = byte_codes(main, high, 2, 1, r, j)
            expected = [-(code - 4) * (scale - 32) for code in codes]
            assert signed_bytes(registers["r0"]) == expected


def test_int8_mins() -> None:
    for number in range(16):
        assert signed_bytes(run(a8._ASM_REPEAT.value, r1=number)["r0"]) == [number] * 4
