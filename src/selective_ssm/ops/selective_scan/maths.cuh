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

// The factor by which B u enters a state in a step dt under zero-order hold, (exp(dt A) - 1) / A, from
// x = dt A log2(e) and decay = 2^x: by its series where the difference would cancel. The series' error and the
// cancellation's are both below 2e-7 where T is fp32, below 1e-6 where it has 16 bits.
template <class T> __device__ __forceinline__ float hold(float x, float decay, float dt, float inverse_A) {
    constexpr float RADIUS = (sizeof(T) == 4 ? 0.5f : 0.0625f) * LOG2_E;
    constexpr float C = LN_2;  // the series is of x C, its k-th coefficient C^k / (k + 1)!
    float series = C * C * C / 24;
    if (sizeof(T) == 4) {
        series = fmaf(x, C * C * C * C * C * C * C / 40320, C * C * C * C * C * C / 5040);
        series = fmaf(series, x, C * C * C * C * C / 720);
        series = fmaf(series, x, C * C * C * C / 120);
        series = fmaf(series, x, C * C * C / 24);
    }
    series = fmaf(series, x, C * C / 6);
    series = fmaf(series, x, C / 2);
    const float near = fmaf(dt * x, series, dt), far = fmaf(decay, inverse_A, -inverse_A);
    return fabsf(x) < RADIUS ? near : far;
}
