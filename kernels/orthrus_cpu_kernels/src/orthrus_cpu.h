// The whole interface of an object: what Python calls through ctypes (`library.py` mirrors it).
//
// A product is y = x W^T. Weights are repacked into panels of 16 columns of the result (rows of the
// GGUF tensor), activations are quantized row by row. Sums run over k in ascending order, one chain
// per element of the result, so that its bits depend neither on the rows beside it, nor on the
// number of threads, nor on the instruction set.
#ifndef ORTHRUS_CPU_H
#define ORTHRUS_CPU_H

#include <stddef.h>
#include <stdint.h>

// Types of weights, by their number in GGUF.
enum {
    T_F32 = 0,
    T_F16 = 1,
    T_Q4_0 = 2,
    T_Q4_1 = 3,
    T_Q5_0 = 6,
    T_Q5_1 = 7,
    T_Q8_0 = 8,
    T_Q2_K = 10,
    T_Q3_K = 11,
    T_Q4_K = 12,
    T_Q5_K = 13,
    T_Q6_K = 14,
    T_IQ4_NL = 20,
    T_IQ4_XS = 23,
    T_BF16 = 30,
};

// Forms of activations. X_K: int8 with a scale per 256 columns (`XK`), for types of 256-weight
// blocks. X_B: int8 with a scale per 32 (`XB`). X_F: float32 as they are.
enum { X_F, X_B, X_K };

// sums: of each 16 values. q: round(x / d), -127..127.
typedef struct {
    float d;
    int16_t sums16[16];
    int16_t sums32[8];
    int8_t q[256];
    int32_t unused;
} XK;

// sum: of the values; scaled: d * sum.
typedef struct {
    float d, scaled;
    int32_t sum;
    int8_t q[32];
} XB;

const char *orthrus_isa(void);
// 1 if this machine has what the object was compiled for.
int orthrus_usable(void);

// The form of activations that a type of weights takes, or -1 for a type without kernels.
int orthrus_form(int type);
// Bytes of one panel of k columns, and of one row of activations.
size_t orthrus_panel_bytes(int type, int k);
size_t orthrus_row_bytes(int form, int k);

// Panels first .. stop-1 of a GGUF tensor [columns, k] at `raw`, into `panels` (of panel 0).
void orthrus_repack(int type, const uint8_t *raw, int columns, int k, int first, int stop,
                    uint8_t *panels);

// One row of activations from k floats.
void orthrus_quantize(int form, const float *x, int k, uint8_t *row);

// y[row * stride + 16 p + lane] for panels p = first .. stop-1 (of `panels`, panel 0) and all rows.
// add: y is added to instead of written.
void orthrus_product(int type, const uint8_t *panels, int k, int first, int stop, const uint8_t *x,
                     int rows, float *y, size_t stride, int add);

// x of k weights of one row (a column of the product), for embeddings.
void orthrus_unpack_row(int type, const uint8_t *panels, int k, int row, float *x);

#endif
