// The scanners of the backward pass.
//
// A warp holds 16 channels of 16 states as tensor cores hold a matrix: with row = lane / 4 and column = lane % 4 a lane has
// channels row and row + 8, and of each the states 2 column, 2 column + 1 and those plus 8. So states, rounded to bf16, are
// the left operand of a product that sums over states (y), and, transposed, the right operand of one that sums over channels
// (the gradients of B and C). The other operand is zero but for the token at hand, so that a product's 8 columns (rows)
// gather the sums of SUB = 8 tokens. A number is given as the sum of PARTS bf16 numbers. The sums over states that make the
// gradient of dt stay in fp32, since that of the bias adds up those of all tokens.

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
                multiply_add(sums, a, mine ? map[0][j] : 0, mine ? map[1][j] : 0);
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
                multiply_add(sums[0], a, b[0], b[1]);
                multiply_add(sums[1], a, b[2], b[3]);
            }
        }
    }
};

struct Scanner : Work {
    const int warp, lane, row, column;

    States A[PASSES], d_A[PASSES], g[PASSES];  // A in units of log2
    States fixed_B[PASSES], fixed_C[PASSES], d_fixed_B[PASSES], d_fixed_C[PASSES];

    __device__ __forceinline__ explicit Scanner(const Work& work)
        : Work(work), warp(thread / 32), lane(thread % 32), row(lane / 4), column(lane % 4) {
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
    }

    // ---- where a lane's numbers lie -------------------------------------------------------------------------------

    // In a quarter: the place of the lane's channel of a half.
    __device__ __forceinline__ int place(int half) const { return warp * 16 + row * 2 + half; }
    __device__ __forceinline__ int state(int s, int pass) const { return pass * STATES + s / 2 * 8 + column * 2 + s % 2; }

    // Which of a (…, D, N) tensor's numbers is a state of the lane's: -1 if there is none.
    __device__ __forceinline__ int64 state_index(int64 rows, int half, int s, int pass) const {
        const int c = channel_at(place(half)), n = state(s, pass);
        return c < task.valid && n < N ? (rows * p.channels + task.first + c) * N + n : -1;
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

    // ---- the recurrence -------------------------------------------------------------------------------------------

    __device__ __forceinline__ void read_map(States& x, const float (&of_token)[4][4], bool is_fixed, const States& fixed) const {
        float once[4];
        if (!is_fixed) read(once, of_token[column]);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int s = 0; s < 4; s++) x[half][s] = is_fixed ? fixed[half][s] : once[s];
    }
    // dt and u of the lane's two channels.
    __device__ __forceinline__ void read_steps(float (&steps)[2][2], const Quarter& quarter, int t) const {
        float both[4];
        read(both, quarter.step[t][place(0)]);
#pragma unroll
        for (int i = 0; i < 4; i++) steps[i / 2][i % 2] = both[i];
    }

    __device__ __forceinline__ float gain(float dt, float decay, float A_log2) const {
        return ZOH ? hold(dt * A_log2, decay, dt, LOG2_E / A_log2) : 1.0f;
    }
    // That which B and the gain are multiplied with.
    __device__ __forceinline__ float input(float dt, float u) const { return ZOH ? u : dt * u; }

