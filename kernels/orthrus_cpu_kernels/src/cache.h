// Where keys and values lie in a cache, of one head of one layer.
//
// Keys of 16 columns form a panel, so that columns are the lanes of a register:
//
//   F32, F16   [column / 16][head_dim][16]
//   Q8_0       [column / 16][head_dim / 32]: d F16 [16], codes int8 [32][16]
//   Q4_0       [column / 16][head_dim / 32]: d F16 [16], codes [16][16], element i in the low and
//              i + 16 in the high nibble, + 8
//
// Values lie column by column, so that elements are lanes: floats, or GGUF's blocks of 32. Bytes
// belong to one column each: threads store columns side by side.
#ifndef ORTHRUS_CACHE_H
#define ORTHRUS_CACHE_H

#include "isa.h"
#include "orthrus_cpu.h"

enum { PANEL_Q8_0 = 32 + 512, PANEL_Q4_0 = 32 + 256, BLOCK_Q8_0 = 34, BLOCK_Q4_0 = 18 };

// Bytes of one column's keys, or values, of a head of d elements.
INLINE size_t column_bytes(int type, int d) {
    switch (type) {
    case T_F32: return (size_t)d * 4;
    case T_F16: return (size_t)d * 2;
    case T_Q8_0: return (size_t)(d / 32) * BLOCK_Q8_0;
    default: return (size_t)(d / 32) * BLOCK_Q4_0;
    }
}

// Elements i of the keys of a panel, one per column. scale: of the block of 32 that i is in.
INLINE vf key_scale(const int type, const uint8_t *panel, int i) {
    if (type == T_Q8_0) return f_load_f16((const uint16_t *)(panel + i / 32 * PANEL_Q8_0));
    if (type == T_Q4_0) return f_load_f16((const uint16_t *)(panel + i / 32 * PANEL_Q4_0));
    return f_set(1.0f);
}
INLINE vf key_elements(const int type, const uint8_t *panel, int i, vf scale) {
    if (type == T_F32) return f_load((const float *)panel + i * LANES);
    if (type == T_F16) return f_load_f16((const uint16_t *)panel + i * LANES);
    if (type == T_Q8_0) {
        const uint8_t *q = panel + i / 32 * PANEL_Q8_0 + 32 + i % 32 * LANES;
        return f_mul(f_from_i(i_load_s8((const int8_t *)q)), scale);
    }
    vi q = i_load_u8(panel + i / 32 * PANEL_Q4_0 + 32 + i % 16 * LANES);
    q = i % 32 < 16 ? i_and(q, 15) : i_shr(q, 4);
    return f_mul(f_from_i(i_add(q, i_set(-8))), scale);
}

// Elements e .. e+15 of the values of a column; e is a multiple of 16.
INLINE vf value_elements(const int type, const uint8_t *column, int e) {
    if (type == T_F32) return f_load((const float *)column + e);
    if (type == T_F16) return f_load_f16((const uint16_t *)column + e);
    const uint8_t *block = column + e / 32 * (type == T_Q8_0 ? BLOCK_Q8_0 : BLOCK_Q4_0);
    uint16_t d;
    memcpy(&d, block, 2);
    vi q;
    if (type == T_Q8_0) {
        q = i_load_s8((const int8_t *)block + 2 + e % 32);
    } else {
        q = i_load_u8(block + 2);
        q = i_add(e % 32 ? i_shr(q, 4) : i_and(q, 15), i_set(-8));
    }
    return f_mul(f_from_i(q), f_set(half_to_float(d)));
}

#endif
