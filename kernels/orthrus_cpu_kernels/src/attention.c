// Attention: keys and values are read once for all rows and query heads that share them.
//
// cache.h says how they lie. A row sees columns since .. sees-1, then from .. to-1 (a branch of a
// tree, or a diffusion block). Those are dealt with in panels of 16 columns and chunks of CHUNK
// panels, counted from the first one that a row of the group sees: a score is one chain over the
// elements, a softmax runs over chunks in order, a value is one chain over the columns. The bits of
// rows that see everything from column 0 on therefore depend on what they see and on nothing else.
//
// Columns must hold finite numbers up to the end of the last panel that a row sees.
#include "cache.h"
#include "elementary.h"
#include "isa.h"
#include "steps.h"

#define CHUNK 16 // panels: 256 columns
#define BLOCK 8  // panels: 128 columns, which sparse attention takes or leaves
#define SINKS 1  // blocks at the beginning, and
#define WINDOW 4 // before the rows' own, which it always takes

// Chains of sums that run side by side, so that none waits for its last step: packed rows times
// panels, or times vectors of a value. EACH_SPLIT: of rows and those others, more rows first.
#if defined(ORTHRUS_PORTABLE)
#define CHAINS 1
#define EACH_SPLIT(do)                                                                             \
    do (1, 1)
#elif defined(ORTHRUS_AVX512VNNI)
#define CHAINS 8
#define EACH_SPLIT(do)                                                                             \
    do (8, 1) do(4, 2) do(2, 4) do(1, 8)
#else
#define CHAINS 4
#define EACH_SPLIT(do)                                                                             \
    do (4, 1) do(2, 2) do(1, 4)
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

// The first panel that some row of the group sees.
static int begin_of(const Head *h) {
    int begin = INT32_MAX;
    for (int i = 0; i < h->group->count; i++) {
        int since = h->step->row[h->group->first + i].since;
        if (since < begin) begin = since;
    }
    return begin / LANES;
}

// Columns of a panel that a row sees none of: those below.
static int below(const Row *row, int panel, int first) {
    int n = panel < first ? row->since - panel * LANES : 0;
    return n < 0 ? 0 : n > LANES ? LANES : n;
}

// Columns of a panel that a row sees, from `below` on: up to 0 .. 16.
static int lanes_of(const Row *row, int panel, int first) {
    int n =
        panel < first ? row->sees - panel * LANES : row->to - row->from - (panel - first) * LANES;
    return n < 0 ? 0 : n > LANES ? LANES : n;
}

// to[m][panel] = scores of `count` packed rows against `panels` panels of keys.
INLINE void score(const int type, const Head *h, int packed, const int count, const int panels,
                  const uint8_t *keys, float *to, size_t stride) {
    const size_t bytes = LANES * column_bytes(type, h->d);
    const float *q[CHAINS];
    vf sum[CHAINS][CHAINS]; // [panel][row]
    for (int m = 0; m < count; m++) q[m] = query(h, packed + m);
    for (int p = 0; p < panels; p++)
        for (int m = 0; m < count; m++) sum[p][m] = f_set(0.0f);
    for (int block = 0; block < h->d; block += 32) {
        int stop = block + 32 < h->d ? block + 32 : h->d;
        vf of_block[CHAINS];
        for (int p = 0; p < panels; p++) of_block[p] = key_scale(type, keys + p * bytes, block);
        for (int i = block; i < stop; i++)
            for (int p = 0; p < panels; p++) {
                vf k = key_elements(type, keys + p * bytes, i, of_block[p]);
                for (int m = 0; m < count; m++) sum[p][m] = f_fma(k, f_set(q[m][i]), sum[p][m]);
            }
    }
    vf scale = f_set(h->step->scale);
    for (int p = 0; p < panels; p++)
        for (int m = 0; m < count; m++)
            f_store(to + m * stride + p * LANES, f_mul(sum[p][m], scale));
}

// Scores of all packed rows against panels that follow one another.
INLINE void score_all(const int type, const Head *h, int panels, const uint8_t *keys, float *to,
                      size_t stride) {
    const size_t bytes = LANES * column_bytes(type, h->d);
    int m = 0;
#define ROWS(n, at_once)                                                                           \
    for (; h->packed - m >= n; m += n) {                                                           \
        int p = 0;                                                                                 \
        for (; p + at_once <= panels; p += at_once)                                                \
            score(type, h, m, n, at_once, keys + p * bytes, to + m * stride + p * LANES, stride);  \
        for (; at_once > 1 && p < panels; p++)                                                     \
            score(type, h, m, n, 1, keys + p * bytes, to + m * stride + p * LANES, stride);        \
    }
    EACH_SPLIT(ROWS)
#undef ROWS
}

