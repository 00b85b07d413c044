// Sixteen lanes, whatever the instruction set has: one register of AVX-512, two of AVX2, four of
// NEON, or an array. Kernels are written once, over these; each object is compiled with one of
// ORTHRUS_AVX512VNNI, ORTHRUS_AVX2VNNI, ORTHRUS_AVX2, ORTHRUS_NEONI8MM, ORTHRUS_NEON or
// ORTHRUS_PORTABLE defined.
//
// Every operation gives the same bits on all of them: integers are exact, floats are rounded once
// per operation (the sources are compiled without contraction, and fused where they say so), and
// lanes never meet. A lane is a column of a product, a key or an element of a head.
//
//   vf  16 floats     vi  16 int32     vb  64 bytes: 16 lanes of 4 consecutive k
#ifndef ORTHRUS_ISA_H
#define ORTHRUS_ISA_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

#if defined(ORTHRUS_AVX512VNNI)
#include <immintrin.h>
#define ISA_NAME "AVX-512 VNNI"

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vb;

INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
INLINE uint16_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE vf f_set(float x) { return _mm512_set1_ps(x); }
INLINE vf f_load(const float *p) { return _mm512_loadu_ps(p); }
INLINE void f_store(float *p, vf x) { _mm512_storeu_ps(p, x); }
INLINE vf f_load_f16(const uint16_t *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
INLINE void f_store_f16(uint16_t *p, vf x) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vf f_load_bf16(const uint16_t *p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
INLINE vf f_add(vf a, vf b) { return _mm512_add_ps(a, b); }
INLINE vf f_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
INLINE vf f_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
INLINE vf f_div(vf a, vf b) { return _mm512_div_ps(a, b); }
INLINE vf f_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vf f_max(vf a, vf b) { return _mm512_max_ps(a, b); }
INLINE vf f_min(vf a, vf b) { return _mm512_min_ps(a, b); }
INLINE vf f_abs(vf a) { return _mm512_abs_ps(a); }
INLINE vf f_from_i(vi x) { return _mm512_cvtepi32_ps(x); }
INLINE vf f_from_bits(vi x) { return _mm512_castsi512_ps(x); }

INLINE vi i_set(int32_t x) { return _mm512_set1_epi32(x); }
INLINE vi i_load_u8(const uint8_t *p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
}
INLINE vi i_load_s8(const int8_t *p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
}
INLINE vi i_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
INLINE vi i_and(vi a, int32_t m) { return _mm512_and_si512(a, _mm512_set1_epi32(m)); }
INLINE vi i_or(vi a, vi b) { return _mm512_or_si512(a, b); }
#define i_shl(a, n) _mm512_slli_epi32(a, n)
#define i_shr(a, n) _mm512_srli_epi32(a, n)
// Nearest integer, ties to even.
INLINE vi i_round(vf x) { return _mm512_cvtps_epi32(x); }
INLINE void i_store_s8(int8_t *p, vi x) { _mm_storeu_si128((__m128i *)p, _mm512_cvtepi32_epi8(x)); }

INLINE vb b_load(const void *p) { return _mm512_loadu_si512(p); }
INLINE vb b_and(vb a, int m) { return _mm512_and_si512(a, _mm512_set1_epi8((char)m)); }
INLINE vb b_or(vb a, vb b) { return _mm512_or_si512(a, b); }
// Shifts of 16-bit units: what crosses from byte to byte is masked away by the caller.
#define b_shr(a, n) _mm512_srli_epi16(a, n)
#define b_shl(a, n) _mm512_slli_epi16(a, n)
INLINE vb b_lookup(vb index, const int8_t *table) {
    __m128i t = _mm_loadu_si128((const __m128i *)table);
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), index);
}

// w + 16 where the bit of its byte is set, of 64 bits.
INLINE vb b_add_bit4(vb w, const uint8_t *bits) {
    uint64_t mask;
    memcpy(&mask, bits, 8);
    return _mm512_mask_add_epi8(w, (__mmask64)mask, w, _mm512_set1_epi8(16));
}

