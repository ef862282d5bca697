// The selective scan backward. Windows of WINDOW tokens are gone through from the last to the first; in one, a task runs
// the recurrence again from the state that was kept, a few states at a time with all tokens of the window, notes their
// decays and states, and goes back over them:
//
//     g_t = C_t dy_t + decay_{t+1} g_{t+1}        d C_t = sum_d dy_t h_t        d B_t = sum_d dt_t u_t g_t
//     d (dt_t u_t) = sum_n B_t g_t                d (dt_t A) = decay_t g_t h_{t-1}
//
// Rows are served side by side, and so are pieces of one; the gradients of the states between these are found before.
// Sums over channels are kept as vectors while a block's vectors are served, then each is summed. The sums of tasks are
// added up in their order when a *slice* of windows is done: they take little memory, and no bit depends on threads.
#include "backward.hpp"

namespace {

// The sums over a block's channels of COUNT states, which stand from `first` on in a token's totals.
template <int COUNT>
void add_sums(Maps maps, int64 first, const float* vectors, int64 states, int tokens) {
    for (int i = 0; i < tokens * COUNT; i += LANES) {
        float some[LANES];
        store(some, sums(vectors + i * LANES));
        for (int j = 0; j < LANES && i + j < tokens * COUNT; j++) {
            float* total = maps.totals + (i + j) / COUNT * 2 * states + first + (i + j) % COUNT;
            *total = maps.is_first ? some[j] : *total + some[j];
        }
    }
}

// Sends for what lies a window before the segment: of its tokens a share, `done` to `done + count` of N block.vectors.
void fetch_before(const Backward& call, const Block& block, const Segment& segment, int64 done, int count) {
    const int64 all = call.scan.states * block.vectors, from = segment.from - WINDOW;
    const int64 first = from + done * WINDOW / all, last = from + (done + count) * WINDOW / all;
    fetch(call.scan, block, segment.batch, first, static_cast<int>(last - first));
    for (int64 q = first < 0 ? 0 : first; q < last; q++) {
        fetch(call.d_out, call.d_out.at(segment.batch, call.scan.token(q)) + block.first, block.count);
    }
}

template <bool GENERAL, int COUNT>
void go_through(const Backward& call, const Work& work, const Block& block, const Segment& segment, int64 n, Maps maps) {
    const Scan& scan = call.scan;
    const Map B(scan.B_fixed ? work.fixed_B : work.B, scan.B_fixed, scan);
    const Map C(scan.C_fixed ? work.fixed_C : work.C, scan.C_fixed, scan);
    const int tokens = static_cast<int>(segment.tokens());
    for (int v = 0; v < block.vectors; v++) {
        fetch_before(call, block, segment, n * block.vectors + v * COUNT, COUNT);
        const Pass<GENERAL, COUNT> pass{scan, work, block, B, C, n, v, v * LANES, tokens};
        pass.forward();
        pass.backward();
    }
    if (!scan.B_fixed) add_sums<COUNT>(maps, n, work.sums_B, scan.states, tokens);
    if (!scan.C_fixed) add_sums<COUNT>(maps, scan.states + n, work.sums_C, scan.states, tokens);
}

template <bool GENERAL>
void go_through(const Backward& call, const Work& work, const Block& block, const Segment& segment, Maps maps) {
    int64 n = 0;
    for (; n + STATES <= call.scan.states; n += STATES) {
        go_through<GENERAL, STATES>(call, work, block, segment, n, maps);
    }
    for (; n < call.scan.states; n++) go_through<GENERAL, 1>(call, work, block, segment, n, maps);
}

// Arguments by value, as forward.
void prepare(const Backward call, const Work work, const Block block, const Segment segment) {
    const Scan& scan = call.scan;
    const int tokens = static_cast<int>(segment.tokens());
    for (int t = 0; t < tokens; t++) {
        const int64 token = scan.token(segment.from + t);
        for (int v = 0; v < block.vectors; v++) {
            const int lanes = block.lanes(v);
            const int64 channel = block.first + v * LANES;
            const Floats step = step_of(scan, raw_step(scan, block, v, segment.batch, token));
            const Floats u = load(scan.u, scan.u.at(segment.batch, token) + channel, lanes);
            const Floats d_out = load(call.d_out, call.d_out.at(segment.batch, token) + channel, lanes);
            const Floats dy = gated(scan, block, v, segment.batch, token, d_out);
            float* here = work.token(v, t);
            store(here + STEP * LANES, step);
            store(here + U * LANES, u);
            store(here + D_Y * LANES, dy);
        }
    }
    if (!scan.B_fixed) load_map(work.B, scan, scan.B, block.group, segment.batch, segment.from, tokens);
    if (!scan.C_fixed) load_map(work.C, scan, scan.C, block.group, segment.batch, segment.from, tokens);
}

// The gradients of u, delta and z from the sums over states, and the sums over tokens of those of D and the bias.
void finish(const Backward call, const Work work, const Block block, const Segment segment) {
    const Scan& scan = call.scan;
    const int tokens = static_cast<int>(segment.tokens());
    for (int v = 0; v < block.vectors; v++) {
        const int lanes = block.lanes(v);
        const int64 channel = block.first + v * LANES;
        const Floats D = scan.D == nullptr ? zeros() : load(scan.D + channel, lanes);
        Floats d_D = zeros(), d_bias = zeros();
        for (int t = 0; t < tokens; t++) {
            const int64 token = scan.token(segment.from + t);
            const float* here = work.token(v, t);
            const Floats dy = load(here + D_Y * LANES), u = load(here + U * LANES);
            const Floats d_drive = load(here + D_DRIVE * LANES);
            Floats d_u = load(here + STEP * LANES) * d_drive, d_raw = load(here + D_STEP * LANES);
            if (!scan.zoh) d_raw = fma(u, d_drive, d_raw);
            if (scan.softplus) d_raw = d_raw * sigmoid(raw_step(scan, block, v, segment.batch, token));
            if (scan.D != nullptr) d_u = fma(D, dy, d_u);
            d_D = fma(dy, u, d_D);
            d_bias = d_bias + d_raw;
            store(call.d_u, call.d_u.at(segment.batch, token) + channel, d_u, lanes);
            store(call.d_delta, call.d_delta.at(segment.batch, token) + channel, d_raw, lanes);
            if (scan.z.data == nullptr) continue;
            Floats y = load(here + Y * LANES);
            if (scan.D != nullptr) y = fma(D, u, y);
            const Floats z = load(scan.z, scan.z.at(segment.batch, token) + channel, lanes), gate = sigmoid(z);
            const Floats slope = gate * fma(z, splat(1) - gate, splat(1));
            const Floats d_out = load(call.d_out, call.d_out.at(segment.batch, token) + channel, lanes);
            store(call.d_z, call.d_z.at(segment.batch, token) + channel, d_out * y * slope, lanes);
        }
        float* totals = work.d_channels + block.place + v * LANES;
        store(totals, load(totals) + d_D);
        store(totals + scan.stride(), load(totals + scan.stride()) + d_bias);
    }
}

// One block and segment; `maps` are the sums over channels at its first token.
void run(const Backward& call, const Work& work, const Block& block, const Segment& segment, Maps maps) {
    const Scan& scan = call.scan;
    const int64 states = scan.states, of_row = segment.row(scan) * scan.channels * states;
    if (!segment.begins) {
        const int64 window = segment.batch * ((scan.length - 1) / WINDOW) + segment.from / WINDOW - 1;
        copy_in(work.state, call.kept + window * states * scan.stride(), block, states, scan.stride());
    } else if (scan.initial != nullptr) {
        load_states(work.state, scan.initial + of_row, block, states);
    } else {
        zero_states(work.state, block, states);
    }
    if (segment.ends && call.d_final != nullptr) {
        load_states(work.carry, call.d_final + of_row, block, states);
    } else if (segment.ends) {
        zero_states(work.carry, block, states);
    } else if (segment.to % scan.piece == 0) {
        copy_in(work.carry, scan.handed_at(segment.batch, segment.to / scan.piece - 1), block, states, scan.stride());
    }
    prepare(call, work, block, segment);
    if (scan.zoh || scan.B_fixed || scan.C_fixed) {
        go_through<true>(call, work, block, segment, maps);
    } else {
        go_through<false>(call, work, block, segment, maps);
    }
    finish(call, work, block, segment);
    if (segment.begins && call.d_initial != nullptr) store_states(call.d_initial + of_row, work.carry, block, states);
}

// A window of a row, in which several sequences may lie: from the last to the first.
void run_window(const Backward& call, const Work& work, const Block& block, int64 batch, int64 window, Maps maps) {
    const Scan& scan = call.scan;
    const int64 from = window * WINDOW, to = least(from + WINDOW, scan.length);
    for (int64 i = scan.last_before(to); i >= 0; i--) {
        const Segment segment(scan, batch, scan.in_order(i), from, to);
        if (segment.to <= from) break;
        if (segment.tokens() <= 0) continue;
        run(call, work, block, segment, {maps.totals + (segment.from - from) * 2 * scan.states, maps.is_first});
    }
}

// The windows of a part, the last first, in slices.
struct Slice {
    int64 row, before, windows;  // the part's first row; of each row the windows before the piece, and those of it
    int64 first, count;  // of the part's windows those of the slice

