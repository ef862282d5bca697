#pragma once
#include "block.cuh"

// A row of logits and their weights, an octet a thread at a time.
//
// A weight is a whole number with 24 significant bits at most, so fp32 holds it exactly, and its bits are in order as it
// is. Logits that are no numbers count as impossible.

constexpr float UNITS = 0x1p34f;  // of weight, that the most likely token has

__device__ __forceinline__ float impossible() { return __uint_as_float(0xff800000u); }  // -infinity

struct Row {
    const NUMBER* logits;
    const uint8* seen;
    float* weights;
    int vocabulary;
    float temperature, penalty, best;  // the largest logit, penalised
};

// The octets of ids that a warp has: neighbours, so that those of warps, of steps and of lanes follow each other as ids do.
struct Octets {
    int begin, end;
    __device__ __forceinline__ explicit Octets(int vocabulary) {
        const int all = (vocabulary + 7) / 8, share = (all + THREADS - 1) / THREADS * 32;
        begin = warp_index() * share;
        end = min(begin + share, all);
    }
};

// Calls f(octet) for each that this lane has.
template <class F> __device__ __forceinline__ void for_octets(const Row& row, F f) {
    const Octets octets(row.vocabulary);
    for (int octet = octets.begin + lane_index(); octet < octets.end; octet += 32) f(octet);
}

// As many of an octet's logits as there are, one by one; beyond the vocabulary what is impossible.
__device__ __forceinline__ void load_each(const Row& row, int octet, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int id = 8 * octet + i;
        x[i] = id < row.vocabulary ? to_float(row.logits[id]) : impossible();
    }
}

// The product is rounded by itself: joined with what comes after it, it would be rounded otherwise here than there.
__device__ __forceinline__ void penalise(const Row& row, int octet, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int id = 8 * octet + i;
        if (id < row.vocabulary && row.seen[id]) x[i] = x[i] > 0 ? x[i] / row.penalty : __fmul_rn(x[i], row.penalty);
    }
}

template <bool PENALISES> __device__ __forceinline__ void load_logits(const Row& row, int octet, float (&x)[8]) {
    if (ALIGNED && 8 * octet + 8 <= row.vocabulary) {
        load8(row.logits + 8 * octet, x);
    } else {
        load_each(row, octet, x);
    }
    if constexpr (PENALISES) penalise(row, octet, x);
}

// As `for_octets`, with f(octet, its logits), for the first time that the row is read: it comes from afar then, and much of
// it should be on its way at once.
template <bool PENALISES, class F> __device__ __forceinline__ void for_far_logits(const Row& row, F f) {
    constexpr int VECTORS = 8 * sizeof(NUMBER) / sizeof(Vector), AHEAD = 4 / VECTORS;
    const Octets octets(row.vocabulary);
    const int whole = ALIGNED ? min(octets.end, row.vocabulary / 8) : 0;
    for (int first = octets.begin; first < octets.end; first += 32 * AHEAD) {
        Vector v[AHEAD][VECTORS];
#pragma unroll
        for (int i = 0; ALIGNED && i < AHEAD; i++) {
            const int octet = first + 32 * i + lane_index();
            const Vector* from = reinterpret_cast<const Vector*>(row.logits) + VECTORS * octet;
#pragma unroll
            for (int j = 0; j < VECTORS; j++) v[i][j] = load_if(octet < whole, from + j);
        }
        sync_warp();  // the compiler would put off most loads until the first has been used
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            const int octet = first + 32 * i + lane_index();
            float x[8];
            if (octet < whole) {
                load8(reinterpret_cast<const NUMBER*>(v[i]), x);
            } else if (octet < octets.end) {
                load_each(row, octet, x);
            } else {
                break;
            }
            if constexpr (PENALISES) penalise(row, octet, x);
            f(octet, x);
        }
    }
}

// The largest logit and, of the ids that have it, the lowest: packed, so that the larger number is the better one.
template <bool PENALISES> __device__ __forceinline__ uint64 most_likely(const Row& row) {
    float best = impossible();
    int id = 0;
    for_far_logits<PENALISES>(row, [&](int octet, const float (&x)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (x[i] > best) best = x[i], id = 8 * octet + i;
        }
    });
    const uint32 bits = __float_as_uint(best + 0.0f);  // a zero without its sign
    const uint32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return reduce_block(uint64(ordered) << 32 | ~uint32(id), [](uint64 a, uint64 b) { return max(a, b); });
}
__device__ __forceinline__ int id_of(uint64 packed) { return int(~uint32(packed)); }
__device__ __forceinline__ float logit_of(uint64 packed) {
    const uint32 ordered = uint32(packed >> 32);
    return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// log Σ exp(x − top).
__device__ __forceinline__ float log_sum(const Row& row, float top) {
    float sum = 0;
    for_octets(row, [&](int octet) {
        float x[8];
        load_logits<false>(row, octet, x);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += expf(x[i] - top);
    });
    return logf(reduce_block(sum, [](float a, float b) { return a + b; }));
}

__device__ __forceinline__ void make_weights(const Row& row, int octet, float (&w)[8]) {
    load_logits<PENALTY>(row, octet, w);
#pragma unroll
    for (int i = 0; i < 8; i++) w[i] = fmaxf(truncf(expf((w[i] - row.best) / row.temperature) * UNITS), 0.0f);
}

__device__ __forceinline__ void load_weights(const Row& row, int octet, float (&w)[8]) {
    if constexpr (RANKED) {
        load8(row.weights + 8 * octet, w);  // this thread's own
    } else {
        make_weights(row, octet, w);
    }
}
