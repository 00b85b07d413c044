// Products of quantized activations with repacked weights (orthrus_cpu.h).
//
// Within a block the dot products are exact integers. Per block, or sub-block of a K type, one
// fused multiply-add in float brings them into a sum that runs in ascending k:
//
//   K types, per 256:   s = sum over sub-blocks: s = fma(dot, scale, s)
//                       t = fma(-dmin, sum of min * sum(x), d * s);  y = fma(dx, t, y)
//   block types, per 32: y = fma(dot, d * dx, y), and with mins y = fma(m, dx * sum(x), y)
//   floats, per column:  y = fma(w, x, y)
#include "isa.h"
#include "orthrus_cpu.h"
#include "panels.h"

// Rows of the largest tile, and sub-blocks that it takes at once: as many sums as registers hold,
// so that none waits for the one before. Portable C gains nothing from more than one, and would
// take long to compile.
#if defined(ORTHRUS_AVX512VNNI)
#define MOST_ROWS 8
#define AT_ONCE 2
#elif defined(ORTHRUS_PORTABLE)
#define MOST_ROWS 1
#define AT_ONCE 1
#else
#define MOST_ROWS 4
#define AT_ONCE 1
#endif

// Bytes between the weights at work and those that are asked for.
#define AHEAD 4096

#ifdef ORTHRUS_PORTABLE
#define UNROLL(n) // sixteen lanes of four, unrolled, would take minutes to compile
#else
#define UNROLL(n) _Pragma(UNROLL_TEXT(GCC unroll n))
#define UNROLL_TEXT(x) #x
#endif

// Ask for the weights that come AHEAD bytes after these. A few lines at a time: many at once would
// wait for each other, and hold up the arithmetic meanwhile.
INLINE void fetch(const uint8_t *p, const size_t bytes) {
    UNROLL(16) for (size_t line = 0; line < bytes; line += 64)
        __builtin_prefetch(p + AHEAD + line, 0, 3);
}

INLINE int32_t four(const int8_t *q) {
    int32_t x;
    memcpy(&x, q, 4);
    return x;
}

// Codes of group g (4 columns of k) of the 32 that sub-block j covers, of a K type.
INLINE vb codes_k(const int type, const uint8_t *p, int j, int g) {
    if (type == T_Q2_K || type == T_Q3_K) {
        const uint8_t *low = p + (j >> 2) * 512 + g * 64;
        vb two = b_and(b_shr(b_load(low), 2 * (j & 3)), 3);
        if (type == T_Q2_K) return two;
        vb high = b_and(b_shr(b_load(p + Q3_HIGH + g * 64), j), 1);
        return b_or(two, b_shl(high, 2));
    }
    vb q = b_load(p + (j >> 1) * 512 + g * 64);
    vb low = b_and(b_shr(q, 4 * (j & 1)), 15);
    if (type == T_Q5_K) return b_add_bit4(low, p + Q5_HIGH + (j * 8 + g) * 8);
    if (type == T_Q6_K) {
        vb high = b_load(p + Q6_HIGH + (j >> 2) * 512 + g * 64);
        const int up = 4 - 2 * (j & 3); // to bits 4 and 5
        return b_or(low, b_and(up >= 0 ? b_shl(high, up) : b_shr(high, -up), 0x30));
    }
    if (type == T_IQ4_XS) return wide(b_lookup(low, iq4_values));
    return low;
}

// Codes of group g of block j (0 or 1) of a pair of 32-weight blocks.
INLINE vb codes_b(const int type, const uint8_t *p, int j, int g) {
    if (type == T_Q8_0) return wide(b_load(p + pair_codes(type) + (j * 8 + g) * 64));
    vb q = b_load(p + pair_codes(type) + g * 64);
    vb low = b_and(b_shr(q, 4 * j), 15);
    if (type == T_Q5_0 || type == T_Q5_1)
        return b_add_bit4(low, p + pair_codes(type) + 512 + (j * 8 + g) * 8);
    if (type == T_IQ4_NL) return wide(b_lookup(low, iq4_values));
    return low;
}