    Slice(const Backward& call, int64 part, int64 index) {
        const int64 pieces = call.scan.pieces(), rows = part / pieces, piece = part % pieces;
        row = call.first_row(rows);
        before = call.windows_before(piece), windows = call.windows_before(piece + 1) - before;
        const int64 end = (call.first_row(rows + 1) - row) * windows - index * call.slice;
        count = least(end, call.slice);
        first = end - count;
    }
    int64 batch(int64 i) const { return row + (first + count - 1 - i) / windows; }
    int64 window(int64 i) const { return before + (first + count - 1 - i) % windows; }
};

// All blocks of a task, each through a slice.
void run_slice(const Backward& call, int64 part, int64 task, int64 index, float* memory) {
    const Scan& scan = call.scan;
    const Work work(call, part, memory);
    const Slice slice(call, part, index);
    const int64 states = scan.states, stride = scan.stride(), blocks = scan.group_blocks();
    const int64 group = task / call.group_tasks, inside = task % call.group_tasks;
    const int64 from = inside * blocks / call.group_tasks, to = (inside + 1) * blocks / call.group_tasks;
    for (int64 i = from; i < to; i++) {
        const Block block(scan, group * blocks + i);
        load_states(work.rates, scan.rates, block, states);
        copy_in(work.carry, work.carried, block, states, stride);
        if (scan.B_fixed) load_fixed_map(work.fixed_B, scan.B, block, states);
        if (scan.C_fixed) load_fixed_map(work.fixed_C, scan.C, block, states);
        for (int64 k = 0; k < slice.count; k++) {
            run_window(call, work, block, slice.batch(k), slice.window(k), {call.map_part(part, task, k), i == from});
        }
        copy_out(work.carried, work.carry, block, states, stride);
    }
}

// The gradient of a map at a token of a group: the sum over tasks.
void add_parts(const Backward& call, const Rows& map, const float* parts, int64 at, int64 group) {
    const int64 states = call.scan.states, task_stride = call.map_part(0, 1, 0) - call.map_part(0, 0, 0);
    parts += group * call.group_tasks * task_stride;
    for (int64 n = 0; n < states; n += LANES) {
        const int lanes = static_cast<int>(states - n);
        Floats total = load(parts + n, lanes);
        for (int64 i = 1; i < call.group_tasks; i++) total = total + load(parts + i * task_stride + n, lanes);
        store(map, at + group * map.group + n, total, lanes);
    }
}

void add_window(const Backward& call, int64 part, int64 index, int64 i) {
    const Scan& scan = call.scan;
    const Slice slice(call, part, index);
    if (i >= slice.count) return;
    const int64 batch = slice.batch(i), first = slice.window(i) * WINDOW;
    for (int64 t = 0; t < WINDOW && first + t < scan.length; t++) {
        const float* parts = call.map_part(part, 0, i) + t * 2 * scan.states;
        const int64 token = scan.token(first + t);
        for (int64 group = 0; group < scan.groups; group++) {
            if (!scan.B_fixed) add_parts(call, call.d_B, parts, call.d_B.at(batch, token), group);
            if (!scan.C_fixed) add_parts(call, call.d_C, parts + scan.states, call.d_C.at(batch, token), group);
        }
    }
}

}  // namespace

KERNEL(selective_scan_backward)(const void* parameters) {
    const Backward& call = *static_cast<const Backward*>(parameters);
    const Scan& scan = call.scan;
    const int threads = static_cast<int>(scan.threads);
    const int64 tasks = call.tasks(), rows = call.parts / scan.pieces();  // of parts, side by side
    const int64 most_windows = (scan.batch + rows - 1) / rows * call.windows_before(1);
    for (int64 index = 0; index * call.slice < most_windows; index++) {
        parallel_for(call.parts * tasks, threads, [&](int64 i, int worker) {
            run_slice(call, i / tasks, i % tasks, index, scan.scratch + worker * scan.worker_scratch);
        });
        if (scan.B_fixed && scan.C_fixed) continue;
        parallel_for(call.parts * call.slice, threads, [&](int64 i, int) {
            add_window(call, i / call.slice, index, i % call.slice);
        });
    }
}
