#include "device.cuh"

// RWKV's average over the past, forward and backward. A thread has one channel of one sequence and walks along it, with the
// sums in registers; neighbouring threads have neighbouring channels. It goes STEPS tokens at a time: those of the next
// stretch are sent for before those of this one are worked on. Of each stretch but the first the state before it is kept;
// backward, stretches are visited from the last, and each is first walked forward, which notes the sums before its tokens.
// The maths is in op.py.
//
// Macros: NUMBER (the format of k, v, y and their gradients), WIDTH (D), STEPS, THREADS (of a block).

constexpr int COLUMNS = (WIDTH + THREADS - 1) / THREADS;  // blocks that serve a sequence

__device__ __forceinline__ float exponential(float x) { return exp2_fast(LOG2_E * x); }

// e^{a - m} and e^{b - m} with m the larger of both.
struct Shares {
    float of_a, of_b;
    bool b_is_larger;
    __device__ __forceinline__ Shares(float a, float b) {
        const float smaller = exponential(-fabsf(b - a));
        b_is_larger = b > a;
        of_a = b_is_larger ? smaller : 1.0f;
        of_b = b_is_larger ? 1.0f : smaller;
    }
};

// Two sums in units of e^top. The top falls with each token: it is made from that of `age` tokens ago, so that it is rounded
// once, however long it falls.
struct Sums {
    float start, age, values, weights;

    __device__ __forceinline__ float top(float fade) const { return fmaf(-age, fade, start); }

    // One token later, with something of weight e^logit added.
    __device__ __forceinline__ void go_on(float fade, float logit, float value, float weight) {
        age += 1.0f;
        const Shares share(top(fade), logit);
        values = share.of_a * values + share.of_b * value;
        weights = share.of_a * weights + share.of_b * weight;
        start = share.b_is_larger ? logit : start;
        age = share.b_is_larger ? 0.0f : age;
    }
};

struct Inputs {
    const NUMBER *k, *v;        // (B, L, D)
    const float *fade, *bonus;  // (D)
    const float* state;         // (B or S, 3, D)
    const void* offsets;        // (S + 1) of int32, or int64 where `wide`; null where nothing is packed
    float* kept;                // (B, (L - 1) / STEPS, 3, D); null where nothing is to be kept
    int64 length;
    int wide;
};

// What a thread works on.
struct Place {
    int channel;
    int64 sequence;  // of all rows
    int64 first;     // of its numbers in a (B, L, D) tensor
    int64 kept;      // where the state before token STEPS would be kept
    int64 length;

    __device__ __forceinline__ explicit Place(const Inputs& p) {
        channel = int(blockIdx.x % COLUMNS) * THREADS + int(threadIdx.x);
        sequence = blockIdx.x / COLUMNS;
        const int64 begin = p.offsets ? offset(p, sequence, 0) : 0;
        length = (p.offsets ? offset(p, sequence + 1, begin) : p.length) - begin;
        const int64 row = p.offsets ? 0 : sequence;
        first = (row * p.length + begin) * WIDTH + channel;
        // Tokens before which states are kept lie at least STEPS apart, over a boundary too: each has a place of its own.
        kept = (row * ((p.length - 1) / STEPS) + begin / STEPS) * 3 * WIDTH + channel;
    }

    // Where a sequence begins, from `low` to the length of the row whatever cu_seqlens holds.
    __device__ __forceinline__ static int64 offset(const Inputs& p, int64 at, int64 low) {
        const int64 x = p.wide ? static_cast<const int64*>(p.offsets)[at] : static_cast<const int*>(p.offsets)[at];
        return min(max(x, low), p.length);
    }

    // A number of a (B or S, 3, D) tensor.
    __device__ __forceinline__ int64 of_state(int part) const { return (sequence * 3 + part) * WIDTH + channel; }

    // A number of the state that is kept before a token `from`, a positive multiple of STEPS.
    __device__ __forceinline__ int64 of_kept(int64 from, int part) const {
        return kept + ((from / STEPS - 1) * 3 + part) * WIDTH;
    }
};

// Numbers of STEPS consecutive tokens, or of fewer.
struct Stretch {
    NUMBER at[STEPS];
    __device__ __forceinline__ void load(const NUMBER* from, int64 tokens) {
        const int count = int(min(tokens, int64(STEPS)));
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
            if (i < count) at[i] = from[i * WIDTH];
        }
    }
    __device__ __forceinline__ float operator[](int i) const { return to_float(at[i]); }
};

__device__ __forceinline__ Sums state_before(const Inputs& p, const Place& place, int64 from) {
    const float* state = from ? p.kept + place.of_kept(from, 0) : p.state + place.of_state(0);
    return {state[0], 0.0f, state[WIDTH], state[2 * WIDTH]};
}

// Calls a function with whether there are STEPS tokens, which it should know when it is compiled, and how many there are.
struct Whole {
    static constexpr bool value = true;
};
struct Part {
    static constexpr bool value = false;
};
template <class F> __device__ __forceinline__ void for_tokens(int64 count, F function) {
    if (count >= STEPS)
        function(Whole(), STEPS);
    else
        function(Part(), int(count));
}

struct Forward {
    Inputs in;
    NUMBER* y;
    float* end;  // as the state
};

