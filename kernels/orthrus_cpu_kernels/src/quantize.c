// Rows of activations as int8 (orthrus_cpu.h).
//
// Values so small that the scale's inverse overflows count as zeros. A row's scale is NaN where a
// value is infinite or NaN, so that products with it are too: int8 itself would hide it.
#include "isa.h"
#include "orthrus_cpu.h"

#define SMALLEST 1e-36f // 127 / SMALLEST is finite

typedef struct {
    float d, inverse;
    int sane; // whether all values are finite
} Scale;

INLINE Scale scale_of(const float *x, const int count) {
    vf most = f_set(0.0f), zeros = most;
    for (int i = 0; i < count; i += LANES) {
        vf v = f_load(x + i);
        most = f_max(f_abs(v), most);
        zeros = f_fma(v, f_set(0.0f), zeros);
    }
    float largest = f_largest(most);
    if (f_sum(zeros) != 0.0f) return (Scale){NAN, 0.0f, 0};
    if (largest < SMALLEST) return (Scale){0.0f, 0.0f, 1};
    return (Scale){largest / 127.0f, 127.0f / largest, 1};
}

INLINE void codes_of(const float *x, const int count, Scale scale, int8_t *q) {
    if (!scale.sane) {
        memset(q, 0, (size_t)count);
        return;
    }
    for (int i = 0; i < count; i += LANES)
        i_store_s8(q + i, i_round(f_mul(f_load(x + i), f_set(scale.inverse))));
}

static void quantize_k(const float *x, int k, XK *to) {
    for (; k > 0; k -= 256, x += 256, to++) {
        Scale scale = scale_of(x, 256);
        to->d = scale.d;
        to->unused = 0;
        codes_of(x, 256, scale, to->q);
        for (int i = 0; i < 16; i++) {
            int sum = 0;
            for (int c = 0; c < 16; c++) sum += to->q[i * 16 + c];
            to->sums16[i] = (int16_t)sum;
        }
        for (int i = 0; i < 8; i++)
            to->sums32[i] = (int16_t)(to->sums16[2 * i] + to->sums16[2 * i + 1]);
    }
}

static void quantize_b(const float *x, int k, XB *to) {
    int blocks = (k + 63) / 64 * 2;
    for (int b = 0; b < blocks; b++, x += 32, to++) {
        if (b * 32 >= k) { // the half of a pair that does not exist
            memset(to, 0, sizeof *to);
            continue;
        }
        Scale scale = scale_of(x, 32);
        to->d = scale.d;
        codes_of(x, 32, scale, to->q);
        int sum = 0;
        for (int c = 0; c < 32; c++) sum += to->q[c];
        to->sum = sum;
        to->scaled = to->d * (float)sum;
    }
}

void orthrus_quantize(int form, const float *x, int k, uint8_t *row) {
    if (form == X_K)
        quantize_k(x, k, (XK *)row);
    else if (form == X_B)
        quantize_b(x, k, (XB *)row);
    else
        memcpy(row, x, (size_t)k * sizeof *x);
}
