// Gated DeltaNet: a causal convolution, a recurrence over the rows of a sequence, a gated norm.
//
// Per value head h, which reads key head h mod n_head_kv, a state S[i][j], i along the key, j along
// the value, changes row by row:
//
//   delta = beta (v - decay S^T k)      S <- decay S + k delta^T      o = S^T q
//
// The columns j do not meet: a task takes a tile of them through all rows of the pass, in the first
// cache, and reads and writes the state once. Sums over i are two chains, of the even and of the
// odd i, whatever the number of rows: so a row's bits depend on the rows before it and on nothing
// else.
//
// What a row does to the state is kept beside it (a record), and the state stays as it was: rows
// that are accepted become part of it at the beginning of the next pass, with the same
// instructions, and dropping the others costs nothing.
//
//   state    [value head][tile][head_dim, along the key][columns of a tile]
//   record   inputs of the convolution [(2 key heads + value heads) * head_dim], k [key heads *
//            head_dim], delta [value heads * head_dim], decay [value heads, to whole vectors]
#include "elementary.h"
#include "isa.h"
#include "steps.h"

#define WIDE 2           // vectors of a tile's columns, where the heads divide by them
#define HEADS_PER_TASK 8 // of the convolution
// Whether registers suffice to ask the state for the next row while it changes for this one.
#if defined(ORTHRUS_AVX512VNNI)
#define TOGETHER 1
#else
#define TOGETHER 0
#endif
#define L2_EPS 1e-6f // what the squared length of q and k is raised by

// Offsets within a record, and its size, in floats.
typedef struct {
    size_t k, delta, decay, size;
} Record;

static size_t padded(int n) { return (size_t)(n + LANES - 1) / LANES * LANES; }

static Record record_of(const Step *s) {
    size_t d = (size_t)s->head_dim, keys = (size_t)s->n_head_kv * d, values = (size_t)s->n_head * d;
    Record r = {2 * keys + values, 3 * keys + values, 3 * keys + 2 * values, 0};
    r.size = r.decay + padded(s->n_head);
    return r;
}

// Decay and beta of all value heads. x, y: alpha | beta and decay | beta, each to whole vectors.
static void gates(const Step *s, const float *x, float *y) {
    int n = (int)padded(s->n_head);
    for (int i = 0; i < n; i += LANES) {
        vf step = f_softplus(f_add(f_load(x + i), f_load(s->bias[0] + i)));
        f_store(y + i, f_exp(f_mul(f_load(s->weight_k + i), step)));
        f_store(y + n + i, f_sigmoid(f_load(x + n + i)));
    }
}

// A head of d elements to length `length`.
static void unit(float *x, int d, float length) {
    vf squares = f_set(0.0f);
    for (int i = 0; i < d; i += LANES) squares = f_fma(f_load(x + i), f_load(x + i), squares);
    vf scale = f_set(length / sqrtf(f_sum(squares) + L2_EPS));
    for (int i = 0; i < d; i += LANES) f_store(x + i, f_mul(f_load(x + i), scale));
}

