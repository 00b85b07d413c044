"""Device functions that turn packed codes into fp16 MMA operands.

A code u becomes the fp16 number 1024 + u by OR-ing 0x6400 over it: exact for u < 1024, no integer
to float conversion. Left to itself LLVM narrows the packed 32-bit operations to 16 bits and spends
two PRMT per pair on putting them together again (2.4 instructions per weight more), so shift and
LOP3 are inline assembly on two 16-bit elements. The interpreter has no inline assembly: `ASM` False
takes the same steps in plain Triton, and both forms are compile-checked.

A step of 256 weights is 4 * OUTER dots of 64 / OUTER weights: dot (h, o), h = 2j + h of
quant_tensor.py, takes the elements with c // (8 / OUTER) = o. OUTER is 2 with a 2-bit plane and 4
with a 1-bit plane, whose elements serve several c at different bits: shifts that vary inside a
tile keep the compiler from moving the arithmetic into the MMA's register layout (measured: 8.0
instead of 4.6 instructions per weight for Q6_K).
"""

import triton
import triton.language as tl

from orthrus_kernels.packing.quant_tensor import IQ4_VALUES


def table_words(bias: int) -> tuple[int, int, int, int]:
    """IQ4_VALUES + bias as bytes, four to a word: what two PRMT select from."""
    data = bytes((value + bias) % 256 for value in IQ4_VALUES)
    first, second, third, fourth = (
        int.from_bytes(data[at : at + 4], "little") for at in range(0, 16, 4)
    )
    return first, second, third, fourth


def lookup_text(source: str, first: str, second: str, bias: int) -> str:
    """Assembly: the table's bytes of the low four nibbles of `source`, and of the high four.

    PRMT selects from eight bytes by three bits; the fourth bit of each nibble chooses, in a third
    PRMT, between the halves of the table.
    """
    t0, t1, t2, t3 = table_words(bias)
    half = f"prmt.b32 a, {t0}, {t1}, q; prmt.b32 b, {t2}, {t3}, q; "
    return (
        f".reg .b32 q, s, a, b; and.b32 q, {source}, 0x77777777; shr.b32 s, {source}, 1; "
        "lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA; "
        f"{half} prmt.b32 {first}, a, b, s; "
        f"shr.b32 q, q, 16; shr.b32 s, s, 16; {half} prmt.b32 {second}, a, b, s; "
    )


def _table_text() -> str:
    """Assembly: fp16 numbers 1024 + value + 128 of two elements' codes ($4), for h = 0 ... 3."""
    text = "{ .reg .b32 w, c, d; prmt.b32 w, $4, 0, 0x3120; " + lookup_text("w", "c", "d", 128)
    for h in range(4):
        j, byte = h // 2, h % 2
        # c: byte 0 of both elements, d: byte 1; code j of each, and 0x64 above it.
        text += f"prmt.b32 ${h}, {'cd'[byte]}, 0x64646464, 0x4{2 + j}4{j}; "
    return text + "}"


_ASM_TABLE = tl.constexpr(_table_text())
_TABLE_LOW = tl.constexpr(table_words(128)[0] | table_words(128)[1] << 32)
_TABLE_HIGH = tl.constexpr(table_words(128)[2] | table_words(128)[3] << 32)