    // One token of the recurrence.
    __device__ __forceinline__ void advance(
        States& h, States& decay, const States& before, const Quarter& quarter, const Maps& maps, int t, int pass) const {
        float steps[2][2];
        States B;
        read_steps(steps, quarter, t);
        read_map(B, maps.B[t], B_FIXED, fixed_B[pass]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float dt = steps[half][0], in = input(dt, steps[half][1]);
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const float rate = A[pass][half][s];
                decay[half][s] = decay_over(dt, rate);
                h[half][s] = fmaf(decay[half][s], before[half][s], in * gain(dt, decay[half][s], rate) * B[half][s]);
            }
        }
    }

    // From the state before a chunk to those before each run of SUB tokens.
    __device__ __forceinline__ void note_states(const Turn& turn) {
        States h;
        read_states_before(h, turn);
#pragma unroll 1
        for (int sub = 0; sub < SUBS; sub++) {
            write(shared.runs[sub][warp].states[0][lane], h[0]);
            write(shared.runs[sub][warp].states[1][lane], h[1]);
            if (sub == SUBS - 1) break;
            const int q = sub * SUB / QUARTER, first = sub * SUB % QUARTER;
            const Quarter& quarter = shared.quarters[turn.place(q)];
            const Maps& maps = shared.maps[turn.maps_place(q)];
            States decay;
#pragma unroll
            for (int j = 0; j < SUB; j++) advance(h, decay, h, quarter, maps, first + j, turn.pass());
        }
    }
    __device__ __forceinline__ void read_states_before(States& h, const Turn& turn) const {
        const int64 position = piece.from + turn.from(*this);
        if (position == 0) return read_states(h, p.initial, piece.sequence, turn.pass());
        read_states(h, p.kept, int64(piece.batch) * p.kept_states + kept_index(piece.begin, position), turn.pass());
    }

    // ---- a run of tokens: forward from the state before it, then back ----------------------------------------------

    // The two tokens-by-channels words of a left operand: row's token, the channels 2 column, the next, and those plus 8.
    __device__ __forceinline__ void read_dy(uint32 (&to)[2][PARTS], const Quarter& quarter, int t) const {
        float x[4];
        read(x, &quarter.dy[t][warp * 16 + column * 4]);
        split(to[0], x[0], x[2]);
        split(to[1], x[1], x[3]);
    }
    __device__ __forceinline__ void read_inputs(uint32 (&to)[2][PARTS], const Quarter& quarter, int t) const {
        float x[4], rest[4];
        read(x, quarter.step[t][warp * 16 + column * 4]);
        read(rest, quarter.step[t][warp * 16 + column * 4 + 2]);
        split(to[0], input(x[0], x[1]), input(rest[0], rest[1]));
        split(to[1], input(x[2], x[3]), input(rest[2], rest[3]));
    }
    // The two states-by-tokens words of a right operand: row's token, the states 2 column, the next, and those plus 8.
    __device__ __forceinline__ void read_map_pairs(uint32 (&to)[2][PARTS], const float (&map)[4]) const {
        split(to[0], map[0], map[1]);
        split(to[1], map[2], map[3]);
    }

    __device__ __forceinline__ void scan_run(int sub, const Turn& turn) {
        const int pass = turn.pass(), first = sub * SUB % QUARTER;
        Quarter& quarter = shared.quarters[turn.place(turn.quarter())];
        const Maps& maps = shared.maps[turn.maps_place(turn.quarter())];
        States before, h[SUB], decay[SUB];
        read(before[0], shared.runs[sub][warp].states[0][lane]);
        read(before[1], shared.runs[sub][warp].states[1][lane]);

        float d_B[2][4] = {}, d_C[2][4] = {}, y[4] = {};
        uint32 weights[2][PARTS], map[2][PARTS];
        if (!C_FIXED) read_dy(weights, quarter, first + row);
        if (!C_FIXED && HAS_Z) read_map_pairs(map, maps.C[first + row][column]);
#pragma unroll
        for (int j = 0; j < SUB; j++) {
            advance(h[j], decay[j], j == 0 ? before : h[j == 0 ? 0 : j - 1], quarter, maps, first + j, pass);
            if (C_FIXED) {
                if (HAS_Z) add_states(y, h[j], fixed_C[pass], j);
            } else {
                const Pairs pairs(h[j]);
                if (HAS_Z) pairs.sum_states(y, map, row == j);
                pairs.sum_channels(d_C, weights, row == j);
            }
        }

        if (!B_FIXED) read_inputs(weights, quarter, first + row);
        float sums_B[SUB / 4][2], sums_A[SUB / 4][2];
#pragma unroll
        for (int four = SUB - 4; four >= 0; four -= 4) {
            float through_B[2][4], through_A[2][4];
#pragma unroll
            for (int i = 3; i >= 0; i--) {
                const int j = four + i;
                States gained;
                const States& last = j == 0 ? before : h[j == 0 ? 0 : j - 1];
                go_back(gained, through_B, through_A, last, h[j], decay[j], i, quarter, maps, first + j, pass);
                if (!B_FIXED) Pairs(gained).sum_channels(d_B, weights, row == j);
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                sums_B[four / 4][half] = sum_over_lanes(through_B[half]);
                sums_A[four / 4][half] = LN_2 * sum_over_lanes(through_A[half]);
            }
        }
        keep_sums(quarter, first, sums_B, sums_A, pass);
        if (HAS_Z) keep_y(quarter, first, y, pass);
        if (MAPS_VARY) keep_maps(sub, d_B, d_C);
    }

    // The gradients at token t, i of four, from g, that of the state as later tokens see it; leaves g as earlier ones do.
    __device__ __forceinline__ void go_back(
        States& gained, float (&through_B)[2][4], float (&through_A)[2][4], const States& last, const States& h,
        const States& decay, int i, const Quarter& quarter, const Maps& maps, int t, int pass) {
        float steps[2][2], dys[2];
        States B, C;
        read_steps(steps, quarter, t);
        read(dys, &quarter.dy[t][place(0)]);
        read_map(B, maps.B[t], B_FIXED, fixed_B[pass]);
        read_map(C, maps.C[t], C_FIXED, fixed_C[pass]);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float dt = steps[half][0], in = input(dt, steps[half][1]), dy = dys[half];
            through_B[half][i] = through_A[half][i] = 0.0f;
#pragma unroll
            for (int s = 0; s < 4; s++) {
                const float rate = A[pass][half][s], here = fmaf(dy, C[half][s], g[pass][half][s]);
                gained[half][s] = here * gain(dt, decay[half][s], rate);
                through_B[half][i] = fmaf(gained[half][s], B[half][s], through_B[half][i]);
                if (B_FIXED) d_fixed_B[pass][half][s] = fmaf(in, gained[half][s], d_fixed_B[pass][half][s]);
                if (C_FIXED) d_fixed_C[pass][half][s] = fmaf(dy, h[half][s], d_fixed_C[pass][half][s]);
                g[pass][half][s] = decay[half][s] * here;
                const float x = g[pass][half][s] * last[half][s];
                through_A[half][i] = fmaf(x, rate, through_A[half][i]);
                d_A[pass][half][s] = fmaf(x, dt, d_A[pass][half][s]);
                if (ZOH) add_hold(through_A[half][i], d_A[pass][half][s], here * B[half][s] * in, dt, decay[half][s], rate);
            }
        }
    }

    // Through (exp(dt A) - 1) / A: its derivative is exp(dt A) in dt, and dt^2 (1/2 + x/3 + x^2/8 + ...) in A, x = dt A.
    // through_A is in units of log2.
    __device__ __forceinline__ void add_hold(
        float& through_A, float& d_A, float d_hold, float dt, float decay, float A_log2) const {
        through_A = fmaf(d_hold * LOG2_E, decay, through_A);
        const float x = dt * A_log2 * LN_2;
        float series = 10.0f / 39916800;
        series = fmaf(series, x, 9.0f / 3628800);
        series = fmaf(series, x, 8.0f / 362880);
        series = fmaf(series, x, 7.0f / 40320);
        series = fmaf(series, x, 6.0f / 5040);
        series = fmaf(series, x, 5.0f / 720);
        series = fmaf(series, x, 4.0f / 120);
        series = fmaf(series, x, 3.0f / 24);
        series = fmaf(series, x, 2.0f / 6);
        series = fmaf(series, x, 1.0f / 2);
        const float exact = (x * decay - (decay - 1.0f)) / (x * x);
        d_A = fmaf(d_hold * dt * dt, fabsf(x) < 1.0f ? series : exact, d_A);
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

    // The sums over states of a run: a lane has, of its two channels, the tokens column and column + 4. Of them is made what
    // comes through the states of the gradients of u and dt.
    __device__ __forceinline__ void keep_sums(
        Quarter& quarter, int first, const float (&sums_B)[SUB / 4][2], const float (&sums_A)[SUB / 4][2], int pass) const {
        float d_u[SUB / 4][2], d_dt[SUB / 4][2];
#pragma unroll
        for (int i = 0; i < SUB / 4; i++) {
            float steps[2][2];
            read_steps(steps, quarter, first + column + 4 * i);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                d_u[i][half] = ZOH ? sums_B[i][half] : sums_B[i][half] * steps[half][0];
                d_dt[i][half] = ZOH ? sums_A[i][half] : fmaf(sums_B[i][half], steps[half][1], sums_A[i][half]);
            }
        }
        sync_warp();  // all lanes have read what gives way
        const bool add = !IN_PLACE && pass > 0;
#pragma unroll
        for (int i = 0; i < SUB / 4; i++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float& to_u = quarter.d_u(first + column + 4 * i, place(half));
                float& to_dt = quarter.d_dt(first + column + 4 * i, place(half));
                to_u = add ? to_u + d_u[i][half] : d_u[i][half];
                to_dt = add ? to_dt + d_dt[i][half] : d_dt[i][half];
            }
    }

    // y of a run: a lane has, of its two channels, the tokens 2 column and the next.
    __device__ __forceinline__ void keep_y(Quarter& quarter, int first, const float (&y)[4], int pass) const {
        const bool add = !IN_PLACE && pass > 0;
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float& to = quarter.y(first + column * 2 + i, place(half));
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

    // ---- a piece --------------------------------------------------------------------------------------------------

    __device__ __forceinline__ void run() {
        for (int pass = 0; pass < PASSES; pass++) {
            if (p.pieces > 1) read_states(g[pass], p.piece_grad, piece_index(), pass);
            else read_states(g[pass], p.d_final, piece.sequence, pass);
        }
        sync_block();  // the first chunk is prepared
        for (Turn turn = {0}; turn.number < chunks() * QUARTERS * PASSES; turn.number++) {
            if (turn.is_first_of_pass()) {
                sync_block();  // what lies in the place of the notes has been read
                note_states(turn);
            }
#pragma unroll 1
            for (int sub = (turn.quarter() + 1) * QUARTER / SUB - 1; sub >= turn.quarter() * QUARTER / SUB; sub--)
                scan_run(sub, turn);
            sync_block();
        }
        if (piece.index == 0)
            for (int pass = 0; pass < PASSES; pass++) write_states(p.d_initial, g[pass], piece.sequence, pass);
    }

    __device__ __forceinline__ void summarize() {
        float time[2] = {0.0f, 0.0f};
        for (int pass = 0; pass < PASSES; pass++) read_states<float>(g[pass], nullptr, 0, pass);
        sync_block();
        for (Turn turn = {0}; turn.number < chunks() * QUARTERS * PASSES; turn.number++) {
            const Quarter& quarter = shared.quarters[turn.place(turn.quarter())];
            const Maps& maps = shared.maps[turn.maps_place(turn.quarter())];
            const int pass = turn.pass();
#pragma unroll 4
            for (int t = QUARTER - 1; t >= 0; t--) {
                States C;
                float steps[2][2], dys[2];
                read_map(C, maps.C[t], C_FIXED, fixed_C[pass]);
                read_steps(steps, quarter, t);
                read(dys, &quarter.dy[t][place(0)]);
#pragma unroll
                for (int half = 0; half < 2; half++) {
#pragma unroll
                    for (int s = 0; s < 4; s++) {
                        float& at = g[pass][half][s];
                        at = decay_over(steps[half][0], A[pass][half][s]) * fmaf(dys[half], C[half][s], at);
                    }
                    if (pass == 0) time[half] += steps[half][0];
                }
            }
            sync_block();
        }
        for (int pass = 0; pass < PASSES; pass++) write_states(p.piece_grad, g[pass], piece_index(), pass);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int c = channel_at(place(half));
            if (column == 0 && c < task.valid) p.piece_time[piece_index() * p.channels + task.first + c] = time[half];
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
        sync_block();
    }
};
