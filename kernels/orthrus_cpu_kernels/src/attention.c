// Attention: keys and values are read once for all rows and query heads that share them.
//
// cache.h says how they lie. A row sees columns 0 .. sees-1, then from .. to-1 (a branch of a tree,
// or a diffusion block). Those are dealt with in panels of 16 columns and chunks of CHUNK panels,
// counted from the row's first column on: a score is one chain over the elements, a softmax runs
// over chunks in order, a value is one chain over the columns. A row's bits therefore depend on
// what it sees and on nothing else.
//
// Columns must hold finite numbers up to the end of the last panel that a row sees.
#include "cache.h"
#include "elementary.h"
#include "isa.h"
#include "steps.h"

#define CHUNK 16 // panels: 256 columns
#ifdef ORTHRUS_PORTABLE
#define TOGETHER 1 // packed rows at once
#else
#define TOGETHER 4
#endif

typedef struct {
    int d, packed, rows;          // head_dim; query rows; query rows of one pass row
    const uint8_t *keys, *values; // of the head
    int type_k, type_v;
    const Step *step;
    const Group *group;
    int kv_head;
} Head;

static const float *query(const Head *h, int packed) {
    int row = h->group->first + packed / h->rows;
    int head = h->kv_head * h->rows + packed % h->rows;
    return h->step->x + (size_t)row * h->step->x_stride + head * h->d;
}

static const Row *row_of(const Head *h, int packed) {
    return &h->step->row[h->group->first + packed / h->rows];
}

// Panels of the first part that some row of the group sees, and of the second.
static void extent(const Head *h, int *first, int *second, int *from) {
    *first = *second = *from = 0;
    for (int i = 0; i < h->group->count; i++) {
        const Row *row = &h->step->row[h->group->first + i];
        int a = (row->sees + LANES - 1) / LANES, b = (row->to - row->from + LANES - 1) / LANES;
        if (a > *first) *first = a;
        if (row->to > row->from) {
            *from = row->from / LANES;
            if (b > *second) *second = b;
        }
    }
}

// Columns of a panel that a row sees: 0 .. 16.
static int lanes_of(const Row *row, int panel, int first) {
    int n =
        panel < first ? row->sees - panel * LANES : row->to - row->from - (panel - first) * LANES;
    return n < 0 ? 0 : n > LANES ? LANES : n;
}

// Scores of `count` packed rows against one panel of keys.
INLINE void score(const int type, const Head *h, int packed, const int count, const uint8_t *keys,
                  float *to, size_t stride) {
    const float *q[TOGETHER];
    vf sum[TOGETHER];
    for (int m = 0; m < count; m++) {
        q[m] = query(h, packed + m);
        sum[m] = f_set(0.0f);
    }
    for (int block = 0; block < h->d; block += 32) {
        int stop = block + 32 < h->d ? block + 32 : h->d;
        vf of_block = key_scale(type, keys, block);
        for (int i = block; i < stop; i++) {
            vf k = key_elements(type, keys, i, of_block);
            for (int m = 0; m < count; m++) sum[m] = f_fma(k, f_set(q[m][i]), sum[m]);
        }
    }
    vf scale = f_set(h->step->scale);
    for (int m = 0; m < count; m++) f_store(to + m * stride, f_mul(sum[m], scale));
}

// Scores of all packed rows.
INLINE void score_all(const int type, const Head *h, const uint8_t *keys, float *to,
                      size_t stride) {
    int m = 0;
    for (; m + TOGETHER <= h->packed; m += TOGETHER)
        score(type, h, m, TOGETHER, keys, to + m * stride, stride);
    for (; TOGETHER > 1 && m < h->packed; m++) score(type, h, m, 1, keys, to + m * stride, stride);
}

// acc [count][d] += weights of `columns` columns times their values, 32 elements at a time.
INLINE void mix(const int type, const uint8_t *values, int d, int columns, const float *weights,
                size_t stride, const int count, float *acc) {
    const size_t bytes = column_bytes(type, d);
    for (int e = 0; e < d; e += 2 * LANES) {
        const int two = e + LANES < d;
        vf a[TOGETHER], b[TOGETHER];
        for (int m = 0; m < count; m++) {
            a[m] = f_load(acc + m * d + e);
            b[m] = two ? f_load(acc + m * d + e + LANES) : a[m];
        }
        for (int c = 0; c < columns; c++) {
            const uint8_t *v = values + (size_t)c * bytes;
            vf low = value_elements(type, v, e);
            vf high = two ? value_elements(type, v, e + LANES) : low;
            for (int m = 0; m < count; m++) {
                vf w = f_set(weights[m * stride + c]);
                a[m] = f_fma(low, w, a[m]);
                b[m] = f_fma(high, w, b[m]);
            }
        }
        for (int m = 0; m < count; m++) {
            f_store(acc + m * d + e, a[m]);
            if (two) f_store(acc + m * d + e + LANES, b[m]);
        }
    }
}

// The same for all packed rows.
INLINE void mix_all(const int type, const Head *h, const uint8_t *values, int columns,
                    const float *weights, size_t stride, float *acc) {
    int m = 0;
    for (; m + TOGETHER <= h->packed; m += TOGETHER)
        mix(type, values, h->d, columns, weights + m * stride, stride, TOGETHER, acc + m * h->d);
    for (; TOGETHER > 1 && m < h->packed; m++)
        mix(type, values, h->d, columns, weights + m * stride, stride, 1, acc + m * h->d);
}

