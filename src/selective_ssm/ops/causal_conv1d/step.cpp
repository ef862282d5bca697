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

constexpr int64 BLOCK = 256;  // channels of a task

INLINE void put(float* to, float x) { *to = x; }
INLINE void put(bf16* to, float x) { store(to, splat(x), 1); }

// One channel: the sum over its state and its input, while the state's entries move by one. Number by number: in memory a
// channel's few entries lie side by side, and to turn them around costs more than the sum.
template <int WIDTH, class T, class S>
INLINE float advance(const Step& p, S* state, const float* weight, const T* x, float sum) {
    const int64 history = (WIDTH > 0 ? WIDTH : p.width) - 1;
    const float now = to_float(*x);
    for (int64 k = 0; k < history; k++) {
        S* entry = state + k * p.state_entry;
        sum += weight[k] * to_float(*entry);
        if (k + 1 < history) {
            *entry = entry[p.state_entry];
        } else {
            put(entry, now);
        }
    }
    return sum + weight[history] * now;
}

// The channels of a row from `first` to before `end`.
template <int WIDTH, class T, class S>
void step_channels(const Step& p, int64 b, int64 first, int64 end) {
    T* out = static_cast<T*>(p.out) + b * p.channels;
    const T* x = static_cast<const T*>(p.x) + b * p.x_row;
    int64 slot = p.slots == nullptr ? b : p.slots[b];
    if (slot >= p.slot_count) slot = p.slot_count - 1;
    S* state = static_cast<S*>(p.state) + (slot < 0 ? 0 : slot) * p.state_slot;
    for (int64 c = first; c < end; c += LANES) {
        const int count = static_cast<int>(end - c < LANES ? end - c : LANES);
        float sums[LANES] = {};
        for (int64 i = c; slot >= 0 && i < c + count; i++) {
            const float bias = p.bias == nullptr ? 0 : p.bias[i];
            sums[i - c] = advance<WIDTH>(p, state + i * p.state_channel, p.weight + i * p.width, x + i, bias);
        }
        const Floats sum = load(sums);
        store(out + c, p.silu ? silu(sum) : sum, count);
    }
}

template <int WIDTH, class T, class S>
void step(const Step& p) {
    const int64 blocks = (p.channels + BLOCK - 1) / BLOCK;
    parallel_for(p.batch * blocks, p.threads, [&](int64 task, int) {
        const int64 first = task % blocks * BLOCK;
        const int64 end = first + BLOCK < p.channels ? first + BLOCK : p.channels;
        step_channels<WIDTH, T, S>(p, task / blocks, first, end);
    });
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
