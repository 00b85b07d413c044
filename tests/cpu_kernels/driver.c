// Runs calls of the kernels that a file describes (tests/helpers/cpu_calls.py writes it), and
// writes what is in memory afterwards: for instruction sets of other machines, and for sanitizers.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "orthrus_cpu.h"
#include "steps.h"

enum { ARGUMENTS = 10 };

static void *get(size_t bytes) {
    void *data = malloc(bytes ? bytes : 1);
    if (!data || fread(data, 1, bytes, stdin) != bytes) exit(2);
    return data;
}

static int64_t number(void) {
    int64_t *n = get(sizeof *n), value = *n;
    free(n);
    return value;
}

static void call(int64_t function, const int64_t *n, void **p) {
    switch (function) {
    case 0:
        orthrus_repack((int)n[0], p[1], (int)n[2], (int)n[3], (int)n[4], (int)n[5], p[6]);
        break;
    case 1: orthrus_quantize((int)n[0], p[1], (int)n[2], p[3]); break;
    case 2:
        orthrus_product((int)n[0], p[1], (int)n[2], (int)n[3], (int)n[4], p[5], (int)n[6], p[7],
                        (size_t)n[8], (int)n[9]);
        break;
    case 3: orthrus_unpack_row((int)n[0], p[1], (int)n[2], (int)n[3], p[4]); break;
    default: {
        Pool *pool = orthrus_pool_new((int)n[0]);
        if (!pool || orthrus_run(pool, p[1], (int)n[2])) exit(3);
        orthrus_pool_free(pool);
    }
    }
}

int main(void) {
    if (!orthrus_usable()) return 4;
    for (int64_t cases = number(); cases > 0; cases--) {
        int64_t buffers = number();
        char **data = malloc((size_t)buffers * sizeof *data);
        int64_t *size = malloc((size_t)buffers * sizeof *size);
        for (int64_t i = 0; i < buffers; i++) {
            size[i] = number();
            data[i] = get((size_t)size[i]);
        }
        for (int64_t pointers = number(); pointers > 0; pointers--) {
            int64_t in = number(), at = number(), of = number(), offset = number();
            char *target = data[of] + offset;
            memcpy(data[in] + at, &target, sizeof target);
        }
        for (int64_t calls = number(); calls > 0; calls--) {
            int64_t function = number(), n[ARGUMENTS];
            void *p[ARGUMENTS];
            for (int i = 0; i < ARGUMENTS; i++) {
                int64_t buffer = number();
                n[i] = number();
                p[i] = buffer < 0 ? NULL : data[buffer] + n[i];
            }
            call(function, n, p);
        }
        for (int64_t i = 0; i < buffers; i++) {
            if (fwrite(data[i], 1, (size_t)size[i], stdout) != (size_t)size[i]) return 5;
            free(data[i]);
        }
        free(data);
        free(size);
    }
    return 0;
}
