// The selective scan, forward.
//
// A block goes through its piece of a sequence tile by tile. Half of its warps, the scanners, run the recurrence: lanes keep
// some states of one channel each, and special functions bind them. The other half, the helpers, meanwhile gate and write the
// outputs of the tile before, and work out the step sizes and inputs of the tile after, 8 neighbouring channels of a token a
// thread; what they need has been on its way from memory for a tile's time. A barrier a tile keeps the two in step.
//
// With more than 16 states a tile is scanned in several passes; a turn is one pass over one tile.
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

constexpr int BLOCK = 2 * THREADS;
constexpr int OCTETS_A_THREAD = (STEPS * OCTETS + THREADS - 1) / THREADS;
constexpr int ROWS_APART = THREADS / OCTETS;  // tokens between a helper's octets
constexpr int MAP_TURNS = (STEPS + 31) / 32;
static_assert(CHUNK % STEPS == 0, "states are kept between tiles");

// The last numbers of these rows are never used: they keep lanes out of each other's banks.
struct Shared {
    float maps[2][STEPS][2 * STATES + 4];  // by lane: its states of B, then of C
    float step[2][STEPS][CHANNELS][2];     // dt, and dt u (euler) or u (zero-order hold)
    float y[2][STEPS][CHANNELS + 32 / LANES];
    Mailbox<U, ALIGNED> u[OCTETS_A_THREAD];
    Mailbox<DELTA, ALIGNED> delta[OCTETS_A_THREAD];
    Mailbox<Z, ALIGNED> z[OCTETS_A_THREAD];
    Mailbox<B_MAP, MAPS_ALIGNED> B[MAP_TURNS];
    Mailbox<C_MAP, MAPS_ALIGNED> C[MAP_TURNS];
};

// What both roles know of a block's work.
struct Work {
    const Parameters& p;
    Shared& shared;
    const Task task;
    const Piece piece;
    const int thread;  // within the role

    __device__ __forceinline__ Work(const Parameters& p, Shared& shared)
        : p(p), shared(shared), task(p.channels, p.groups, p.pieces),
          piece(find_piece(task.sequence, task.piece, p.pieces, p.length, p.offsets, p.wide_offsets)),
          thread(threadIdx.x % THREADS) {}

    __device__ __forceinline__ int64 turns() const { return (piece.length + STEPS - 1) / STEPS * PASSES; }
    __device__ __forceinline__ static int64 tile(int64 turn) { return PASSES == 1 ? turn : turn / PASSES; }
    __device__ __forceinline__ static int pass(int64 turn) { return PASSES == 1 ? 0 : turn % PASSES; }
};