// acc [count][d] += weights of `columns` columns times their values, from element e on.
INLINE void mix(const int type, const uint8_t *values, int d, int e, const int vectors, int columns,
                const float *weights, size_t stride, const int count, float *acc) {
    const size_t bytes = column_bytes(type, d);
    vf sum[CHAINS][CHAINS]; // [row][vector]
    for (int m = 0; m < count; m++)
        for (int v = 0; v < vectors; v++) sum[m][v] = f_load(acc + m * d + e + v * LANES);
    for (int c = 0; c < columns; c++) {
        vf value[CHAINS];
        for (int v = 0; v < vectors; v++)
            value[v] = value_elements(type, values + c * bytes, e + v * LANES);
        for (int m = 0; m < count; m++) {
            vf w = f_set(weights[m * stride + c]);
            for (int v = 0; v < vectors; v++) sum[m][v] = f_fma(value[v], w, sum[m][v]);
        }
    }
    for (int m = 0; m < count; m++)
        for (int v = 0; v < vectors; v++) f_store(acc + m * d + e + v * LANES, sum[m][v]);
}

// The same for all packed rows and all elements.
INLINE void mix_all(const int type, const Head *h, const uint8_t *values, int columns,
                    const float *weights, size_t stride, float *acc) {
    int m = 0, d = h->d;
#define ROWS(n, at_once)                                                                           \
    for (; h->packed - m >= n; m += n) {                                                           \
        const float *w = weights + m * stride;                                                     \
        int e = 0;                                                                                 \
        for (; e + at_once * LANES <= d; e += at_once * LANES)                                     \
            mix(type, values, d, e, at_once, columns, w, stride, n, acc + m * d);                  \
        for (; at_once > 1 && e < d; e += LANES)                                                   \
            mix(type, values, d, e, 1, columns, w, stride, n, acc + m * d);                        \
    }
    EACH_SPLIT(ROWS)
#undef ROWS
}

// Mean of the keys of BLOCK panels: [d].
INLINE void mean(const int type, const Head *h, const uint8_t *keys, float *to) {
    const size_t bytes = LANES * column_bytes(type, h->d);
    for (int block = 0; block < h->d; block += 32) {
        int stop = block + 32 < h->d ? block + 32 : h->d;
        vf scale[BLOCK];
        for (int p = 0; p < BLOCK; p++) scale[p] = key_scale(type, keys + p * bytes, block);
        for (int i = block; i < stop; i++) {
            vf sum = f_set(0.0f);
            for (int p = 0; p < BLOCK; p++)
                sum = f_add(sum, key_elements(type, keys + p * bytes, i, scale[p]));
            to[i] = f_sum(sum) / (BLOCK * LANES);
        }
    }
}

