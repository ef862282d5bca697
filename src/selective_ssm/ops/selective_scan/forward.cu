// The selective scan, forward.
//
// A block goes through its piece of a sequence tile by tile, in two phases with a barrier after each: the recurrence is run
// by lanes that each keep some states of one channel; then the outputs of the tile are gated and written, and the step sizes
// and inputs of the next tile are worked out, by threads that take 8 neighbouring channels of a token each. What they need
// has been on its way from memory since the tile before.
//
// Macros: STEPS (tokens a tile), UNROLLED (of them, those whose sums are written together).

#include "scan.cuh"

struct Parameters {
    const U* u;
    const DELTA* delta;
    const Z* z;
    const B_MAP* B;
    const C_MAP* C;
    const float* A;
    const float* D;
    const float* delta_bias;
    const float* initial;  // (sequences, D, N)
    const void* offsets;   // (sequences + 1,)
    U* out;
    float* final;        // (sequences, D, N)
    float* kept;         // (B, kept states, D, N)
    float* piece_state;  // (sequences, pieces, D, N): the state before each piece, or after it (summary)
    float* piece_time;   // (sequences, pieces, D): the sum of dt
    Strides u_stride, delta_stride, z_stride, B_stride, C_stride, out_stride;
    int64 length;
    int channels, groups, sequences, pieces, kept_states;
    int wide_offsets, reverse;
};

constexpr int OCTETS_A_THREAD = (STEPS * OCTETS + THREADS - 1) / THREADS;
constexpr int ROWS_APART = THREADS / OCTETS;  // tokens between a thread's octets
static_assert(CHUNK % STEPS == 0, "states are kept between tiles");

struct Shared {
    float maps[STEPS][LANES][2 * PER_LANE];  // of B, then of C, as each lane reads them
    float step[STEPS][CHANNELS][2];          // dt, and dt u (euler) or u (zero-order hold)
    float y[STEPS][CHANNELS];
    float bias[CHANNELS], skip[CHANNELS];
};

// A thread's octets of a tile of one tensor, on their way from memory.
template <class T> struct Tile {
    Octet<T, ALIGNED> octet[OCTETS_A_THREAD];

    __device__ __forceinline__ void fetch(Rows<const T>& rows, int rows_left, int valid) {
#pragma unroll
        for (int i = 0; i < OCTETS_A_THREAD; i++)
            octet[i].fetch(rows.at(i * ROWS_APART), i * ROWS_APART < rows_left ? valid : 0);
        rows.first += STEPS * rows.step;
    }
};

// A thread's octets of the maps of a tile: half of the threads bring B, half C.
struct Maps {
    static constexpr int TURNS = (STEPS + 31) / 32;
    Octet<B_MAP, MAPS_ALIGNED> B[TURNS];
    Octet<C_MAP, MAPS_ALIGNED> C[TURNS];

    static __device__ __forceinline__ bool is_B() { return threadIdx.x < THREADS / 2; }
    static __device__ __forceinline__ int half() { return threadIdx.x % 2; }
    static __device__ __forceinline__ int row(int i) { return (threadIdx.x % (THREADS / 2) + i * THREADS / 2) / 2; }
};

