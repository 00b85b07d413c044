// The tasks of all steps but attention (steps.h).
#include "steps.h"
#include "elementary.h"
#include "isa.h"
#include "panels.h"

// Panels of one task of a product: small enough to share out, large enough to be worth taking.
#define PANELS_PER_TASK 4

void orthrus_sizes(int32_t sizes[10]) {
    sizes[0] = (int32_t)sizeof(Step);
    sizes[1] = (int32_t)sizeof(Row);
    sizes[2] = (int32_t)sizeof(Matrix);
    sizes[3] = (int32_t)sizeof(LayerCache);
    sizes[4] = (int32_t)sizeof(Group);
    sizes[5] = (int32_t)sizeof(StateRow);
    sizes[6] = (int32_t)sizeof(LayerState);
    sizes[7] = (int32_t)sizeof(Run);
    sizes[8] = PANELS_PER_TASK;
    sizes[9] = STEPS;
}

static void embed(const Step *s, int task) {
    const Matrix *m = &s->matrix[0];
    orthrus_unpack_row(m->type, m->data, m->k, s->row[task].token,
                       s->y + (size_t)task * s->y_stride);
}

float inverse_rms(const float *x, int width, float epsilon) {
    vf squares = f_set(0.0f);
    for (int i = 0; i < width; i += LANES) squares = f_fma(f_load(x + i), f_load(x + i), squares);
    return 1.0f / sqrtf(f_sum(squares) / (float)width + epsilon);
}

static void norm(const Step *s, int task, Scratch *scratch) {
    const float *x = s->x + (size_t)task * s->x_stride;
    float *y = s->y ? s->y + (size_t)task * s->y_stride : reserve(scratch, (size_t)s->width);
    vf scale = f_set(inverse_rms(x, s->width, s->epsilon));
    for (int i = 0; i < s->width; i += LANES)
        f_store(y + i, f_mul(f_mul(f_load(x + i), scale), f_load(s->weight + i)));
    if (s->q)
        orthrus_quantize(s->form, y, s->width,
                         s->q + (size_t)task * orthrus_row_bytes(s->form, s->width));
}

static void quantize(const Step *s, int task) {
    size_t bytes = orthrus_row_bytes(s->form, s->width);
    orthrus_quantize(s->form, s->x + (size_t)task * s->x_stride, s->width,
                     s->q + (size_t)task * bytes);
}

static void product(const Step *s, int task) {
    int first = task * PANELS_PER_TASK, column = 0;
    for (int i = 0; i < s->count; i++) {
        const Matrix *m = &s->matrix[i];
        int tasks = (m->panels + PANELS_PER_TASK - 1) / PANELS_PER_TASK;
        if (first >= tasks * PANELS_PER_TASK) {
            first -= tasks * PANELS_PER_TASK;
            column += m->panels * LANES;
            continue;
        }
        int stop = first + PANELS_PER_TASK < m->panels ? first + PANELS_PER_TASK : m->panels;
        float *y = s->y + column;
        orthrus_product(m->type, m->data, m->k, first, stop, s->q, s->rows, y, s->y_stride, s->add);
        if (s->bias[i])
            for (int r = 0; r < s->rows; r++)
                for (int p = first; p < stop; p++) {
                    float *at = y + (size_t)r * s->y_stride + p * LANES;
                    f_store(at, f_add(f_load(at), f_load(s->bias[i] + p * LANES)));
                }
        return;
    }
}

static void gated(const Step *s, int task, Scratch *scratch) {
    const Matrix *gate = &s->matrix[0], *up = &s->matrix[1];
    int first = task * PANELS_PER_TASK;
    int stop = first + PANELS_PER_TASK < gate->panels ? first + PANELS_PER_TASK : gate->panels;
    size_t stride = PANELS_PER_TASK * LANES;
    float *other = reserve(scratch, stride * (size_t)s->rows);
    size_t panel = orthrus_panel_bytes(up->type, up->k);
    orthrus_product(gate->type, gate->data, gate->k, first, stop, s->q, s->rows, s->y, s->y_stride,
                    0);
    orthrus_product(up->type, up->data + (size_t)first * panel, up->k, 0, stop - first, s->q,
                    s->rows, other, stride, 0);
    for (int r = 0; r < s->rows; r++)
        for (int p = first; p < stop; p++) {
            float *at = s->y + (size_t)r * s->y_stride + p * LANES;
            vf u = f_load(other + (size_t)r * stride + (p - first) * LANES);
            f_store(at, f_mul(f_silu(f_load(at)), u));
        }
}