INLINE int is_wide(const int type) {
    return type == T_Q8_0 || type == T_IQ4_NL || type == T_IQ4_XS;
}

INLINE int is_per16(const int type) {
    return type == T_Q2_K || type == T_Q3_K || type == T_Q6_K;
}

// Whether sub-blocks 2i and 2i+1 lie in the same bytes, so that both at once load them once.
INLINE int shares_codes(const int type) { return !is_per16(type) && type != T_Q8_0; }

// Codes of group g of sub-block s, counted in sub-blocks as long as their scales reach.
INLINE vb codes(const int type, const uint8_t *p, int s, int g) {
    if (form_of(type) == X_B) return codes_b(type, p, s, g);
    return is_per16(type) ? codes_k(type, p, s / 2, (s & 1) * 4 + g) : codes_k(type, p, s, g);
}

// Groups whose sums of two products, |x| being at most 127, are sure to fit int16.
INLINE int short_groups(const int type) {
    if (is_wide(type)) return 1;
    if (type == T_Q6_K) return 32767 / (2 * 63 * 127);
    if (type == T_Q5_K || type == T_Q5_0 || type == T_Q5_1) return 32767 / (2 * 31 * 127);
    return 32767 / (2 * 15 * 127);
}

// dot[i][m] += sub-block s + i with its activations in row m, at q[m] + i * q_stride.
INLINE void dots(const int type, const int rows, const uint8_t *p, int s,
                 const int8_t *const *q, const size_t q_stride, vi dot[][MOST_ROWS]) {
    const int groups = is_per16(type) ? 4 : 8, at_once = shares_codes(type) ? AT_ONCE : 1;
#ifdef ORTHRUS_TWO_ROWS
    if (rows > 1) {
        vp two[MOST_ROWS / 2];
        UNROLL(8) for (int m = 0; m < rows / 2; m++) two[m] = p_zero();
        UNROLL(8) for (int g = 0; g < groups; g += 2) {
            vb w = codes(type, p, s, g), next = codes(type, p, s, g + 1);
            vb low = p_low(w, next), high = p_high(w, next);
            UNROLL(8) for (int m = 0; m < rows / 2; m++)
                two[m] = dot_two(two[m], low, high, q[2 * m] + g * 4, q[2 * m + 1] + g * 4);
        }
        UNROLL(8) for (int m = 0; m < rows / 2; m++)
            p_add(two[m], &dot[0][2 * m], &dot[0][2 * m + 1]);
        return;
    }
#elif defined(ORTHRUS_SHORT_SUMS)
    const int together = short_groups(type);
    if (together > 1) {
        UNROLL(4) for (int first = 0; first < groups; first += together) {
            vi sums[MOST_ROWS];
            UNROLL(8) for (int m = 0; m < rows; m++) sums[m] = i_set(0);
            const int stop = first + together < groups ? first + together : groups;
            UNROLL(8) for (int g = first; g < stop; g++) {
                vb w = codes(type, p, s, g);
                UNROLL(8) for (int m = 0; m < rows; m++)
                    sums[m] = short_sums(sums[m], w, four(q[m] + g * 4));
            }
            UNROLL(8) for (int m = 0; m < rows; m++) dot[0][m] = add_short_sums(dot[0][m], sums[m]);
        }
        return;
    }
#endif
    UNROLL(8) for (int g = 0; g < groups; g++) {
        UNROLL(2) for (int i = 0; i < at_once; i++) {
            vb w = codes(type, p, s + i, g);
            UNROLL(8) for (int m = 0; m < rows; m++) {
                int32_t x = four(q[m] + i * q_stride + g * 4);
                dot[i][m] = is_wide(type) ? dot_wide(dot[i][m], w, x)
                                          : dot_narrow(dot[i][m], w, x);
            }
        }
    }
}