template <bool SUMMARY> struct Scan {
    const Parameters& p;
    Shared& shared;
    const Piece piece;
    const int group, block_channel, valid_channels;
    const int place, lane;        // of this thread's channel; its part of the states
    const int octet, row, valid;  // of this thread's octets in a tile
    const bool present;
    const int channel;
    Rows<const U> u;
    Rows<const DELTA> delta;
    Rows<const Z> z;
    Rows<U> out;
    Tile<U> next_u, this_u;
    Tile<DELTA> next_delta;
    Tile<Z> next_z, this_z;
    Maps maps;
    float A[PASSES][PER_LANE];  // in units of log2
    float h[PASSES][PER_LANE];
    float fixed_B[PASSES][PER_LANE], fixed_C[PASSES][PER_LANE];
    float time = 0.0f;

    __device__ __forceinline__ Scan(const Parameters& p, Shared& shared, const Piece& piece, const Task& task)
        : p(p), shared(shared), piece(piece), group(task.group), block_channel(task.first), valid_channels(task.valid),
          place(threadIdx.x / LANES), lane(threadIdx.x % LANES), octet(threadIdx.x % OCTETS), row(threadIdx.x / OCTETS),
          valid(row < STEPS ? task.valid - octet * 8 : 0), present(channel_at(place) < task.valid),
          channel(present ? task.first + channel_at(place) : task.first), u(octets_of(p.u, p.u_stride)),
          delta(octets_of(p.delta, p.delta_stride)), z(octets_of(p.z, p.z_stride)), out(octets_of(p.out, p.out_stride)) {}

    template <class T> __device__ __forceinline__ Rows<T> octets_of(T* x, Strides s) const {
        const Rows<T> rows = rows_of(x, s, piece, p.reverse, 0, block_channel + octet * 8);
        return {rows.at(row), rows.step};
    }

    __device__ __forceinline__ void fetch(int64 from) {
        const int rows_left = int(min(piece.length - from, int64(STEPS))) - row;
        next_u.fetch(u, rows_left, valid);
        next_delta.fetch(delta, rows_left, valid);
        if (HAS_Z && !SUMMARY) next_z.fetch(z, rows_left, valid);
    }

    // Step sizes and inputs of the tile fetched; beyond the end steps of length 0, which leave the state as it is.
    __device__ __forceinline__ void prepare(int64 from) {
        this_u = next_u;
        if (HAS_Z && !SUMMARY) this_z = next_z;
#pragma unroll
        for (int i = 0; i < OCTETS_A_THREAD; i++) {
            const int t = row + i * ROWS_APART;
            float dt[8], x[8];
            next_delta.octet[i].get(dt);
            this_u.octet[i].get(x);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                dt[k] += shared.bias[octet * 8 + k];
                if (SOFTPLUS) dt[k] = softplus(dt[k]);
            }
            if (from + t >= piece.length) {
#pragma unroll
                for (int k = 0; k < 8; k++) dt[k] = 0.0f;
            }
            if (STEPS * OCTETS < THREADS && t >= STEPS) continue;
#pragma unroll
            for (int k = 0; k < 8; k += 2)
                write(shared.step[t][place_of_pair(octet, k / 2)],
                      {dt[k], ZOH ? x[k] : x[k] * dt[k], dt[k + 1], ZOH ? x[k + 1] : x[k + 1] * dt[k + 1]});
        }
    }

    // The maps of a tile, 16 states of them: on their way from memory; then in fp32 where each lane reads its own.
    __device__ __forceinline__ void fetch_maps(int64 from, int pass) {
        const int n = pass * STATES + Maps::half() * 8;
        const auto B = rows_of(p.B, p.B_stride, piece, p.reverse, group, n);
        const auto C = rows_of(p.C, p.C_stride, piece, p.reverse, group, n);
#pragma unroll
        for (int i = 0; i < Maps::TURNS; i++) {
            const int64 token = from + Maps::row(i);
            const int there = token < piece.length && Maps::row(i) < STEPS ? N - n : 0;
            if (!B_FIXED && Maps::is_B()) maps.B[i].fetch(B.at(token), there);
            if (!C_FIXED && !SUMMARY && !Maps::is_B()) maps.C[i].fetch(C.at(token), there);
        }
    }
    __device__ __forceinline__ void widen_maps() {
#pragma unroll
        for (int i = 0; i < Maps::TURNS; i++) {
            const int t = Maps::row(i);
            if (STEPS < 32 && t >= STEPS) continue;
            float* to = &shared.maps[t][0][0] + map_start(Maps::half());
            float x[8];
            if (!B_FIXED && Maps::is_B()) {
                maps.B[i].get(x);
                write_map(to, x);
            }
            if (!C_FIXED && !SUMMARY && !Maps::is_B()) {
                maps.C[i].get(x);
                write_map(to + PER_LANE, x);
            }
        }
    }

    __device__ __forceinline__ void finish(int64 from) {
#pragma unroll
        for (int i = 0; i < OCTETS_A_THREAD; i++) {
            const int t = row + i * ROWS_APART;
            float x[8], gate[8], y[8];
            this_u.octet[i].get(x);
            if (HAS_Z) this_z.octet[i].get(gate);
            if (STEPS * OCTETS < THREADS && t >= STEPS) continue;
#pragma unroll
            for (int k = 0; k < 8; k += 2) {
                float pair[2];
                read(pair, &shared.y[t][place_of_pair(octet, k / 2)]);
                y[k] = pair[0];
                y[k + 1] = pair[1];
            }
#pragma unroll
            for (int k = 0; k < 8; k++) {
                y[k] = fmaf(shared.skip[octet * 8 + k], x[k], y[k]);
                if (HAS_Z) y[k] *= gate[k] * sigmoid(gate[k]);
            }
            write_octet(out.at(i * ROWS_APART), y, from + t < piece.length ? valid : 0);
        }
        out.first += STEPS * out.step;
    }

    __device__ __forceinline__ int64 state_offset() const { return (int64(piece.sequence) * p.channels + channel) * N; }
    __device__ __forceinline__ int64 piece_offset() const {
        return (int64(piece.sequence) * p.pieces + piece.index) * p.channels + channel;
    }

    __device__ __forceinline__ void begin() {
        for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
            shared.bias[c] = p.delta_bias && c < valid_channels ? p.delta_bias[block_channel + c] : 0.0f;
            shared.skip[c] = p.D && c < valid_channels ? p.D[block_channel + c] : 0.0f;
        }
        const float* before = p.pieces > 1 ? p.piece_state + piece_offset() * N : p.initial ? p.initial + state_offset() : nullptr;
        for (int pass = 0; pass < PASSES; pass++) {
            const int first = pass * STATES + lane * PER_LANE;
            read_states(h[pass], before, first, present && !SUMMARY && before);
            read_states(A[pass], p.A + int64(channel) * N, first, present);
            if (B_FIXED) read_states(fixed_B[pass], p.B + int64(channel) * N, first, present);
            if (C_FIXED) read_states(fixed_C[pass], p.C + int64(channel) * N, first, present);
#pragma unroll
            for (int r = 0; r < PER_LANE; r++) A[pass][r] *= LOG2_E;
        }
    }

    __device__ __forceinline__ void run() {
        begin();
        if (piece.length > 0) fetch(0);
        if (PASSES == 1 && piece.length > 0) fetch_maps(0, 0);
        sync_block();
        for (int64 from = 0; from < piece.length; from += STEPS) {
            prepare(from);
            const bool more = from + STEPS < piece.length;
            if (more) fetch(from + STEPS);
            for (int pass = 0; pass < PASSES; pass++) {
                if (pass > 0) sync_block();  // all have read the maps of the pass before
                if (PASSES > 1) fetch_maps(from, pass);
                widen_maps();
                if (PASSES == 1 && more) fetch_maps(from + STEPS, 0);
                sync_block();
                if (!SUMMARY) keep(piece.from + from, pass);
                scan_tile(h[pass], A[pass], fixed_B[pass], fixed_C[pass], pass);
            }
            sync_block();
            if (!SUMMARY) finish(from);
        }
        for (int pass = 0; pass < PASSES; pass++) {
            const int first = pass * STATES + lane * PER_LANE;
            if (SUMMARY) write_states(p.piece_state + piece_offset() * N, h[pass], first, present);
            else if (p.final && piece.is_last) write_states(p.final + state_offset(), h[pass], first, present);
        }
        if (SUMMARY && lane == 0 && present) p.piece_time[piece_offset()] = time;
    }

    // The state before every chunk but a sequence's first, for the backward pass.
    __device__ __forceinline__ void keep(int64 position, int pass) {
        if (!p.kept || position == 0 || position % CHUNK != 0) return;
        const int64 index = int64(piece.batch) * p.kept_states + kept_index(piece.begin, position);
        write_states(p.kept + (index * p.channels + channel) * N, h[pass], pass * STATES + lane * PER_LANE, present);
    }

    // What a lane needs of a token. It is read a token ahead, and sums are written a run of tokens late, since the compiler
    // moves no read of shared memory over a write.
    struct Step {
        float dt, input;
        float maps[2 * PER_LANE];

        __device__ __forceinline__ Step(const Shared& shared, int t, int place, int lane) {
            float pair[2];
            read(pair, shared.step[t][place]);
            read(maps, shared.maps[t][lane]);
            dt = pair[0];
            input = pair[1];
        }
    };

    // Advances 16 states of each channel over a tile.
    __device__ __forceinline__ void scan_tile(
        float (&h)[PER_LANE], const float (&A)[PER_LANE], const float (&fixed_B)[PER_LANE],
        const float (&fixed_C)[PER_LANE], int pass) {
        constexpr int RUN = UNROLLED > LANES ? UNROLLED : LANES;
        Step next(shared, 0, place, lane);
#pragma unroll 1
        for (int base = 0; base < STEPS; base += RUN) {
            float y[RUN];
#pragma unroll
            for (int j = 0; j < RUN; j++) {
                const Step step = next;
                next = Step(shared, min(base + j + 1, STEPS - 1), place, lane);
                y[j] = 0.0f;
#pragma unroll
                for (int r = 0; r < PER_LANE; r++) {
                    const float x = step.dt * A[r], decay = exp2_fast(x);
                    const float drive = ZOH ? step.input * hold<U>(x, decay, step.dt, LOG2_E / A[r]) : step.input;
                    h[r] = fmaf(decay, h[r], drive * (B_FIXED ? fixed_B[r] : step.maps[r]));
                    if (!SUMMARY) y[j] = fmaf(C_FIXED ? fixed_C[r] : step.maps[PER_LANE + r], h[r], y[j]);
                }
                if (SUMMARY && pass == 0) time += step.dt;
            }
            if (SUMMARY) continue;
#pragma unroll
            for (int group = 0; group < RUN; group += LANES) {
                float of_group[LANES];
#pragma unroll
                for (int j = 0; j < LANES; j++) of_group[j] = y[group + j];
                y[group] = sum_over_lanes(of_group);
            }
#pragma unroll
            for (int group = 0; group < RUN; group += LANES) {
                float& to = shared.y[base + group + lane][place];
                to = pass == 0 ? y[group] : to + y[group];
            }
        }
    }
};