// Functions of their own per type, so that the type is a constant inside.
#define OF_TYPE(T)                                                                                 \
    static void score_##T(const Head *h, const uint8_t *keys, float *to, size_t stride) {          \
        score_all(T_##T, h, keys, to, stride);                                                     \
    }                                                                                              \
    static void mix_##T(const Head *h, const uint8_t *values, int columns, const float *weights,   \
                        size_t stride, float *acc) {                                               \
        mix_all(T_##T, h, values, columns, weights, stride, acc);                                  \
    }
OF_TYPE(F32)
OF_TYPE(F16)
OF_TYPE(Q8_0)
OF_TYPE(Q4_0)

static void score_panel(const Head *h, const uint8_t *keys, float *to, size_t stride) {
    switch (h->type_k) {
    case T_F32: score_F32(h, keys, to, stride); break;
    case T_F16: score_F16(h, keys, to, stride); break;
    case T_Q8_0: score_Q8_0(h, keys, to, stride); break;
    default: score_Q4_0(h, keys, to, stride); break;
    }
}

static void mix_columns(const Head *h, const uint8_t *values, int columns, const float *weights,
                        size_t stride, float *acc) {
    switch (h->type_v) {
    case T_F32: mix_F32(h, values, columns, weights, stride, acc); break;
    case T_F16: mix_F16(h, values, columns, weights, stride, acc); break;
    case T_Q8_0: mix_Q8_0(h, values, columns, weights, stride, acc); break;
    default: mix_Q4_0(h, values, columns, weights, stride, acc); break;
    }
}

// Scores of one row in one chunk -> weights, and the row's running softmax brought along.
static void soften(const Row *row, int panel, int panels, int first, float *scores, int d,
                   float *top, float *total, float *acc) {
    vf most = f_set(*top);
    int last = 0;
    for (int p = 0; p < panels; p++) {
        int n = lanes_of(row, panel + p, first);
        if (!n) continue;
        last = p + 1;
        for (int i = n; i < LANES; i++) scores[p * LANES + i] = -1e30f;
        most = f_max(f_load(scores + p * LANES), most);
    }
    float peak = last ? f_largest(most) : *top;
    vf sum = f_set(0.0f), at = f_set(peak);
    for (int p = 0; p < panels; p++) {
        int n = lanes_of(row, panel + p, first);
        float *to = scores + p * LANES;
        f_store(to, n ? f_exp(f_sub(f_load(to), at)) : f_set(0.0f));
        for (int i = n; i < LANES; i++) to[i] = 0.0f;
        sum = f_add(sum, f_load(to));
    }
    if (!last) return;
    float lanes[LANES];
    f_store(lanes, f_exp(f_sub(f_set(*top), at)));
    float shrink = lanes[0];
    *total = fused(*total, shrink, f_sum(sum));
    for (int i = 0; i < d; i += LANES) f_store(acc + i, f_mul(f_load(acc + i), f_set(shrink)));
    *top = peak;
}

static void chunk(const Head *h, int panel, int panels, int first, int from, float *scores,
                  float *tops, float *totals, float *acc) {
    size_t stride = CHUNK * LANES, d = (size_t)h->d;
    for (int p = 0; p < panels; p++) {
        int at = panel + p < first ? panel + p : from + panel + p - first;
        const uint8_t *keys = h->keys + (size_t)at * LANES * column_bytes(h->type_k, h->d);
        score_panel(h, keys, scores + p * LANES, stride);
    }
    for (int m = 0; m < h->packed; m++)
        soften(row_of(h, m), panel, panels, first, scores + m * stride, h->d, &tops[m], &totals[m],
               acc + m * d);
    // The two parts lie apart; within each, values follow one another.
    for (int p = 0; p < panels;) {
        int in_first = panel + p < first;
        int run = in_first && first - panel < panels ? first - panel - p : panels - p;
        int at = in_first ? panel + p : from + panel + p - first;
        const uint8_t *values = h->values + (size_t)at * LANES * column_bytes(h->type_v, h->d);
        mix_columns(h, values, run * LANES, scores + p * LANES, stride, acc);
        p += run;
    }
}

// Task: one kv head of one group.
void attention_task(const Step *step, int task, Scratch *scratch) {
    const Group *group = &step->group[task / step->n_head_kv];
    int kv_head = task % step->n_head_kv, d = step->head_dim;
    const LayerCache *cache = &step->cache[step->row[group->first].cache];
    size_t before = (size_t)kv_head * (size_t)cache->columns;
    int rows = step->n_head / step->n_head_kv;
    Head h = {d,
              group->count * rows,
              rows,
              cache->keys + before * column_bytes(cache->type_k, d),
              cache->values + before * column_bytes(cache->type_v, d),
              cache->type_k,
              cache->type_v,
              step,
              group,
              kv_head};
    size_t packed = (size_t)h.packed;
    float *scores = reserve(scratch, packed * (CHUNK * LANES + 2 + (size_t)d));
    float *tops = scores + packed * CHUNK * LANES, *totals = tops + packed, *acc = totals + packed;
    for (size_t i = 0; i < packed; i++) tops[i] = -1e30f;
    memset(totals, 0, packed * (1 + (size_t)d) * sizeof(float));
    int first, second, from;
    extent(&h, &first, &second, &from);
    for (int panel = 0; panel < first + second; panel += CHUNK) {
        int panels = first + second - panel < CHUNK ? first + second - panel : CHUNK;
        chunk(&h, panel, panels, first, from, scores, tops, totals, acc);
    }
    for (int m = 0; m < h.packed; m++) {
        float *to = step->y + (size_t)(group->first + m / rows) * step->y_stride +
                    (kv_head * rows + m % rows) * d;
        vf total = f_set(totals[m]);
        for (int i = 0; i < d; i += LANES) f_store(to + i, f_div(f_load(acc + m * d + i), total));
    }
}
