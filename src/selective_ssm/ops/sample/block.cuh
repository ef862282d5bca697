#pragma once
#include "device.cuh"

// What the threads of a block do together. A block has 1,024 of them, so that a lane can look at what each warp gives.

constexpr int WARPS = 32, THREADS = 32 * WARPS;

// Halves of sums of 64 bits, to which threads add atomically; one for each of them to look at. They are sums of whole
// numbers, so that it does not matter who adds first.
struct Bins {
    uint32 low[THREADS], high[THREADS];

    __device__ __forceinline__ void clear() { low[threadIdx.x] = high[threadIdx.x] = 0; }
    __device__ __forceinline__ void add(int bin, uint64 x) {
        const uint32 before = add_shared(&low[bin], uint32(x));
        const uint32 rest = uint32(x >> 32) + (before + uint32(x) < before);  // with what is carried
        if (rest) add_shared(&high[bin], rest);
    }
    __device__ __forceinline__ uint64 at(int bin) const { return uint64(high[bin]) << 32 | low[bin]; }
};

// Where a sum over the row reaches what is wanted, what is then left of that, and of a quota.
struct Place {
    uint64 wanted, quota;
    uint32 index;
};

struct Shared {
    uint64 parts[2][WARPS];  // what warps hand each other
    Place place;
    Bins bins;
};
__device__ __forceinline__ Shared& shared() { return *reinterpret_cast<Shared*>(shared_memory()); }

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

template <class T, class Join> __device__ __forceinline__ T reduce_warp(T x, Join join) {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x = join(x, shuffle_xor(x, mask));
    return x;
}

// Everything that the block's threads give, joined, for each of them.
template <class T, class Join> __device__ __forceinline__ T reduce_block(T x, Join join) {
    x = reduce_warp(x, join);
    T* parts = reinterpret_cast<T*>(shared().parts[0]);
    sync_block();  // whoever reads what lay there before has done so
    if (lane_index() == 0) parts[warp_index()] = x;
    sync_block();
    return reduce_warp(parts[lane_index()], join);
}

// The sum over this lane and those before it.
__device__ __forceinline__ uint64 scan_warp(uint64 x) {
#pragma unroll
    for (int places = 1; places < 32; places *= 2) {
        const uint64 lower = shuffle_up(x, places);
        if (lane_index() >= places) x += lower;
    }
    return x;
}

// The sum over this thread and those before it.
__device__ __forceinline__ uint64 scan_block(uint64 x) {
    x = scan_warp(x);
    uint64* parts = shared().parts[0];
    sync_block();
    if (lane_index() == 31) parts[warp_index()] = x;
    sync_block();
    const uint64 part = parts[lane_index()];
    return x + shuffle(scan_warp(part) - part, warp_index());
}

__device__ __forceinline__ uint64 add(uint64 a, uint64 b) { return a + b; }
