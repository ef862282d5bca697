// Exponentials and what is made of them, as polynomials; for each a bound of its error, which test_maths.py holds.
//
// An ulp is the distance of neighbouring fp32 numbers at the exact result. Results below 2^-126 are zero, exactly; what is
// not a number stays so; infinities give limits. All this holds where subnormals are flushed, as parallel_for sees to.
#pragma once

#include "vector.hpp"

namespace {

#if defined(__AVX512F__)
// With a mask of all lanes, since GCC 12 warns of the forms without one.
constexpr __mmask16 ALL = 0xffff;
constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#endif

// 2^n p for whole n and p in [0.7, 1.5], where n is t rounded and t says what is too large or too small.
// `shifted` is n + 1.5 * 2^23, in which the low bits are n.
INLINE Part scale(Part p, Part shifted, Part t) {
    const PartBits exponent = reinterpret_cast<PartBits>(shifted) << 23;
    const Part scaled = reinterpret_cast<Part>(reinterpret_cast<PartBits>(p) + exponent);
    const Part small = t < -126.0f ? Part{} : scaled;
    return t < 128.0f ? small : t + __builtin_inff();  // a NaN is not smaller, and stays
}

INLINE Part exp2_polynomial(Part r) {
    Part p = fma(splat_part(0x1.416b52p-13f), r, splat_part(0x1.5f082ep-10f));
    p = fma(p, r, splat_part(0x1.3b2de0p-7f));
    p = fma(p, r, splat_part(0x1.c6af7cp-5f));
    p = fma(p, r, splat_part(0x1.ebfbdcp-3f));
    p = fma(p, r, splat_part(0x1.62e430p-1f));
    return fma(p, r, splat_part(1));
}

constexpr float SHIFT = 0x1.8p23f;  // added to a number below 2^22, it leaves no place for a fraction

// 2^t within 1 ulp; without fma, 2.
INLINE Part exp2(Part t) {
#if defined(__AVX512F__)
    const Part r = _mm512_maskz_reduce_ps(ALL, t, NEAREST);  // t minus t rounded, 0 for infinities
    return _mm512_maskz_scalef_ps(ALL, exp2_polynomial(r), _mm512_maskz_roundscale_ps(ALL, t, NEAREST));
#else
    const Part shifted = t + SHIFT;
    return scale(exp2_polynomial(t - (shifted - SHIFT)), shifted, t);
#endif
}

INLINE Part exp_polynomial(Part r) {
    Part p = fma(splat_part(0x1.6d1390p-10f), r, splat_part(0x1.120b7cp-7f));
    p = fma(p, r, splat_part(0x1.555516p-5f));
    p = fma(p, r, splat_part(0x1.5554dcp-3f));
    p = fma(p, r, splat_part(0.5f));
    p = fma(p, r, splat_part(1));
    return fma(p, r, splat_part(1));
}

constexpr float LOG2_E = 0x1.715476p+0f;
constexpr float LN_2_HIGH = 0x1.62e4p-1f, LN_2_LOW = 0x1.7f7d1cp-20f;  // whole multiples of the first are exact

// e^x within 1 ulp; without fma, 2.
INLINE Part exp(Part x) {
#if defined(__AVX512F__)
    // Beyond these bounds the result is 0 or infinite anyway; maximum and minimum give their second operand for a NaN.
    const Part above = _mm512_maskz_max_ps(ALL, splat_part(-90), x);
    const Part inside = _mm512_maskz_min_ps(ALL, splat_part(90), above);
    const Part n = _mm512_maskz_roundscale_ps(ALL, inside * LOG2_E, NEAREST);
    const Part r = fma(n, splat_part(-LN_2_LOW), fma(n, splat_part(-LN_2_HIGH), inside));
    return _mm512_maskz_scalef_ps(ALL, exp_polynomial(r), n);
#else
    const Part t = x * LOG2_E;
    const Part shifted = t + SHIFT;
    const Part n = shifted - SHIFT;
    const Part r = fma(n, splat_part(-LN_2_LOW), fma(n, splat_part(-LN_2_HIGH), x));
    return scale(exp_polynomial(r), shifted, t);
#endif
}

// 1 / (1 + e^-x) within 3 ulp.
INLINE Part sigmoid(Part x) { return 1.0f / (1.0f + exp(-x)); }

// log(1 + e^x) within 3 ulp: max(x, 0) + log(1 + e), e = e^-|x|, the logarithm as e + e^2 p(e): what is rounded after e is
// small beside it where the result is, and no division is needed.
INLINE Part softplus(Part x) {
    const Part e = exp(x < 0.0f ? x : -x);
    Part p = fma(splat_part(0x1.0fb4a2p-9f), e, splat_part(-0x1.bead36p-7f));
    p = fma(p, e, splat_part(0x1.57e954p-5f));
    p = fma(p, e, splat_part(-0x1.54457ep-4f));
    p = fma(p, e, splat_part(0x1.fea744p-4f));
    p = fma(p, e, splat_part(-0x1.4a542cp-3f));
    p = fma(p, e, splat_part(0x1.978278p-3f));
    p = fma(p, e, splat_part(-0x1.ffc420p-3f));
    p = fma(p, e, splat_part(0x1.5553a6p-2f));
    p = fma(p, e, splat_part(-0x1.fffff8p-2f));
    return (x < 0.0f ? Part{} : x) + fma(e * e, p, e);
}

// (e^x - 1) / x for x below 88, given e^x, within 4 ulp: what zero-order hold multiplies by, 1 at 0.
INLINE Part hold(Part x, Part exp_x) {
    Part p = fma(splat_part(0x1.a1d6ccp-16f), x, splat_part(0x1.a2463ap-13f));
    p = fma(p, x, splat_part(0x1.6c161ap-10f));
    p = fma(p, x, splat_part(0x1.111040p-7f));
    p = fma(p, x, splat_part(0x1.555556p-5f));
    p = fma(p, x, splat_part(0x1.555556p-3f));
    p = fma(p, x, splat_part(0.5f));
    p = fma(p, x, splat_part(1));
    const Part away = (exp_x - 1.0f) / x;
    return x * x < 0.25f ? p : away;
}

// The derivative of (e^x - 1) / x, given e^x and that, within 8 ulp where x < 88: by its series, of which (k + 1) / (k + 2)! is
// a coefficient, near 0.
INLINE Part hold_slope(Part x, Part exp_x, Part held) {
    Part p = splat_part(0x1.08db48p-29f);
    p = fma(p, x, splat_part(0x1.8a86a4p-26f));
    p = fma(p, x, splat_part(0x1.0cfeb6p-22f));
    p = fma(p, x, splat_part(0x1.4ce19ap-19f));
    p = fma(p, x, splat_part(0x1.71de3ap-16f));
    p = fma(p, x, splat_part(0x1.6c16c2p-13f));
    p = fma(p, x, splat_part(0x1.381382p-10f));
    p = fma(p, x, splat_part(0x1.c71c72p-8f));
    p = fma(p, x, splat_part(0x1.111112p-5f));
    p = fma(p, x, splat_part(0x1p-3f));
    p = fma(p, x, splat_part(0x1.555556p-2f));
    p = fma(p, x, splat_part(0x1p-1f));
    const Part away = (exp_x - held) / x;
    return x * x < 1.0f ? p : away;
}

INLINE Floats exp2(Floats t) EACH(Floats, exp2(t.at[i]))
INLINE Floats exp(Floats x) EACH(Floats, exp(x.at[i]))
INLINE Floats sigmoid(Floats x) EACH(Floats, sigmoid(x.at[i]))
// x sigmoid(x).
INLINE Floats silu(Floats x) { return x * sigmoid(x); }
INLINE Floats softplus(Floats x) EACH(Floats, softplus(x.at[i]))
INLINE Floats hold(Floats x, Floats exp_x) EACH(Floats, hold(x.at[i], exp_x.at[i]))
INLINE Floats hold_slope(Floats x, Floats exp_x, Floats held) EACH(Floats, hold_slope(x.at[i], exp_x.at[i], held.at[i]))

}  // namespace
