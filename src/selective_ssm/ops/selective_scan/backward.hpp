// A few states of the scan's backward pass over a window: what a worker holds, and the recurrence there and back.
#pragma once

#include "scan.hpp"

namespace {

constexpr int STATES = 4;  // that are gone through together

struct Backward {
    Scan scan;
    Rows d_out, d_u, d_delta, d_z, d_B, d_C;  // the last three may be absent
    const float *kept, *d_final;  // (B, (L - 1) / WINDOW, N, scan.stride()); d_final may be absent
    float* d_initial;  // may be absent; where a sequence is empty nothing is written
    // Sums over a part's rows, and what it hands on: (parts, N, scan.stride()); d_channels (parts, 2, scan.stride()).
    float *d_rates, *d_channels, *d_fixed_B, *d_fixed_C, *carry;
    float* d_maps;  // (parts, tasks, slice, WINDOW or L if that is less, 2, N)
    int64 parts, group_tasks, slice;

    // A part is a piece of some neighbouring rows.
    int64 first_row(int64 rows) const { return rows * scan.batch * scan.pieces() / parts; }
    int64 windows_before(int64 piece) const { return least(piece * scan.piece, scan.length + WINDOW - 1) / WINDOW; }
    int64 tasks() const { return scan.groups * group_tasks; }
    float* map_part(int64 part, int64 task, int64 window) const {
        const int64 tokens = scan.length < WINDOW ? scan.length : WINDOW;
        return d_maps + ((part * tasks() + task) * slice + window) * tokens * 2 * scan.states;
    }
};

// The vectors that a window has of each token: dt, u, the gradient of y, y, the gradients of dt u and of dt.
enum { STEP, U, D_Y, Y, D_DRIVE, D_STEP, VECTORS_OF_TOKEN };

// What a worker holds of a block.
struct Work {
    float* tokens;  // (width / LANES, WINDOW, VECTORS_OF_TOKEN) vectors
    float* notes;  // (1 + WINDOW, 2, STATES) vectors: of each token the state before it and its decay
    float *sums_B, *sums_C;  // (WINDOW, STATES) vectors
    float *B, *C;  // (WINDOW, N)
    float *rates, *state, *carry, *fixed_B, *fixed_C;  // (N, width)
    float *d_rates, *d_channels, *d_fixed_B, *d_fixed_C, *carried;  // of Backward, those of the part at hand

    Work(const Backward& call, int64 part, float* memory) {
        const int64 states = call.scan.states, size = states * call.scan.stride();
        const auto take = [&](int64 count) { memory += count; return memory - count; };
        const int64 group = WINDOW * STATES * LANES, map = WINDOW * states, matrix = states * call.scan.width;
        tokens = take(WINDOW * call.scan.width * VECTORS_OF_TOKEN);
        notes = take(2 * (group + STATES * LANES)), sums_B = take(group), sums_C = take(group);
        B = take(map), C = take(map);
        rates = take(matrix), state = take(matrix), carry = take(matrix);
        fixed_B = take(matrix), fixed_C = take(matrix);
        d_rates = call.d_rates + part * size, carried = call.carry + part * size;
        d_fixed_B = call.scan.B_fixed ? call.d_fixed_B + part * size : nullptr;
        d_fixed_C = call.scan.C_fixed ? call.d_fixed_C + part * size : nullptr;
        d_channels = call.d_channels + part * 2 * call.scan.stride();
    }
    float* token(int v, int t) const { return tokens + (v * WINDOW + t) * VECTORS_OF_TOKEN * LANES; }
};

// Where a task sums over channels, at some token; its first block begins the sums.
struct Maps {
    float* totals;
    bool is_first;
};

// A few states of a vector of channels.
template <bool GENERAL, int COUNT>
struct Pass {
    static constexpr int NOTE = 2 * COUNT * LANES;  // of a token: COUNT states before it, COUNT decays

    const Scan& scan;
    const Work& work;
    const Block& block;
    const Map B, C;
    const int64 n;
    const int v, channel, tokens;

    float* matrix(float* of, int i) const { return of + (n + i) * scan.width + channel; }

    void forward() const {
        Floats rate[COUNT], h[COUNT];
        for (int i = 0; i < COUNT; i++) {
            rate[i] = load(matrix(work.rates, i));
            h[i] = load(matrix(work.state, i));
        }
        const Map B = this->B, C = this->C;
        const int64 n = this->n;
        const int tokens = this->tokens;
        float *token = work.token(v, 0), *note = work.notes;
        for (int t = 0; t < tokens; t++, token += VECTORS_OF_TOKEN * LANES, note += NOTE) {
            const Floats step = load(token + STEP * LANES), drive = step * load(token + U * LANES);
            Floats y = zeros();
            for (int i = 0; i < COUNT; i++) {
                const Floats exponent = step * rate[i], decay = decay_of(exponent);
                Floats input = drive * B.template get<GENERAL>(t, n + i, channel);
                if (GENERAL && scan.zoh) input = input * hold(exponent, decay);
                store(note + i * LANES, h[i]);
                store(note + (COUNT + i) * LANES, decay);
                h[i] = fma_once(decay, h[i], input);
                y = fma(h[i], C.template get<GENERAL>(t, n + i, channel), y);
            }
            add(n, token + Y * LANES, y);
        }
        for (int i = 0; i < COUNT; i++) store(note + i * LANES, h[i]);
    }