template <bool SUMMARY> __device__ __forceinline__ void scan(const Parameters& p) {
    const Task task(p.channels, p.groups, p.pieces);
    const Piece piece = find_piece(task.sequence, task.piece, p.pieces, p.length, p.offsets, p.wide_offsets);
    Scan<SUMMARY>(p, *reinterpret_cast<Shared*>(shared_memory()), piece, task).run();
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    selective_scan_forward(const __grid_constant__ Parameters p) {
    scan<false>(p);
}

// Each piece's end state from a zero start, and the time it takes.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    selective_scan_summary(const __grid_constant__ Parameters p) {
    scan<true>(p);
}

// Turns the pieces' end states, in place, into the states before them: one thread a state.
extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_hand_over(const __grid_constant__ Parameters p) {
    const int64 i = int64(blockIdx.x) * THREADS + threadIdx.x;
    const int64 states = int64(p.channels) * N;
    if (i >= p.sequences * states) return;
    const int64 sequence = i / states, state = i % states;
    const float A = p.A[state] * LOG2_E;
    float h = p.initial ? p.initial[i] : 0.0f;
    for (int piece = 0; piece < p.pieces; piece++) {
        const int64 index = sequence * p.pieces + piece;
        float& place = p.piece_state[index * states + state];
        const float after = place;
        place = h;
        h = fmaf(exp2_fast(A * p.piece_time[index * p.channels + state / N]), h, after);
    }
}
