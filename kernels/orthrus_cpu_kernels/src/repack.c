// GGUF blocks -> panels (panels.h), and back to floats.
//
// A block is first spelled out: codes by k, scales and mins by sub-block. Then it is laid out anew.
#include "isa.h"
#include "orthrus_cpu.h"
#include "panels.h"

typedef struct {
    uint8_t code[256];          // of 32 values for block types
    int16_t scale[16], min[16]; // of K types
    uint16_t d, m;              // F16; m is dmin, or the min of a block type
} Block;

INLINE uint16_t half_at(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }

// Scale and min of sub-block j in the 12 bytes of Q4_K and Q5_K.
static void scale_min(const uint8_t *s, int j, int16_t *scale, int16_t *min) {
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (int16_t)((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        *min = (int16_t)((s[j + 4] >> 4) | (s[j] >> 6) << 4);
    }
}

static void spell_q45(const uint8_t *p, int five, Block *to) {
    const uint8_t *high = p + 16, *codes = p + 16 + (five ? 32 : 0);
    to->d = half_at(p);
    to->m = half_at(p + 2);
    for (int j = 0; j < 8; j++) {
        scale_min(p + 4, j, &to->scale[j], &to->min[j]);
        for (int i = 0; i < 32; i++) {
            int code = codes[j / 2 * 32 + i] >> (4 * (j & 1)) & 15;
            if (five) code |= (high[i] >> j & 1) << 4;
            to->code[j * 32 + i] = (uint8_t)code;
        }
    }
}

static void spell_q6(const uint8_t *p, Block *to) {
    to->d = half_at(p + 208);
    for (int s = 0; s < 16; s++) to->scale[s] = (int8_t)p[192 + s];
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) {
            int low = p[j / 4 * 64 + (j & 1) * 32 + i] >> (4 * (j / 2 & 1)) & 15;
            int high = p[128 + j / 4 * 32 + i] >> (2 * (j & 3)) & 3;
            to->code[j * 32 + i] = (uint8_t)(low | high << 4);
        }
}

static void spell_q2(const uint8_t *p, Block *to) {
    to->d = half_at(p + 80);
    to->m = half_at(p + 82);
    for (int s = 0; s < 16; s++) {
        to->scale[s] = p[s] & 15;
        to->min[s] = p[s] >> 4;
    }
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++)
            to->code[j * 32 + i] = p[16 + j / 4 * 32 + i] >> (2 * (j & 3)) & 3;
}

static void spell_q3(const uint8_t *p, Block *to) {
    const uint8_t *scales = p + 96;
    to->d = half_at(p + 108);
    for (int s = 0; s < 16; s++) {
        int low = s < 8 ? scales[s] & 15 : scales[s - 8] >> 4;
        to->scale[s] = (int16_t)((low | (scales[8 + s % 4] >> (2 * (s / 4)) & 3) << 4) - 32);
    }
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) {
            int low = p[32 + j / 4 * 32 + i] >> (2 * (j & 3)) & 3;
            to->code[j * 32 + i] = (uint8_t)(low | (p[i] >> j & 1) << 2);
        }
}

static void spell_iq4_xs(const uint8_t *p, Block *to) {
    int high = half_at(p + 2);
    to->d = half_at(p);
    for (int j = 0; j < 8; j++) {
        int low = p[4 + j / 2] >> (4 * (j & 1)) & 15;
        to->scale[j] = (int16_t)((low | (high >> (2 * j) & 3) << 4) - 32);
        for (int i = 0; i < 32; i++)
            to->code[j * 32 + i] = p[8 + j * 16 + i % 16] >> (i < 16 ? 0 : 4) & 15;
    }
}

// A 32-weight block.
static void spell_b(int type, const uint8_t *p, Block *to) {
    to->d = half_at(p);
    p += 2;
    if (type == T_Q8_0) {
        memcpy(to->code, p, 32);
        return;
    }
    if (type == T_Q4_1 || type == T_Q5_1) {
        to->m = half_at(p);
        p += 2;
    }
    uint32_t fifth;
    int five = type == T_Q5_0 || type == T_Q5_1;
    if (five) {
        memcpy(&fifth, p, 4);
        p += 4;
    }
    for (int i = 0; i < 16; i += 8) {
        uint64_t eight, low, high;
        memcpy(&eight, p + i, 8);
        low = eight & 0x0F0F0F0F0F0F0F0F;
        high = eight >> 4 & 0x0F0F0F0F0F0F0F0F;
        memcpy(to->code + i, &low, 8);
        memcpy(to->code + i + 16, &high, 8);
    }
    if (five)
        for (int i = 0; i < 32; i++) to->code[i] |= (uint8_t)((fifth >> i & 1) << 4);
}