    void backward() const {
        // g, and the decay between it and the g of the token before: rounded together with C dy, since where decays are
        // slow the rounding of a product of its own adds up over thousands of tokens.
        Floats g[COUNT], decay[COUNT], rate[COUNT], d_rate[COUNT], d_B[COUNT], d_C[COUNT];
        for (int i = 0; i < COUNT; i++) {
            g[i] = load(matrix(work.carry, i));
            decay[i] = splat(1);
            rate[i] = load(matrix(work.rates, i));
            d_rate[i] = d_B[i] = d_C[i] = zeros();
        }
        const Map B = this->B, C = this->C;
        const int64 n = this->n;
        const int v = this->v;
        float *token = work.token(v, tokens), *note = work.notes + tokens * NOTE;
        float *sums_B = work.sums_B + tokens * COUNT * LANES, *sums_C = work.sums_C + tokens * COUNT * LANES;
        for (int t = tokens - 1; t >= 0; t--) {
            token -= VECTORS_OF_TOKEN * LANES, note -= NOTE;
            sums_B -= COUNT * LANES, sums_C -= COUNT * LANES;
            const Floats step = load(token + STEP * LANES), u = load(token + U * LANES), drive = step * u;
            const Floats dy = load(token + D_Y * LANES);
            Floats d_drive = zeros(), d_step = zeros();
            for (int i = 0; i < COUNT; i++) {
                const Floats map = B.template get<GENERAL>(t, n + i, channel);
                g[i] = fma_once(decay[i], g[i], dy * C.template get<GENERAL>(t, n + i, channel));
                decay[i] = load(note + (COUNT + i) * LANES);
                const Floats d_exponent = g[i] * decay[i] * load(note + i * LANES);
                d_step = fma(d_exponent, rate[i], d_step);
                d_rate[i] = fma(d_exponent, step, d_rate[i]);
                Floats input = drive, held_map = map;
                if (GENERAL && scan.zoh) {
                    const Floats exponent = step * rate[i], held = hold(exponent, decay[i]), through = g[i] * map;
                    d_step = fma(through * decay[i], u, d_step);
                    d_rate[i] = fma(through * hold_slope(exponent, decay[i], held), step * drive, d_rate[i]);
                    input = input * held;
                    held_map = map * held;
                }
                d_drive = fma(g[i], held_map, d_drive);
                add(B.fixed, d_B[i], v == 0, sums_B + i * LANES, input, g[i]);
                add(C.fixed, d_C[i], v == 0, sums_C + i * LANES, dy, load(note + NOTE + i * LANES));
            }
            add(n, token + D_DRIVE * LANES, d_drive);
            add(n, token + D_STEP * LANES, d_step);
        }
        const int64 stride = scan.stride(), at = n * stride + block.place + channel;
        for (int i = 0; i < COUNT; i++) {
            store(matrix(work.carry, i), g[i] * decay[i]);
            add_to(work.d_rates + at + i * stride, d_rate[i]);
            if (GENERAL && scan.B_fixed) add_to(work.d_fixed_B + at + i * stride, d_B[i]);
            if (GENERAL && scan.C_fixed) add_to(work.d_fixed_C + at + i * stride, d_C[i]);
        }
    }

    // Adds to a token's sum over states, which begins with the first.
    INLINE static void add(int64 n, float* total, Floats x) { store(total, n == 0 ? x : load(total) + x); }

    // a b, for a map that is fixed or else for one of a token, whose sum over channels begins with the first vector. Lanes that
    // are no channels stay out of it: there 0 may be multiplied with infinity.
    INLINE void add(bool fixed, Floats& over_tokens, bool is_first, float* over_channels, Floats a, Floats b) const {
        if (GENERAL && fixed) {
            over_tokens = fma(a, b, over_tokens);
            return;
        }
        const Floats before = is_first ? zeros() : load(over_channels);
        const int lanes = block.lanes(v);
        store(over_channels, lanes < LANES ? before + first_lanes(a * b, lanes) : fma(a, b, before));
    }
    INLINE static void add_to(float* total, Floats x) { store(total, load(total) + x); }
};

}  // namespace
