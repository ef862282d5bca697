// One token of the selective scan, in place: a vector has states of a channel, whose sums over states are taken for 16
// channels at a time.
#include "scan.hpp"

namespace {

constexpr int64 WIDTH = 64;  // channels that a task serves

struct Step {
    Rows u, delta, z, B, C, out;  // `batch` is the stride of rows; z may be absent
    float* state;
    const float *rates, *D, *delta_bias;  // A (D, N); the others may be absent
    const int64* slots;  // (B,), negative for padding; absent where row b has slot b
    int64 slot_stride, channel_stride, state_stride;  // of the state
    int64 batch, channels, groups, states, slot_count, softplus, zoh, B_fixed, C_fixed, threads;

    int64 map_at(const Rows& map, bool fixed, int64 row, int64 channel) const {
        return fixed ? channel * states : row * map.batch + channel / (channels / groups) * map.group;
    }
};

// Advances the states of a channel; their products with C, added up in 16 lanes.
template <bool SIDE_BY_SIDE>
INLINE Floats advance(const Step& call, float* state, int64 row, int64 channel, float step, float drive) {
    const float* rates = call.rates + channel * call.states;
    const int64 B = call.map_at(call.B, call.B_fixed, row, channel);
    const int64 C = call.map_at(call.C, call.C_fixed, row, channel);
    Floats y = zeros();
    for (int64 n = 0; n < call.states; n += LANES) {
        const int count = static_cast<int>(call.states - n);
        float* here = state + n * call.state_stride;
        Floats h = SIDE_BY_SIDE ? load(here, count) : gather(here, call.state_stride, count);
        const Floats exponent = splat(step) * load(rates + n, count), decay = decay_of(exponent);
        Floats input = splat(drive) * load(call.B, B + n, count);
        if (call.zoh) input = input * hold(exponent, decay);
        h = fma_once(decay, h, input);
        if (SIDE_BY_SIDE) {
            store(here, h, count);
        } else {
            scatter(here, call.state_stride, h, count);
        }
        const Floats map = load(call.C, C + n, count);
        if (count >= LANES) {
            y = fma(h, map, y);
            continue;
        }
        float some[LANES] = {};  // without the lanes that are no states: 0 times infinity is not 0
        store(some, h * map, count);
        y = y + load(some);
    }
    return y;
}

// 16 channels of a row; its state is there unless it is padding.
void run(const Step& call, int64 row, int64 channel, float* state) {
    const int lanes = static_cast<int>(call.channels - channel);
    const int64 out = row * call.out.batch + channel;
    if (state == nullptr) return store(call.out, out, zeros(), lanes);
    const Floats u = load(call.u, row * call.u.batch + channel, lanes);
    Floats step = load(call.delta, row * call.delta.batch + channel, lanes);
    if (call.delta_bias != nullptr) step = step + load(call.delta_bias + channel, lanes);
    if (call.softplus) step = softplus(step);
    float steps[LANES], drives[LANES], products[LANES * LANES] = {};
    store(steps, step);
    store(drives, step * u);
    for (int i = 0; i < LANES && i < lanes; i++) {
        float* here = state + (channel + i) * call.channel_stride;
        const Floats y = call.state_stride == 1 ? advance<true>(call, here, row, channel + i, steps[i], drives[i])
                                                : advance<false>(call, here, row, channel + i, steps[i], drives[i]);
        store(products + i * LANES, y);
    }
    Floats y = sums(products);
    if (call.D != nullptr) y = fma(load(call.D + channel, lanes), u, y);
    if (call.z.data != nullptr) {
        const Floats z = load(call.z, row * call.z.batch + channel, lanes);
        y = y * silu(z);
    }
    store(call.out, out, y, lanes);
}

}  // namespace

KERNEL(selective_scan_step)(const void* parameters) {
    const Step& call = *static_cast<const Step*>(parameters);
    const int64 blocks = (call.channels + WIDTH - 1) / WIDTH;
    const auto task = [&](int64 index, int) {
        const int64 row = index / blocks, first = index % blocks * WIDTH;
        int64 slot = call.slots == nullptr ? row : call.slots[row];
        if (slot >= call.slot_count) slot = call.slot_count - 1;
        float* state = slot < 0 ? nullptr : call.state + slot * call.slot_stride;
        for (int64 c = first; c < first + WIDTH && c < call.channels; c += LANES) run(call, row, c, state);
    };
    parallel_for(call.batch * blocks, static_cast<int>(call.threads), task);
}