// Scales of sub-block s, as float.
INLINE vf scale_k(const int type, const uint8_t *p, int s) {
    if (type == T_Q2_K) return f_from_i(i_and(i_load_u8(p + Q2_SCALES + s * 16), 15));
    if (type == T_Q3_K) return f_from_i(i_load_s8((const int8_t *)p + Q3_SCALES + s * 16));
    if (type == T_Q6_K) return f_from_i(i_load_s8((const int8_t *)p + Q6_SCALES + s * 16));
    if (type == T_IQ4_XS) return f_from_i(i_load_s8((const int8_t *)p + IQ4_SCALES + s * 16));
    return f_from_i(i_load_u8(p + (type == T_Q5_K ? Q5_SCALES : Q4_SCALES) + s * 16));
}

// What sub-blocks 2i and 2i+1 subtract per unit of the sum of x, as pairs of int16.
INLINE vi mins_k(const int type, const uint8_t *p, int i) {
    vi even, odd;
    if (type == T_Q2_K) {
        even = i_shr(i_load_u8(p + Q2_SCALES + 2 * i * 16), 4);
        odd = i_shr(i_load_u8(p + Q2_SCALES + (2 * i + 1) * 16), 4);
    } else if (type == T_Q3_K || type == T_Q6_K) {
        const int8_t *s = (const int8_t *)p + (type == T_Q3_K ? Q3_SCALES : Q6_SCALES);
        even = i_load_s8(s + 2 * i * 16);
        odd = i_load_s8(s + (2 * i + 1) * 16);
    } else {
        const uint8_t *m = p + (type == T_Q5_K ? Q5_MINS : Q4_MINS);
        even = i_load_u8(m + 2 * i * 16);
        odd = i_load_u8(m + (2 * i + 1) * 16);
    }
    return i_or(i_and(even, 0xFFFF), i_shl(odd, 16));
}

// scaled[m] += sub-block s, and those that go with it, of a K type.
INLINE void sub_blocks(const int type, const int rows, const uint8_t *p, int s,
                       const XK *const *xk, vf *scaled) {
    const int subs = is_per16(type) ? 16 : 8, at_once = shares_codes(type) ? AT_ONCE : 1;
    const size_t q_stride = 256 / subs, bytes = block_bytes(type) / subs;
    const int8_t *q[MOST_ROWS];
    vi dot[AT_ONCE][MOST_ROWS];
    fetch(p + s * bytes, at_once * bytes);
    UNROLL(8) for (int m = 0; m < rows; m++) q[m] = xk[m]->q + s * q_stride;
    UNROLL(2) for (int i = 0; i < at_once; i++)
        UNROLL(8) for (int m = 0; m < rows; m++)
            dot[i][m] = i_set(type == T_IQ4_XS ? WIDE_BIAS * xk[m]->sums32[s + i] : 0);
    dots(type, rows, p, s, q, q_stride, dot);
    UNROLL(2) for (int i = 0; i < at_once; i++) {
        vf scale = scale_k(type, p, s + i);
        UNROLL(8) for (int m = 0; m < rows; m++)
            scaled[m] = f_fma(f_from_i(dot[i][m]), scale, scaled[m]);
    }
}

