// The vectors that every CPU kernel is written in: 16 fp32 numbers, whatever the machine has registers for.
//
// A kernel's source is compiled once for each instruction set (CMakeLists.txt), with VECTORS defined as its name: avx512,
// avx2 or baseline. The objects end up in one library, and two objects must not share an inline function: the linker keeps
// one of them, maybe the one with instructions that this machine does not know. So everything here lies in an anonymous
// namespace, and kernels use no templates of the standard library that are more than types. No -ffast-math, and no
// contraction of a * b + c by the compiler: what is fused says fma.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define CALLED __attribute__((noinline, unused))  // not written out: less to compile, where a call costs little

#define SELECTIVE_SSM_NAME_(name, vectors) selective_ssm_##name##_##vectors
#define SELECTIVE_SSM_NAME(name, vectors) SELECTIVE_SSM_NAME_(name, vectors)
// What native.py finds under this name, for the instruction set of this object.
#define KERNEL(name) extern "C" __attribute__((visibility("default"))) void SELECTIVE_SSM_NAME(name, VECTORS)

namespace {

using int64 = std::int64_t;
using uint16 = std::uint16_t;

// A brain float: the upper half of an fp32 number.
struct bf16 {
    uint16 bits;
};

// As native.py numbers them.
enum Number : int { FP32 = 0, BF16 = 1 };

INLINE int64 least(int64 a, int64 b) { return a < b ? a : b; }
INLINE int64 most(int64 a, int64 b) { return a > b ? a : b; }

constexpr int LANES = 16;  // numbers in a vector

#if defined(__AVX512F__)
constexpr int PART = 16;  // numbers in a register
#elif defined(__AVX2__)
constexpr int PART = 8;
#else
constexpr int PART = 4;
#endif
constexpr int PARTS = LANES / PART;

typedef float Part __attribute__((vector_size(4 * PART)));
typedef std::int32_t PartInts __attribute__((vector_size(4 * PART)));
typedef std::uint32_t PartBits __attribute__((vector_size(4 * PART)));
typedef uint16 PartHalves __attribute__((vector_size(2 * PART)));

struct Floats {
    Part at[PARTS];
};

// One function on each register of a vector; written out, so that a vector never lies in memory.
template <class Result, class F>
INLINE Result each(F f) {
    if constexpr (PARTS == 1) {
        return Result{{f(0)}};
    } else if constexpr (PARTS == 2) {
        return Result{{f(0), f(1)}};
    } else {
        return Result{{f(0), f(1), f(2), f(3)}};
    }
}

// The body of a function whose result is, in register i, this expression.
#define EACH(Result, expression) \
    { return each<Result>([&](int i) __attribute__((always_inline)) { return expression; }); }

INLINE Part splat_part(float x) { return x - Part{}; }
INLINE Floats splat(float x) {
    return each<Floats>([&](int) { return splat_part(x); });
}
INLINE Floats zeros() { return Floats{}; }

INLINE Part fma(Part a, Part b, Part c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}

// The same, rounded once on every machine: for what is carried over thousands of tokens, where two roundings to the same
// side add up.
INLINE Part fma_once(Part a, Part b, Part c) {
#if defined(__AVX2__) || defined(__aarch64__)
    return fma(a, b, c);
#else
    Part sum;
    for (int i = 0; i < PART; i++) sum[i] = static_cast<float>(static_cast<double>(a[i]) * b[i] + c[i]);
    return sum;
#endif
}

INLINE Floats operator+(Floats a, Floats b) EACH(Floats, a.at[i] + b.at[i])
INLINE Floats operator-(Floats a, Floats b) EACH(Floats, a.at[i] - b.at[i])
INLINE Floats operator*(Floats a, Floats b) EACH(Floats, a.at[i] * b.at[i])
INLINE Floats operator-(Floats a) EACH(Floats, -a.at[i])

// a b + c; rounded once where the machine can.
INLINE Floats fma(Floats a, Floats b, Floats c) EACH(Floats, fma(a.at[i], b.at[i], c.at[i]))
INLINE Floats fma_once(Floats a, Floats b, Floats c) EACH(Floats, fma_once(a.at[i], b.at[i], c.at[i]))

// The first numbers of a vector, and zeros.
INLINE Floats first_lanes(Floats x, int count) {
    float lanes[LANES];
    __builtin_memcpy(lanes, &x, sizeof x);
    for (int i = 0; i < LANES; i++) lanes[i] = i < count ? lanes[i] : 0;
    __builtin_memcpy(&x, lanes, sizeof x);
    return x;
}

// The sum of a vector's numbers, always in the same order.
INLINE float sum(Floats x) {
    float lanes[LANES];
    __builtin_memcpy(lanes, &x, sizeof x);
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    }
    return lanes[0];
}

