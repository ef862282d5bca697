// The selective scan forward. A task serves one block of channels of one sequence in one piece, tile after tile: step
// sizes and inputs of a tile in fp32, then the recurrence, a few states at a time with all tokens of the tile, then
// skip, gate, rounding.
#include "scan.hpp"

namespace {

constexpr int STEPS = 32;  // tokens of a tile
constexpr int STATES = 4;  // that are advanced together, in registers

struct Forward {
    Scan scan;
    Rows out;
    float *final, *kept;  // the latter may be absent: (B, (L - 1) / WINDOW, N, scan.stride())
};

// The vectors that a tile has of each token.
enum { STEP, DRIVE, Y, VECTORS_OF_TOKEN };  // dt, dt u, C h

// What a worker holds of a block; N = scan.states.
struct Tile {
    float* tokens;  // (width / LANES, STEPS, VECTORS_OF_TOKEN) vectors
    float *B, *C;  // (STEPS, N)
    float *rates, *state, *fixed_B, *fixed_C;  // (N, width)

    Tile(float* memory, const Scan& scan) {
        const auto take = [&](int64 count) { memory += count; return memory - count; };
        const int64 map = STEPS * scan.states, matrix = scan.states * scan.width;
        tokens = take(STEPS * scan.width * VECTORS_OF_TOKEN);
        B = take(map), C = take(map);
        rates = take(matrix), state = take(matrix), fixed_B = take(matrix), fixed_C = take(matrix);
    }
    float* token(int v, int t) const { return tokens + (v * STEPS + t) * VECTORS_OF_TOKEN * LANES; }
};

// STATES states of a vector of channels over a tile; y is added to unless they are the first.
template <bool GENERAL, int COUNT>
inline void advance(const Scan& scan, const Tile& tile, Map B, Map C, int64 n, int v, int tokens) {
    const int channel = v * LANES;
    Floats rate[COUNT], h[COUNT];
    for (int i = 0; i < COUNT; i++) {
        rate[i] = load(tile.rates + (n + i) * scan.width + channel);
        h[i] = load(tile.state + (n + i) * scan.width + channel);
    }
    float* token = tile.token(v, 0);
    for (int t = 0; t < tokens; t++, token += VECTORS_OF_TOKEN * LANES) {
        const Floats step = load(token + STEP * LANES), drive = load(token + DRIVE * LANES);
        Floats y = zeros();
        for (int i = 0; i < COUNT; i++) {
            const Floats exponent = step * rate[i], decay = decay_of(exponent);
            Floats input = drive * B.get<GENERAL>(t, n + i, channel);
            if (GENERAL && scan.zoh) input = input * hold(exponent, decay);
            h[i] = fma_once(decay, h[i], input);
            y = fma(h[i], C.get<GENERAL>(t, n + i, channel), y);
        }
        store(token + Y * LANES, n == 0 ? y : load(token + Y * LANES) + y);
    }
    for (int i = 0; i < COUNT; i++) store(tile.state + (n + i) * scan.width + channel, h[i]);
}

template <bool GENERAL>
inline void advance(const Scan& scan, const Tile& tile, const Block& block, int64 batch, int64 next, int tokens) {
    const Map B(scan.B_fixed ? tile.fixed_B : tile.B, scan.B_fixed, scan);
    const Map C(scan.C_fixed ? tile.fixed_C : tile.C, scan.C_fixed, scan);
    for (int v = 0; v < block.vectors; v++) {
        fetch(scan, block, batch, next + v * STEPS / block.vectors, (STEPS + block.vectors - 1) / block.vectors);
        int64 n = 0;
        for (; n + STATES <= scan.states; n += STATES) advance<GENERAL, STATES>(scan, tile, B, C, n, v, tokens);
        for (; n < scan.states; n++) advance<GENERAL, 1>(scan, tile, B, C, n, v, tokens);
    }
}

// Arguments by value: a store might change what a reference refers to, for all that compilers know.
void prepare(const Scan scan, const Tile tile, const Block block, int64 batch, int64 place, int tokens) {
    for (int t = 0; t < tokens; t++) {
        const int64 token = scan.token(place + t), u = scan.u.at(batch, token) + block.first;
        for (int v = 0; v < block.vectors; v++) {
            const Floats step = step_of(scan, raw_step(scan, block, v, batch, token));
            store(tile.token(v, t) + STEP * LANES, step);
            store(tile.token(v, t) + DRIVE * LANES, step * load(scan.u, u + v * LANES, block.lanes(v)));
        }
    }
    if (!scan.B_fixed) load_map(tile.B, scan, scan.B, block.group, batch, place, tokens);
    if (!scan.C_fixed) load_map(tile.C, scan, scan.C, block.group, batch, place, tokens);
}

void finish(const Forward call, const Tile tile, const Block block, int64 batch, int64 place, int tokens) {
    const Scan& scan = call.scan;
    for (int t = 0; t < tokens; t++) {
        const int64 token = scan.token(place + t);
        for (int v = 0; v < block.vectors; v++) {
            const int64 channel = block.first + v * LANES;
            const int lanes = block.lanes(v);
            Floats y = load(tile.token(v, t) + Y * LANES);
            if (scan.D != nullptr) {
                const Floats u = load(scan.u, scan.u.at(batch, token) + channel, lanes);
                y = fma(load(scan.D + channel, lanes), u, y);
            }
            y = gated(scan, block, v, batch, token, y);
            store(call.out, call.out.at(batch, token) + channel, y, lanes);
        }
    }
}

void run(const Forward& call, const Block& block, const Segment& segment, float* memory) {
    const Scan& scan = call.scan;
    const int64 batch = segment.batch, states = scan.states, of_row = segment.row(scan) * scan.channels * states;
    const Tile tile(memory, scan);
    load_states(tile.rates, scan.rates, block, states);
    if (!segment.begins) {
        copy_in(tile.state, scan.handed_at(batch, segment.from / scan.piece - 1), block, states, scan.stride());
    } else if (scan.initial != nullptr) {
        load_states(tile.state, scan.initial + of_row, block, states);
    } else {
        zero_states(tile.state, block, states);
    }
    if (scan.B_fixed) load_fixed_map(tile.fixed_B, scan.B, block, states);
    if (scan.C_fixed) load_fixed_map(tile.fixed_C, scan.C, block, states);
    const int64 windows = (scan.length - 1) / WINDOW;
    for (int64 place = segment.from, next; place < segment.to; place = next) {
        next = least((place / STEPS + 1) * STEPS, segment.to);
        if (call.kept != nullptr && place % WINDOW == 0 && !(segment.begins && place == segment.from)) {
            const int64 window = batch * windows + place / WINDOW - 1;
            copy_out(call.kept + window * states * scan.stride(), tile.state, block, states, scan.stride());
        }
        const int tokens = static_cast<int>(next - place);
        prepare(scan, tile, block, batch, place, tokens);
        if (scan.zoh || scan.B_fixed || scan.C_fixed) {
            advance<true>(scan, tile, block, batch, next, tokens);
        } else {
            advance<false>(scan, tile, block, batch, next, tokens);
        }
        finish(call, tile, block, batch, place, tokens);
    }
    if (segment.ends) store_states(call.final + of_row, tile.state, block, states);
}

// What is to be run of a row, numbered: the next sequence and the next piece each raise the number by one, so that some
// slots have nothing. An empty sequence has one: its final state is its initial one.
int64 slots(const Scan& scan) { return scan.sequences + scan.pieces() - 1; }

void run_slot(const Forward& call, const Block& block, int64 batch, int64 slot, float* memory) {
    const Scan& scan = call.scan;
    const int64 i = scan.last([&](int64 i) { return i + scan.piece_of(scan.begin(scan.in_order(i))) <= slot; });
    const int64 low = (slot - i) * scan.piece;
    const Segment segment(scan, batch, scan.in_order(i), low, low + scan.piece);
    if (segment.tokens() > 0 || (segment.begins && segment.ends)) run(call, block, segment, memory);
}

}  // namespace

KERNEL(selective_scan_forward)(const void* parameters) {
    const Forward& call = *static_cast<const Forward*>(parameters);
    const Scan& scan = call.scan;
    const int64 blocks = scan.blocks();
    const auto task = [&](int64 index, int worker) {
        const int64 row = index / blocks;
        float* memory = scan.scratch + worker * scan.worker_scratch;
        run_slot(call, Block(scan, index % blocks), row / slots(scan), row % slots(scan), memory);
    };
    parallel_for(scan.batch * slots(scan) * blocks, static_cast<int>(scan.threads), task);
}
