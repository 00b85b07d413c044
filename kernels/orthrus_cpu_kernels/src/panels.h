// Panels: 16 columns of a product, their weights in the order in which kernels read them.
//
// Codes lie in groups of 64 bytes: 16 columns of 4 consecutive k, which one `dot` consumes. A block
// of a K type covers 256 k, in eight sub-blocks j of 32 k, of eight groups g each:
//
//   4-bit codes  [j/2][g][64]: sub-block j in the low nibbles if even, in the high ones if odd
//   2-bit codes  [j/4][g][64]: sub-block j in bits 2(j%4)
//   1-bit codes  [g][64]: sub-block j in bit j (Q3_K); [j][g][8], bit by bit (Q5_K)
//
// then scales [sub-block][16] (int8 or uint8, unpacked), mins likewise, and d (and dmin) as F16
// [16]. A block of the other types is a pair of two 32-weight blocks: d F16 [2][16], with mins F16
// [2][16], 4-bit codes [g][64] or 8-bit codes [2][g][64], and the fifth bits [2][g][8]. The second
// of a pair is zeros where there is none. Floats lie [k][16].
#ifndef ORTHRUS_PANELS_H
#define ORTHRUS_PANELS_H

#include "isa.h"
#include "orthrus_cpu.h"

enum {
    Q4_SCALES = 2048,
    Q4_MINS = Q4_SCALES + 128,
    Q4_D = Q4_MINS + 128,
    Q5_HIGH = 2048,
    Q5_SCALES = Q5_HIGH + 512,
    Q5_MINS = Q5_SCALES + 128,
    Q5_D = Q5_MINS + 128,
    Q6_HIGH = 2048,
    Q6_SCALES = Q6_HIGH + 1024,
    Q6_D = Q6_SCALES + 256,
    Q3_HIGH = 1024,
    Q3_SCALES = Q3_HIGH + 512,
    Q3_D = Q3_SCALES + 256,
    Q2_SCALES = 1024,
    Q2_D = Q2_SCALES + 256,
    IQ4_SCALES = 2048,
    IQ4_D = IQ4_SCALES + 128,
};

static const int8_t iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                      1,    13,   25,  38,  53,  69,  89,  113};

INLINE int form_of(int type) {
    switch (type) {
    case T_F32:
    case T_F16:
    case T_BF16: return X_F;
    case T_Q4_0:
    case T_Q4_1:
    case T_Q5_0:
    case T_Q5_1:
    case T_Q8_0:
    case T_IQ4_NL: return X_B;
    case T_Q2_K:
    case T_Q3_K:
    case T_Q4_K:
    case T_Q5_K:
    case T_Q6_K:
    case T_IQ4_XS: return X_K;
    default: return -1;
    }
}

INLINE size_t d_offset(int type) {
    switch (type) {
    case T_Q4_K: return Q4_D;
    case T_Q5_K: return Q5_D;
    case T_Q6_K: return Q6_D;
    case T_Q3_K: return Q3_D;
    case T_Q2_K: return Q2_D;
    default: return IQ4_D;
    }
}

// Where the codes of a pair begin.
INLINE size_t pair_codes(int type) { return type == T_Q4_1 || type == T_Q5_1 ? 128 : 64; }

// Bytes of a block of 256 (K types), of a pair of blocks, or of one k of a float type.
INLINE size_t block_bytes(int type) {
    switch (type) {
    case T_F32: return 4 * LANES;
    case T_F16:
    case T_BF16: return 2 * LANES;
    case T_Q8_0: return pair_codes(type) + 1024;
    case T_Q4_0:
    case T_Q4_1:
    case T_IQ4_NL: return pair_codes(type) + 512;
    case T_Q5_0:
    case T_Q5_1: return pair_codes(type) + 512 + 128;
    case T_Q4_K:
    case T_Q5_K:
    case T_Q2_K: return d_offset(type) + 64;
    default: return d_offset(type) + 32;
    }
}

INLINE int block_width(int type) {
    int form = form_of(type);
    return form == X_K ? 256 : form == X_B ? 64 : 1;
}

#endif