static int raw_bytes(int type) {
    switch (type) {
    case T_Q2_K: return 84;
    case T_Q3_K: return 110;
    case T_Q4_K: return 144;
    case T_Q5_K: return 176;
    case T_Q6_K: return 210;
    case T_IQ4_XS: return 136;
    case T_Q4_0:
    case T_IQ4_NL: return 18;
    case T_Q4_1: return 20;
    case T_Q5_0: return 22;
    case T_Q5_1: return 24;
    case T_Q8_0: return 34;
    case T_F32: return 4;
    default: return 2;
    }
}

static void spell(int type, const uint8_t *p, Block *to) {
    switch (type) {
    case T_Q2_K: spell_q2(p, to); break;
    case T_Q3_K: spell_q3(p, to); break;
    case T_Q4_K: spell_q45(p, 0, to); break;
    case T_Q5_K: spell_q45(p, 1, to); break;
    case T_Q6_K: spell_q6(p, to); break;
    case T_IQ4_XS: spell_iq4_xs(p, to); break;
    default: spell_b(type, p, to); break;
    }
}

INLINE void put_half(uint8_t *p, uint16_t h) { memcpy(p, &h, 2); }

// Four codes, of consecutive k, as one word.
INLINE uint32_t word(const Block *b, int i) {
    uint32_t w;
    memcpy(&w, b->code + 4 * i, 4);
    return w;
}

INLINE void put_word(uint8_t *p, int i, uint32_t w) { memcpy(p + 4 * (size_t)i, &w, 4); }

// The lowest bits of the four bytes of a word, side by side.
INLINE uint8_t low_bits(uint32_t w) { return (uint8_t)((w & 0x01010101) * 0x01020408 >> 24 & 15); }

// Fifth bits of a word of codes, where `b_add_bit4` looks for them.
INLINE void put_fifth(uint8_t *group, int column, uint32_t w) {
    group[column / 2] |= (uint8_t)(low_bits(w >> 4) << (column % 2 * 4));
}

// One column of a block of a K type; `p` has been zeroed.
static void lay_out_k(int type, const Block *b, int column, uint8_t *p) {
    int two_bits = type == T_Q2_K || type == T_Q3_K;
    for (int g = 0; g < 8; g++) {
        int at = g * LANES + column;
        for (int half = 0; half < 2; half++) { // four sub-blocks each
            uint32_t w[4], low = 0, high = 0;
            for (int i = 0; i < 4; i++) {
                w[i] = word(b, (half * 4 + i) * 8 + g);
                low |= (w[i] & 0x03030303) << 2 * i;
                high |= (w[i] >> 4 & 0x03030303) << 2 * i;
            }
            if (two_bits) {
                put_word(p + half * 512, at, low);
                continue;
            }
            for (int i = 0; i < 4; i += 2)
                put_word(p + (half * 2 + i / 2) * 512, at,
                         (w[i] & 0x0F0F0F0F) | (w[i + 1] & 0x0F0F0F0F) << 4);
            if (type == T_Q6_K) put_word(p + Q6_HIGH + half * 512, at, high);
            for (int i = 0; i < 4 && type == T_Q5_K; i++)
                put_fifth(p + Q5_HIGH + ((half * 4 + i) * 8 + g) * 8, column, w[i]);
        }
        if (type == T_Q3_K) {
            uint32_t high = 0;
            for (int j = 0; j < 8; j++) high |= (word(b, j * 8 + g) >> 2 & 0x01010101) << j;
            put_word(p + Q3_HIGH, at, high);
        }
    }
    int subs = type == T_Q2_K || type == T_Q3_K || type == T_Q6_K ? 16 : 8;
    for (int s = 0; s < subs; s++) {
        int at = s * 16 + column, scale = b->scale[s], min = b->min[s];
        switch (type) {
        case T_Q2_K: p[Q2_SCALES + at] = (uint8_t)(scale | min << 4); break;
        case T_Q3_K: p[Q3_SCALES + at] = (uint8_t)scale; break;
        case T_Q6_K: p[Q6_SCALES + at] = (uint8_t)scale; break;
        case T_IQ4_XS: p[IQ4_SCALES + at] = (uint8_t)scale; break;
        case T_Q5_K:
            p[Q5_SCALES + at] = (uint8_t)scale;
            p[Q5_MINS + at] = (uint8_t)min;
            break;
        default: p[Q4_SCALES + at] = (uint8_t)scale; p[Q4_MINS + at] = (uint8_t)min;
        }
    }
    put_half(p + d_offset(type) + 2 * column, b->d);
    if (type == T_Q4_K || type == T_Q5_K || type == T_Q2_K)
        put_half(p + d_offset(type) + 2 * (16 + column), b->m);
}

