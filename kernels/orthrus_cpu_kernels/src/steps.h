// A pass as a list of steps, each a number of tasks that threads take in turn.
#ifndef ORTHRUS_STEPS_H
#define ORTHRUS_STEPS_H

#include "orthrus_cpu.h"

// A repacked matrix.
typedef struct {
    int32_t type, k, columns, panels;
    const uint8_t *data;
} Matrix;

enum {
    STEP_EMBED,
    STEP_NORM,
    STEP_QUANTIZE,
    STEP_PRODUCT,
    STEP_GATED,
    STEP_HEADS,
    STEP_ATTENTION,
    STEP_PICK,
    STEP_SILU,
    STEP_SIGMOID,
    STEP_CONVOLVE,
    STEP_RECUR,
    STEP_GATED_NORM,
    STEP_WEIGHTS,
    STEP_REPACK,
    STEPS,
};

// One row of a pass.
//
// key: cache column that its keys and values go to; more_keys[0 .. copies-1]: others, of a tree.
// since, sees: columns since .. sees-1 of its cache; then from .. to-1, where from is a multiple of
// 16.
// cache: which of the pass's caches. cos, sin: of its position.
typedef struct {
    int32_t token, cache, key, copies, sees, from, to, since;
    const int32_t *more_keys;
    const float *cos, *sin;
} Row;

// Keys and values of one layer of one cache (cache.h says how they lie), as F32, F16, Q8_0 or Q4_0.
typedef struct {
    uint8_t *keys, *values;
    int64_t columns;
    int32_t type_k, type_v;
} LayerCache;

// Rows first .. first+count-1, of one cache, which see columns `from` on from the same place.
typedef struct {
    int32_t first, count;
} Group;

// A row of a pass as gated DeltaNet layers see it.
//
// back: the three rows before it on its way, the nearest first: row `back` of the pass, or record
// -1 - back of its sequence. state: which of the pass's states is its sequence's. record: where
// what it does to that is kept; -1 if nowhere. follows: whether the state before it is the one
// behind the row before; else it is the committed one, changed by records replay[0 .. replays-1].
typedef struct {
    int32_t back[3], state, record, follows, replays, unused;
    const int32_t *replay;
} StateRow;

// State of one DeltaNet layer of one sequence (delta.c says how it lies).
typedef struct {
    float *memory, *saved, *records;
} LayerState;

// Rows first .. first+count-1, of one sequence. Before them, records apply[0 .. applied-1] become
// part of its state for good. advance: so do its rows. save: the state before them goes to `saved`.
typedef struct {
    int32_t first, count, state, applied, advance, save;
    const int32_t *apply;
} Run;

#define MATRICES 4 // of one step

// x, y: rows of floats, `stride` floats apart. rows, first: of the pass that the step is about.
//
//   EMBED      y = row `token` of matrix 0
//   NORM       q = RMSNorm(x; weight) of `width` columns, quantized in `form`; y too, if given
//   QUANTIZE   q = x, quantized
//   PRODUCT    y = q times matrices 0 .. count-1, side by side, + bias; added to y if `add`
//   GATED      y = silu(q times matrix 0) * (q times matrix 1)
//   HEADS      x = q | k | v of a row: norms, RoPE of the first `width` elements of each head; q
//              stays, k and v go to the cache
//   ATTENTION  x = queries, y = their weighted values; if `count`, chains see no more than so many
//              blocks of columns, beside the first ones and those before themselves (attention.c)
//   PICK       y row i = x row index[i]
//   SILU       y = silu(y) * x
//   SIGMOID    y = y * sigmoid(x)
//   WEIGHTS    y plane h = the larger of y and what the query heads of kv head h weigh each column
//              with; x = queries of `rows` rows, y = [n_head_kv][rows][y_stride]
//   REPACK     panels first .. first+count-1 of matrix 0 = the GGUF tensor at x, `width` a task
//
// Of a DeltaNet layer, of n_head value heads and n_head_kv key heads:
//
//   CONVOLVE   x = inputs | gates of outputs | alpha | beta of a row -> y = q | k | v | decay |
//   beta RECUR      x = y of CONVOLVE, y = what the state tells of each row; one task a tile of it
//   GATED_NORM q = RMSNorm(y; weight) of heads * silu(x), quantized
typedef struct {
    int32_t op, tasks, first, rows, width, form, count, add;
    int32_t n_head, n_head_kv, head_dim, adjacent, groups, unused;
    float epsilon, scale;
    const float *x;
    float *y;
    size_t x_stride, y_stride;
    uint8_t *q;
    const float *weight, *weight_k;
    const float *bias[MATRICES];
    Matrix matrix[MATRICES];
    const Row *row;
    const LayerCache *cache;
    const Group *group;
    const int32_t *index;
    const StateRow *state_row;
    const LayerState *state;
    const Run *run;
} Step;

// Threads that run steps; the caller is one of them. Null if they cannot be started.
typedef struct Pool Pool;
Pool *orthrus_pool_new(int threads);
void orthrus_pool_free(Pool *pool);
// Runs steps one after the other; a second run of a pool waits for the first. -1 in a process that
// was forked off from the pool's.
int orthrus_run(Pool *pool, const Step *steps, int count);
// Runs one step on the caller's thread.
void orthrus_run_here(const Step *step);
// Bytes of a Step, a Row, a Matrix, a LayerCache, a Group, a StateRow, a LayerState and a Run,
// panels per task of a product, and how many operations there are, so that a caller can check its
// own idea of them.
void orthrus_sizes(int32_t sizes[10]);

// What the pool runs (steps.c): task number `task` of a step. scratch: of the thread, grows as
// needed.
typedef struct {
    float *data;
    size_t floats;
} Scratch;
void run_task(const Step *step, int task, Scratch *scratch);
float *reserve(Scratch *scratch, size_t floats);
void attention_task(const Step *step, int task, Scratch *scratch);
float inverse_rms(const float *x, int width, float epsilon);
void convolve_task(const Step *step, int task);
void recur_task(const Step *step, int task, Scratch *scratch);
void gated_norm_task(const Step *step, int task);
void weights_task(const Step *step, int task, Scratch *scratch);
void store_head(const LayerCache *cache, int head, int d, int column, const float *k,
                const float *v);

#endif
