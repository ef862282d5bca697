// The states between pieces, without which these would have to wait for each other. The recurrence is linear:
//
//     h at the end = (what inputs make of zero) + exp(A sum dt) (h at the beginning)
//
// so the first term and the sum are found for all pieces side by side, and then one state after the other. Going
// backward the states are gradients c of states, and a piece goes from its last token to its first:
//
//     c_{t-1} = decay_t (c_t + C_t dy_t)
#include "scan.hpp"

namespace {

constexpr int STEPS = 32;  // tokens of a tile
constexpr int STATES = 4;  // that are advanced together, in registers

struct HandOver {
    Scan scan;  // finds scan.handed
    Rows d_out;  // absent going forward
    const float* d_final;  // may be absent
    float* steps;  // (B, pieces - 1, scan.stride()): of dt the sums over pieces

    bool backward() const { return d_out.data != nullptr; }
    const Rows& map() const { return backward() ? scan.C : scan.B; }
    bool fixed() const { return backward() ? scan.C_fixed : scan.B_fixed; }
    const float* outermost() const { return backward() ? d_final : scan.initial; }

    // What the state at a border comes from: of the sequence that lies on both sides, if any does, the piece before it.
    Segment before(int64 batch, int64 border) const {
        const int64 place = (border + 1) * scan.piece, sequence = scan.in_order(scan.last_before(place));
        if (scan.end(sequence) <= place) return Segment(scan, batch, sequence, place, place);
        return backward() ? Segment(scan, batch, sequence, place, place + scan.piece)
                          : Segment(scan, batch, sequence, place - scan.piece, place);
    }
    // Whether that piece begins with the sequence's outermost state, and so waits for no other.
    bool is_outermost(const Segment& segment) const { return backward() ? segment.ends : segment.begins; }
    float* steps_at(int64 batch, int64 border) const {
        return steps + (batch * (scan.pieces() - 1) + border) * scan.stride();
    }
};

// The vectors that a tile has of each token: dt, and what its map is multiplied with, dt u or dy.
enum { STEP, DRIVE, VECTORS_OF_TOKEN };

// What a worker holds of a block; N = scan.states.
struct Tile {
    float* tokens;  // (width / LANES, STEPS, VECTORS_OF_TOKEN) vectors
    float* map;  // (STEPS, N)
    float *rates, *state, *fixed;  // (N, width)

