"""Device functions that turn packed codes into int8 MMA operands, for the A8 layout.

Where a scale per 16 weights times a code fits a byte (Q2_K: at most 15 * 3; Q3_K: -(-32 ... 31) *
(-4 ... 3), -124 ... 128 negated), the integer dots take the *product*: one dot of 32 instead of
two, and still exact. Those types keep the scale bytes of two runs in the order (h, r, j), so that a
tile [rows, h] of words is what the MMA's layout can broadcast: any shift or mask that varies
along k would keep the arithmetic out of that layout (measured: 12.9 instead of 9.3 instructions
per weight for Q2_K).
"""

import triton
import triton.language as tl

from orthrus_kernels.products.weights import half_bits, lookup_text, small_half, table_value


def _code_text(main_bits: int, high_bits: int, r: int, j: int, top: int = 0) -> str:
    """Assembly: in t, four codes from four main bytes $1 (and high bytes $2), with bits `top`."""
    shift = (4 * j if main_bits == 4 else 4 * (r % 2) + 2 * j) - high_bits
    mask = (((1 << main_bits) - 1) << high_bits) * 0x01010101
    text = f"shf.r.wrap.b32 t, $1, $1, {shift % 32}; lop3.b32 t, t, {mask}, {top}, 0xEA; "
    if high_bits:
        high_shift = 2 * r + j if high_bits == 1 else 4 * (r % 2) + 2 * j
        high_mask = ((1 << high_bits) - 1) * 0x01010101
        text += f"shr.u32 u, $2, {high_shift}; lop3.b32 t, u, {high_mask}, t, 0xEA; "
    return text


def _signed_text(main_bits: int, high_bits: int, bias: int, r: int, j: int) -> str:
    """Assembly: four signed codes in $0."""
    if main_bits == 8:
        return "{ xor.b32 $0, $1, 0x80808080; }"
    # The sign bit is set first so that taking the bias off cannot borrow from the next byte.
    text = _code_text(main_bits, high_bits, r, j, 0x80808080 if bias else 0)
    if bias:
        text += f"sub.u32 t, t, {bias * 0x01010101}; xor.b32 t, t, 0x80808080; "
    return "{ .reg .b32 t, u; " + text + "mov.b32 $0, t; }"


def _signed_texts(main_bits: int, high_bits: int, bias: int) -> tl.constexpr:
    return tl.constexpr(
        tuple(_signed_text(main_bits, high_bits, bias, r, j) for r in range(4) for j in range(2))
    )


def _product_text_q2(r: int, j: int) -> str:
    """Assembly: four codes of two bits times the scale $2."""
    return "{ .reg .b32 t, u; " + _code_text(2, 0, r, j) + "mul.lo.u32 $0, t, $2; }"


def _product_text_q3(r: int, j: int) -> str:
    """Assembly: four times (code - 4) * (32 - scale), modulo 256.

    $3 = 288 - scale, $7 = 128 + 4 * scale in both halves: code * $3 + $7 in lanes of 16 bits.
    """
    return (
        "{ .reg .b32 t, u; "
        + _code_text(2, 1, r, j)
        + "and.b32 u, t, 0x00FF00FF; shr.u32 t, t, 8; and.b32 t, t, 0x00FF00FF; "
        "mad.lo.u32 u, u, $3, $7; mad.lo.u32 t, t, $3, $7; prmt.b32 $0, u, t, 0x6240; }"
    )


_ASM_8 = _signed_texts(8, 0, 128)
_ASM_4 = _signed_texts(4, 0, 0)
_ASM_4_BIAS = _signed_texts(4, 0, 8)
_ASM_41 = _signed_texts(4, 1, 0)
_ASM_41_BIAS = _signed_texts(4, 1, 16)
_ASM_42 = _signed_texts(4, 2, 32)
# Both nibbles of four bytes: the codes of j = 0 and of j = 1.
_ASM_TABLE = tl.constexpr(
    "{ .reg .b32 c, d; "
    + lookup_text("$2", "c", "d", 0)
    + "prmt.b32 $0, c, d, 0x6420; prmt.b32 $1, c, d, 0x7531; }"
)
_ASM_Q2 = tl.constexpr(tuple(_product_text_q2(r, j) for r in range(4) for j in range(2)))
_ASM_Q3 = tl.constexpr(tuple(_product_text_q3(r, j) for r in range(4) for j in range(2)))
_ASM_REPEAT = tl.constexpr("mul.lo.u32 $0, $1, 0x01010101;")


@triton.jit
def _bytes(TEXT: tl.constexpr, a):
    return tl.inline_asm_elementwise(TEXT, "=r,r", [a], tl.int8, is_pure=True, pack=4)


@triton.jit
def _bytes2(TEXT: tl.constexpr, a, b):
    return tl.inline_asm_elementwise(TEXT, "=r,r,r", [a, b], tl.int8, is_pure=True, pack=4)