def _pair_text(main_bits: int, high_bits: int, h: int, outer: int) -> str:
    """Assembly of dot (h, o): $0 = two fp16, $1 two main elements, $2 two high elements."""
    j, byte = h // 2, 8 * (h % 2)
    main_shift = {8: byte, 4: byte + 4 * j, 2: byte + 2 * j}[main_bits] - high_bits
    if main_bits == 2:
        main_shift += 4 * (outer // (2 if high_bits == 1 else 1))
    main_mask = (((1 << main_bits) - 1) << high_bits) * 0x10001
    # A rotation, not a shift: it may go left by one bit or two, and loses nothing that is kept.
    text = f"shf.r.wrap.b32 t, $1, $1, {main_shift % 32}; "
    if not high_bits:
        return "{ .reg .b32 t; " + text + f"lop3.b32 $0, t, {main_mask}, 0x64006400, 0xEA; }}"
    high_shift = byte + high_bits * j + 2 * high_bits * outer
    high_mask = ((1 << high_bits) - 1) * 0x10001
    return (
        "{ .reg .b32 t, u; "
        + text
        + f"lop3.b32 t, t, {main_mask}, 0x64006400, 0xEA; "
        + f"shf.r.wrap.b32 u, $2, $2, {high_shift}; "
        + f"lop3.b32 $0, u, {high_mask}, t, 0xEA; }}"
    )


def _texts(main_bits: int, high_bits: int, outer: int) -> tl.constexpr:
    return tl.constexpr(
        tuple(_pair_text(main_bits, high_bits, h, o) for o in range(outer) for h in range(4))
    )


_ASM_8 = _texts(8, 0, 1)
_ASM_4 = _texts(4, 0, 1)
_ASM_41 = _texts(4, 1, 4)
_ASM_42 = _texts(4, 2, 2)
_ASM_2 = _texts(2, 0, 2)
_ASM_21 = _texts(2, 1, 4)


@triton.jit
def half_bits(bits):
    """The low 16 bits as an fp16 number."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def small_half(number):
    """Unsigned integer below 1024 -> the fp16 number 1024 + it."""
    return half_bits(number | 0x6400)


@triton.jit
def _pair(TEXT: tl.constexpr, a):
    return tl.inline_asm_elementwise(TEXT, "=r,r", [a], tl.float16, is_pure=True, pack=2)


@triton.jit
def _pair2(TEXT: tl.constexpr, a, b):
    return tl.inline_asm_elementwise(TEXT, "=r,r,r", [a, b], tl.float16, is_pure=True, pack=2)


@triton.jit
def table_value(code):
    """IQ4_VALUES[code] + 128 in plain Triton."""
    low = tl.full(code.shape, _TABLE_LOW, tl.uint64)
    high = tl.full(code.shape, _TABLE_HIGH, tl.uint64)
    shift = (code & 7).to(tl.uint64) * 8
    return (tl.where(code < 8, low, high) >> shift).to(tl.uint8)


@triton.jit
def _table_codes(main, H: tl.constexpr):
    """The same for every H until the choice: the compiler keeps one copy."""
    four = tl.inline_asm_elementwise(
        _ASM_TABLE,
        "=r,=r,=r,=r,r",
        [main],
        (tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )
    return four[H]


@triton.jit
def biased_codes(
    main,
    high,
    H: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    MAIN: tl.constexpr,
    HIGH: tl.constexpr,
    TABLE: tl.constexpr,
    ASM: tl.constexpr,
):
    """fp16 numbers 1024 + code of dot (H, O), from the u16 elements of its tile of each plane."""
    AT: tl.constexpr = O * 4 + H
    if ASM:
        # Named first: triton 3.6 takes a bare element of a constant tuple for a plain string.
        if MAIN == 8:
            TEXT_8: tl.constexpr = _ASM_8[AT]
            half = _pair(TEXT_8, main)
        elif TABLE:
            half = _table_codes(main, H)
        elif MAIN == 4:
            if HIGH == 0:
                TEXT_4: tl.constexpr = _ASM_4[AT]
                half = _pair(TEXT_4, main)
            elif HIGH == 1:
                TEXT_41: tl.constexpr = _ASM_41[AT]
                half = _pair2(TEXT_41, main, high)
            else:
                TEXT_42: tl.constexpr = _ASM_42[AT]
                half = _pair2(TEXT_42, main, high)
        elif HIGH == 0:
            TEXT_2: tl.constexpr = _ASM_2[AT]
            half = _pair(TEXT_2, main)
        else:
            TEXT_21: tl.constexpr = _ASM_21[AT]
            half = _pair2(TEXT_21, main, high)
    else:
        BYTE: tl.constexpr = 8 * (H % 2)
        J: tl.constexpr = H // 2
        if MAIN == 8:
            code = (main >> BYTE) & 255
        elif MAIN == 4:
            code = (main >> (BYTE + 4 * J)) & 15
        elif HIGH == 0:
            code = (main >> (BYTE + 2 * J + 4 * O)) & 3
        else:
            code = (main >> (BYTE + 2 * J + 4 * (O // 2))) & 3
        if HIGH > 0:
            lowest = (high >> (BYTE + HIGH * J + 2 * HIGH * O)) & ((1 << HIGH) - 1)
            code = (code << HIGH) | lowest
        if TABLE:
            code = table_value(code).to(tl.uint16)
        half = small_half(code)
    return half


@triton.jit
def group_scale(word, super_word, H: tl.constexpr, FORM: tl.constexpr, SCALE_BIAS: tl.constexpr):
    """fp16 scale of the group that dot H takes from a scale word (one 64-weight run)."""
    if FORM == 0:
        scale = half_bits((word >> (16 * (H // 2))) & 0xFFFF)
    else:
        if FORM == 1:
            code = (word >> (16 * (H // 2))) & 0xFF
        elif FORM == 2:
            code = (word >> (8 * H)) & 0xFF
        else:
            code = (word >> (8 * H)) & 0xF
        scale = (small_half(code) - (1024.0 + SCALE_BIAS)) * half_bits(super_word & 0xFFFF)
    return scale


@triton.jit
def group_min(word, super_word, H: tl.constexpr, FORM: tl.constexpr):
    """fp16 minimum of the group that dot H takes from a scale word."""
    code = word >> 16 * (H // 2) + 8 & 255 if FORM == 1 else word >> 8 * H + 4 & 15
    return (small_half(code) - 1024.0) * half_bits(super_word >> 16)


@triton.jit
def weights_half(
    main,
    high,
    words,
    super_word,
    H: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    OUTER: tl.constexpr,
    KIND: tl.constexpr,
    ASM: tl.constexpr,
    BN: tl.constexpr,
):
    """fp16 weights [BN, 64 / OUTER] of dot (H, O). words u32 [BN, 4(r)], super_word u32 [BN, 1].

    KIND: see `kind_of` in matmul.py.
    """
    C: tl.constexpr = 8 // OUTER
    codes = biased_codes(main, high, H, O, KIND[0], KIND[1], KIND[6], ASM) - (1024.0 + KIND[3])
    codes = tl.reshape(codes, (BN, C, 4, 2))
    scale = group_scale(words, super_word, H, KIND[2], KIND[4])
    scale = tl.broadcast_to(scale[:, None, :, None], (BN, C, 4, 2))
    if KIND[5]:
        low = group_min(words, super_word, H, KIND[2])
        low = tl.broadcast_to(low[:, None, :, None], (BN, C, 4, 2))
        weights = tl.fma(codes, scale, -low)
    else:
        weights = codes * scale
    return tl.reshape(weights, (BN, C * 8))
