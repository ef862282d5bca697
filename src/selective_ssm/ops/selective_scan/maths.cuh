// The functions of one token of the selective scan.

#include "device.cuh"

// max(x, 0) + log1p(exp(-|x|)), with log1p(e) = e + e^2 p(e), p within 3e-8 for 0 <= e <= 1. Nothing is lost as x -> -inf,
// where a step size is small but its relative error moves every state. So the exponential's argument is taken as a sum: its
// rounding alone would cost up to 4e-7 at x = -7.
__device__ __forceinline__ float softplus(float x) {
    constexpr float REST = 1.925963033500946e-08f;  // of log2(e) beyond fp32
    const float size = fminf(fabsf(x), 126.0f), argument = -LOG2_E * size;
    const float rounded_off = fmaf(-REST, size, fmaf(-LOG2_E, size, -argument));
    float e = exp2_fast(argument);
    e = fmaf(e, LN_2 * rounded_off, e);
    float p = 0.005366176832467318f;
    p = fmaf(p, e, -0.03007141873240471f);
    p = fmaf(p, e, 0.07921410351991653f);
    p = fmaf(p, e, -0.137546569108963f);
    p = fmaf(p, e, 0.19154082238674164f);
    p = fmaf(p, e, -0.24857281148433685f);
    p = fmaf(p, e, 0.3332133889198303f);
    p = fmaf(p, e, -0.49999648332595825f);
    return fmaf(e * e, p, e) + (x < 0.0f ? 0.0f : x);  // not fmaxf, which would hide NaN
}

// The exponent of 2 in exp(dt A), A in units of log2; and that power. ex2.approx is on average a third of 2^-24 too small just below 1 (measured on an H200), which
// adds up where a state decays over thousands of tokens; hence a quarter more in the exponent. That of dt = 0 is still 1.
__device__ __forceinline__ float exponent_over(float dt, float A_log2) {
    constexpr float EXCESS = 0.25f * 5.9604645e-8f * LOG2_E;
    return fmaf(dt, A_log2, EXCESS);
}
__device__ __forceinline__ float decay_over(float dt, float A_log2) { return exp2_fast(exponent_over(dt, A_log2)); }

// The factor by which B u enters a state in a step dt under zero-order hold, (exp(dt A) - 1) / A, from
// x = dt A log2(e) and decay = 2^x: near 0, where the difference would cancel, by a polynomial within 5e-8; elsewhere that
// costs 2e-7, at most 6e-7.
__device__ __forceinline__ float hold(float x, float decay, float dt, float inverse_A) {
    float series = 0.00192408578f;
    series = fmaf(series, x, 0.0139029427f);
    series = fmaf(series, x, 0.0800756216f);
    series = fmaf(series, x, 0.346572936f);
    const float near = fmaf(dt * x, series, dt), far = fmaf(decay, inverse_A, -inverse_A);
    return fabsf(x) < 0.3125f ? near : far;
}

// The derivative of that factor in A, over dt^2: (x exp(x) - (exp(x) - 1)) / x^2 of x = dt A, here given as x log2(e); near 0 by
// a polynomial within 3e-7.
__device__ __forceinline__ float hold_slope(float x, float decay) {
    float series = 0.00018988442f;
    series = fmaf(series, x, 0.00161919859f);
    series = fmaf(series, x, 0.0111019397f);
    series = fmaf(series, x, 0.0600532591f);
    series = fmaf(series, x, 0.231048867f);
    series = fmaf(series, x, 0.500000119f);
    const float inverse = LOG2_E * reciprocal_fast(x), far = (decay - (decay - 1.0f) * inverse) * inverse;
    return fabsf(x) < 0.75f ? series : far;
}
