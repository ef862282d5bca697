// The helpers of the backward pass: what is done of each channel and token but once, 8 neighbouring channels of a token a
// thread.

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

struct Helper : Work {
    static constexpr int ROWS_APART = HELPERS / OCTETS;  // tokens between a thread's octets
    const int octet, row, valid;
    float d_skip[8], d_bias[8];  // of this thread's tokens

    __device__ __forceinline__ explicit Helper(const Work& work)
        : Work(work), octet(thread % OCTETS), row(thread / OCTETS), valid(task.valid - octet * 8) {
        for (int k = 0; k < 8; k++) {
            d_skip[k] = d_bias[k] = 0.0f;
        }
    }

    // Where this thread's octets of a tensor are, from token `from` of the piece on.
    template <class T> __device__ __forceinline__ Rows<T> octets(T* x, Strides s, int64 from) const {
        const Rows<T> rows = rows_of(x, s, piece, p.reverse, 0, task.first + octet * 8);
        return {rows.at(from), rows.step};
    }
    __device__ __forceinline__ Sources sources(int64 from) const {
        return {octets(p.d_out, p.d_out_stride, from), octets(p.u, p.u_stride, from),
                octets(p.delta, p.delta_stride, from), octets(p.z, p.z_stride, from)};
    }

    // ---- before a quarter is scanned ------------------------------------------------------------------------------

