// The selective scan, backward.
//
// A block serves 64 channels of a sequence and goes through its piece from the last chunk of CHUNK tokens to the first. Of a
// chunk it knows the state before it, kept by the forward pass. From there it
//   1. works out dt, the inputs and the gradients dy of the scan's output (threads that take 8 channels of a token each);
//   2. runs the recurrence over the chunk, noting the state every SUB tokens in shared memory;
//   3. takes the runs of SUB tokens from the last to the first: forward again, now with all states and decays in registers,
//      then backward with g_t = C_t dy_t + decay_{t+1} g_{t+1};
//   4. turns the sums over states into the gradients of u, delta and z (8 channels of a token each).
//
// A warp holds 16 channels of 16 states as tensor cores hold a matrix: with row = lane / 4 and column = lane % 4 a lane has
// channels row and row + 8, and of each the states 2 column, 2 column + 1 and those plus 8. So states, rounded to bf16, are
// the left operand of a product that sums over states (y), and, transposed, the right operand of one that sums over channels
// (the gradients of B and C). The other operand is zero but for the token at hand, so that a product's 8 columns (rows)
// gather the sums of SUB = 8 tokens. A number is given as the sum of PARTS bf16 numbers. The sums over states that make the
// gradient of dt stay in fp32, since that of the bias adds up those of all tokens.
//
// Each block writes its sums over channels and tokens; sum.cu adds them up, in order: no atomics, the same bits every time.

#include "scan.cuh"

struct Parameters {
    const U* d_out;
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
    const float* kept;     // (B, kept states, D, N)
    const float* d_final;  // (sequences, D, N)
    U* d_u;
    DELTA* d_delta;
    Z* d_z;
    float* d_initial;    // (sequences, D, N)
    float* B_parts;      // (blocks of a group, B, L, G, N); time-invariant (parts, D, N)
    float* C_parts;      // likewise
    float* A_parts;      // (parts, D, N)
    float* D_parts;      // (parts, D)
    float* bias_parts;   // (parts, D)
    float* piece_grad;   // (sequences, pieces, D, N): of the state after each piece, or before it (summary)
    float* piece_time;   // (sequences, pieces, D): the sum of dt
    Strides d_out_stride, u_stride, delta_stride, z_stride, B_stride, C_stride, out_stride;
    int64 length;
    int channels, groups, batch, sequences, slots, pieces;
    int kept_states;
    int wide_offsets, reverse;
};

constexpr int SUB = 8;
constexpr int SUBS = CHUNK / SUB;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS_APART = THREADS / OCTETS;  // tokens between a thread's octets
constexpr bool IN_PLACE = PASSES == 1;        // whether results may take the place of what they were made of
constexpr bool MAPS_VARY = !B_FIXED || !C_FIXED;

// The last numbers of these rows are never used: they keep lanes out of each other's banks.
struct Shared {
    float step[CHUNK][CHANNELS + 2][2];  // dt, and dt u (euler) or u (zero-order hold); the latter gives way to sum g B
    float dy[CHUNK][CHANNELS + 8];       // which gives way to y = sum C h
    float sum_A[CHUNK][CHANNELS + 8];    // the sum over states of g A decay h
    float sums[IN_PLACE ? 1 : CHUNK][IN_PLACE ? 1 : CHANNELS][4];
    float B[CHUNK][4][4], C[CHUNK][4][4];  // by column: 4 states each
    union {
        float states[2][32][4];  // those before a run of SUB tokens
        float maps[SUB][32];  // after it: the gradients of 16 states of B and of C of each token
    } runs[SUBS][WARPS];
    float bias[CHANNELS], skip[CHANNELS];
    float totals[WARPS][CHANNELS][2];  // the gradients of skip and bias
};

// A token's 8 channels of every tensor, on their way from memory; and where a thread's are, from the first of a chunk.
struct Raw {
    Octet<U, ALIGNED> d_out, u;
    Octet<DELTA, ALIGNED> delta;
    Octet<Z, ALIGNED> z;
};
struct Sources {
    Rows<const U> d_out, u;
    Rows<const DELTA> delta;
    Rows<const Z> z;