// One column of block j of a pair.
static void lay_out_b(int type, const Block *b, int j, int column, uint8_t *p) {
    put_half(p + 2 * (j * 16 + column), b->d);
    if (type == T_Q4_1 || type == T_Q5_1) put_half(p + 2 * (32 + j * 16 + column), b->m);
    uint8_t *codes = p + pair_codes(type);
    for (int g = 0; g < 8; g++) {
        uint32_t w = word(b, g), other;
        if (type == T_Q8_0) {
            put_word(codes + (j * 8 + g) * 64, column, w);
            continue;
        }
        memcpy(&other, codes + g * 64 + column * 4, 4);
        put_word(codes + g * 64, column, other | (w & 0x0F0F0F0F) << (4 * j));
        if (type == T_Q5_0 || type == T_Q5_1) put_fifth(codes + 512 + (j * 8 + g) * 8, column, w);
    }
}

int orthrus_form(int type) { return form_of(type); }

size_t orthrus_panel_bytes(int type, int k) {
    int width = block_width(type);
    return (size_t)((k + width - 1) / width) * block_bytes(type);
}

size_t orthrus_row_bytes(int form, int k) {
    if (form == X_K) return (size_t)(k / 256) * sizeof(XK);
    if (form == X_B) return (size_t)((k + 63) / 64) * 2 * sizeof(XB);
    return (size_t)k * sizeof(float);
}

// The panel's columns of one k after the other: read from 16 places, written to one.
#define GATHER(T)                                                                                  \
    for (int i = 0; i < k; i++)                                                                    \
        for (int c = 0; c < columns; c++)                                                          \
            memcpy(to + ((size_t)i * LANES + (size_t)c) * sizeof(T),                               \
                   raw + ((size_t)c * (size_t)k + (size_t)i) * sizeof(T), sizeof(T));

static void repack_floats(int type, const uint8_t *raw, int columns, int k, uint8_t *to) {
    if (type == T_F32) {
        GATHER(float)
    } else {
        GATHER(uint16_t)
    }
}
#undef GATHER

void orthrus_repack(int type, const uint8_t *raw, int columns, int k, int first, int stop,
                    uint8_t *panels) {
    size_t bytes = orthrus_panel_bytes(type, k), block = block_bytes(type);
    int form = form_of(type), size = raw_bytes(type);
    int per = form == X_K ? 256 : form == X_B ? 32 : 1;
    for (int panel = first; panel < stop; panel++) {
        uint8_t *to = panels + panel * bytes;
        memset(to, 0, bytes);
        int column = panel * LANES, here = columns - column < LANES ? columns - column : LANES;
        const uint8_t *from = raw + (size_t)column * (size_t)(k / per * size);
        if (form == X_F) {
            repack_floats(type, from, here, k, to);
            continue;
        }
        for (int c = 0; c < here; c++) {
            for (int b = 0; b < k / per; b++, from += size) {
                Block spelled;
                spell(type, from, &spelled);
                if (form == X_K)
                    lay_out_k(type, &spelled, c, to + b * block);
                else
                    lay_out_b(type, &spelled, b & 1, c, to + b / 2 * block);
            }
        }
    }
}

