// The functions of one token of the selective scan.

#include "device.cuh"

// max(x, 0) + log1p(exp(-|x|)): the polynomial is within 3e-8 of log1p(e) / e for 0 <= e <= 1. Nothing is lost as
// x -> -inf, where a step size is small but its relative error moves every state.
__device__ __forceinline__ float softplus(float x) {
    const float e = exp2_fast(-LOG2_E * fabsf(x));
    float p = 0.0052326880395412445f;
    p = fmaf(p, e, -0.029505213722586632f);
    p = fmaf(p, e, 0.07822591066360474f);
    p = fmaf(p, e, -0.13663242757320404f);
    p = fmaf(p, e, 0.19106005132198334f);
    p = fmaf(p, e, -0.2484298199415207f);
    p = fmaf(p, e, 0.3331909775733948f);
    p = fmaf(p, e, -0.4999949336051941f);
    p = fmaf(p, e, 0.9999999403953552f);
    return fmaf(p, e, fmaxf(x, 0.0f));
}

// 1 / (1 + exp(-x)). (By tanh.approx it would cost one special function rather than two, but far below 0 its error is
// as large as the result.)
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-LOG2_E * x)); }

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