// RMSNorm of one head in place, where there is a weight.
static void head_norm(float *x, const float *weight, int width, float epsilon) {
    if (!weight) return;
    vf scale = f_set(inverse_rms(x, width, epsilon));
    for (int i = 0; i < width; i += LANES)
        f_store(x + i, f_mul(f_mul(f_load(x + i), scale), f_load(weight + i)));
}

static void rotate(float *x, const Row *row, int width, int adjacent) {
    int half = width / 2, step = adjacent ? 2 : 1, apart = adjacent ? 1 : half;
    for (int i = 0; i < half; i++) {
        float *a = x + i * step, *b = a + apart;
        float low = *a, high = *b, c = row->cos[i], s = row->sin[i];
        *a = fused(low, c, -(high * s));
        *b = fused(high, c, low * s);
    }
}

static void heads(const Step *s, int task) {
    const Row *row = &s->row[task];
    int d = s->head_dim;
    float *q = s->y + (size_t)task * s->y_stride;
    float *k = q + s->n_head * d, *v = k + s->n_head_kv * d;
    for (int h = 0; h < s->n_head; h++) {
        head_norm(q + h * d, s->weight, d, s->epsilon);
        rotate(q + h * d, row, s->width, s->adjacent);
    }
    const LayerCache *cache = &s->cache[row->cache];
    for (int h = 0; h < s->n_head_kv; h++) {
        head_norm(k + h * d, s->weight_k, d, s->epsilon);
        rotate(k + h * d, row, s->width, s->adjacent);
        store_head(cache, h, d, row->key, k + h * d, v + h * d);
        for (int i = 0; i < row->copies; i++)
            store_head(cache, h, d, row->more_keys[i], k + h * d, v + h * d);
    }
}

static void pick(const Step *s, int task) {
    memcpy(s->y + (size_t)task * s->y_stride, s->x + (size_t)s->index[task] * s->x_stride,
           (size_t)s->width * sizeof(float));
}

static void silu(const Step *s, int task) {
    const float *x = s->x + (size_t)task * s->x_stride;
    float *y = s->y + (size_t)task * s->y_stride;
    for (int i = 0; i < s->width; i += LANES)
        f_store(y + i, f_mul(f_silu(f_load(y + i)), f_load(x + i)));
}

static void sigmoid(const Step *s, int task) {
    const float *x = s->x + (size_t)task * s->x_stride;
    float *y = s->y + (size_t)task * s->y_stride;
    for (int i = 0; i < s->width; i += LANES)
        f_store(y + i, f_mul(f_load(y + i), f_sigmoid(f_load(x + i))));
}

static void repack(const Step *step, int task) {
    const Matrix *to = &step->matrix[0];
    int first = step->first + task * step->width, end = step->first + step->count;
    int stop = first + step->width < end ? first + step->width : end;
    orthrus_repack(to->type, (const uint8_t *)step->x, to->columns, to->k, first, stop,
                   (uint8_t *)to->data);
}

void run_task(const Step *step, int task, Scratch *scratch) {
    switch (step->op) {
    case STEP_EMBED: embed(step, task); break;
    case STEP_NORM: norm(step, task, scratch); break;
    case STEP_QUANTIZE: quantize(step, task); break;
    case STEP_PRODUCT: product(step, task); break;
    case STEP_GATED: gated(step, task, scratch); break;
    case STEP_HEADS: heads(step, task); break;
    case STEP_ATTENTION: attention_task(step, task, scratch); break;
    case STEP_PICK: pick(step, task); break;
    case STEP_SILU: silu(step, task); break;
    case STEP_SIGMOID: sigmoid(step, task); break;
    case STEP_CONVOLVE: convolve_task(step, task); break;
    case STEP_RECUR: recur_task(step, task, scratch); break;
    case STEP_GATED_NORM: gated_norm_task(step, task); break;
    case STEP_WEIGHTS: weights_task(step, task, scratch); break;
    case STEP_REPACK: repack(step, task); break;
    }
}
