// Stores keys and values (cache.h), rounded to the cache's types.
//
// What does not fit F16 is clamped: rows that are hidden must stay finite, since their weight of
// zero is multiplied with what lies there.
#include "cache.h"
#include "isa.h"
#include "steps.h"

#define MOST 65504.0f

// NaN becomes -MOST.
INLINE vf clamped(const float *x) { return f_min(f_max(f_load(x), f_set(-MOST)), f_set(MOST)); }

// 32 values as Q8_0: round(x / d), as ggml does on x86.
static uint16_t quantize_8(const float *x, int8_t *q) {
    XB blocks[2];
    orthrus_quantize(X_B, x, 32, (uint8_t *)blocks);
    memcpy(q, blocks[0].q, 32);
    return float_to_half(blocks[0].d);
}

// 32 values as Q4_0: the largest becomes -8. Codes are 0..15.
static uint16_t quantize_4(const float *x, uint8_t *q) {
    float most = 0.0f, at = 0.0f;
    for (int i = 0; i < 32; i++)
        if (fabsf(x[i]) > most) {
            most = fabsf(x[i]);
            at = x[i];
        }
    float d = at / -8.0f, inverse = most > 1e-36f ? 1.0f / d : 0.0f;
    for (int i = 0; i < 32; i++) {
        int code = (int)(x[i] * inverse + 8.5f);
        q[i] = (uint8_t)(code > 15 ? 15 : code);
    }
    return float_to_half(d);
}

static void store_keys(int type, uint8_t *head, int d, int column, const float *x) {
    uint8_t *panel = head + (size_t)(column / LANES) * LANES * column_bytes(type, d);
    int lane = column % LANES;
    float values[32];
    for (int i = 0; i < d; i += LANES) {
        f_store(values + i % 32, clamped(x + i));
        if (type == T_F32) {
            for (int e = 0; e < LANES; e++)
                ((float *)panel)[(i + e) * LANES + lane] = values[i % 32 + e];
        } else if (type == T_F16) {
            uint16_t halves[LANES];
            f_store_f16(halves, f_load(values + i % 32));
            for (int e = 0; e < LANES; e++) ((uint16_t *)panel)[(i + e) * LANES + lane] = halves[e];
        } else if (i % 32 && type == T_Q8_0) {
            uint8_t *block = panel + i / 32 * PANEL_Q8_0;
            int8_t q[32];
            ((uint16_t *)block)[lane] = quantize_8(values, q);
            for (int e = 0; e < 32; e++) block[32 + e * LANES + lane] = (uint8_t)q[e];
        } else if (i % 32) {
            uint8_t *block = panel + i / 32 * PANEL_Q4_0, q[32];
            ((uint16_t *)block)[lane] = quantize_4(values, q);
            for (int e = 0; e < 16; e++)
                block[32 + e * LANES + lane] = (uint8_t)(q[e] | q[e + 16] << 4);
        }
    }
}

static void store_values(int type, uint8_t *head, int d, int column, const float *x) {
    uint8_t *to = head + (size_t)column * column_bytes(type, d);
    float values[32];
    for (int i = 0; i < d; i += LANES) {
        vf v = clamped(x + i);
        f_store(values + i % 32, v);
        if (type == T_F32) {
            f_store((float *)to + i, v);
        } else if (type == T_F16) {
            f_store_f16((uint16_t *)to + i, v);
        } else if (i % 32 && type == T_Q8_0) {
            uint8_t *block = to + i / 32 * BLOCK_Q8_0;
            uint16_t scale = quantize_8(values, (int8_t *)block + 2);
            memcpy(block, &scale, 2);
        } else if (i % 32) {
            uint8_t *block = to + i / 32 * BLOCK_Q4_0, q[32];
            uint16_t scale = quantize_4(values, q);
            memcpy(block, &scale, 2);
            for (int e = 0; e < 16; e++) block[2 + e] = (uint8_t)(q[e] | q[e + 16] << 4);
        }
    }
}

// k, v: of one key/value head, d elements each.
void store_head(const LayerCache *cache, int head, int d, int column, const float *k,
                const float *v) {
    size_t before = (size_t)head * (size_t)cache->columns;
    store_keys(cache->type_k, cache->keys + before * column_bytes(cache->type_k, d), d, column, k);
    store_values(cache->type_v, cache->values + before * column_bytes(cache->type_v, d), d, column,
                 v);
}
