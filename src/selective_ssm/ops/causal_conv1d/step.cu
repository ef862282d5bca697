#include "device.cuh"

// One token of the causal depthwise convolution: a thread serves CHANNELS neighbouring channels of a row, and moves their
// state on in place.
//
// Macros: X_TYPE, WEIGHT_TYPE, BIAS_TYPE, STATE_TYPE; WIDTH; SILU, 0 or 1; THREADS; CHANNELS, 1, or 8 where all that a thread
// reads of one tensor is one piece of memory and aligned to vectors.

constexpr int HISTORY = WIDTH - 1;
constexpr int KEPT = HISTORY > 0 ? HISTORY : 1;

struct Parameters {
    X_TYPE* out;                // (B, D) contiguous
    STATE_TYPE* state;          // (slots, D, K - 1)
    const X_TYPE* x;            // (B, D), unit stride in D
    const WEIGHT_TYPE* weight;  // (D, K)
    const BIAS_TYPE* bias;      // (D,), or null
    const void* slots;          // (B,) of int32, or int64 where `wide`, negative for padding; null: row b has slot b
    // strides
    int64 x_row, state_slot, state_channel, state_entry, weight_channel, weight_tap, bias_channel, slots_row;
    int channels, slot_count, wide;
};

// The slot of a row; one past the last stays inside.
__device__ __forceinline__ int64 slot_of(const Parameters& p, int64 row) {
    if (p.slots == nullptr) return row;
    const int64 at = row * p.slots_row;
    const int64 slot = p.wide ? static_cast<const int64*>(p.slots)[at] : static_cast<const int*>(p.slots)[at];
    return slot < p.slot_count ? slot : p.slot_count - 1;
}

// COUNT numbers of each of the thread's channels, `apart` from each other where it has but one channel.
template <int COUNT, int SIZE, class T>
__device__ __forceinline__ void load(const T* from, int64 apart, float (&x)[CHANNELS][SIZE]) {
    if constexpr (CHANNELS == 1) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) x[0][k] = to_float(from[k * apart]);
    } else {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            float eight[8];
            load8(from + 8 * k, eight);
#pragma unroll
            for (int i = 0; i < 8; i++) x[(8 * k + i) / COUNT][(8 * k + i) % COUNT] = eight[i];
        }
    }
}
template <int COUNT, int SIZE, class T>
__device__ __forceinline__ void store(T* to, int64 apart, const float (&x)[CHANNELS][SIZE]) {
    if constexpr (CHANNELS == 1) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) to[k * apart] = from_float<T>(x[0][k]);
    } else {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
            float eight[8];
#pragma unroll
            for (int i = 0; i < 8; i++) eight[i] = x[(8 * k + i) / COUNT][(8 * k + i) % COUNT];
            store8(to + 8 * k, eight);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) causal_conv1d_step(const __grid_constant__ Parameters p) {
    constexpr int OF_BLOCK = THREADS * CHANNELS;
    const int columns = (p.channels + OF_BLOCK - 1) / OF_BLOCK;
    const int64 row = blockIdx.x / columns;
    const int channel = int(blockIdx.x) % columns * OF_BLOCK + int(threadIdx.x) * CHANNELS;
    if (channel >= p.channels) return;
    const int64 slot = slot_of(p, row);
    STATE_TYPE* state = p.state + slot * p.state_slot + channel * p.state_channel;
    float window[CHANNELS][WIDTH], weight[CHANNELS][WIDTH], before[CHANNELS][KEPT], sum[CHANNELS][1] = {};
    const WEIGHT_TYPE* own_weight = p.weight + channel * p.weight_channel;
    if (slot >= 0) load<HISTORY>(state, p.state_entry, before);  // no kernel just before this one writes to states
    prefetch(own_weight);
    let_next_begin();
    wait_for_previous();

    load<WIDTH>(own_weight, p.weight_tap, weight);
    if (p.bias != nullptr) load<1>(p.bias + channel * p.bias_channel, 0, sum);
    float x[CHANNELS][1];
    load<1>(p.x + row * p.x_row + channel, 0, x);
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
#pragma unroll
        for (int k = 0; k < HISTORY; k++) window[c][k] = before[c][k];
        window[c][HISTORY] = x[c][0];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) sum[c][0] += weight[c][k] * window[c][k];
        if (SILU) sum[c][0] *= sigmoid(sum[c][0]);
        if (slot < 0) sum[c][0] = 0.0f;
#pragma unroll
        for (int k = 0; k < HISTORY; k++) before[c][k] = window[c][k + 1];
    }
    if (slot >= 0) store<HISTORY>(state, p.state_entry, before);
    store<1>(p.out + row * p.channels + channel, 0, sum);
}