INLINE void tile_k(const int type, const int rows, int k, const uint8_t *p, const uint8_t *x,
                   size_t x_stride, float *y, size_t stride, int add) {
    const int per16 = is_per16(type);
    const size_t bytes = block_bytes(type);
    vf sum[MOST_ROWS];
    UNROLL(8) for (int m = 0; m < rows; m++) sum[m] = f_set(0.0f);
    for (int b = 0; b < k / 256; b++, p += bytes) {
        const XK *xk[MOST_ROWS];
        UNROLL(8) for (int m = 0; m < rows; m++) xk[m] = (const XK *)(x + m * x_stride) + b;
        vf scaled[MOST_ROWS];
        UNROLL(8) for (int m = 0; m < rows; m++) scaled[m] = f_set(0.0f);
        if (per16) // shifts of codes are constants, if four sub-blocks of 32 are unrolled
            for (int half = 0; half < 16; half += 8)
                UNROLL(8) for (int s = half; s < half + 8; s++)
                    sub_blocks(type, rows, p, s, xk, scaled);
        else
            UNROLL(2) for (int s = 0; s < 8; s += shares_codes(type) ? AT_ONCE : 1)
                sub_blocks(type, rows, p, s, xk, scaled);
        vf d = f_load_f16((const uint16_t *)(p + d_offset(type)));
        vf dmin = d;
        if (type == T_Q4_K || type == T_Q5_K || type == T_Q2_K)
            dmin = f_load_f16((const uint16_t *)(p + d_offset(type)) + 16);
        if (type == T_Q6_K) dmin = f_mul(d, f_set(32.0f));
        if (type == T_Q3_K) dmin = f_mul(d, f_set(4.0f));
        vi mins[8];
        const int pairs = type == T_IQ4_XS ? 0 : per16 ? 8 : 4;
        for (int i = 0; i < pairs; i++) mins[i] = mins_k(type, p, i);
        UNROLL(8) for (int m = 0; m < rows; m++) {
            vf t = f_mul(d, scaled[m]);
            if (pairs) {
                const int16_t *sums = per16 ? xk[m]->sums16 : xk[m]->sums32;
                vi below = i_set(0);
                for (int i = 0; i < pairs; i++) {
                    int32_t pair;
                    memcpy(&pair, sums + 2 * i, 4);
                    below = dot_pairs(below, mins[i], pair);
                }
                t = f_fma(f_sub(f_set(0.0f), dmin), f_from_i(below), t);
            }
            sum[m] = f_fma(f_set(xk[m]->d), t, sum[m]);
        }
    }
    UNROLL(8) for (int m = 0; m < rows; m++) {
        float *to = y + m * stride;
        f_store(to, add ? f_add(f_load(to), sum[m]) : sum[m]);
    }
}

INLINE void tile_b(const int type, const int rows, int k, const uint8_t *p, const uint8_t *x,
                   size_t x_stride, float *y, size_t stride, int add) {
    const int bias = is_wide(type) ? WIDE_BIAS : type == T_Q4_0 ? -8 : type == T_Q5_0 ? -16 : 0;
    const int at_once = shares_codes(type) ? AT_ONCE : 1;
    const size_t bytes = block_bytes(type);
    vf sum[MOST_ROWS];
    UNROLL(8) for (int m = 0; m < rows; m++) sum[m] = f_set(0.0f);
    for (int b = 0; b < (k + 63) / 64; b++, p += bytes) {
        UNROLL(2) for (int j = 0; j < 2; j += at_once) {
            fetch(p + j * (bytes / 2), at_once * bytes / 2);
            const XB *xb[MOST_ROWS];
            const int8_t *q[MOST_ROWS];
            vi dot[AT_ONCE][MOST_ROWS];
            UNROLL(8) for (int m = 0; m < rows; m++) {
                xb[m] = (const XB *)(x + m * x_stride) + 2 * b + j;
                q[m] = xb[m]->q;
                UNROLL(2) for (int i = 0; i < at_once; i++)
                    dot[i][m] = i_set(bias * xb[m][i].sum);
            }
            dots(type, rows, p, j, q, sizeof(XB), dot);
            UNROLL(2) for (int i = 0; i < at_once; i++) {
                vf d = f_load_f16((const uint16_t *)p + (j + i) * 16);
                UNROLL(8) for (int m = 0; m < rows; m++)
                    sum[m] = f_fma(f_from_i(dot[i][m]), f_mul(d, f_set(xb[m][i].d)), sum[m]);
                if (type == T_Q4_1 || type == T_Q5_1) {
                    vf low = f_load_f16((const uint16_t *)p + 32 + (j + i) * 16);
                    UNROLL(8) for (int m = 0; m < rows; m++)
                        sum[m] = f_fma(low, f_set(xb[m][i].scaled), sum[m]);
                }
            }
        }
    }
    UNROLL(8) for (int m = 0; m < rows; m++) {
        float *to = y + m * stride;
        f_store(to, add ? f_add(f_load(to), sum[m]) : sum[m]);
    }
}