    __device__ __forceinline__ void fetch(Raw& raw, int t, int64 rows_left, int valid) const {
        if (t >= rows_left) valid = 0;
        raw.delta.fetch(delta.at(t), valid);
        raw.u.fetch(u.at(t), valid);
        raw.d_out.fetch(d_out.at(t), valid);
        if (HAS_Z) raw.z.fetch(z.at(t), valid);
    }
    __device__ __forceinline__ void prefetch(int t) const {
        ::prefetch(delta.at(t));
        ::prefetch(u.at(t));
        ::prefetch(d_out.at(t));
        if (HAS_Z) ::prefetch(z.at(t));
    }
};

// A pair of numbers as PARTS pairs of bf16, the largest first, which add up to it.
__device__ __forceinline__ void split(uint32 (&parts)[PARTS], float low, float high) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        parts[i] = pack<bf16>(low, high);
        if (i + 1 == PARTS) break;
        low -= low_half<bf16>(parts[i]);
        high -= high_half<bf16>(parts[i]);
    }
}

// What a lane holds of 16 channels and 16 states: [channel half][state]; in pairs, as the left operand of a product.
typedef float States[2][4];
struct Pairs {
    uint32 pair[4][PARTS];

    __device__ __forceinline__ explicit Pairs(const States& x) {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int side = 0; side < 2; side++)
                split(pair[side * 2 + half], x[half][side * 2], x[half][side * 2 + 1]);
    }

    // sums[channel][token] += over states of x and of a map of the token that is column `token` of 8.
    __device__ __forceinline__ void sum_states(float (&sums)[4], const uint32 (&map)[2][PARTS], bool mine) const {
#pragma unroll
        for (int i = 0; i < PARTS; i++)
#pragma unroll
            for (int j = 0; i + j < PARTS; j++) {
                const uint32 a[4] = {pair[0][i], pair[1][i], pair[2][i], pair[3][i]};
                multiply_add<bf16>(sums, a, mine ? map[0][j] : 0, mine ? map[1][j] : 0);
            }
    }

    // sums[state half][token][state] += over channels of x and of what the channels weigh at the token.
    __device__ __forceinline__ void sum_channels(float (&sums)[2][4], const uint32 (&weight)[2][PARTS], bool mine) const {
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            uint32 b[4];
#pragma unroll
            for (int k = 0; k < 4; k++) b[k] = transpose(pair[k][i]);
#pragma unroll
            for (int j = 0; i + j < PARTS; j++) {
                const uint32 a[4] = {mine ? weight[0][j] : 0, 0, mine ? weight[1][j] : 0, 0};
                multiply_add<bf16>(sums[0], a, b[0], b[1]);
                multiply_add<bf16>(sums[1], a, b[2], b[3]);
            }
        }
    }
};

struct Backward {
    const Parameters& p;
    Shared& shared;
    const int group, block_of_group, block_channel, valid_channels;
    const int warp, lane, row, column;

    States A[PASSES], d_A[PASSES], g[PASSES];  // A in units of log2
    States fixed_B[PASSES], fixed_C[PASSES], d_fixed_B[PASSES], d_fixed_C[PASSES];

    __device__ __forceinline__ Backward(const Parameters& p, Shared& shared, const Task& task)
        : p(p), shared(shared), group(task.group), block_of_group(task.block_of_group), block_channel(task.first),
          valid_channels(task.valid), warp(threadIdx.x / 32), lane(threadIdx.x % 32), row(lane / 4), column(lane % 4) {
        for (int c = threadIdx.x; c < CHANNELS; c += THREADS) {
            shared.bias[c] = p.delta_bias && c < valid_channels ? p.delta_bias[block_channel + c] : 0.0f;
            shared.skip[c] = p.D && c < valid_channels ? p.D[block_channel + c] : 0.0f;
        }
        for (int pass = 0; pass < PASSES; pass++) {
            read_states(A[pass], p.A, 0, pass);
#pragma unroll
            for (int half = 0; half < 2; half++)
#pragma unroll
                for (int s = 0; s < 4; s++) {
                    A[pass][half][s] *= LOG2_E;
                    d_A[pass][half][s] = 0.0f;
                    if (B_FIXED) d_fixed_B[pass][half][s] = 0.0f;
                    if (C_FIXED) d_fixed_C[pass][half][s] = 0.0f;
                }
            if (B_FIXED) read_states(fixed_B[pass], p.B, 0, pass);
            if (C_FIXED) read_states(fixed_C[pass], p.C, 0, pass);
        }
        for (int i = threadIdx.x; i < WARPS * CHANNELS * 2; i += THREADS) (&shared.totals[0][0][0])[i] = 0.0f;
    }