// Task: HEADS_PER_TASK heads of q | k | v of one row, from row `first` on. weight: taps of 16
// channels [4][16], side by side; weight_k: A; bias 0: dt, both to whole vectors.
void convolve_task(const Step *s, int task) {
    int d = s->head_dim, heads = 2 * s->n_head_kv + s->n_head;
    int parts = (heads + HEADS_PER_TASK - 1) / HEADS_PER_TASK;
    int row = s->first + task / parts, first = task % parts * HEADS_PER_TASK;
    int stop = first + HEADS_PER_TASK < heads ? first + HEADS_PER_TASK : heads;
    const StateRow *at = &s->state_row[row];
    const LayerState *state = &s->state[at->state];
    const Record r = record_of(s);
    const float *x[4] = {s->x + (size_t)row * s->x_stride};
    for (int i = 0; i < 3; i++)
        x[1 + i] = at->back[i] >= 0 ? s->x + (size_t)at->back[i] * s->x_stride
                                    : state->records + (size_t)(-1 - at->back[i]) * r.size;
    float *y = s->y + (size_t)row * s->y_stride;
    for (int c = first * d; c < stop * d; c += LANES) {
        const float *taps = s->weight + 4 * c;
        vf sum = f_mul(f_load(x[3] + c), f_load(taps));
        for (int i = 1; i < 4; i++)
            sum = f_fma(f_load(x[3 - i] + c), f_load(taps + i * LANES), sum);
        f_store(y + c, f_silu(sum));
    }
    for (int h = first; h < stop && h < 2 * s->n_head_kv; h++)
        unit(y + h * d, d, h < s->n_head_kv ? 1.0f / sqrtf((float)d) : 1.0f);
    if (!first) gates(s, x[0] + r.k + (size_t)s->n_head * (size_t)d, y + r.k);
    if (at->record < 0) return;
    float *record = state->records + (size_t)at->record * r.size;
    memcpy(record + first * d, x[0] + first * d, (size_t)(stop - first) * d * sizeof(float));
    for (int h = first; h < stop; h++)
        if (h >= s->n_head_kv && h < 2 * s->n_head_kv)
            memcpy(record + r.k + (h - s->n_head_kv) * d, y + h * d, (size_t)d * sizeof(float));
    if (!first) memcpy(record + r.decay, y + r.k, padded(s->n_head) * sizeof(float));
}

// to = decay from + k delta^T, of `wide` vectors of columns.
INLINE void learn(float *to, const float *from, int d, const int wide, float decay, const float *k,
                  const float *delta) {
    vf by = f_set(decay);
    for (int i = 0; i < d; i++)
        for (int w = 0; w < wide; w++) {
            int at = (i * wide + w) * LANES;
            vf old = f_mul(f_load(from + at), by);
            f_store(to + at, f_fma(f_set(k[i]), f_load(delta + w * LANES), old));
        }
}

// Sums over i of a tile's columns, in two chains: [even, odd][vector].
typedef struct {
    vf of[2][WIDE];
} Sums;

INLINE void clear(Sums *sums, const int wide) {
    for (int w = 0; w < wide; w++) sums->of[0][w] = sums->of[1][w] = f_set(0.0f);
}

// What a state says to a key.
INLINE void ask(Sums *sums, const float *tile, int d, const int wide, const float *k) {
    clear(sums, wide);
    for (int i = 0; i < d; i += 2)
        for (int odd = 0; odd < 2; odd++)
            for (int w = 0; w < wide; w++)
                sums->of[odd][w] = f_fma(f_load(tile + ((i + odd) * wide + w) * LANES),
                                         f_set(k[i + odd]), sums->of[odd][w]);
}

// One row through a tile. known: what the state before it says to its key; afterwards what the new
// one says to the next row's, if there is one. q, k [d]; v, delta, o: of the tile's columns.
INLINE void recur(Sums *known, float *tile, int d, const int wide, float decay, float beta,
                  const float *q, const float *k, const float *v, float *delta, float *o,
                  const float *next) {
    Sums told, ahead;
    vf change[WIDE], by = f_set(decay);
    for (int w = 0; w < wide; w++) {
        vf old = f_mul(by, f_add(known->of[0][w], known->of[1][w]));
        change[w] = f_mul(f_set(beta), f_sub(f_load(v + w * LANES), old));
        f_store(delta + w * LANES, change[w]);
    }
    clear(&told, wide);
    clear(&ahead, wide);
    for (int i = 0; i < d; i += 2)
        for (int odd = 0; odd < 2; odd++) {
            // Before anything is stored, which might be what they are loaded from.
            vf ki = f_set(k[i + odd]), qi = f_set(q[i + odd]);
            vf ni = f_set(TOGETHER && next ? next[i + odd] : 0.0f);
            for (int w = 0; w < wide; w++) {
                float *at = tile + ((i + odd) * wide + w) * LANES;
                vf now = f_fma(ki, change[w], f_mul(f_load(at), by));
                f_store(at, now);
                told.of[odd][w] = f_fma(now, qi, told.of[odd][w]);
                if (TOGETHER && next) ahead.of[odd][w] = f_fma(now, ni, ahead.of[odd][w]);
            }
        }
    for (int w = 0; w < wide; w++) f_store(o + w * LANES, f_add(told.of[0][w], told.of[1][w]));
    if (TOGETHER)
        *known = ahead;
    else if (next)
        ask(known, tile, d, wide, next);
}

