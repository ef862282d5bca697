#pragma once
#include "row.cuh"

// Cuts by top-k and top-p: what has least weight of all that stays, found by its digits.

constexpr int SHARE_BITS = 24;       // a share is a number of 2^-24
constexpr uint32 ONE = 0x3f800000u;  // the bits of the smallest weight above 0
constexpr int DIGIT = 10;            // bits, of which three hold what the bits of weights can be above those of ONE
constexpr uint64 EVERY = ~0ull;
static_assert(1 << DIGIT == THREADS, "a bin a thread");

// That share of a total, rounded up.
__device__ __forceinline__ uint64 part(uint64 total, uint64 share) {
    const uint64 mask = (1u << SHARE_BITS) - 1;
    return (total >> SHARE_BITS) * share + (((total & mask) * share + mask) >> SHARE_BITS);
}

// What stays: weights above a bar, and of those at it the first so many, in order of ids.
struct Cut {
    float bar;
    uint64 quota;
};

__device__ __forceinline__ uint64 weight_left(const Row& row, const Cut& cut) {
    uint64 sum = 0;
    for_octets(row, [&](int octet) {
        float w[8];
        load_weights(row, octet, w);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += w[i] > cut.bar ? uint64(w[i]) : 0;
    });
    return reduce_block(sum, add) + cut.quota * uint64(cut.bar);
}

// The largest weights that together have the mass wanted, those below `least` apart: as a bar, and as the mass that is left
// to be found at it. Found digit by digit, from the highest: each weight's mass goes to the bin of its digit. If there is
// not so much, all stay.
template <class Mass>
__device__ __forceinline__ Cut largest_with(const Row& row, float least, uint64 wanted, Mass mass) {
    Bins& bins = shared().bins;
    Place& place = shared().place;
    uint32 bar = 0;
#pragma unroll 1
    for (int shift = 2 * DIGIT; shift >= 0; shift -= DIGIT) {
        bins.clear();
        if (threadIdx.x == 0) place.wanted = 0;
        sync_block();
        for_octets(row, [&](int octet) {
            float w[8];
            load_weights(row, octet, w);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const uint32 digits = (__float_as_uint(w[i]) - ONE) >> shift;
                if (w[i] >= least && digits >> DIGIT == bar) bins.add(digits % THREADS, mass(w[i]));
            }
        });
        sync_block();
        const uint32 digit = THREADS - 1 - threadIdx.x;
        const uint64 here = bins.at(digit), reached = scan_block(here);
        if (reached - here < wanted && wanted <= reached) place = {wanted - (reached - here), 0, digit};
        sync_block();
        wanted = place.wanted;
        if (wanted == 0) return {0.0f, 0};
        bar = bar << DIGIT | place.index;
        sync_block();
    }
    return {__uint_as_float(bar + ONE), wanted};
}

// The k best, and of these the fewest that have a share of the k's weight.
__device__ __forceinline__ Cut best_of(const Row& row, int64 k, uint64 share) {
    Cut cut = {0.0f, 0};
    if (k < row.vocabulary) cut = largest_with(row, 1.0f, k, [](float) { return uint64(1); });
    if (share >> SHARE_BITS == 0) {
        const uint64 wanted = part(weight_left(row, cut), share);
        cut = largest_with(row, fmaxf(cut.bar, 1.0f), wanted, [](float w) { return uint64(w); });
        const uint64 each = uint64(fmaxf(cut.bar, 1.0f));
        cut.quota = (cut.quota + each - 1) / each;
    }
    return cut;
}