    // ---- where a lane's numbers lie -------------------------------------------------------------------------------

    // In the tiles: the place of the lane's channel of a half.
    __device__ __forceinline__ int place(int half) const { return warp * 16 + row * 2 + half; }
    __device__ __forceinline__ int state(int s, int pass) const { return pass * STATES + s / 2 * 8 + column * 2 + s % 2; }

    // Which of a (…, D, N) tensor's numbers is a state of the lane's: -1 if there is none.
    __device__ __forceinline__ int64 state_index(int64 rows, int half, int s, int pass) const {
        const int c = channel_at(place(half)), n = state(s, pass);
        return c < valid_channels && n < N ? (rows * p.channels + block_channel + c) * N + n : -1;
    }
    template <class T> __device__ __forceinline__ void read_states(States& to, const T* from, int64 rows, int pass) const {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const int64 index = state_index(rows, half, s, pass);
                to[half][s] = from && index >= 0 ? to_float(from[index]) : 0.0f;
            }
    }
    __device__ __forceinline__ void write_states(float* to, const States& from, int64 rows, int pass) const {
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const int64 index = state_index(rows, half, s, pass);
                if (to && index >= 0) to[index] = from[half][s];
            }
    }

    // Where this thread's octets of a tensor are, from token `from` on.
    template <class T> __device__ __forceinline__ Rows<T> octets(T* x, Strides s, const Piece& piece, int64 from) const {
        const Rows<T> rows = rows_of(x, s, piece, p.reverse, 0, block_channel + threadIdx.x % OCTETS * 8);
        return {rows.at(from), rows.step};
    }
    __device__ __forceinline__ Sources sources(const Piece& piece, int64 from) const {
        return {octets(p.d_out, p.d_out_stride, piece, from), octets(p.u, p.u_stride, piece, from),
                octets(p.delta, p.delta_stride, piece, from), octets(p.z, p.z_stride, piece, from)};
    }

    // What the sums over states of a token and channel are kept in.
    __device__ __forceinline__ float& sum_B(int t, int c) { return IN_PLACE ? shared.step[t][c][1] : shared.sums[t][c][0]; }
    __device__ __forceinline__ float& sum_C(int t, int c) { return IN_PLACE ? shared.dy[t][c] : shared.sums[t][c][1]; }
    __device__ __forceinline__ float& sum_A(int t, int c) { return IN_PLACE ? shared.sum_A[t][c] : shared.sums[t][c][2]; }

    // ---- a chunk --------------------------------------------------------------------------------------------------

    // dt, the inputs and dy of a chunk; beyond the end steps of length 0 that nothing depends on.
    __device__ __forceinline__ void prepare(const Piece& piece, int64 from) {
        const int octet = threadIdx.x % OCTETS, first = threadIdx.x / OCTETS, valid = valid_channels - octet * 8;
        const Sources source = sources(piece, from);
        Raw raw, next;
        source.fetch(next, first, piece.length - from, valid);
#pragma unroll 2
        for (int t = first; t < CHUNK; t += ROWS_APART) {
            raw = next;
            if (t + ROWS_APART < CHUNK) source.fetch(next, t + ROWS_APART, piece.length - from, valid);
            if (from > 0 && valid > 0) source.prefetch(t - CHUNK);
            float dt[8], x[8], dy[8], gate[8];
            raw.delta.get(dt);
            raw.u.get(x);
            raw.d_out.get(dy);
            if (HAS_Z) raw.z.get(gate);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                dt[k] += shared.bias[octet * 8 + k];
                if (SOFTPLUS) dt[k] = softplus(dt[k]);
                if (HAS_Z) dy[k] *= gate[k] * sigmoid(gate[k]);
            }
            if (from + t >= piece.length) {
#pragma unroll
                for (int k = 0; k < 8; k++) dt[k] = 0.0f;
            }
#pragma unroll
            for (int k = 0; k < 8; k += 2) {
                const int at = place_of_pair(octet, k / 2);
                write(shared.step[t][at], {dt[k], ZOH ? x[k] : x[k] * dt[k], dt[k + 1], ZOH ? x[k + 1] : x[k + 1] * dt[k + 1]});
                write(&shared.dy[t][at], {dy[k], dy[k + 1]});
            }
        }
    }

    // A map of a chunk, 16 states of it, in fp32 where each column of lanes reads its own.
    template <class T>
    __device__ __forceinline__ void widen(
        float (&to)[CHUNK][4][4], const T* map, Strides s, const Piece& piece, int64 from, int pass) {
        const int half = threadIdx.x % 2, n = pass * STATES + half * 8;
        const auto rows = rows_of(map, s, piece, p.reverse, group, n);
#pragma unroll
        for (int t = threadIdx.x / 2; t < CHUNK; t += THREADS / 2) {
            Octet<T, MAPS_ALIGNED> raw;
            raw.fetch(rows.at(from + t), from + t < piece.length ? N - n : 0);
            float x[8];
            raw.get(x);
#pragma unroll
            for (int k = 0; k < 8; k += 2) write(&to[t][k / 2][half * 2], {x[k], x[k + 1]});
        }
    }

    __device__ __forceinline__ void read_B(float (&x)[2][4], int t, int pass) const { read_map(x, shared.B, B_FIXED, fixed_B, t, pass); }
    __device__ __forceinline__ void read_C(float (&x)[2][4], int t, int pass) const { read_map(x, shared.C, C_FIXED, fixed_C, t, pass); }
    __device__ __forceinline__ void read_map(
        States& x, const float (&tile)[CHUNK][4][4], bool is_fixed, const States (&fixed)[PASSES], int t, int pass) const {
        float once[4];
        if (!is_fixed) read(once, tile[t][column]);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int s = 0; s < 4; s++) x[half][s] = is_fixed ? fixed[pass][half][s] : once[s];
    }
    __device__ __forceinline__ void read_steps(float (&steps)[2][2], int t) const {
        float both[4];
        read(both, shared.step[t][place(0)]);
#pragma unroll
        for (int i = 0; i < 4; i++) steps[i / 2][i % 2] = both[i];
    }

    __device__ __forceinline__ float gain(float dt, float decay, float A_log2) const {
        return ZOH ? hold(exponent_over(dt, A_log2), decay, dt, LOG2_E * reciprocal_fast(A_log2)) : 1.0f;
    }

    // One token of the recurrence.
    __device__ __forceinline__ void advance(States& h, States& decay, const States& before, int t, int pass) const {
        float steps[2][2];
        States B;
        read_steps(steps, t);
        read_B(B, t, pass);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const float dt = steps[half][0], rate = A[pass][half][s];
                decay[half][s] = decay_over(dt, rate);
                h[half][s] = fmaf(decay[half][s], before[half][s], steps[half][1] * gain(dt, decay[half][s], rate) * B[half][s]);
            }
    }

    // From the state before a chunk to those before each run of SUB tokens.
    __device__ __forceinline__ void note_states(States& h, int pass) {
        for (int sub = 0; sub < SUBS; sub++) {
            write(shared.runs[sub][warp].states[0][lane], h[0]);
            write(shared.runs[sub][warp].states[1][lane], h[1]);
            if (sub == SUBS - 1) break;
            States decay;
#pragma unroll
            for (int j = 0; j < SUB; j++) advance(h, decay, h, sub * SUB + j, pass);
        }
    }

    // ---- a run of tokens: forward from the state before it, then back ----------------------------------------------

    // The two tokens-by-channels words of a left operand: row's token, the channels 2 column, the next, and those plus 8.
    __device__ __forceinline__ void read_weights(uint32 (&to)[2][PARTS], const float (&tile)[CHUNK][CHANNELS + 8], int t) const {
        float x[4];
        read(x, &tile[t][warp * 16 + column * 4]);
        split(to[0], x[0], x[2]);
        split(to[1], x[1], x[3]);
    }
    __device__ __forceinline__ void read_weights(uint32 (&to)[2][PARTS], const float (&tile)[CHUNK][CHANNELS + 2][2], int t) const {
        float x[4], rest[4];
        read(x, tile[t][warp * 16 + column * 4]);
        read(rest, tile[t][warp * 16 + column * 4 + 2]);
        split(to[0], x[1], rest[1]);
        split(to[1], x[3], rest[3]);
    }
    // The two states-by-tokens words of a right operand: row's token, the states 2 column, the next, and those plus 8.
    __device__ __forceinline__ void read_map_pairs(uint32 (&to)[2][PARTS], const float (&map)[4]) const {
        split(to[0], map[0], map[1]);
        split(to[1], map[2], map[3]);
    }

    __device__ __forceinline__ void run(int sub, int pass) {
        States before, h[SUB], decay[SUB];
        read(before[0], shared.runs[sub][warp].states[0][lane]);
        read(before[1], shared.runs[sub][warp].states[1][lane]);

        const int first = sub * SUB;
        float d_B[2][4] = {}, d_C[2][4] = {}, y[4] = {};
        uint32 weights[2][PARTS], map[2][PARTS];
        if (!C_FIXED) read_weights(weights, shared.dy, first + row);
        if (!C_FIXED && HAS_Z) read_map_pairs(map, shared.C[first + row][column]);
#pragma unroll
        for (int j = 0; j < SUB; j++) {
            advance(h[j], decay[j], j == 0 ? before : h[j == 0 ? 0 : j - 1], first + j, pass);
            if (C_FIXED) {
                if (HAS_Z) add_states(y, h[j], fixed_C[pass], j);
            } else {
                const Pairs pairs(h[j]);
                if (HAS_Z) pairs.sum_states(y, map, row == j);
                pairs.sum_channels(d_C, weights, row == j);
            }
        }

        if (!B_FIXED) read_weights(weights, shared.step, first + row);
        float sums_B[SUB / 4][2], sums_A[SUB / 4][2];
#pragma unroll
        for (int four = SUB - 4; four >= 0; four -= 4) {
            float through_B[2][4], through_A[2][4];
#pragma unroll
            for (int i = 3; i >= 0; i--) {
                const int j = four + i;
                States gained;
                const States& last = j == 0 ? before : h[j == 0 ? 0 : j - 1];
                go_back(gained, through_B, through_A, last, h[j], decay[j], i, first + j, pass);
                if (!B_FIXED) Pairs(gained).sum_channels(d_B, weights, row == j);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sums_B[four / 4][half] = sum_over_lanes(through_B[half]);
                sums_A[four / 4][half] = LN_2 * sum_over_lanes(through_A[half]);
            }
        }
        sync_warp();  // all lanes have read what gives way to the sums
        keep_sums(first, sums_B, sums_A, pass);
        if (HAS_Z) keep_y(first, y, pass);
        if (MAPS_VARY) keep_maps(sub, d_B, d_C);
    }

    // The gradients at token t, i of four, from g, that of the state as later tokens see it; leaves g as earlier ones do.
    __device__ __forceinline__ void go_back(
        States& gained, float (&through_B)[2][4], float (&through_A)[2][4], const States& last, const States& h,
        const States& decay, int i, int t, int pass) {
        float steps[2][2], dys[2];
        States B, C;
        read_steps(steps, t);
        read(dys, &shared.dy[t][place(0)]);
        read_B(B, t, pass);
        read_C(C, t, pass);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float dt = steps[half][0], input = steps[half][1], dy = dys[half];
            through_B[half][i] = through_A[half][i] = 0.0f;
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const float rate = A[pass][half][s], here = fmaf(dy, C[half][s], g[pass][half][s]);
                gained[half][s] = here * gain(dt, decay[half][s], rate);
                through_B[half][i] = fmaf(gained[half][s], B[half][s], through_B[half][i]);
                if (B_FIXED) d_fixed_B[pass][half][s] = fmaf(input, gained[half][s], d_fixed_B[pass][half][s]);
                if (C_FIXED) d_fixed_C[pass][half][s] = fmaf(dy, h[half][s], d_fixed_C[pass][half][s]);
                g[pass][half][s] = decay[half][s] * here;
                const float x = g[pass][half][s] * last[half][s];
                through_A[half][i] = fmaf(x, rate, through_A[half][i]);
                d_A[pass][half][s] = fmaf(x, dt, d_A[pass][half][s]);
                if (ZOH) add_hold(through_A[half][i], d_A[pass][half][s], here * B[half][s] * input, dt, decay[half][s], rate);
            }
        }
    }

    // Through the hold: its derivative in dt is exp(dt A). through_A is in units of log2.
    __device__ __forceinline__ void add_hold(
        float& through_A, float& d_A, float d_hold, float dt, float decay, float A_log2) const {
        through_A = fmaf(d_hold * LOG2_E, decay, through_A);
        d_A = fmaf(d_hold * dt * dt, hold_slope(dt * A_log2, decay), d_A);
    }

    // sums[channel][token j] += over states of x and a time-invariant map, laid out as sum_states does.
    __device__ __forceinline__ void add_states(float (&sums)[4], const States& x, const States& map, int j) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = 0.0f;