extern "C" __global__ void __launch_bounds__(THREADS) wkv(const __grid_constant__ Forward p) {
    const Place place(p.in);
    if (place.channel >= WIDTH) return;
    const float fade = p.in.fade[place.channel], bonus = p.in.bonus[place.channel];
    Sums past = state_before(p.in, place, 0);
    Stretch next_k, next_v;
    next_k.load(p.in.k + place.first, place.length);
    next_v.load(p.in.v + place.first, place.length);
    for (int64 from = 0; from < place.length; from += STEPS) {
        const Stretch k = next_k, v = next_v;
        const int64 start = place.first + from * WIDTH, after = start + STEPS * WIDTH;
        next_k.load(p.in.k + after, place.length - from - STEPS);
        next_v.load(p.in.v + after, place.length - from - STEPS);
        if (from && p.in.kept) {
            float* kept = p.in.kept + place.of_kept(from, 0);
            kept[0] = past.top(fade), kept[WIDTH] = past.values, kept[2 * WIDTH] = past.weights;
        }
        for_tokens(place.length - from, [&](auto kind, int count) {
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                if (!kind.value && i >= count) break;
                const float logit = k[i], value = v[i];
                const Shares share(past.top(fade), logit + bonus);
                const float sum = share.of_a * past.values + share.of_b * value;
                const float weight = share.of_a * past.weights + share.of_b;
                p.y[start + i * WIDTH] = from_float<NUMBER>(sum * reciprocal_fast(weight));
                past.go_on(fade, logit, value, 1.0f);
            }
        });
    }
    p.end[place.of_state(0)] = past.top(fade);
    p.end[place.of_state(1)] = past.values;
    p.end[place.of_state(2)] = past.weights;
}

struct Backward {
    Inputs in;
    const NUMBER* d_y;
    const float* d_end;  // null for zero
    NUMBER *d_k, *d_v;
    float *d_fade, *d_bonus;  // (B or S, D), of each sequence
    float* d_state;
};

extern "C" __global__ void __launch_bounds__(THREADS) wkv_backward(const __grid_constant__ Backward p) {
    const Place place(p.in);
    if (place.channel >= WIDTH) return;
    const float fade = p.in.fade[place.channel], bonus = p.in.bonus[place.channel];
    float d_fade = 0.0f, d_bonus = 0.0f, d_end[3] = {};
#pragma unroll
    for (int part = 0; part < 3; part++) {
        if (p.d_end) d_end[part] = p.d_end[place.of_state(part)];
    }
    Sums future = {0.0f, 0.0f, d_end[1], d_end[2]};  // of α and β; its start is not known before the end has been reached

    Stretch next_k, next_v, next_d_y;
    Sums next_past;
    const auto send_for = [&](int64 from) {
        const int64 start = place.first + from * WIDTH, count = place.length - from;
        next_k.load(p.in.k + start, count);
        next_v.load(p.in.v + start, count);
        next_d_y.load(p.d_y + start, count);
        next_past = state_before(p.in, place, from);
    };
    const int64 last = (place.length - 1) / STEPS * STEPS;
    send_for(last);
    for (int64 from = last; from >= 0 && place.length; from -= STEPS) {
        const Stretch k = next_k, v = next_v, d_y = next_d_y;
        Sums past = next_past;
        if (from) send_for(from - STEPS);
        const int64 start = place.first + from * WIDTH;
        for_tokens(place.length - from, [&](auto kind, int count) {
            float tops[STEPS], values[STEPS], weights[STEPS];
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
                if (!kind.value && i >= count) break;
                tops[i] = past.top(fade), values[i] = past.values, weights[i] = past.weights;
                past.go_on(fade, k[i], v[i], 1.0f);
            }
            if (from == last) future.start = -past.top(fade);
            float own_fade = 0.0f, own_bonus = 0.0f;  // summed here first: the fewer are added, the less they are rounded
#pragma unroll
            for (int i = STEPS - 1; i >= 0; i--) {
                if (!kind.value && i >= count) continue;
                const float logit = k[i], value = v[i], top = tops[i];
                const Shares share(top, logit + bonus);
                const float scale = reciprocal_fast(share.of_a * weights[i] + share.of_b);
                const float y = (share.of_a * values[i] + share.of_b * value) * scale;
                const float slope = d_y[i] * scale, own = share.of_b * slope, to_own = own * (value - y);

                const float to_come = future.top(fade), unit = exponential(logit + to_come);
                const float d_v = unit * future.values + own;
                const float d_k = unit * (future.values * value + future.weights) + to_own;
                p.d_v[start + i * WIDTH] = from_float<NUMBER>(d_v);
                p.d_k[start + i * WIDTH] = from_float<NUMBER>(d_k);
                const float both = future.values * values[i] + future.weights * weights[i];
                own_fade -= exponential(top + to_come - fade) * both;
                own_bonus += to_own;
                future.go_on(fade, share.b_is_larger ? -(logit + bonus) : -top, slope, -slope * y);
            }
            d_fade += own_fade;
            d_bonus += own_bonus;
        });
    }
    p.d_fade[place.sequence * WIDTH + place.channel] = d_fade;
    p.d_bonus[place.sequence * WIDTH + place.channel] = d_bonus;
    if (place.length) {
        const Sums initial = state_before(p.in, place, 0);
        const float unit = exponential(initial.start + future.top(fade));
        d_end[0] = unit * (future.values * initial.values + future.weights * initial.weights);
        d_end[1] = unit * future.values;
        d_end[2] = unit * future.weights;
    }
#pragma unroll
    for (int part = 0; part < 3; part++) p.d_state[place.of_state(part)] = d_end[part];
}