static void unpack_k(int type, const uint8_t *p, int column, float *x) {
    float d = half_to_float(half_at(p + d_offset(type) + 2 * column)), dmin = 0.0f;
    int has_min = type == T_Q4_K || type == T_Q5_K || type == T_Q2_K;
    if (has_min) dmin = half_to_float(half_at(p + d_offset(type) + 2 * (16 + column)));
    for (int k = 0; k < 256; k++) {
        int j = k / 32, g = k % 32 / 4, byte = column * 4 + k % 4, code, scale, min = 0;
        int at = (type == T_Q2_K || type == T_Q3_K || type == T_Q6_K ? k / 16 : j) * 16 + column;
        if (type == T_Q2_K || type == T_Q3_K)
            code = p[j / 4 * 512 + g * 64 + byte] >> (2 * (j & 3)) & 3;
        else
            code = p[j / 2 * 512 + g * 64 + byte] >> (4 * (j & 1)) & 15;
        switch (type) {
        case T_Q2_K:
            scale = p[Q2_SCALES + at] & 15;
            min = p[Q2_SCALES + at] >> 4;
            break;
        case T_Q3_K:
            code = (code | (p[Q3_HIGH + g * 64 + byte] >> j & 1) << 2) - 4;
            scale = (int8_t)p[Q3_SCALES + at];
            break;
        case T_Q6_K:
            code =
                (code | (p[Q6_HIGH + j / 4 * 512 + g * 64 + byte] >> (2 * (j & 3)) & 3) << 4) - 32;
            scale = (int8_t)p[Q6_SCALES + at];
            break;
        case T_IQ4_XS:
            code = iq4_values[code];
            scale = (int8_t)p[IQ4_SCALES + at];
            break;
        case T_Q5_K:
            code |= (p[Q5_HIGH + (j * 8 + g) * 8 + byte / 8] >> byte % 8 & 1) << 4;
            scale = p[Q5_SCALES + at];
            min = p[Q5_MINS + at];
            break;
        default: scale = p[Q4_SCALES + at]; min = p[Q4_MINS + at];
        }
        float value = d * (float)scale * (float)code;
        x[k] = has_min ? value - dmin * (float)min : value;
    }
}

static void unpack_b(int type, const uint8_t *p, int j, int column, float *x) {
    float d = half_to_float(half_at(p + 2 * (j * 16 + column))), m = 0.0f;
    int has_min = type == T_Q4_1 || type == T_Q5_1;
    if (has_min) m = half_to_float(half_at(p + 2 * (32 + j * 16 + column)));
    const uint8_t *codes = p + pair_codes(type);
    for (int k = 0; k < 32; k++) {
        int g = k / 4, byte = column * 4 + k % 4, code;
        if (type == T_Q8_0) {
            x[k] = d * (float)(int8_t)codes[(j * 8 + g) * 64 + byte];
            continue;
        }
        code = codes[g * 64 + byte] >> (4 * j) & 15;
        if (type == T_Q5_0 || type == T_Q5_1)
            code |= (codes[512 + (j * 8 + g) * 8 + byte / 8] >> byte % 8 & 1) << 4;
        if (type == T_IQ4_NL) code = iq4_values[code];
        if (type == T_Q4_0) code -= 8;
        if (type == T_Q5_0) code -= 16;
        x[k] = has_min ? d * (float)code + m : d * (float)code;
    }
}

void orthrus_unpack_row(int type, const uint8_t *panels, int k, int row, float *x) {
    const uint8_t *p = panels + (size_t)(row / LANES) * orthrus_panel_bytes(type, k);
    int form = form_of(type), column = row % LANES;
    size_t block = block_bytes(type);
    if (form == X_K) {
        for (int b = 0; b < k / 256; b++) unpack_k(type, p + b * block, column, x + b * 256);
    } else if (form == X_B) {
        for (int b = 0; b < k / 32; b++)
            unpack_b(type, p + b / 2 * block, b & 1, column, x + b * 32);
    } else {
        for (int i = 0; i < k; i++) {
            float lanes[LANES];
            const uint8_t *at = p + i * block;
            f_store(lanes, type == T_F32   ? f_load((const float *)at)
                           : type == T_F16 ? f_load_f16((const uint16_t *)at)
                                           : f_load_bf16((const uint16_t *)at));
            x[i] = lanes[column];
        }
    }
}