#pragma unroll
            for (int s = 0; s < 4; s++) sum = fmaf(x[half][s], map[half][s], sum);
            sum += shuffle_xor(sum, 1);
            sum += shuffle_xor(sum, 2);
            if (column == j / 2) sums[half * 2 + j % 2] = sum;
        }
    }

    // The sums over states of a run: a lane has, of its two channels, the tokens column and column + 4.
    __device__ __forceinline__ void keep_sums(
        int first, const float (&sums_B)[SUB / 4][2], const float (&sums_A)[SUB / 4][2], int pass) {
        const bool add = !IN_PLACE && pass > 0;
#pragma unroll
        for (int i = 0; i < SUB / 4; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float& to_B = sum_B(first + column + 4 * i, place(half));
                float& to_A = sum_A(first + column + 4 * i, place(half));
                to_B = add ? to_B + sums_B[i][half] : sums_B[i][half];
                to_A = add ? to_A + sums_A[i][half] : sums_A[i][half];
            }
    }

    // y of a run: a lane has, of its two channels, the tokens 2 column and the next.
    __device__ __forceinline__ void keep_y(int first, const float (&y)[4], int pass) {
        const bool add = !IN_PLACE && pass > 0;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& to = sum_C(first + column * 2 + i, place(half));
                to = add ? to + y[half * 2 + i] : y[half * 2 + i];
            }
    }

    // A warp's sums over channels, where the states before the run were. Rows are turned against each other, so that
    // lanes of 4 rows meet in no bank.
    __device__ __forceinline__ void keep_maps(int sub, const float (&d_B)[2][4], const float (&d_C)[2][4]) {
        float (&to)[32] = shared.runs[sub][warp].maps[row];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int n = half * 8 + column * 2;
            write(&to[(n + 8 * row) % 32], {d_B[half][0], d_B[half][1]});
            write(&to[(n + 16 + 8 * row) % 32], {d_C[half][0], d_C[half][1]});
        }
    }

    // The block's sums over channels of a run to memory: a thread a pair of states of a token.
    __device__ __forceinline__ void write_maps(const Piece& piece, int64 from, int sub, int pass) const {
#pragma unroll
        for (int i = threadIdx.x; i < SUB * 16; i += THREADS) {
            const int t = i / 16, n = i % 16 * 2;
            float total[2] = {0.0f, 0.0f};
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float x[2];
                read(x, &shared.runs[sub][w].maps[t][(n + 8 * t) % 32]);
                total[0] += x[0];
                total[1] += x[1];
            }
            const int64 scanned = piece.from + from + sub * SUB + t;
            const int state = pass * STATES + n % 16;
            const bool is_B = n < 16;
            if (from + sub * SUB + t >= piece.length || state >= N || (is_B ? B_FIXED : C_FIXED)) continue;
            const int64 token = piece.begin + (p.reverse ? piece.sequence_length - 1 - scanned : scanned);
            const int64 rows = (int64(block_of_group) * p.batch + piece.batch) * p.length + token;
            float* to = (is_B ? p.B_parts : p.C_parts) + (rows * p.groups + group) * N + state;
            if (N % 2 == 0) {
                write(to, total);
            } else {
                to[0] = total[0];
                if (state + 1 < N) to[1] = total[1];
            }
        }
    }

    // The gradients of u, delta and z of a chunk.
    __device__ __forceinline__ void finish(const Piece& piece, int64 from) {
        const int octet = threadIdx.x % OCTETS, first = threadIdx.x / OCTETS, valid = valid_channels - octet * 8;
        const Sources source = sources(piece, from);
        const auto d_u = octets(p.d_u, p.out_stride, piece, from);
        const auto d_delta = octets(p.d_delta, p.out_stride, piece, from);
        const auto d_z = octets(p.d_z, p.out_stride, piece, from);
        float d_skip[8] = {}, d_bias[8] = {};
        Raw raw, next;
        source.fetch(next, first, piece.length - from, valid);
#pragma unroll 2
        for (int t = first; t < CHUNK; t += ROWS_APART) {
            raw = next;
            if (t + ROWS_APART < CHUNK) source.fetch(next, t + ROWS_APART, piece.length - from, valid);
            if (from + t >= piece.length) continue;
            float x[8], delta[8], dy[8], gate[8], to_u[8], to_delta[8], to_z[8];
            raw.u.get(x);
            raw.delta.get(delta);
            raw.d_out.get(dy);
            if (HAS_Z) raw.z.get(gate);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const int at = place_of_pair(octet, k / 2) + k % 2, c = octet * 8 + k;
                if (HAS_Z) {
                    const float open = sigmoid(gate[k]), y = fmaf(shared.skip[c], x[k], sum_C(t, at));
                    to_z[k] = dy[k] * y * open * fmaf(gate[k], 1.0f - open, 1.0f);
                    dy[k] *= gate[k] * open;
                }
                const float from_B = sum_B(t, at);
                float from_dt = sum_A(t, at);
                to_u[k] = fmaf(shared.skip[c], dy[k], ZOH ? from_B : from_B * shared.step[t][at][0]);
                if (!ZOH) from_dt = fmaf(from_B, x[k], from_dt);
                to_delta[k] = SOFTPLUS ? from_dt * sigmoid(delta[k] + shared.bias[c]) : from_dt;
                d_skip[k] = fmaf(dy[k], x[k], d_skip[k]);
                d_bias[k] += to_delta[k];
            }
            write_octet(d_u.at(t), to_u, valid);
            write_octet(d_delta.at(t), to_delta, valid);
            if (HAS_Z) write_octet(d_z.at(t), to_z, valid);
        }