    Tile(float* memory, const Scan& scan) {
        const auto take = [&](int64 count) { memory += count; return memory - count; };
        const int64 matrix = scan.states * scan.width;
        tokens = take(STEPS * scan.width * VECTORS_OF_TOKEN);
        map = take(STEPS * scan.states);
        rates = take(matrix), state = take(matrix), fixed = take(matrix);
    }
    float* token(int v, int t) const { return tokens + (v * STEPS + t) * VECTORS_OF_TOKEN * LANES; }
};

// Some tokens of a segment in the order in which they are gone through; adds their steps to `total`, those of a tile
// first: of thousands that are alike each alone would be rounded to the same side. Arguments by value, as forward.
void prepare(const HandOver call, const Tile tile, const Block block, const Segment segment, int64 done, int tokens,
             float* total) {
    const Scan& scan = call.scan;
    for (int t = 0; t < tokens; t++) {
        const int64 place = call.backward() ? segment.to - 1 - done - t : segment.from + done + t;
        const int64 token = scan.token(place);
        const Rows& source = call.backward() ? call.d_out : scan.u;
        for (int v = 0; v < block.vectors; v++) {
            const Floats step = step_of(scan, raw_step(scan, block, v, segment.batch, token));
            const Floats x = load(source, source.at(segment.batch, token) + block.first + v * LANES, block.lanes(v));
            const Floats drive = call.backward() ? gated(scan, block, v, segment.batch, token, x) : step * x;
            store(tile.token(v, t) + STEP * LANES, step);
            store(tile.token(v, t) + DRIVE * LANES, drive);
        }
        if (call.fixed()) continue;
        load_map(tile.map + t * scan.states, scan, call.map(), block.group, segment.batch, place, 1);
    }
    for (int v = 0; v < block.vectors; v++) {
        Floats sum = zeros();
        for (int t = 0; t < tokens; t++) sum = sum + load(tile.token(v, t) + STEP * LANES);
        store(total + v * LANES, load(total + v * LANES) + sum);
    }
}

// STATES states of a vector of channels over a tile.
template <int COUNT>
inline void advance(const HandOver& call, const Tile& tile, Map map, int64 n, int v, int tokens) {
    const Scan& scan = call.scan;
    const bool backward = call.backward(), zoh = scan.zoh;
    const int channel = v * LANES;
    Floats rate[COUNT], h[COUNT];
    for (int i = 0; i < COUNT; i++) {
        rate[i] = load(tile.rates + (n + i) * scan.width + channel);
        h[i] = load(tile.state + (n + i) * scan.width + channel);
    }
    const float* token = tile.token(v, 0);
    for (int t = 0; t < tokens; t++, token += VECTORS_OF_TOKEN * LANES) {
        const Floats step = load(token + STEP * LANES), drive = load(token + DRIVE * LANES);
        for (int i = 0; i < COUNT; i++) {
            const Floats exponent = step * rate[i], decay = decay_of(exponent);
            Floats input = drive * map.get<true>(t, n + i, channel);
            if (backward) {
                input = input * decay;
            } else if (zoh) {
                input = input * hold(exponent, decay);
            }
            h[i] = fma_once(decay, h[i], input);
        }
    }
    for (int i = 0; i < COUNT; i++) store(tile.state + (n + i) * scan.width + channel, h[i]);
}

// The state that a piece ends with, from the sequence's outermost state or else from zero.
void run(const HandOver& call, const Block& block, int64 batch, int64 border, float* memory) {
    const Scan& scan = call.scan;
    const Segment segment = call.before(batch, border);
    if (segment.tokens() <= 0) return;
    const int64 states = scan.states, stride = scan.stride();
    const Tile tile(memory, scan);
    load_states(tile.rates, scan.rates, block, states);
    if (call.is_outermost(segment) && call.outermost() != nullptr) {
        load_states(tile.state, call.outermost() + segment.row(scan) * scan.channels * states, block, states);
    } else {
        zero_states(tile.state, block, states);
    }
    if (call.fixed()) load_fixed_map(tile.fixed, call.map(), block, states);
    const Map map(call.fixed() ? tile.fixed : tile.map, call.fixed(), scan);
    float* total = call.steps_at(batch, border) + block.place;
    for (int v = 0; v < block.vectors; v++) store(total + v * LANES, zeros());
    for (int64 done = 0; done < segment.tokens(); done += STEPS) {
        const int tokens = static_cast<int>(least(STEPS, segment.tokens() - done));
        prepare(call, tile, block, segment, done, tokens, total);
        for (int v = 0; v < block.vectors; v++) {
            int64 n = 0;
            for (; n + STATES <= states; n += STATES) advance<STATES>(call, tile, map, n, v, tokens);
            for (; n < states; n++) advance<1>(call, tile, map, n, v, tokens);
        }
    }
    copy_out(scan.handed_at(batch, border), tile.state, block, states, stride);
}

// made + decay^2 h: the root is taken so that neither overflows where the product does not. Nothing grows out of 0.
INLINE Floats handed_on(Floats made, Floats root, Floats h)
    EACH(Floats, h.at[i] == 0.0f ? made.at[i] : fma(root.at[i], root.at[i] * h.at[i], made.at[i]))

// Adds to what pieces made of zero what they make of the states that they begin with.
void hand_on(const HandOver& call, const Block& block, int64 batch, float* memory) {
    const Scan& scan = call.scan;
    const Tile tile(memory, scan);
    load_states(tile.rates, scan.rates, block, scan.states);
    const int64 borders = scan.pieces() - 1, stride = scan.stride();
    for (int64 i = 1; i < borders; i++) {
        const int64 border = call.backward() ? borders - 1 - i : i;
        const Segment segment = call.before(batch, border);
        if (segment.tokens() <= 0 || call.is_outermost(segment)) continue;
        const float* from = scan.handed_at(batch, call.backward() ? border + 1 : border - 1) + block.place;
        float* to = scan.handed_at(batch, border) + block.place;
        const float* steps = call.steps_at(batch, border) + block.place;
        for (int64 n = 0; n < scan.states; n++) {
            for (int at = 0; at < block.vectors * LANES; at += LANES) {
                const Floats rate = load(tile.rates + n * scan.width + at) * splat(0.5f);
                const Floats root = decay_of(load(steps + at) * rate);
                store(to + n * stride + at, handed_on(load(to + n * stride + at), root, load(from + n * stride + at)));
            }
        }
    }
}

}  // namespace

KERNEL(selective_scan_hand_over)(const void* parameters) {
    const HandOver& call = *static_cast<const HandOver*>(parameters);
    const Scan& scan = call.scan;
    const int threads = static_cast<int>(scan.threads);
    const int64 blocks = scan.blocks(), borders = scan.pieces() - 1;
    parallel_for(scan.batch * borders * blocks, threads, [&](int64 i, int worker) {
        const int64 border = i / blocks;
        float* memory = scan.scratch + worker * scan.worker_scratch;
        run(call, Block(scan, i % blocks), border / borders, border % borders, memory);
    });
    parallel_for(scan.batch * blocks, threads, [&](int64 i, int worker) {
        hand_on(call, Block(scan, i % blocks), i / blocks, scan.scratch + worker * scan.worker_scratch);
    });
}