INLINE vf weights_f(const int type, const uint8_t *p, int i) {
    if (type == T_F32) return f_load((const float *)p + i * LANES);
    if (type == T_F16) return f_load_f16((const uint16_t *)p + i * LANES);
    return f_load_bf16((const uint16_t *)p + i * LANES);
}

INLINE void tile_f(const int type, const int rows, int k, const uint8_t *p, const uint8_t *x,
                   size_t x_stride, float *y, size_t stride, int add) {
    vf sum[MOST_ROWS];
    UNROLL(8) for (int m = 0; m < rows; m++) sum[m] = f_set(0.0f);
    for (int i = 0; i < k; i++) {
        vf w = weights_f(type, p, i);
        if (i % 8 == 0) __builtin_prefetch(p + (i + 64) * LANES * (type == T_F32 ? 4 : 2), 0, 3);
        UNROLL(8) for (int m = 0; m < rows; m++)
            sum[m] = f_fma(w, f_set(((const float *)(x + m * x_stride))[i]), sum[m]);
    }
    UNROLL(8) for (int m = 0; m < rows; m++) {
        float *to = y + m * stride;
        f_store(to, add ? f_add(f_load(to), sum[m]) : sum[m]);
    }
}

INLINE void panel_rows(const int type, int k, const uint8_t *p, const uint8_t *x, int rows,
                       float *y, size_t stride, int add) {
    const int form = form_of(type);
    const size_t x_stride = orthrus_row_bytes(form, k);
#define TILE(n)                                                                                    \
    for (; rows >= n; rows -= n, x += n * x_stride, y += n * stride) {                             \
        if (form == X_K)                                                                           \
            tile_k(type, n, k, p, x, x_stride, y, stride, add);                                    \
        else if (form == X_B)                                                                      \
            tile_b(type, n, k, p, x, x_stride, y, stride, add);                                    \
        else                                                                                       \
            tile_f(type, n, k, p, x, x_stride, y, stride, add);                                    \
    }
#if MOST_ROWS >= 8
    TILE(8)
#endif
#if MOST_ROWS >= 4
    TILE(4)
    TILE(2)
#endif
    TILE(1)
#undef TILE
}

// A function of its own per type, so that the type is a constant inside.
#define PANEL(T)                                                                                   \
    static void panel_##T(int k, const uint8_t *p, const uint8_t *x, int rows, float *y,           \
                          size_t stride, int add) {                                                \
        panel_rows(T_##T, k, p, x, rows, y, stride, add);                                          \
    }
PANEL(F32)
PANEL(F16)
PANEL(BF16)
PANEL(Q4_0)
PANEL(Q4_1)
PANEL(Q5_0)
PANEL(Q5_1)
PANEL(Q8_0)
PANEL(IQ4_NL)
PANEL(Q2_K)
PANEL(Q3_K)
PANEL(Q4_K)
PANEL(Q5_K)
PANEL(Q6_K)
PANEL(IQ4_XS)

typedef void (*Panel)(int, const uint8_t *, const uint8_t *, int, float *, size_t, int);

static Panel panel_of(int type) {
    switch (type) {
#define CASE(T)                                                                                    \
    case T_##T: return panel_##T;
        CASE(F32)
        CASE(F16)
        CASE(BF16)
        CASE(Q4_0)
        CASE(Q4_1)
        CASE(Q5_0)
        CASE(Q5_1)
        CASE(Q8_0)
        CASE(IQ4_NL)
        CASE(Q2_K)
        CASE(Q3_K)
        CASE(Q4_K)
        CASE(Q5_K)
        CASE(Q6_K)
        CASE(IQ4_XS)
#undef CASE
    default: return 0;
    }
}

void orthrus_product(int type, const uint8_t *panels, int k, int first, int stop, const uint8_t *x,
                     int rows, float *y, size_t stride, int add) {
    Panel panel = panel_of(type);
    size_t bytes = orthrus_panel_bytes(type, k);
    for (int i = first; i < stop; i++)
        panel(k, panels + i * bytes, x, rows, y + (size_t)i * LANES, stride, add);
}