@triton.jit
def _table_bytes(main, J: tl.constexpr):
    """The same for both J until the choice: the compiler keeps one copy."""
    both = tl.inline_asm_elementwise(
        _ASM_TABLE, "=r,=r,r", [main], (tl.int8, tl.int8), is_pure=True, pack=4
    )
    return both[J]


@triton.jit
def _plain_codes(main, high, R: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr):
    """i32 codes, bias and all, without assembly."""
    if KIND[0] == 8:
        code = main.to(tl.int32)
    elif KIND[0] == 4:
        code = (main.to(tl.int32) >> (4 * J)) & 15
    else:
        code = (main.to(tl.int32) >> (4 * (R % 2) + 2 * J)) & 3
    if KIND[1] == 1:
        code = (code << 1) | ((high.to(tl.int32) >> (2 * R + J)) & 1)
    elif KIND[1] == 2:
        code = (code << 2) | ((high.to(tl.int32) >> (4 * (R % 2) + 2 * J)) & 3)
    if KIND[6]:
        code = table_value(code).to(tl.int32)
    return code


@triton.jit
def signed_codes(
    main, high, R: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr
):
    """int8 codes (bias taken off) of the group (R, J), from its bytes of each plane."""
    AT: tl.constexpr = R * 2 + J
    if ASM:
        # Named first: triton 3.6 takes a bare element of a constant tuple for a plain string.
        if KIND[0] == 8:
            TEXT_8: tl.constexpr = _ASM_8[AT]
            codes = _bytes(TEXT_8, main)
        elif KIND[6]:
            codes = _table_bytes(main, J)
        elif KIND[1] == 0:
            TEXT_4: tl.constexpr = _ASM_4[AT] if KIND[3] == 0 else _ASM_4_BIAS[AT]
            codes = _bytes(TEXT_4, main)
        elif KIND[1] == 1:
            TEXT_41: tl.constexpr = _ASM_41[AT] if KIND[3] == 0 else _ASM_41_BIAS[AT]
            codes = _bytes2(TEXT_41, main, high)
        else:
            TEXT_42: tl.constexpr = _ASM_42[AT]
            codes = _bytes2(TEXT_42, main, high)
    else:
        codes = (_plain_codes(main, high, R, J, KIND) - KIND[3]).to(tl.int8)
    return codes


@triton.jit
def along_halves(numbers, BN: tl.constexpr):
    """[BN, 2(h)] -> [BN, 32]: each number 16 times."""
    return tl.reshape(tl.broadcast_to(numbers[:, :, None], (BN, 2, 16)), (BN, 32))


@triton.jit
def product_codes(
    main,
    high,
    halves,
    R: tl.constexpr,
    J: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    BN: tl.constexpr,
):
    """int8 scale * code of the group (R, J); Q3_K: negated.

    halves: u32 [BN, 2(h)], a byte for each (r % 2, j).
    """
    scale = ((halves >> (16 * (R % 2) + 8 * J)) & (63 if KIND[1] else 15)).to(tl.int32)
    if ASM:
        if KIND[1]:
            factor = along_halves(288 - scale, BN)
            term = along_halves((128 + 4 * scale) * 0x00010001, BN)
            products = tl.inline_asm_elementwise(
                _ASM_Q3[R * 2 + J],
                "=r,r,r,r,r,r,r,r,r,r,r",
                [main, high, factor, term],
                tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            products = tl.inline_asm_elementwise(
                _ASM_Q2[R * 2 + J],
                "=r,r,r,r,r,r",
                [main, along_halves(scale, BN)],
                tl.int8,
                is_pure=True,
                pack=4,
            )
    else:
        code = _plain_codes(main, high, R, J, KIND) - KIND[3]
        wide = along_halves(scale, BN)
        products = (code * (32 - wide if KIND[1] else wide)).to(tl.int8)
    return products


@triton.jit
def repeated_mins(halves, R: tl.constexpr, J: tl.constexpr, ASM: tl.constexpr, BN: tl.constexpr):
    """int8 [BN, 32]: the 4-bit minimum of each weight of the group (R, J)."""
    wide = along_halves(((halves >> (16 * (R % 2) + 8 * J + 4)) & 15).to(tl.int32), BN)
    if ASM:
        mins = tl.inline_asm_elementwise(
            _ASM_REPEAT, "=r,r,r,r,r", [wide], tl.int8, is_pure=True, pack=4
        )
    else:
        mins = wide.to(tl.int8)
    return mins


@triton.jit
def group_scales(word, d, J: tl.constexpr, H: tl.constexpr, KIND: tl.constexpr):
    """f32 scale of group (J) or half group (J, H) from the scale word of a run."""
    if KIND[2] == 0:
        scale = half_bits((word >> (16 * J)) & 0xFFFF).to(tl.float32)
    else:
        code = word >> 16 * J & 255 if KIND[2] == 1 else word >> 16 * J + 8 * H & 255
        scale = (small_half(code) - (1024.0 + KIND[4])).to(tl.float32) * d
    return scale
