// exp, lane by lane, the same bits everywhere: 2^n * p(r) with |r| <= ln(2)/2.
#ifndef ORTHRUS_ELEMENTARY_H
#define ORTHRUS_ELEMENTARY_H

#include "isa.h"

// Relative error below 2e-7 for -87 <= x <= 88; smaller x give about 1e-38, not zero.
INLINE vf f_exp(vf x) {
    x = f_min(f_max(x, f_set(-87.0f)), f_set(88.0f));
    vi n = i_round(f_mul(x, f_set(1.44269504f)));
    vf m = f_from_i(n);
    vf r = f_fma(m, f_set(-0.693145752f), x);
    r = f_fma(m, f_set(-1.42860677e-6f), r);
    vf p = f_set(1.0f / 720.0f);
    p = f_fma(p, r, f_set(1.0f / 120.0f));
    p = f_fma(p, r, f_set(1.0f / 24.0f));
    p = f_fma(p, r, f_set(1.0f / 6.0f));
    p = f_fma(p, r, f_set(0.5f));
    p = f_fma(p, r, f_set(1.0f));
    p = f_fma(p, r, f_set(1.0f));
    return f_mul(p, f_from_bits(i_shl(i_add(n, i_set(127)), 23)));
}

// x / (1 + exp(-x))
INLINE vf f_silu(vf x) { return f_div(x, f_add(f_set(1.0f), f_exp(f_sub(f_set(0.0f), x)))); }

#endif