// What the records at `index` do to a tile.
static void replay(float *tile, const float *from, const Step *s, const float *records,
                   const int32_t *index, int count, int head, int column, const int wide) {
    const Record r = record_of(s);
    int d = s->head_dim, key = head % s->n_head_kv;
    for (int i = 0; i < count; i++, from = tile) {
        const float *record = records + (size_t)index[i] * r.size;
        learn(tile, from, d, wide, record[r.decay + head], record + r.k + key * d,
              record + r.delta + head * d + column);
    }
    if (from != tile) memcpy(tile, from, (size_t)(d * wide * LANES) * sizeof(float));
}

// One tile of one value head through all rows of a run.
INLINE void run_tile(const Step *s, const Run *run, int head, int number, const int wide,
                     float *tile) {
    int d = s->head_dim, column = number * wide * LANES, key = head % s->n_head_kv;
    const LayerState *state = &s->state[run->state];
    const Record r = record_of(s);
    size_t floats = (size_t)(d * wide * LANES);
    size_t at = (size_t)head * (size_t)(d * d) + (size_t)number * floats;
    float *memory = state->memory + at, spare[WIDE * LANES];
    replay(tile, memory, s, state->records, run->apply, run->applied, head, column, wide);
    if (run->save) memcpy(state->saved + at, tile, floats * sizeof(float));
    if (run->applied && !run->advance) memcpy(memory, tile, floats * sizeof(float));
    Sums known;
    clear(&known, wide);
    for (int row = run->first, stop = row + run->count; row < stop; row++) {
        const StateRow *here = &s->state_row[row];
        const float *x = s->x + (size_t)row * s->x_stride, *gate = x + r.k;
        const float *k = x + (s->n_head_kv + key) * d;
        if (!here->follows)
            replay(tile, memory, s, state->records, here->replay, here->replays, head, column,
                   wide);
        if (row == run->first || !here->follows) ask(&known, tile, d, wide, k);
        float *delta = spare;
        if (here->record >= 0)
            delta = state->records + (size_t)here->record * r.size + r.delta + head * d + column;
        float *o = s->y + (size_t)row * s->y_stride + head * d + column;
        const float *v = x + (2 * s->n_head_kv + head) * d + column, *q = x + key * d;
        float decay = gate[head], beta = gate[padded(s->n_head) + (size_t)head];
        if (row + 1 < stop && here[1].follows)
            recur(&known, tile, d, wide, decay, beta, q, k, v, delta, o, k + s->x_stride);
        else
            recur(&known, tile, d, wide, decay, beta, q, k, v, delta, o, 0);
    }
    if (run->advance) memcpy(memory, tile, floats * sizeof(float));
}

// Task: one tile of one value head of one run.
void recur_task(const Step *s, int task, Scratch *scratch) {
    int d = s->head_dim, wide = d % (WIDE * LANES) ? 1 : WIDE, tiles = d / (wide * LANES);
    const Run *run = &s->run[task / (s->n_head * tiles)];
    int head = task / tiles % s->n_head, number = task % tiles;
    float *tile = reserve(scratch, (size_t)(d * wide * LANES));
    if (wide == WIDE)
        run_tile(s, run, head, number, WIDE, tile);
    else
        run_tile(s, run, head, number, 1, tile);
}

// Task: one row.
void gated_norm_task(const Step *s, int task) {
    int d = s->head_dim;
    const float *gate = s->x + (size_t)task * s->x_stride;
    float *y = s->y + (size_t)task * s->y_stride;
    for (int h = 0; h < s->n_head; h++) {
        vf scale = f_set(inverse_rms(y + h * d, d, s->epsilon));
        for (int i = 0; i < d; i += LANES) {
            float *at = y + h * d + i;
            vf normed = f_mul(f_mul(f_load(at), scale), f_load(s->weight + i));
            f_store(at, f_mul(normed, f_silu(f_load(gate + h * d + i))));
        }
    }
    orthrus_quantize(s->form, y, s->n_head * d,
                     s->q + (size_t)task * orthrus_row_bytes(s->form, s->n_head * d));
}
