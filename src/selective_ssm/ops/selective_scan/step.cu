// One token of the selective scan. A channel of a row is served by LANES neighbouring lanes of a warp, each of which
// reads and writes WIDTH neighbouring states at a time.
//
// Macros: U, DELTA, Z, B_MAP, C_MAP (number types); N (states); LANES; WIDTH, 1 or 4 (in memory aligned to four
// numbers); THREADS; and 0 or 1: HAS_Z, SOFTPLUS, ZOH.

#include "maths.cuh"

constexpr int CHANNELS = THREADS / LANES;  // of a block
constexpr int READS = (N + LANES * WIDTH - 1) / (LANES * WIDTH);  // of a lane from each map

struct Parameters {
    U* out;          // (B, D) contiguous
    float* state;    // (slots, D, N)
    const U* u;      // (B, D), as delta and z, unit stride in D
    const DELTA* delta;
    const Z* z;
    const float* A;  // (D, N) contiguous
    const B_MAP* B;  // as C one (N,) for each row and each group of `B_share` neighbouring channels
    const C_MAP* C;
    const float* D;           // (D,) contiguous, or null
    const float* delta_bias;  // (D,) contiguous, or null
    const void* slots;        // (B,) of int32, or int64 where `wide`, negative for padding; null for slot b of row b
    // strides
    int64 u_row, delta_row, z_row, state_slot, state_channel, state_entry, B_row, B_group, C_row, C_group, slots_row;
    int batch, channels, B_share, C_share, slot_count, wide;
};

template <class T> __device__ __forceinline__ void read(const T* from, float (&x)[WIDTH]) {
    if constexpr (WIDTH == 1) {
        x[0] = to_float(*from);
    } else {
        struct alignas(WIDTH * sizeof(T)) Words {
            uint32 word[WIDTH * sizeof(T) / 4];
        };
        const Words words = *reinterpret_cast<const Words*>(from);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            if constexpr (sizeof(T) == 4) x[i] = __uint_as_float(words.word[i]);
            else x[i] = i % 2 ? high_half<T>(words.word[i / 2]) : low_half<T>(words.word[i / 2]);
        }
    }
}

__device__ __forceinline__ void write(float* to, const float (&x)[WIDTH]) {
    if constexpr (WIDTH == 1) {
        *to = x[0];
    } else {
        Vector words;
#pragma unroll
        for (int i = 0; i < WIDTH; i++) words.word[i] = __float_as_uint(x[i]);
        *reinterpret_cast<Vector*>(to) = words;
    }
}

// The slot of a row; one past the last stays inside.
__device__ __forceinline__ int64 slot_of(const Parameters& p, int64 row) {
    if (p.slots == nullptr) return row;
    const int64 at = row * p.slots_row;
    const int64 slot = p.wide ? static_cast<const int64*>(p.slots)[at] : static_cast<const int*>(p.slots)[at];
    return slot < p.slot_count ? slot : p.slot_count - 1;
}

// The states that a lane serves, or whatever belongs to them.
struct Share {
    float x[READS][WIDTH];

    template <class T> __device__ __forceinline__ void load(const T* from, int lane, int64 entry = 1) {
#pragma unroll
        for (int i = 0; i < READS; i++) {
            const int n = (i * LANES + lane) * WIDTH;
            if (n < N) read(from + n * entry, x[i]);
        }
    }
    __device__ __forceinline__ void store(float* to, int lane, int64 entry) const {
#pragma unroll
        for (int i = 0; i < READS; i++) {
            const int n = (i * LANES + lane) * WIDTH;
            if (n < N) write(to + n * entry, x[i]);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_step(const __grid_constant__ Parameters p) {
    const int columns = (p.channels + CHANNELS - 1) / CHANNELS;
    const int lane = int(threadIdx.x) % LANES;
    const int wanted = int(blockIdx.x) % columns * CHANNELS + int(threadIdx.x) / LANES;
    const bool is_inside = wanted < p.channels;
    const int channel = min(wanted, p.channels - 1);
    const int64 row = int(blockIdx.x) / columns, slot = slot_of(p, row);
    const bool has_state = slot >= 0 && is_inside;
    float* state = p.state + slot * p.state_slot + channel * p.state_channel;
    const float* rates = p.A + int64(channel) * N;
    Share h = {}, A = {}, B = {}, C = {};
    if (has_state) h.load(state, lane, p.state_entry);  // no kernel just before this one writes to states
    for (int n = lane * WIDTH; n < N; n += LANES * WIDTH) prefetch(rates + n);
    let_next_begin();
    wait_for_previous();

    A.load(rates, lane);
    B.load(p.B + row * p.B_row + channel / p.B_share * p.B_group, lane);
    C.load(p.C + row * p.C_row + channel / p.C_share * p.C_group, lane);
    const float u = to_float(p.u[row * p.u_row + channel]);
    const float z = HAS_Z ? to_float(p.z[row * p.z_row + channel]) : 0.0f;
    const float bias = p.delta_bias == nullptr ? 0.0f : p.delta_bias[channel];
    float dt = to_float(p.delta[row * p.delta_row + channel]) + bias;
    if (SOFTPLUS) dt = softplus(dt);
    float y = 0;
#pragma unroll
    for (int i = 0; i < READS; i++) {
        if ((i * LANES + lane) * WIDTH >= N) continue;  // of infinities what is no state would make NaN
#pragma unroll
        for (int j = 0; j < WIDTH; j++) {
            const float x = exponent_over(dt, A.x[i][j] * LOG2_E), decay = exp2_fast(x);
            const float gain = ZOH ? hold(x, decay, dt, reciprocal_fast(A.x[i][j])) : dt;
            h.x[i][j] = decay * h.x[i][j] + gain * u * B.x[i][j];
            y += C.x[i][j] * h.x[i][j];
        }
    }
    if (has_state) h.store(state, lane, p.state_entry);
#pragma unroll
    for (int mask = LANES / 2; mask >= 1; mask /= 2) y += shuffle_xor(y, mask);
    if (p.D != nullptr) y += p.D[channel] * u;
    if (HAS_Z) y *= z * sigmoid(z);
    if (lane == 0 && is_inside) p.out[row * p.channels + channel] = from_float<U>(has_state ? y : 0.0f);
}
