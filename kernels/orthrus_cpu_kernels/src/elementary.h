// Functions lane by lane, the same bits everywhere.
#ifndef ORTHRUS_ELEMENTARY_H
#define ORTHRUS_ELEMENTARY_H

#include "isa.h"

// 2^n * p(r) with |r| <= ln(2)/2. Relative error below 2e-7 for -87 <= x <= 88; smaller x give
// about 1e-38, not zero.
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

INLINE vf f_sigmoid(vf x) {
    return f_div(f_set(1.0f), f_add(f_set(1.0f), f_exp(f_sub(f_set(0.0f), x))));
}

// log(1 + exp(x)) = max(x, 0) + log(1 + z) with z = exp(-|x|) <= 1, and log(1 + z) = 2 atanh(s),
// s = z / (2 + z) <= 1/3.
INLINE vf f_softplus(vf x) {
    vf z = f_exp(f_sub(f_set(0.0f), f_abs(x)));
    vf s = f_div(z, f_add(f_set(2.0f), z)), s2 = f_mul(s, s);
    vf p = f_set(1.0f / 17.0f);
    for (int n = 15; n > 0; n -= 2) p = f_fma(p, s2, f_set(1.0f / (float)n));
    return f_fma(f_mul(f_set(2.0f), s), p, f_max(x, f_set(0.0f)));
}

#endif