template <bool SUMMARY> struct Helper : Work {
    const int octet, row, valid;  // of this thread's octets in a tile
    Rows<const U> u;
    Rows<const DELTA> delta;
    Rows<const Z> z;
    Rows<U> out;
    float bias[8], skip[8];
    Octet<U, ALIGNED> next_u[OCTETS_A_THREAD], last_u[OCTETS_A_THREAD];  // of the tile prepared; to be finished
    Octet<Z, ALIGNED> next_z[OCTETS_A_THREAD], last_z[OCTETS_A_THREAD];

    __device__ __forceinline__ explicit Helper(const Work& work)
        : Work(work), octet(thread % OCTETS), row(thread / OCTETS), valid(row < STEPS ? task.valid - octet * 8 : 0),
          u(octets_of(p.u, p.u_stride)), delta(octets_of(p.delta, p.delta_stride)), z(octets_of(p.z, p.z_stride)),
          out(octets_of(p.out, p.out_stride)) {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const int c = octet * 8 + k;
            bias[k] = p.delta_bias && c < task.valid ? p.delta_bias[task.first + c] : 0.0f;
            skip[k] = p.D && c < task.valid ? p.D[task.first + c] : 0.0f;
        }
    }

    template <class T> __device__ __forceinline__ Rows<T> octets_of(T* x, Strides s) const {
        const Rows<T> rows = rows_of(x, s, piece, p.reverse, 0, task.first + octet * 8);
        return {rows.at(row), rows.step};
    }

    __device__ __forceinline__ void run() {
        const int64 turns = this->turns();
        if (turns > 0) {
            fetch_rows(0);
            fetch_maps(0);
            commit_copies();
        }
        if (turns > 0) prepare(0);
        sync_block();
        for (int64 turn = 0; turn <= turns; turn++) {
            const bool ends_tile = pass(turn) == 0;  // the turn before did
            if (ends_tile && turn > 0 && !SUMMARY) finish(tile(turn) - 1);
            if (turn == turns) break;
            if (pass(turn + 1) == 0) keep_rows();
            if (turn + 1 < turns) prepare(turn + 1);
            sync_block();
        }
    }

    // Sends for a tile.
    __device__ __forceinline__ void fetch_rows(int64 tile) {
        const int rows_left = int(min(piece.length - tile * STEPS, int64(STEPS))) - row;
#pragma unroll
        for (int i = 0; i < OCTETS_A_THREAD; i++) {
            const int t = i * ROWS_APART, there = t < rows_left ? valid : 0;
            shared.u[i].fetch(u.at(t), there, thread);
            shared.delta[i].fetch(delta.at(t), there, thread);
            if (HAS_Z && !SUMMARY) shared.z[i].fetch(z.at(t), there, thread);
        }
        u.first += STEPS * u.step;
        delta.first += STEPS * delta.step;
        z.first += STEPS * z.step;
    }

    // Half of the helpers bring B, half C: an octet at a time.
    __device__ __forceinline__ bool brings_B() const { return thread < THREADS / 2; }
    __device__ __forceinline__ int map_row(int i) const { return (thread % (THREADS / 2) + i * THREADS / 2) / 2; }

    // Sends for the maps of a turn.
    __device__ __forceinline__ void fetch_maps(int64 turn) {
        const int64 from = tile(turn) * STEPS;
        const int n = pass(turn) * STATES + thread % 2 * 8;
        const auto B = rows_of(p.B, p.B_stride, piece, p.reverse, task.group, n);
        const auto C = rows_of(p.C, p.C_stride, piece, p.reverse, task.group, n);
#pragma unroll
        for (int i = 0; i < MAP_TURNS; i++) {
            const int64 token = from + map_row(i);
            const int there = token < piece.length && map_row(i) < STEPS ? N - n : 0;
            if (!B_FIXED && brings_B()) shared.B[i].fetch(B.at(token), there, thread);
            if (!C_FIXED && !SUMMARY && !brings_B()) shared.C[i].fetch(C.at(token), there, thread);
        }
    }

    // Those of the tile that is scanned now stay until it is finished.
    __device__ __forceinline__ void keep_rows() {
#pragma unroll
        for (int i = 0; i < OCTETS_A_THREAD; i++) {
            last_u[i] = next_u[i];
            if (HAS_Z && !SUMMARY) last_z[i] = next_z[i];
        }
    }

    // Takes what a turn needs, and sends for what the next one will.
    __device__ __forceinline__ void prepare(int64 turn) {
        Octet<DELTA, ALIGNED> raw[OCTETS_A_THREAD];
        wait_copies<0>();
        if (pass(turn) == 0) {
#pragma unroll
            for (int i = 0; i < OCTETS_A_THREAD; i++) {
                next_u[i] = shared.u[i].take(thread);
                raw[i] = shared.delta[i].take(thread);
                if (HAS_Z && !SUMMARY) next_z[i] = shared.z[i].take(thread);
            }
        }
        widen_maps(turn % 2);
        if (turn + 1 < turns()) {
            fetch_maps(turn + 1);
            if (pass(turn + 1) == 0) fetch_rows(tile(turn + 1));
            commit_copies();
        }
        if (pass(turn) == 0) write_steps(raw, tile(turn));
    }

    // The maps of a turn, 16 states of them, in fp32 where each lane reads its own.
    __device__ __forceinline__ void widen_maps(int half) {
#pragma unroll
        for (int i = 0; i < MAP_TURNS; i++) {
            const int t = map_row(i);
            if (STEPS < 32 && t >= STEPS) continue;
            float* to = shared.maps[half][t] + map_start(thread % 2);
            float x[8];
            if (!B_FIXED && brings_B()) {
                shared.B[i].take(thread).get(x);
                write_map(to, x);
            }
            if (!C_FIXED && !SUMMARY && !brings_B()) {
                shared.C[i].take(thread).get(x);
                write_map(to + PER_LANE, x);
            }
        }
    }

    // Step sizes and inputs of a tile; beyond the end steps have length 0 and leave the state as it is.
    __device__ __forceinline__ void write_steps(const Octet<DELTA, ALIGNED> (&raw)[OCTETS_A_THREAD], int64 tile) {
#pragma unroll
        for (int i = 0; i < OCTETS_A_THREAD; i++) {
            const int t = row + i * ROWS_APART;
            if (STEPS * OCTETS < THREADS && t >= STEPS) continue;
            float dt[8], x[8];
            raw[i].get(dt);
            next_u[i].get(x);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                dt[k] += bias[k];
                if (SOFTPLUS) dt[k] = softplus(dt[k]);
            }
            if (tile * STEPS + t >= piece.length) {
#pragma unroll
                for (int k = 0; k < 8; k++) dt[k] = 0.0f;
            }
#pragma unroll
            for (int k = 0; k < 8; k += 2)
                write(shared.step[tile % 2][t][place_of_pair(octet, k / 2)],
                      {dt[k], ZOH ? x[k] : x[k] * dt[k], dt[k + 1], ZOH ? x[k + 1] : x[k + 1] * dt[k + 1]});
        }
    }

    // The outputs of a tile that has been scanned.
    __device__ __forceinline__ void finish(int64 tile) {
#pragma unroll
        for (int i = 0; i < OCTETS_A_THREAD; i++) {
            const int t = row + i * ROWS_APART;
            if (STEPS * OCTETS < THREADS && t >= STEPS) continue;
            float x[8], gate[8], y[8];
            last_u[i].get(x);
            if (HAS_Z) last_z[i].get(gate);
#pragma unroll
            for (int k = 0; k < 8; k += 2) {
                float pair[2];
                read(pair, &shared.y[tile % 2][t][place_of_pair(octet, k / 2)]);
                y[k] = pair[0];
                y[k + 1] = pair[1];
            }
#pragma unroll
            for (int k = 0; k < 8; k++) {
                y[k] = fmaf(skip[k], x[k], y[k]);
                if (HAS_Z) y[k] *= gate[k] * sigmoid(gate[k]);
            }
            write_octet(out.at(i * ROWS_APART), y, tile * STEPS + t < piece.length ? valid : 0);
        }
        out.first += STEPS * out.step;
    }
};