INLINE float to_float(float x) { return x; }
INLINE float to_float(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, sizeof wide);
    return wide;
}

INLINE Part load_part(const float* from) {
    Part x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}
// Written as instructions where GCC would go through memory.
INLINE PartBits widened(PartHalves x) {
#if defined(__AVX512F__)
    return reinterpret_cast<PartBits>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(x)));
#elif defined(__AVX2__)
    return reinterpret_cast<PartBits>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
#else
    return __builtin_convertvector(x, PartBits);
#endif
}
INLINE PartHalves narrowed(PartBits x) {
#if defined(__AVX512F__)
    return reinterpret_cast<PartHalves>(_mm512_maskz_cvtepi32_epi16(0xffff, reinterpret_cast<__m512i>(x)));
#elif defined(__AVX2__)
    const __m256i whole = reinterpret_cast<__m256i>(x);
    return reinterpret_cast<PartHalves>(_mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1)));
#else
    return __builtin_convertvector(x, PartHalves);
#endif
}
INLINE Part load_part(const bf16* from) {
    PartHalves halves;
    __builtin_memcpy(&halves, from, sizeof halves);
    return reinterpret_cast<Part>(widened(halves) << 16);
}

INLINE void store_part(float* to, Part x) { __builtin_memcpy(to, &x, sizeof x); }
// To nearest, ties to even; a NaN stays one, also where its low half held all its bits.
INLINE void store_part(bf16* to, Part x) {
    const PartBits bits = reinterpret_cast<PartBits>(x);
    const PartBits rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const PartBits wide = x == x ? rounded : bits | 0x400000;
    const PartHalves halves = narrowed(wide >> 16);
    __builtin_memcpy(to, &halves, sizeof halves);
}

// 16 numbers that lie side by side, at any address.
template <class T>
INLINE Floats load(const T* from) EACH(Floats, load_part(from + i * PART))
template <class T>
INLINE void store(T* to, Floats x) {
    for (int i = 0; i < PARTS; i++) store_part(to + i * PART, x.at[i]);
}

// The end of a row: seldom met, and most of the code if it were written out.
template <class T>
CALLED Floats load_some(const T* from, int count) {
    T lanes[LANES] = {};
    for (int i = 0; i < count; i++) lanes[i] = from[i];
    return load(lanes);
}
template <class T>
CALLED void store_some(T* to, Floats x, int count) {
    T lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < count; i++) to[i] = lanes[i];
}

// The first `count` of 16 numbers, zeros after them; nothing beside them is read.
template <class T>
INLINE Floats load(const T* from, int count) {
    return count >= LANES ? load(from) : load_some(from, count);
}
// The first `count` of 16 numbers; nothing beside them is written.
template <class T>
INLINE void store(T* to, Floats x, int count) {
    if (count >= LANES) {
        store(to, x);
    } else {
        store_some(to, x, count);
    }
}

// The first `count` of numbers that lie `stride` apart, zeros after them.
template <class T>
CALLED Floats gather(const T* from, int64 stride, int count) {
    T lanes[LANES] = {};
    for (int i = 0; i < count && i < LANES; i++) lanes[i] = from[i * stride];
    return load(lanes);
}
template <class T>
CALLED void scatter(T* to, int64 stride, Floats x, int count) {
    T lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < count && i < LANES; i++) to[i * stride] = lanes[i];
}

// The sums of neighbours in two registers laid end to end.
INLINE Part pairwise(Part a, Part b) {
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(...) __builtin_shuffle(a, b, PartInts{__VA_ARGS__})
#endif
#if defined(__AVX512F__)
    return SHUFFLE(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
    return SHUFFLE(0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(1, 3, 5, 7, 9, 11, 13, 15);
#else
    return SHUFFLE(0, 2, 4, 6) + SHUFFLE(1, 3, 5, 7);
#endif
#undef SHUFFLE
}

template <int COUNT>
INLINE Part sums_of(const Part* x) {
    if constexpr (COUNT == 1) {
        return x[0];
    } else {
        Part half[COUNT / 2];
        for (int i = 0; i < COUNT / 2; i++) half[i] = pairwise(x[2 * i], x[2 * i + 1]);
        return sums_of<COUNT / 2>(half);
    }
}

// Of each of 16 vectors that lie side by side the sum of its numbers.
INLINE Floats sums(const float* from) {
    Floats result;
    for (int i = 0; i < PARTS; i++) {
        Part x[PART];
        for (int j = 0; j < PART; j++) {
            const float* vector = from + (i * PART + j) * LANES;
            x[j] = load_part(vector);
            for (int k = 1; k < PARTS; k++) x[j] = x[j] + load_part(vector + k * PART);
        }
        result.at[i] = sums_of<PART>(x);
    }
    return result;
}

}  // namespace
