// Threads for steps: work is taken by task, and a barrier lies behind every step.
//
// A thread that waits spins for a few microseconds, since steps are short, and then sleeps: another
// program that runs meanwhile costs its share of time and no more.
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#include "isa.h"
#include "steps.h"

#define SPINS 2000

// relax: within a loop that waits. Control of floats: other libraries may have told a thread to
// round differently, or to take subnormal numbers for zeros, which would change the bits.
#if defined(__x86_64__)
#define relax() __builtin_ia32_pause()
typedef unsigned Control;
#define CONTROL 0x1F80u // as a process starts: nearest, nothing flushed, nothing raised
static Control control(void) { return __builtin_ia32_stmxcsr(); }
static void set_control(Control to) { __builtin_ia32_ldmxcsr(to); }
#elif defined(__aarch64__)
#define relax() __asm__ volatile("yield")
typedef uint64_t Control;
#define CONTROL 0
static Control control(void) {
    Control now;
    __asm__ volatile("mrs %0, fpcr" : "=r"(now));
    return now;
}
static void set_control(Control to) { __asm__ volatile("msr fpcr, %0" : : "r"(to)); }
#else
#define relax() ((void)0)
typedef int Control;
#define CONTROL 0
static Control control(void) { return 0; }
static void set_control(Control to) { (void)to; }
#endif

typedef struct {
    Pool *pool;
    pthread_t handle;
    unsigned step, round; // how far this thread has come, of the pool's counters
    Scratch scratch;
} Thread;

struct Pool {
    int threads;
    Thread *thread;          // [0] is the caller's
    pid_t process;           // threads do not follow into a forked one
    pthread_mutex_t running; // by whoever runs steps
    pthread_mutex_t lock;
    pthread_cond_t changed;
    const Step *steps;
    int count;
    atomic_int next, waiting; // next task of the step; threads that have no more to do in it
    atomic_int sleeping, end; // threads that wait on `changed`; whether they are to leave
    atomic_uint step, round;  // steps done and runs begun, ever: they only grow
};

static void wait_for(Pool *pool, atomic_uint *counter, unsigned old) {
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(counter, memory_order_acquire) != old) return;
        relax();
    }
    pthread_mutex_lock(&pool->lock);
    atomic_fetch_add(&pool->sleeping, 1);
    while (atomic_load(counter) == old) pthread_cond_wait(&pool->changed, &pool->lock);
    atomic_fetch_sub(&pool->sleeping, 1);
    pthread_mutex_unlock(&pool->lock);
}

static void count_up(Pool *pool, atomic_uint *counter) {
    atomic_fetch_add(counter, 1);
    if (atomic_load(&pool->sleeping)) {
        pthread_mutex_lock(&pool->lock);
        pthread_cond_broadcast(&pool->changed);
        pthread_mutex_unlock(&pool->lock);
    }
}

static void work(Thread *me) {
    Pool *pool = me->pool;
    for (const Step *step = pool->steps, *stop = step + pool->count; step < stop; step++) {
        int task;
        while ((task = atomic_fetch_add(&pool->next, 1)) < step->tasks)
            run_task(step, task, &me->scratch);
        if (atomic_fetch_add(&pool->waiting, 1) == pool->threads - 1) { // everybody is here
            atomic_store(&pool->waiting, 0);
            atomic_store(&pool->next, 0);
            count_up(pool, &pool->step);
        } else {
            wait_for(pool, &pool->step, me->step);
        }
        me->step++;
    }
}

static void *live(void *argument) {
    Thread *me = argument;
    set_control(CONTROL);
    for (;;) {
        wait_for(me->pool, &me->pool->round, me->round);
        me->round++;
        if (atomic_load(&me->pool->end)) return 0;
        work(me);
    }
}

int orthrus_run(Pool *pool, const Step *steps, int count) {
    if (pool->process != getpid()) return -1;
    pthread_mutex_lock(&pool->running);
    Control before = control();
    set_control(CONTROL);
    pool->steps = steps;
    pool->count = count;
    count_up(pool, &pool->round);
    work(&pool->thread[0]);
    set_control(before);
    pthread_mutex_unlock(&pool->running);
    return 0;
}

void orthrus_run_here(const Step *step) {
    Scratch scratch = {0, 0};
    Control before = control();
    set_control(CONTROL);
    for (int task = 0; task < step->tasks; task++) run_task(step, task, &scratch);
    set_control(before);
    free(scratch.data);
}

Pool *orthrus_pool_new(int threads) {
    Pool *pool = calloc(1, sizeof *pool);
    Thread *all = calloc((size_t)threads, sizeof *all);
    if (!pool || !all) return free(pool), free(all), (Pool *)0;
    pool->threads = threads;
    pool->thread = all;
    pool->process = getpid();
    pthread_mutex_init(&pool->running, 0);
    pthread_mutex_init(&pool->lock, 0);
    pthread_cond_init(&pool->changed, 0);
    all[0].pool = pool;
    for (int i = 1; i < threads; i++) {
        all[i].pool = pool;
        if (pthread_create(&all[i].handle, 0, live, &all[i])) {
            pool->threads = i;
            orthrus_pool_free(pool);
            return 0;
        }
    }
    return pool;
}

void orthrus_pool_free(Pool *pool) {
    if (pool->process == getpid()) {
        pthread_mutex_lock(&pool->running); // until the last run has ended
        atomic_store(&pool->end, 1);
        count_up(pool, &pool->round);
        for (int i = 1; i < pool->threads; i++) pthread_join(pool->thread[i].handle, 0);
        pthread_mutex_unlock(&pool->running);
        pthread_cond_destroy(&pool->changed);
        pthread_mutex_destroy(&pool->lock);
        pthread_mutex_destroy(&pool->running);
    }
    for (int i = 0; i < pool->threads; i++) free(pool->thread[i].scratch.data);
    free(pool->thread);
    free(pool);
}

float *reserve(Scratch *scratch, size_t floats) {
    if (scratch->floats < floats) {
        free(scratch->data);
        scratch->data = aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
        if (!scratch->data) abort();
        scratch->floats = floats;
    }
    return scratch->data;
}
