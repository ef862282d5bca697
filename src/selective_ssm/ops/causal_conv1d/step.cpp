// One token of the causal depthwise convolution on a CPU: moves each row's state on in place.
#include "maths.hpp"
#include "parallel.hpp"

namespace {

// As in cpu.py; strides in numbers.
struct Step {
    void* out;              // (B, D)
    void* state;            // (slots, D, H)
    const void* x;          // (B, D), unit stride in D
    const float* weight;    // (D, K)
    const float* bias;      // (D,), or null
    const int64* slots;     // (B,), negative for padding; null: row b has slot b
    int64 x_row, state_slot, state_channel, state_entry;
    int64 batch, slot_count, channels, width;
    int number, state_number, threads, silu;
};

// What weight_k x state_k adds up to at some channels, while the state's entries move by one.
template <int WIDTH, class S>
INLINE Floats advance(const Step& p, S* state, const float* weight, Floats x, Floats sum, int count) {
    const int64 history = (WIDTH > 0 ? WIDTH : p.width) - 1;
    for (int64 k = 0; k < history; k++) {
        S* entry = state + k * p.state_entry;
        sum = fma(gather(weight + k, p.width, count), gather(entry, p.state_channel, count), sum);
        const Floats next = k + 1 < history ? gather(entry + p.state_entry, p.state_channel, count) : x;
        scatter(entry, p.state_channel, next, count);
    }
    return fma(gather(weight + history, p.width, count), x, sum);
}

template <int WIDTH, class T, class S>
void step_row(const Step& p, int64 b) {
    T* out = static_cast<T*>(p.out) + b * p.channels;
    const T* x = static_cast<const T*>(p.x) + b * p.x_row;
    int64 slot = p.slots == nullptr ? b : p.slots[b];
    if (slot >= p.slot_count) slot = p.slot_count - 1;
    for (int64 c = 0; c < p.channels; c += LANES) {
        const int count = static_cast<int>(p.channels - c < LANES ? p.channels - c : LANES);
        Floats sum = zeros();
        if (slot >= 0) {
            S* state = static_cast<S*>(p.state) + slot * p.state_slot + c * p.state_channel;
            if (p.bias != nullptr) sum = load(p.bias + c, count);
            sum = advance<WIDTH>(p, state, p.weight + c * p.width, load(x + c, count), sum, count);
            if (p.silu) sum = sum * sigmoid(sum);
        }
        store(out + c, sum, count);
    }
}

template <int WIDTH, class T, class S>
void step(const Step& p) {
    parallel_for(p.batch, p.threads, [&](int64 b, int) { step_row<WIDTH, T, S>(p, b); });
}

template <int WIDTH>
void step(const Step& p) {
    if (p.number == FP32) return p.state_number == FP32 ? step<WIDTH, float, float>(p) : step<WIDTH, float, bf16>(p);
    return p.state_number == FP32 ? step<WIDTH, bf16, float>(p) : step<WIDTH, bf16, bf16>(p);
}

}  // namespace

KERNEL(causal_conv1d_step)(const void* parameters) {
    const Step& p = *static_cast<const Step*>(parameters);
    return p.width == 4 ? step<4>(p) : step<0>(p);
}