template <bool SUMMARY> struct Scanner : Work {
    const int place, lane;  // of this thread's channel; its part of the states
    const bool present;
    const int channel;
    float A[PASSES][PER_LANE];  // in units of log2
    float inverse_A[PASSES][PER_LANE];
    float h[PASSES][PER_LANE];
    float fixed_B[PASSES][PER_LANE], fixed_C[PASSES][PER_LANE];
    float time = 0.0f;

    __device__ __forceinline__ explicit Scanner(const Work& work)
        : Work(work), place(thread / LANES), lane(thread % LANES), present(channel_at(place) < task.valid),
          channel(present ? task.first + channel_at(place) : task.first) {
        const float* before = p.pieces > 1 ? p.piece_state + piece_offset() * N : p.initial ? p.initial + state_offset() : nullptr;
        for (int pass = 0; pass < PASSES; pass++) {
            const int first = pass * STATES + lane * PER_LANE;
            read_states(h[pass], before, first, present && !SUMMARY && before);
            read_states(A[pass], p.A + int64(channel) * N, first, present);
            if (B_FIXED) read_states(fixed_B[pass], p.B + int64(channel) * N, first, present);
            if (C_FIXED) read_states(fixed_C[pass], p.C + int64(channel) * N, first, present);
#pragma unroll
            for (int r = 0; r < PER_LANE; r++) {
                if (ZOH) inverse_A[pass][r] = 1.0f / A[pass][r];
                A[pass][r] *= LOG2_E;
            }
        }
    }

    __device__ __forceinline__ int64 state_offset() const { return (int64(piece.sequence) * p.channels + channel) * N; }
    __device__ __forceinline__ int64 piece_offset() const {
        return (int64(piece.sequence) * p.pieces + piece.index) * p.channels + channel;
    }

    __device__ __forceinline__ void run() {
        sync_block();  // the first turn is prepared
        for (int64 turn = 0; turn < turns(); turn++) {
            if (!SUMMARY) keep(piece.from + tile(turn) * STEPS, pass(turn));
            scan_tile(tile(turn) % 2, turn % 2, pass(turn));
            sync_block();
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
    };
    __device__ __forceinline__ Step read_step(int half, int maps_half, int t) const {
        Step step;
        float pair[2];
        read(pair, shared.step[half][t][place]);
        read(step.maps, shared.maps[maps_half][t] + lane * 2 * PER_LANE);
        step.dt = pair[0];
        step.input = pair[1];
        return step;
    }

    // Advances 16 states of each channel over a tile.
    __device__ __forceinline__ void scan_tile(int half, int maps_half, int pass) {
        constexpr int RUN = UNROLLED > LANES ? UNROLLED : LANES;
        Step next = read_step(half, maps_half, 0);
#pragma unroll 1
        for (int base = 0; base < STEPS; base += RUN) {
            float y[RUN];
#pragma unroll
            for (int j = 0; j < RUN; j++) {
                const Step step = next;
                next = read_step(half, maps_half, min(base + j + 1, STEPS - 1));
                y[j] = 0.0f;
#pragma unroll
                for (int r = 0; r < PER_LANE; r++) {
                    const float x = exponent_over(step.dt, A[pass][r]), decay = exp2_fast(x);
                    const float drive = ZOH ? step.input * hold(x, decay, step.dt, inverse_A[pass][r]) : step.input;
                    h[pass][r] = fmaf(decay, h[pass][r], drive * (B_FIXED ? fixed_B[pass][r] : step.maps[r]));
                    y[j] = fmaf(C_FIXED ? fixed_C[pass][r] : step.maps[PER_LANE + r], h[pass][r], y[j]);
                }
                if (SUMMARY && pass == 0) time += step.dt;
            }
            if (!SUMMARY) write_sums(y, half, base, pass);
        }
    }

    // The sums over states of a run of tokens.
    template <int RUN> __device__ __forceinline__ void write_sums(const float (&y)[RUN], int half, int base, int pass) {
        float sums[RUN / LANES];
#pragma unroll
        for (int group = 0; group < RUN / LANES; group++) {
            float of_group[LANES];
#pragma unroll
            for (int j = 0; j < LANES; j++) of_group[j] = y[group * LANES + j];
            sums[group] = sum_over_lanes(of_group);
        }
#pragma unroll
        for (int group = 0; group < RUN / LANES; group++) {
            float& to = shared.y[half][base + group * LANES + lane][place];
            to = pass == 0 ? sums[group] : to + sums[group];
        }
    }
};

template <bool SUMMARY> __device__ __forceinline__ void scan(const Parameters& p) {
    const Work work(p, *reinterpret_cast<Shared*>(shared_memory()));
    if (threadIdx.x < THREADS) Scanner<SUMMARY>(work).run();
    else Helper<SUMMARY>(work).run();
}

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS) selective_scan_forward(const __grid_constant__ Parameters p) {
    scan<false>(p);
}

// Each piece's end state from a zero start, and the time it takes.
extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS) selective_scan_summary(const __grid_constant__ Parameters p) {
    scan<true>(p);
}

// Turns the pieces' end states, in place, into the states before them: one thread a state.
extern "C" __global__ void __launch_bounds__(THREADS) selective_scan_hand_over(const __grid_constant__ Parameters p) {
    hand_over(p.piece_state, p.piece_time, p.initial, p.A, p.channels, p.sequences, p.pieces, false);
}