// acc + sum of 4 products per lane: weights 0..127 (unsigned) with int8.
INLINE vi dot_narrow(vi acc, vb w, int32_t x) {
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x));
}
// The same for weights of any int8, up to WIDE_BIAS times the sum of x, which the caller adds.
#define WIDE_BIAS (-128)
INLINE vb wide(vb w) { return _mm512_xor_si512(w, _mm512_set1_epi8((char)0x80)); }
INLINE vi dot_wide(vi acc, vb w, int32_t x) { return dot_narrow(acc, w, x); }
// acc + sum of 2 products per lane of int16.
INLINE vi dot_pairs(vi acc, vi w, int32_t x) {
    return _mm512_dpwssd_epi32(acc, w, _mm512_set1_epi32(x));
}

#elif defined(ORTHRUS_AVX2) || defined(ORTHRUS_AVX2VNNI)
#include <immintrin.h>
#ifdef ORTHRUS_AVX2VNNI
#define ISA_NAME "AVX2 VNNI"
#else
#define ISA_NAME "AVX2"
#endif

typedef struct {
    __m256 a, b;
} vf;
typedef struct {
    __m256i a, b;
} vi;
typedef vi vb;

INLINE float half_to_float(uint16_t h) { return _cvtsh_ss(h); }
INLINE uint16_t float_to_half(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE vf f_set(float x) { return (vf){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE vf f_load(const float *p) { return (vf){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void f_store(float *p, vf x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
INLINE vf f_load_f16(const uint16_t *p) {
    return (vf){_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)),
                _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
INLINE void f_store_f16(uint16_t *p, vf x) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
INLINE vf f_load_bf16(const uint16_t *p) {
    __m256i a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    __m256i b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return (vf){_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
}
INLINE vf f_add(vf x, vf y) { return (vf){_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
INLINE vf f_sub(vf x, vf y) { return (vf){_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
INLINE vf f_mul(vf x, vf y) { return (vf){_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
INLINE vf f_div(vf x, vf y) { return (vf){_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
INLINE vf f_fma(vf x, vf y, vf z) {
    return (vf){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
INLINE vf f_max(vf x, vf y) { return (vf){_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
INLINE vf f_min(vf x, vf y) { return (vf){_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
INLINE vf f_abs(vf x) {
    __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7FFFFFFF));
    return (vf){_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)};
}
INLINE vf f_from_i(vi x) { return (vf){_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
INLINE vf f_from_bits(vi x) { return (vf){_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

INLINE vi i_set(int32_t x) { return (vi){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE vi i_load_u8(const uint8_t *p) {
    __m128i x = _mm_loadu_si128((const __m128i *)p);
    return (vi){_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
INLINE vi i_load_s8(const int8_t *p) {
    __m128i x = _mm_loadu_si128((const __m128i *)p);
    return (vi){_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
INLINE vi i_add(vi x, vi y) { return (vi){_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
INLINE vi i_and(vi x, int32_t m) {
    __m256i k = _mm256_set1_epi32(m);
    return (vi){_mm256_and_si256(x.a, k), _mm256_and_si256(x.b, k)};
}
INLINE vi i_or(vi x, vi y) { return (vi){_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
INLINE vi i_shl(vi x, int n) { return (vi){_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
INLINE vi i_shr(vi x, int n) { return (vi){_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
INLINE vi i_round(vf x) { return (vi){_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
INLINE void i_store_s8(int8_t *p, vi x) {
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
    __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)p, bytes);
}

INLINE vb b_load(const void *p) {
    const __m256i *q = (const __m256i *)p;
    return (vb){_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
INLINE vb b_and(vb x, int m) {
    __m256i k = _mm256_set1_epi8((char)m);
    return (vb){_mm256_and_si256(x.a, k), _mm256_and_si256(x.b, k)};
}
INLINE vb b_or(vb x, vb y) { return i_or(x, y); }
INLINE vb b_shr(vb x, int n) { return (vb){_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
INLINE vb b_shl(vb x, int n) { return (vb){_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)}; }
INLINE vb b_lookup(vb index, const int8_t *table) {
    __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    return (vb){_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
}

INLINE __m256i spread_bit4(int32_t bits) {
    const __m256i which =
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    __m256i x = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(bits), which), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(x, bit), _mm256_set1_epi8(16));
}
INLINE vb b_add_bit4(vb w, const uint8_t *bits) {
    int32_t mask[2];
    memcpy(mask, bits, 8);
    return (vb){_mm256_or_si256(w.a, spread_bit4(mask[0])),
                _mm256_or_si256(w.b, spread_bit4(mask[1]))};
}

#ifdef ORTHRUS_AVX2VNNI
INLINE vi dot_narrow(vi acc, vb w, int32_t x) {
    __m256i v = _mm256_set1_epi32(x);
    return (vi){_mm256_dpbusd_avx_epi32(acc.a, w.a, v), _mm256_dpbusd_avx_epi32(acc.b, w.b, v)};
}
#define WIDE_BIAS (-128)
INLINE vb wide(vb w) {
    __m256i k = _mm256_set1_epi8((char)0x80);
    return (vb){_mm256_xor_si256(w.a, k), _mm256_xor_si256(w.b, k)};
}
INLINE vi dot_wide(vi acc, vb w, int32_t x) { return dot_narrow(acc, w, x); }
INLINE vi dot_pairs(vi acc, vi w, int32_t x) {
    __m256i v = _mm256_set1_epi32(x);
    return (vi){_mm256_dpwssd_avx_epi32(acc.a, w.a, v), _mm256_dpwssd_avx_epi32(acc.b, w.b, v)};
}
#else
INLINE __m256i dot_8(__m256i acc, __m256i w, __m256i x) {
    __m256i pairs = _mm256_maddubs_epi16(w, x); // at most 2 * 127 * 127: does not saturate
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
INLINE vi dot_narrow(vi acc, vb w, int32_t x) {
    __m256i v = _mm256_set1_epi32(x);
    return (vi){dot_8(acc.a, w.a, v), dot_8(acc.b, w.b, v)};
}
// The same in two halves: sums of two products in int16, which hold several groups of small codes
// before they are widened.
#define ORTHRUS_SHORT_SUMS
INLINE vi short_sums(vi acc, vb w, int32_t x) {
    __m256i v = _mm256_set1_epi32(x);
    return (vi){_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(w.a, v)),
                _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(w.b, v))};
}
INLINE vi add_short_sums(vi acc, vi sums) {
    __m256i one = _mm256_set1_epi16(1);
    return (vi){_mm256_add_epi32(acc.a, _mm256_madd_epi16(sums.a, one)),
                _mm256_add_epi32(acc.b, _mm256_madd_epi16(sums.b, one))};
}
#define WIDE_BIAS 0
INLINE vb wide(vb w) { return w; }
INLINE vi dot_wide(vi acc, vb w, int32_t x) {
    // |w| is at most 128 and x at least -127: 2 * 128 * 127 does not saturate either.
    __m256i v = _mm256_set1_epi32(x);
    return (vi){dot_8(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(v, w.a)),
                dot_8(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(v, w.b))};
}
INLINE vi dot_pairs(vi acc, vi w, int32_t x) {
    __m256i v = _mm256_set1_epi32(x);
    return (vi){_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, v)),
                _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, v))};
}
#endif

#elif defined(ORTHRUS_NEON) || defined(ORTHRUS_NEONI8MM)
#include <arm_neon.h>
#ifdef ORTHRUS_NEONI8MM
#define ISA_NAME "NEON i8mm"
#else
#define ISA_NAME "NEON dotprod"
#endif

typedef struct {
    float32x4_t v[4];
} vf;
typedef struct {
    int32x4_t v[4];
} vi;
typedef struct {
    uint8x16_t v[4];
} vb;

#define EACH(T, expression)                                                                        \
    T r;                                                                                           \
    _Pragma("GCC unroll 4") for (int i = 0; i < 4; i++) r.v[i] = (expression);                     \
    return r

INLINE float half_to_float(uint16_t h) {
    return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}
INLINE uint16_t float_to_half(float x) {
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}
INLINE vf f_set(float x) { EACH(vf, vdupq_n_f32(x)); }
INLINE vf f_load(const float *p) { EACH(vf, vld1q_f32(p + 4 * i)); }
INLINE void f_store(float *p, vf x) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.v[i]);
}
INLINE vf f_load_f16(const uint16_t *p) {
    EACH(vf, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))));
}
INLINE void f_store_f16(uint16_t *p, vf x) {
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
}
INLINE vf f_load_bf16(const uint16_t *p) {
    EACH(vf, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
INLINE vf f_add(vf x, vf y) { EACH(vf, vaddq_f32(x.v[i], y.v[i])); }
INLINE vf f_sub(vf x, vf y) { EACH(vf, vsubq_f32(x.v[i], y.v[i])); }
INLINE vf f_mul(vf x, vf y) { EACH(vf, vmulq_f32(x.v[i], y.v[i])); }
INLINE vf f_div(vf x, vf y) { EACH(vf, vdivq_f32(x.v[i], y.v[i])); }
INLINE vf f_fma(vf x, vf y, vf z) { EACH(vf, vfmaq_f32(z.v[i], x.v[i], y.v[i])); }
// Like x86's maxps: the second operand where they do not compare.
INLINE vf f_max(vf x, vf y) { EACH(vf, vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
INLINE vf f_min(vf x, vf y) { EACH(vf, vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i])); }
INLINE vf f_abs(vf x) { EACH(vf, vabsq_f32(x.v[i])); }
INLINE vf f_from_i(vi x) { EACH(vf, vcvtq_f32_s32(x.v[i])); }
INLINE vf f_from_bits(vi x) { EACH(vf, vreinterpretq_f32_s32(x.v[i])); }

INLINE vi i_set(int32_t x) { EACH(vi, vdupq_n_s32(x)); }
INLINE vi i_load_u8(const uint8_t *p) {
    uint8x16_t x = vld1q_u8(p);
    uint16x8_t low = vmovl_u8(vget_low_u8(x)), high = vmovl_u8(vget_high_u8(x));
    return (vi){{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(low))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))),
                 vreinterpretq_s32_u32(vmovl_u16(vget_high_u16(high)))}};
}
INLINE vi i_load_s8(const int8_t *p) {
    int8x16_t x = vld1q_s8(p);
    int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
    return (vi){{vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)),
                 vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))}};
}
INLINE vi i_add(vi x, vi y) { EACH(vi, vaddq_s32(x.v[i], y.v[i])); }
INLINE vi i_and(vi x, int32_t m) { EACH(vi, vandq_s32(x.v[i], vdupq_n_s32(m))); }
INLINE vi i_or(vi x, vi y) { EACH(vi, vorrq_s32(x.v[i], y.v[i])); }
INLINE vi i_shl(vi x, int n) { EACH(vi, vshlq_s32(x.v[i], vdupq_n_s32(n))); }
INLINE vi i_shr(vi x, int n) {
    EACH(vi, vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x.v[i]), vdupq_n_s32(-n))));
}
INLINE vi i_round(vf x) { EACH(vi, vcvtnq_s32_f32(x.v[i])); }
INLINE void i_store_s8(int8_t *p, vi x) {
    int16x8_t low = vcombine_s16(vmovn_s32(x.v[0]), vmovn_s32(x.v[1]));
    int16x8_t high = vcombine_s16(vmovn_s32(x.v[2]), vmovn_s32(x.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

INLINE vb b_load(const void *p) { EACH(vb, vld1q_u8((const uint8_t *)p + 16 * i)); }
INLINE vb b_and(vb x, int m) { EACH(vb, vandq_u8(x.v[i], vdupq_n_u8((uint8_t)m))); }
INLINE vb b_or(vb x, vb y) { EACH(vb, vorrq_u8(x.v[i], y.v[i])); }
INLINE vb b_shr(vb x, int n) { EACH(vb, vshlq_u8(x.v[i], vdupq_n_s8((int8_t)-n))); }
INLINE vb b_shl(vb x, int n) { EACH(vb, vshlq_u8(x.v[i], vdupq_n_s8((int8_t)n))); }
INLINE vb b_lookup(vb index, const int8_t *table) {
    uint8x16_t t = vld1q_u8((const uint8_t *)table);
    EACH(vb, vqtbl1q_u8(t, index.v[i]));
}

INLINE vb b_add_bit4(vb w, const uint8_t *bits) {
    static const uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    uint8x16_t of = vld1q_u8(bit);
    vb r;
    for (int i = 0; i < 4; i++) {
        uint8x16_t x = vcombine_u8(vdup_n_u8(bits[2 * i]), vdup_n_u8(bits[2 * i + 1]));
        r.v[i] = vorrq_u8(w.v[i], vandq_u8(vtstq_u8(x, of), vdupq_n_u8(16)));
    }
    return r;
}

INLINE vi dot_narrow(vi acc, vb w, int32_t x) {
    int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(x));
    EACH(vi, vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), v));
}
#define WIDE_BIAS 0
INLINE vb wide(vb w) { return w; }
INLINE vi dot_wide(vi acc, vb w, int32_t x) { return dot_narrow(acc, w, x); }
INLINE vi dot_pairs(vi acc, vi w, int32_t x) {
    int16x4_t v = vreinterpret_s16_s32(vdup_n_s32(x));
    vi r;
    for (int i = 0; i < 4; i++) {
        int16x8_t pairs = vreinterpretq_s16_s32(w.v[i]);
        int32x4_t low = vmull_s16(vget_low_s16(pairs), v);
        int32x4_t high = vmull_s16(vget_high_s16(pairs), v);
        r.v[i] = vaddq_s32(acc.v[i], vpaddq_s32(low, high));
    }
    return r;
}
#ifdef ORTHRUS_NEONI8MM
// Two rows at once: a register holds the sums of two columns for both rows, and an instruction
// takes eight k. p_low and p_high pair eight columns each of two groups of weights.
#define ORTHRUS_TWO_ROWS
typedef struct {
    int32x4_t v[8];
} vp;
INLINE vp p_zero(void) {
    vp r;
    for (int i = 0; i < 8; i++) r.v[i] = vdupq_n_s32(0);
    return r;
}
INLINE uint8x16_t p_zip(uint8x16_t a, uint8x16_t b, int half) {
    uint32x4_t x = vreinterpretq_u32_u8(a), y = vreinterpretq_u32_u8(b);
    return vreinterpretq_u8_u32(half ? vzip2q_u32(x, y) : vzip1q_u32(x, y));
}
INLINE vb p_low(vb a, vb b) { EACH(vb, p_zip(a.v[i / 2], b.v[i / 2], i % 2)); }
INLINE vb p_high(vb a, vb b) { EACH(vb, p_zip(a.v[2 + i / 2], b.v[2 + i / 2], i % 2)); }
INLINE vp dot_two(vp acc, vb low, vb high, const int8_t *x, const int8_t *y) {
    int8x16_t rows = vcombine_s8(vld1_s8(x), vld1_s8(y));
    for (int i = 0; i < 4; i++) {
        acc.v[i] = vmmlaq_s32(acc.v[i], rows, vreinterpretq_s8_u8(low.v[i]));
        acc.v[4 + i] = vmmlaq_s32(acc.v[4 + i], rows, vreinterpretq_s8_u8(high.v[i]));
    }
    return acc;
}
INLINE void p_add(vp acc, vi *a, vi *b) {
    for (int i = 0; i < 4; i++) {
        int64x2_t even = vreinterpretq_s64_s32(acc.v[2 * i]);
        int64x2_t odd = vreinterpretq_s64_s32(acc.v[2 * i + 1]);
        a->v[i] = vaddq_s32(a->v[i], vreinterpretq_s32_s64(vzip1q_s64(even, odd)));
        b->v[i] = vaddq_s32(b->v[i], vreinterpretq_s32_s64(vzip2q_s64(even, odd)));
    }
}
#endif
#undef EACH

#elif defined(ORTHRUS_PORTABLE)
#define ISA_NAME "portable C"

typedef struct {
    float v[LANES];
} vf;
typedef struct {
    int32_t v[LANES];
} vi;
typedef struct {
    uint8_t v[4 * LANES];
} vb;

#define EACH(T, n, expression)                                                                     \
    T r;                                                                                           \
    for (int i = 0; i < (n); i++) r.v[i] = (expression);                                           \
    return r

INLINE float half_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7FFF, bits;
    if (rest >= 0x7C00)
        bits = sign | 0x7F800000 | (rest & 0x3FF) << 13 | (rest > 0x7C00 ? 0x400000u : 0u);
    else if (rest >= 0x400)
        bits = sign | ((rest << 13) + (112u << 23));
    else {
        float small = (float)rest * 0x1p-24f;
        memcpy(&bits, &small, 4);
        bits |= sign;
    }
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE uint16_t float_to_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7FFFFFFF;
    if (rest > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (rest >> 13 & 0x3FF));
    if (rest >= 0x47800000) return (uint16_t)(sign | 0x7C00);
    if (rest < 0x38800000) { // subnormal: the sum rounds to a multiple of 2^-24
        float y;
        memcpy(&y, &rest, 4);
        y += 0.5f;
        uint32_t r;
        memcpy(&r, &y, 4);
        return (uint16_t)(sign | (r - 0x3F000000));
    }
    uint32_t rounded = rest + 0xFFF + (rest >> 13 & 1);
    return (uint16_t)(sign | (rounded >= 0x47800000 ? 0x7C00 : (rounded - (112u << 23)) >> 13));
}
INLINE float bf16_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE float bits_to_float(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE vf f_set(float x) { EACH(vf, LANES, x); }
INLINE vf f_load(const float *p) { EACH(vf, LANES, p[i]); }
INLINE void f_store(float *p, vf x) { memcpy(p, x.v, sizeof x.v); }
INLINE vf f_load_f16(const uint16_t *p) { EACH(vf, LANES, half_to_float(p[i])); }
INLINE void f_store_f16(uint16_t *p, vf x) {
    for (int i = 0; i < LANES; i++) p[i] = float_to_half(x.v[i]);
}
INLINE vf f_load_bf16(const uint16_t *p) { EACH(vf, LANES, bf16_to_float(p[i])); }
INLINE vf f_add(vf x, vf y) { EACH(vf, LANES, x.v[i] + y.v[i]); }
INLINE vf f_sub(vf x, vf y) { EACH(vf, LANES, x.v[i] - y.v[i]); }
INLINE vf f_mul(vf x, vf y) { EACH(vf, LANES, x.v[i] * y.v[i]); }
INLINE vf f_div(vf x, vf y) { EACH(vf, LANES, x.v[i] / y.v[i]); }
INLINE vf f_fma(vf x, vf y, vf z) { EACH(vf, LANES, fmaf(x.v[i], y.v[i], z.v[i])); }
INLINE vf f_max(vf x, vf y) { EACH(vf, LANES, x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
INLINE vf f_min(vf x, vf y) { EACH(vf, LANES, x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
INLINE vf f_abs(vf x) { EACH(vf, LANES, fabsf(x.v[i])); }
INLINE vf f_from_i(vi x) { EACH(vf, LANES, (float)x.v[i]); }
INLINE vf f_from_bits(vi x) { EACH(vf, LANES, bits_to_float(x.v[i])); }

INLINE vi i_set(int32_t x) { EACH(vi, LANES, x); }
INLINE vi i_load_u8(const uint8_t *p) { EACH(vi, LANES, p[i]); }
INLINE vi i_load_s8(const int8_t *p) { EACH(vi, LANES, p[i]); }
INLINE vi i_add(vi x, vi y) { EACH(vi, LANES, (int32_t)((uint32_t)x.v[i] + (uint32_t)y.v[i])); }
INLINE vi i_and(vi x, int32_t m) { EACH(vi, LANES, x.v[i] & m); }
INLINE vi i_or(vi x, vi y) { EACH(vi, LANES, x.v[i] | y.v[i]); }
INLINE vi i_shl(vi x, int n) { EACH(vi, LANES, (int32_t)((uint32_t)x.v[i] << n)); }
INLINE vi i_shr(vi x, int n) { EACH(vi, LANES, (int32_t)((uint32_t)x.v[i] >> n)); }
INLINE vi i_round(vf x) { EACH(vi, LANES, (int32_t)rintf(x.v[i])); }
INLINE void i_store_s8(int8_t *p, vi x) {
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)x.v[i];
}

INLINE vb b_load(const void *p) {
    vb r;
    memcpy(r.v, p, sizeof r.v);
    return r;
}
INLINE vb b_and(vb x, int m) { EACH(vb, 4 * LANES, (uint8_t)(x.v[i] & m)); }
INLINE vb b_or(vb x, vb y) { EACH(vb, 4 * LANES, (uint8_t)(x.v[i] | y.v[i])); }
INLINE vb b_shr(vb x, int n) { EACH(vb, 4 * LANES, (uint8_t)(x.v[i] >> n)); }
INLINE vb b_shl(vb x, int n) { EACH(vb, 4 * LANES, (uint8_t)(x.v[i] << n)); }
INLINE vb b_lookup(vb index, const int8_t *table) {
    EACH(vb, 4 * LANES, (uint8_t)table[index.v[i]]);
}

INLINE vb b_add_bit4(vb w, const uint8_t *bits) {
    for (int i = 0; i < 4 * LANES; i++)
        if (bits[i / 8] >> i % 8 & 1) w.v[i] |= 16;
    return w;
}

INLINE vi dot_narrow(vi acc, vb w, int32_t x) {
    int8_t q[4];
    memcpy(q, &x, 4);
    for (int i = 0; i < LANES; i++)
        for (int t = 0; t < 4; t++) acc.v[i] += (int8_t)w.v[4 * i + t] * q[t];
    return acc;
}
#define WIDE_BIAS 0
INLINE vb wide(vb w) { return w; }
INLINE vi dot_wide(vi acc, vb w, int32_t x) { return dot_narrow(acc, w, x); }
INLINE vi dot_pairs(vi acc, vi w, int32_t x) {
    int16_t q[2];
    memcpy(q, &x, 4);
    for (int i = 0; i < LANES; i++) {
        int16_t pair[2];
        memcpy(pair, &w.v[i], 4);
        acc.v[i] += pair[0] * q[0] + pair[1] * q[1];
    }
    return acc;
}
#undef EACH
#endif

// One float, rounded once.
INLINE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// The sum, or the maximum, of all lanes, in an order that does not depend on the registers.
INLINE float f_sum(vf x) {
    float lane[LANES];
    f_store(lane, x);
    for (int step = LANES / 2; step > 0; step /= 2)
        for (int i = 0; i < step; i++) lane[i] = lane[i] + lane[i + step];
    return lane[0];
}
INLINE float f_largest(vf x) {
    float lane[LANES], best;
    f_store(lane, x);
    best = lane[0];
    for (int i = 1; i < LANES; i++) best = lane[i] > best ? lane[i] : best;
    return best;
}

#endif
