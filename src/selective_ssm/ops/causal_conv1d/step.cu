#include "device.cuh"

// One token of the causal depthwise convolution: a thread serves one channel of a row, and moves its state on in place.
//
// Macros: X_TYPE, WEIGHT_TYPE, BIAS_TYPE, STATE_TYPE; WIDTH; SILU, 0 or 1; THREADS.

constexpr int HISTORY = WIDTH - 1;

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

extern "C" __global__ void __launch_bounds__(THREADS) causal_conv1d_step(const __grid_constant__ Parameters p) {
    const int columns = (p.channels + THREADS - 1) / THREADS;
    const int64 row = blockIdx.x / columns;
    const int channel = int(blockIdx.x) % columns * THREADS + int(threadIdx.x);
    if (channel >= p.channels) return;
    const WEIGHT_TYPE* weight = p.weight + channel * p.weight_channel;
    prefetch(weight);
    if (p.bias != nullptr) prefetch(p.bias + channel * p.bias_channel);
    let_next_begin();
    wait_for_previous();
    X_TYPE* out = p.out + row * p.channels + channel;
    const int64 slot = slot_of(p, row);
    if (slot < 0) {
        *out = from_float<X_TYPE>(0);
        return;
    }
    STATE_TYPE* state = p.state + slot * p.state_slot + channel * p.state_channel;
    float window[WIDTH];
#pragma unroll
    for (int k = 0; k < HISTORY; k++) window[k] = to_float(state[k * p.state_entry]);
    window[HISTORY] = to_float(p.x[row * p.x_row + channel]);
    float sum = p.bias == nullptr ? 0 : to_float(p.bias[channel * p.bias_channel]);
#pragma unroll
    for (int k = 0; k < WIDTH; k++) sum += to_float(weight[k * p.weight_tap]) * window[k];
    if (SILU) sum *= sigmoid(sum);
#pragma unroll
    for (int k = 0; k < HISTORY; k++) state[k * p.state_entry] = from_float<STATE_TYPE>(window[k + 1]);
    *out = from_float<X_TYPE>(sum);
}