// Functions of their own per type, so that the type is a constant inside.
#define OF_TYPE(T)                                                                                 \
    static void score_##T(const Head *h, int panels, const uint8_t *keys, float *to,               \
                          size_t stride) {                                                         \
        score_all(T_##T, h, panels, keys, to, stride);                                             \
    }                                                                                              \
    static void mean_##T(const Head *h, const uint8_t *keys, float *to) {                          \
        mean(T_##T, h, keys, to);                                                                  \
    }                                                                                              \
    static void mix_##T(const Head *h, const uint8_t *values, int columns, const float *weights,   \
                        size_t stride, float *acc) {                                               \
        mix_all(T_##T, h, values, columns, weights, stride, acc);                                  \
    }
OF_TYPE(F32)
OF_TYPE(F16)
OF_TYPE(Q8_0)
OF_TYPE(Q4_0)

static void score_panels(const Head *h, int panels, const uint8_t *keys, float *to, size_t stride) {
    switch (h->type_k) {
    case T_F32: score_F32(h, panels, keys, to, stride); break;
    case T_F16: score_F16(h, panels, keys, to, stride); break;
    case T_Q8_0: score_Q8_0(h, panels, keys, to, stride); break;
    default: score_Q4_0(h, panels, keys, to, stride); break;
    }
}

static void mean_keys(const Head *h, const uint8_t *keys, float *to) {
    switch (h->type_k) {
    case T_F32: mean_F32(h, keys, to); break;
    case T_F16: mean_F16(h, keys, to); break;
    case T_Q8_0: mean_Q8_0(h, keys, to); break;
    default: mean_Q4_0(h, keys, to); break;
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
        int n = lanes_of(row, panel + p, first), from = below(row, panel + p, first);
        if (n <= from) continue;
        last = p + 1;
        for (int i = 0; i < from; i++) scores[p * LANES + i] = -1e30f;
        for (int i = n; i < LANES; i++) scores[p * LANES + i] = -1e30f;
        most = f_max(f_load(scores + p * LANES), most);
    }
    float peak = last ? f_largest(most) : *top;
    vf sum = f_set(0.0f), at = f_set(peak);
    for (int p = 0; p < panels; p++) {
        int n = lanes_of(row, panel + p, first), from = below(row, panel + p, first);
        float *to = scores + p * LANES;
        f_store(to, n > from ? f_exp(f_sub(f_load(to), at)) : f_set(0.0f));
        for (int i = 0; i < from; i++) to[i] = 0.0f;
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

// How many of the panels p .. of a chunk lie side by side, at most `most`, and where they begin.
static int side_by_side(int panel, int p, int panels, int first, int from, int most, int *at) {
    int in_first = panel + p < first;
    *at = in_first ? panel + p : from + panel + p - first;
    int run = in_first && first - panel < panels ? first - panel - p : panels - p;
    return run < most ? run : most;
}

static void chunk(const Head *h, int panel, int panels, int first, int from, float *scores,
                  float *tops, float *totals, float *acc) {
    size_t stride = CHUNK * LANES, d = (size_t)h->d;
    // So few at a time that they stay in the first cache for all rows.
    int most = h->packed < CHAINS ? CHUNK : 4;
    for (int p = 0, at, run; p < panels; p += run) {
        run = side_by_side(panel, p, panels, first, from, most, &at);
        const uint8_t *keys = h->keys + (size_t)at * LANES * column_bytes(h->type_k, h->d);
        score_panels(h, run, keys, scores + p * LANES, stride);
    }
    for (int m = 0; m < h->packed; m++)
        soften(row_of(h, m), panel, panels, first, scores + m * stride, h->d, &tops[m], &totals[m],
               acc + m * d);
    for (int p = 0, at, run; p < panels; p += run) {
        run = side_by_side(panel, p, panels, first, from, most, &at);
        const uint8_t *values = h->values + (size_t)at * LANES * column_bytes(h->type_v, h->d);
        mix_columns(h, values, run * LANES, scores + p * LANES, stride, acc);
    }
}

// Which blocks of columns sparse attention takes: the first SINKS, those from `stop` on, and of
// those between the `count` that all rows together lean on most. A row leans on a block as it would
// on a key that is the mean of the block's. work: floats [work_floats(blocks, d)].
static size_t work_floats(int blocks, int d) {
    return (size_t)blocks * (size_t)d + 3 * (size_t)(blocks + LANES);
}
static const char *take_blocks(const Head *h, int count, int stop, int blocks, float *work) {
    int padded = (blocks + LANES - 1) / LANES * LANES;
    float *line = work, *mass = line + padded, *means = mass + padded;
    char *taken = (char *)(means + (size_t)blocks * (size_t)h->d);
    size_t bytes = (size_t)BLOCK * LANES * column_bytes(h->type_k, h->d);
    for (int b = 0; b < blocks; b++) taken[b] = b < SINKS || b >= stop;
    for (int b = 0; b < padded; b++) mass[b] = 0.0f;
    for (int b = SINKS; b < stop; b++)
        mean_keys(h, h->keys + (size_t)b * bytes, means + (size_t)b * h->d);
    for (int m = 0; m < h->packed; m++) {
        const float *q = query(h, m);
        for (int b = 0; b < padded; b++) line[b] = -1e30f;
        for (int b = SINKS; b < stop; b++) {
            vf sum = f_set(0.0f);
            for (int i = 0; i < h->d; i += LANES)
                sum = f_fma(f_load(q + i), f_load(means + (size_t)b * h->d + i), sum);
            line[b] = f_sum(sum) * h->step->scale;
        }
        vf most = f_set(-1e30f), total = f_set(0.0f);
        for (int b = 0; b < padded; b += LANES) most = f_max(f_load(line + b), most);
        vf peak = f_set(f_largest(most));
        for (int b = 0; b < padded; b += LANES) {
            f_store(line + b, f_exp(f_sub(f_load(line + b), peak)));
            total = f_add(total, f_load(line + b));
        }
        vf share = f_set(1.0f / f_sum(total));
        for (int b = 0; b < padded; b += LANES)
            f_store(mass + b, f_fma(f_load(line + b), share, f_load(mass + b)));
    }
    for (int i = 0; i < count; i++) {
        int best = -1;
        for (int b = SINKS; b < stop; b++)
            if (!taken[b] && (best < 0 || mass[b] > mass[best])) best = b;
        taken[best] = 1;
    }
    return taken;
}

static Head head_of(const Step *step, const Group *group, int kv_head) {
    int d = step->head_dim, rows = step->n_head / step->n_head_kv;
    const LayerCache *cache = &step->cache[step->row[group->first].cache];
    size_t before = (size_t)kv_head * (size_t)cache->columns;
    return (Head){d,
                  group->count * rows,
                  rows,
                  cache->keys + before * column_bytes(cache->type_k, d),
                  cache->values + before * column_bytes(cache->type_v, d),
                  cache->type_k,
                  cache->type_v,
                  step,
                  group,
                  kv_head};
}

// Task: one kv head of one group.
void attention_task(const Step *step, int task, Scratch *scratch) {
    const Group *group = &step->group[task / step->n_head_kv];
    int kv_head = task % step->n_head_kv, d = step->head_dim;
    int rows = step->n_head / step->n_head_kv;
    Head h = head_of(step, group, kv_head);
    size_t packed = (size_t)h.packed;
    int first, second, from;
    extent(&h, &first, &second, &from);
    int blocks = (first + BLOCK - 1) / BLOCK;
    int stop = (step->row[group->first].sees - 1) / (BLOCK * LANES) - WINDOW;
    int sparse = step->count && stop - SINKS > step->count;
    size_t work = sparse ? work_floats(blocks, d) : 0;
    float *scores = reserve(scratch, packed * (CHUNK * LANES + 2 + (size_t)d) + work);
    float *tops = scores + packed * CHUNK * LANES, *totals = tops + packed, *acc = totals + packed;
    for (size_t i = 0; i < packed; i++) tops[i] = -1e30f;
    memset(totals, 0, packed * (1 + (size_t)d) * sizeof(float));
    if (sparse) {
        float *free = acc + packed * (size_t)d;
        const char *taken = take_blocks(&h, step->count, stop, blocks, free);
        for (int b = 0; b < blocks; b++) {
            int left = first - b * BLOCK;
            if (taken[b])
                chunk(&h, b * BLOCK, left < BLOCK ? left : BLOCK, first, from, scores, tops, totals,
                      acc);
        }
    }
    for (int panel = begin_of(&h); !sparse && panel < first + second; panel += CHUNK) {
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

// Scores of `columns` columns -> their softmax, brought into y wherever it is larger.
static void weigh(float *scores, int columns, float *y) {
    int panels = (columns + LANES - 1) / LANES;
    for (int i = columns; i < panels * LANES; i++) scores[i] = -1e30f;
    vf most = f_set(-1e30f), sum = f_set(0.0f);
    for (int p = 0; p < panels; p++) most = f_max(f_load(scores + p * LANES), most);
    vf peak = f_set(f_largest(most));
    for (int p = 0; p < panels; p++) {
        f_store(scores + p * LANES, f_exp(f_sub(f_load(scores + p * LANES), peak)));
        for (int i = columns; i < (p + 1) * LANES; i++) scores[i] = 0.0f;
        sum = f_add(sum, f_load(scores + p * LANES));
    }
    vf total = f_set(f_sum(sum));
    for (int p = 0; p < panels; p++) {
        vf w = f_div(f_load(scores + p * LANES), total);
        f_store(y + p * LANES, f_max(w, f_load(y + p * LANES)));
    }
}

// Task: one kv head. Its rows are those of a chain: they see columns 0 .. sees-1.
void weights_task(const Step *step, int task, Scratch *scratch) {
    Group group = {0, step->rows};
    Head h = head_of(step, &group, task);
    int most = 0;
    for (int i = 0; i < step->rows; i++)
        if (step->row[i].sees > most) most = step->row[i].sees;
    int panels = (most + LANES - 1) / LANES;
    size_t stride = (size_t)panels * LANES;
    float *scores = reserve(scratch, (size_t)h.packed * stride);
    float *y = step->y + (size_t)task * (size_t)step->rows * step->y_stride;
    for (int p = 0; p < panels; p += 4) { // so few that they stay in the first cache for all rows
        int run = panels - p < 4 ? panels - p : 4;
        const uint8_t *keys = h.keys + (size_t)p * LANES * column_bytes(h.type_k, h.d);
        score_panels(&h, run, keys, scores + p * LANES, stride);
    }
    for (int m = 0; m < h.packed; m++)
        weigh(scores + m * stride, row_of(&h, m)->sees, y + (size_t)(m / h.rows) * step->y_stride);
}