#pragma unroll
        for (int k = 0; k < 8; k++) {
#pragma unroll
            for (int width = OCTETS; width < 32; width *= 2) {
                d_skip[k] += shuffle_xor(d_skip[k], width);
                d_bias[k] += shuffle_xor(d_bias[k], width);
            }
            if (lane >= OCTETS) continue;
            shared.totals[warp][octet * 8 + k][0] += d_skip[k];
            shared.totals[warp][octet * 8 + k][1] += d_bias[k];
        }
    }
    static_assert(OCTETS < 32, "the lanes of an octet are OCTETS apart");

    // ---- a piece --------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void read_states_before(States& h, const Piece& piece, int64 position, int pass) const {
        if (position == 0) return read_states(h, p.initial, piece.sequence, pass);
        read_states(h, p.kept, int64(piece.batch) * p.kept_states + kept_index(piece.begin, position), pass);
    }

    __device__ __forceinline__ void scan(const Piece& piece) {
        const int64 piece_index = int64(piece.sequence) * p.pieces + piece.index;
        for (int pass = 0; pass < PASSES; pass++) {
            if (p.pieces > 1) read_states(g[pass], p.piece_grad, piece_index, pass);
            else read_states(g[pass], p.d_final, piece.sequence, pass);
        }
        for (int64 from = (piece.length - 1) / CHUNK * CHUNK; from >= 0 && piece.length > 0; from -= CHUNK) {
            for (int pass = 0; pass < PASSES; pass++) {
                States h;
                read_states_before(h, piece, piece.from + from, pass);
                sync_block();  // the chunk before is done with the shared memory
                if (pass == 0) prepare(piece, from);
                if (!B_FIXED) widen(shared.B, p.B, p.B_stride, piece, from, pass);
                if (!C_FIXED) widen(shared.C, p.C, p.C_stride, piece, from, pass);
                sync_block();
                note_states(h, pass);
                for (int sub = SUBS - 1; sub >= 0; sub--) {
                    run(sub, pass);
                    if (!MAPS_VARY) continue;
                    sync_block();
                    write_maps(piece, from, sub, pass);
                }
            }
            sync_block();
            finish(piece, from);
        }
        if (piece.index == 0)
            for (int pass = 0; pass < PASSES; pass++) write_states(p.d_initial, g[pass], piece.sequence, pass);
    }

    // The gradient of the state before a piece, from a zero one of that after it; and the time that the piece takes.
    __device__ __forceinline__ void summarize(const Piece& piece) {
        const int64 piece_index = int64(piece.sequence) * p.pieces + piece.index;
        float time[2] = {0.0f, 0.0f};
        for (int pass = 0; pass < PASSES; pass++) read_states<float>(g[pass], nullptr, 0, pass);
        for (int64 from = (piece.length - 1) / CHUNK * CHUNK; from >= 0 && piece.length > 0; from -= CHUNK)
            for (int pass = 0; pass < PASSES; pass++) {
                sync_block();
                if (pass == 0) prepare(piece, from);
                if (!C_FIXED) widen(shared.C, p.C, p.C_stride, piece, from, pass);
                sync_block();
#pragma unroll 4
                for (int t = CHUNK - 1; t >= 0; t--) {
                    States C;
                    read_C(C, t, pass);
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        const float dt = shared.step[t][place(half)][0], dy = shared.dy[t][place(half)];
#pragma unroll
                        for (int s = 0; s < 4; s++) {
                            float& at = g[pass][half][s];
                            at = decay_over(dt, A[pass][half][s]) * fmaf(dy, C[half][s], at);
                        }
                        if (pass == 0) time[half] += dt;
                    }
                }
            }
        for (int pass = 0; pass < PASSES; pass++) write_states(p.piece_grad, g[pass], piece_index, pass);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int c = channel_at(place(half));
            if (column == 0 && c < valid_channels) p.piece_time[piece_index * p.channels + block_channel + c] = time[half];
        }
    }

    // The sums over all tokens of this block.
    __device__ __forceinline__ void write_totals(int part) {
        for (int pass = 0; pass < PASSES; pass++) {
            write_states(p.A_parts, d_A[pass], part, pass);
            if (B_FIXED) write_states(p.B_parts, d_fixed_B[pass], part, pass);
            if (C_FIXED) write_states(p.C_parts, d_fixed_C[pass], part, pass);
        }
        sync_block();
        const int c = threadIdx.x / 2, of = threadIdx.x % 2;
        float total = 0.0f;
        for (int w = 0; w < WARPS; w++) total += shared.totals[w][c][of];
        float* to = of == 0 ? p.D_parts : p.bias_parts;
        if (c < valid_channels && to) to[int64(part) * p.channels + block_channel + c] = total;
    }
    static_assert(CHANNELS * 2 == THREADS, "a thread adds up one channel's skip or bias");
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    selective_scan_backward(const __grid_constant__ Parameters p) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const Task task(p.channels, p.groups, p.pieces);
    Backward block(p, shared, task);
    for (int sequence = task.sequence; sequence < p.sequences; sequence += p.slots)
        block.scan(find_piece(sequence, task.piece, p.pieces, p.length, p.offsets, p.wide_offsets));
    block.write_totals(task.sequence * p.pieces + task.piece);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    selective_scan_backward_summary(const __grid_constant__ Parameters p) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    const Task task(p.channels, p.groups, p.pieces);
    Backward block(p, shared, task);
    for (int sequence = task.sequence; sequence < p.sequences; sequence += p.slots)
        block.summarize(find_piece(sequence, task.piece, p.pieces, p.length, p.offsets, p.wide_offsets));
}

// Turns the gradients of the states before the pieces, in place, into those of the states after them: one thread a state.
extern "C" __global__ void __launch_bounds__(THREADS)
    selective_scan_backward_hand_over(const __grid_constant__ Parameters p) {
    hand_over(p.piece_grad, p.piece_time, p.d_final, p.A, p.channels, p.sequences, p.pieces, true);
}