    // dt, u and dy of the quarter that begins at token `from`; beyond the end steps of length 0 that nothing depends on.
    __device__ __forceinline__ void prepare(Quarter& quarter, int64 from) const {
        const Sources source = sources(from);
#pragma unroll 1
        for (int t = row; t < QUARTER; t += ROWS_APART) {
            Raw raw;
            source.fetch(raw, t, piece.length - from, valid);
            if (from >= CHUNK && valid > 0) source.prefetch(t - CHUNK);
            float dt[8], x[8], dy[8], gate[8];
            raw.delta.get(dt);
            raw.u.get(x);
            raw.d_out.get(dy);
            if (HAS_Z) raw.z.get(gate);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                dt[k] += shared.bias[octet * 8 + k];
                if (SOFTPLUS) dt[k] = softplus(dt[k]);
                if (from + t >= piece.length) dt[k] = 0.0f;
                if (HAS_Z) dy[k] *= gate[k] * sigmoid(gate[k]);
            }
#pragma unroll
            for (int k = 0; k < 8; k += 2) {
                const int at = place_of_pair(octet, k / 2);
                write(quarter.step[t][at], {dt[k], x[k], dt[k + 1], x[k + 1]});
                write(&quarter.dy[t][at], {dy[k], dy[k + 1]});
            }
        }
    }

    // A map of a quarter, 16 states of it, in fp32 where each column of lanes reads its own.
    template <class T>
    __device__ __forceinline__ void widen(float (&to)[QUARTER][4][4], const T* map, Strides s, int64 from, int pass) const {
        const int half = thread % 2, n = pass * STATES + half * 8;
        const auto rows = rows_of(map, s, piece, p.reverse, task.group, n);
        for (int t = thread / 2; t < QUARTER; t += HELPERS / 2) {
            Octet<T, MAPS_ALIGNED> raw;
            raw.fetch(rows.at(from + t), from + t < piece.length ? N - n : 0);
            float x[8];
            raw.get(x);
#pragma unroll
            for (int k = 0; k < 8; k += 2) write(&to[t][k / 2][half * 2], {x[k], x[k + 1]});
        }
    }

    // All that the scanners need for a turn.
    __device__ __forceinline__ void prepare(const Turn& turn, bool summary) const {
        if (turn.number >= chunks() * QUARTERS * PASSES) return;
        const int64 from = turn.from(*this) + turn.quarter() * QUARTER;
        Maps& maps = shared.maps[turn.maps_place(turn.quarter())];
        if (!B_FIXED && !summary) widen(maps.B, p.B, p.B_stride, from, turn.pass());
        if (!C_FIXED) widen(maps.C, p.C, p.C_stride, from, turn.pass());
        if (turn.pass() == 0) prepare(shared.quarters[turn.place(turn.quarter())], from);
    }

    // ---- after it has been scanned --------------------------------------------------------------------------------

    // The sums over channels of all scanners to memory: a thread a pair of states of a token.
    __device__ __forceinline__ void write_maps(const Turn& turn) const {
        const int64 from = turn.from(*this) + turn.quarter() * QUARTER;
        for (int i = thread; i < QUARTER * 16; i += HELPERS) {
            const int t = i / 16, n = i % 16 * 2;
            float total[2] = {0.0f, 0.0f};
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                float x[2];
                read(x, &shared.runs[turn.quarter() * QUARTER / SUB + t / SUB][w].maps[t % SUB][(n + 8 * t) % 32]);
                total[0] += x[0];
                total[1] += x[1];
            }
            const int64 scanned = piece.from + from + t;
            const int state = turn.pass() * STATES + n % 16;
            const bool is_B = n < 16;
            if (from + t >= piece.length || state >= N || (is_B ? B_FIXED : C_FIXED)) continue;
            const int64 token = piece.begin + (p.reverse ? piece.sequence_length - 1 - scanned : scanned);
            const int64 rows = (int64(task.block_of_group) * p.batch + piece.batch) * p.length + token;
            float* to = (is_B ? p.B_parts : p.C_parts) + (rows * p.groups + task.group) * N + state;
            if (N % 2 == 0) {
                write(to, total);
            } else {
                to[0] = total[0];
                if (state + 1 < N) to[1] = total[1];
            }
        }
    }

    // The gradients of u, delta and z of the quarter that begins at token `from`.
    __device__ __forceinline__ void finish(Quarter& quarter, int64 from) {
        const Sources source = sources(from);
        const auto to_u = octets(p.d_u, p.out_stride, from);
        const auto to_delta = octets(p.d_delta, p.out_stride, from);
        const auto to_z = octets(p.d_z, p.out_stride, from);
#pragma unroll 1
        for (int t = row; t < QUARTER && from + t < piece.length; t += ROWS_APART) {
            Raw raw;
            source.fetch(raw, t, piece.length - from, valid);
            float x[8], delta[8], dy[8], gate[8], d_u[8], d_delta[8], d_z[8];
            raw.u.get(x);
            raw.delta.get(delta);
            raw.d_out.get(dy);
            if (HAS_Z) raw.z.get(gate);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const int at = place_of_pair(octet, k / 2) + k % 2, c = octet * 8 + k;
                if (HAS_Z) {
                    const float open = sigmoid(gate[k]), y = fmaf(shared.skip[c], x[k], quarter.y(t, at));
                    d_z[k] = dy[k] * y * open * fmaf(gate[k], 1.0f - open, 1.0f);
                    dy[k] *= gate[k] * open;
                }
                d_u[k] = fmaf(shared.skip[c], dy[k], quarter.d_u(t, at));
                d_delta[k] = quarter.d_dt(t, at);
                if (SOFTPLUS) d_delta[k] *= sigmoid(delta[k] + shared.bias[c]);
                d_skip[k] = fmaf(dy[k], x[k], d_skip[k]);
                d_bias[k] += d_delta[k];
            }
            write_octet(to_u.at(t), d_u, valid);
            write_octet(to_delta.at(t), d_delta, valid);
            if (HAS_Z) write_octet(to_z.at(t), d_z, valid);
        }
    }

    // All that is left to do after a turn.
    __device__ __forceinline__ void finish(const Turn& turn) {
        if (turn.is_last_pass())
            finish(shared.quarters[turn.place(turn.quarter())], turn.from(*this) + turn.quarter() * QUARTER);
    }

    // ---- a piece --------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void run() {
        for (int i = 0; i < QUARTERS; i++) prepare(Turn{i}, false);
        sync_block();
        const int64 turns = chunks() * QUARTERS * PASSES;
        for (Turn turn = {0}; turn.number < turns; turn.number++) {
            const Turn last = {turn.number - 1}, next = {turn.number + QUARTERS};
            if (MAPS_VARY && turn.number > 0) write_maps(last);
            if (turn.is_first_of_pass()) sync_block();
            if (turn.number > 0) finish(last);
            prepare(next, false);
            sync_block();
        }
        if (turns == 0) return;
        if (MAPS_VARY) write_maps({turns - 1});
        finish(Turn{turns - 1});
    }

    __device__ __forceinline__ void summarize() const {
        for (int i = 0; i < QUARTERS; i++) prepare(Turn{i}, true);
        sync_block();
        for (Turn turn = {0}; turn.number < chunks() * QUARTERS * PASSES; turn.number++) {
            prepare(Turn{turn.number + QUARTERS}, true);
            sync_block();
        }
    }

    // The sums over all tokens of this block, where the notes were.
    __device__ __forceinline__ void write_totals(int part) {
        float(*totals)[CHANNELS][2] = reinterpret_cast<float(*)[CHANNELS][2]>(shared.runs);
        sync_block();
#pragma unroll
        for (int k = 0; k < 8; k++) write(totals[row][octet * 8 + k], {d_skip[k], d_bias[k]});
        sync_block();
        for (int i = thread; i < CHANNELS * 2; i += HELPERS) {
            const int c = i / 2, of = i % 2;
            float total = 0.0f;
            for (int r = 0; r < ROWS_APART; r++) total += totals[r][c][of];
            float* to = of == 0 ? p.D_parts : p.bias_parts;
            if (c < task.valid && to) to[int64(part) * p.channels + task.first + c] = total;
        }
    }
};
