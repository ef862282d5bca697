// What the scan's passes over a sequence share: their arguments, who serves what, and tiles of it in fp32.
//
// Legend: D channels in G groups, N states, S sequences in a row. A *block* is up to `width` neighbouring channels of
// one group, a *piece* so many neighbouring tokens of a row: what one task serves. Tokens are counted as they are
// scanned: `place` q of a row is token q, in reverse token L - 1 - q. What a block has of a state is a matrix (N, width).
// Channels that do not exist are zero in all vectors, and their states stay 0.
#pragma once

#include "maths.hpp"
#include "parallel.hpp"
#include "vector.hpp"

namespace {

constexpr int WINDOW = 128;  // tokens between two states that are kept for the backward pass, as cpu_plan.py has it

// Where the rows of a (B, L, D) or (B, L, G, N) tensor lie, strides in numbers; of a (D, N) one only the address counts.
struct Rows {
    void* data;
    int64 batch, row, group;
    int64 number;  // of type Number

    int64 at(int64 b, int64 token) const { return b * batch + token * row; }
};

struct Scan {
    Rows u, delta, z, B, C;  // z may be absent
    const float *rates, *D, *delta_bias, *initial;  // A (D, N), the states (B or S, D, N); all but A may be absent
    const int64* offsets;  // (S + 1,) of a row's sequences
    float* scratch;
    float* handed;  // (B, pieces - 1, N, stride), from handover.cpp: the states between pieces, or their gradients
    int64 worker_scratch;  // numbers for each worker
    int64 batch, length, channels, groups, states, sequences;
    int64 softplus, zoh, B_fixed, C_fixed, reverse, threads;
    int64 width, piece;  // channels of a block, whole vectors; tokens of a piece of the length, whole windows

    int64 token(int64 place) const { return reverse ? length - 1 - place : place; }

    // The places of sequence s, from the first to before the last.
    int64 begin(int64 s) const { return reverse ? length - offsets[s + 1] : offsets[s]; }
    int64 end(int64 s) const { return reverse ? length - offsets[s] : offsets[s + 1]; }

    // Sequences in the order in which they are scanned, and the last of them for which something holds that holds for
    // all before it.
    int64 in_order(int64 i) const { return reverse ? sequences - 1 - i : i; }
    template <class F>
    int64 last(F holds) const {
        int64 low = 0, high = sequences;
        while (low < high) {
            const int64 middle = (low + high) / 2;
            if (holds(middle)) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return low - 1;
    }
    int64 last_before(int64 place) const {
        return last([&](int64 i) { return begin(in_order(i)) < place; });
    }

    // Pieces of a row, which of them has a place, and the state between two of them.
    int64 pieces() const { return (length + piece - 1) / piece; }
    int64 piece_of(int64 place) const { return least(place / piece, pieces() - 1); }
    float* handed_at(int64 batch, int64 border) const {
        return handed + (batch * (pieces() - 1) + border) * states * stride();
    }

    // Channels as the library's own memory has them: each group filled up to whole vectors.
    int64 group_channels() const { return channels / groups; }
    int64 group_stride() const { return (group_channels() + LANES - 1) / LANES * LANES; }
    int64 stride() const { return groups * group_stride(); }
    int64 group_blocks() const { return (group_channels() + width - 1) / width; }
    int64 blocks() const { return groups * group_blocks(); }
};

INLINE Floats load(const Rows& x, int64 at, int count) {
    return x.number == BF16 ? load(static_cast<const bf16*>(x.data) + at, count)
                            : load(static_cast<const float*>(x.data) + at, count);
}
INLINE void store(const Rows& x, int64 at, Floats value, int count) {
    if (x.number == BF16) {
        store(static_cast<bf16*>(x.data) + at, value, count);
    } else {
        store(static_cast<float*>(x.data) + at, value, count);
    }
}

// Sends for numbers that will be read soon: rows lie far apart, and no processor guesses the next one.
INLINE void fetch(const Rows& x, int64 at, int count) {
    const int64 size = x.number == BF16 ? 2 : 4;
    const char* from = static_cast<const char*>(x.data) + at * size;
    for (int64 i = 0; i < count * size; i += 64) __builtin_prefetch(from + i);
}

// The places of one sequence between two others.
struct Segment {
    int64 batch, sequence, from, to;
    bool begins, ends;  // the sequence

    Segment(const Scan& scan, int64 batch, int64 sequence, int64 low, int64 high) : batch(batch), sequence(sequence) {
        const int64 begin = scan.begin(sequence), end = scan.end(sequence);
        from = most(begin, low), to = least(end, high);
        begins = from == begin, ends = to == end;
    }
    int64 tokens() const { return to - from; }
    int64 row(const Scan& scan) const { return batch * scan.sequences + sequence; }  // of the states (B or S, D, N)
};

// Up to `width` channels of a group.
struct Block {
    int64 group, first, place;  // its first channel, and where that is in memory of the library's own
    int64 width;  // of its matrices
    int count, vectors;

    Block(const Scan& scan, int64 index) : width(scan.width) {
        group = index / scan.group_blocks();
        const int64 inside = index % scan.group_blocks() * width, left = scan.group_channels() - inside;
        first = group * scan.group_channels() + inside;
        place = group * scan.group_stride() + inside;
        count = static_cast<int>(least(left, width));
        vectors = (count + LANES - 1) / LANES;
    }

    int lanes(int vector) const { return count - vector * LANES; }  // may be more than LANES
};

// (N, width) <- the block's channels of a (D, N) matrix.
inline void load_states(float* to, const float* from, const Block& block, int64 states) {
    for (int v = 0; v < block.vectors; v++) {
        const float* rows = from + (block.first + v * LANES) * states;
        for (int64 n = 0; n < states; n++) {
            store(to + n * block.width + v * LANES, gather(rows + n, states, block.lanes(v)));
        }
    }
}
inline void store_states(float* to, const float* from, const Block& block, int64 states) {
    for (int v = 0; v < block.vectors; v++) {
        float* rows = to + (block.first + v * LANES) * states;
        for (int64 n = 0; n < states; n++) {
            scatter(rows + n, states, load(from + n * block.width + v * LANES), block.lanes(v));
        }
    }
}
inline void zero_states(float* to, const Block& block, int64 states) {
    for (int64 i = 0; i < states * block.width; i += LANES) store(to + i, zeros());
}

// (N, width) <-> N rows of the library's own memory, which has whole vectors.
inline void copy_in(float* to, const float* from, const Block& block, int64 states, int64 stride) {
    for (int64 n = 0; n < states; n++) {
        for (int v = 0; v < block.vectors; v++) {
            store(to + n * block.width + v * LANES, load(from + n * stride + block.place + v * LANES));
        }
    }
}
inline void copy_out(float* to, const float* from, const Block& block, int64 states, int64 stride) {
    for (int64 n = 0; n < states; n++) {
        for (int v = 0; v < block.vectors; v++) {
            store(to + n * stride + block.place + v * LANES, load(from + n * block.width + v * LANES));
        }
    }
}

// B or C in fp32: (tokens, N) that all channels of a group share, or (N, width) for all time.
struct Map {
    const float* at;
    int64 token, state;
    bool fixed;

    Map(const float* at, bool fixed, const Scan& scan)
        : at(at), token(fixed ? 0 : scan.states), state(fixed ? scan.width : 1), fixed(fixed) {}

    template <bool FIXED>
    INLINE Floats get(int64 t, int64 n, int channel) const {
        if constexpr (!FIXED) return splat(at[t * token + n]);
        const float* here = at + t * token + n * state;
        return fixed ? load(here + channel) : splat(*here);
    }
};

inline void load_fixed_map(float* to, const Rows& map, const Block& block, int64 states) {
    for (int64 n = 0; n < states; n++) {
        for (int v = 0; v < block.vectors; v++) {
            const int64 at = (block.first + v * LANES) * states + n;
            const Floats values = map.number == BF16
                                      ? gather(static_cast<const bf16*>(map.data) + at, states, block.lanes(v))
                                      : gather(static_cast<const float*>(map.data) + at, states, block.lanes(v));
            store(to + n * block.width + v * LANES, values);
        }
    }
}

// The tokens at `count` places from `place` on.
inline void load_map(float* to, const Scan& scan, const Rows& map, int64 group, int64 batch, int64 place, int count) {
    for (int t = 0; t < count; t++) {
        const int64 row = map.at(batch, scan.token(place + t)) + group * map.group;
        for (int64 n = 0; n < scan.states; n += LANES) {
            const int left = static_cast<int>(scan.states - n);
            store(to + t * scan.states + n, load(map, row + n, left), left);
        }
    }
}

// delta + delta_bias of one vector of a token.
INLINE Floats raw_step(const Scan& scan, const Block& block, int v, int64 batch, int64 token) {
    const int64 channel = block.first + v * LANES;
    const Floats raw = load(scan.delta, scan.delta.at(batch, token) + channel, block.lanes(v));
    return scan.delta_bias == nullptr ? raw : raw + load(scan.delta_bias + channel, block.lanes(v));
}

// e^(dt A), from dt A. A is not taken in units of log2 beforehand: its rounding would push all tokens to the same side.
INLINE Floats decay_of(Floats exponent) { return exp2(exponent * splat(LOG2_E)); }

// dt, linear above 20 to fp32.
INLINE Floats step_of(const Scan& scan, Floats raw) { return scan.softplus ? softplus(raw) : raw; }

// x silu(z), or x where there is no z.
INLINE Floats gated(const Scan& scan, const Block& block, int v, int64 batch, int64 token, Floats x) {
    if (scan.z.data == nullptr) return x;
    return x * silu(load(scan.z, scan.z.at(batch, token) + block.first + v * LANES, block.lanes(v)));
}

// Sends for the sequences at `count` places from `place` on, where these exist.
INLINE void fetch(const Scan& scan, const Block& block, int64 batch, int64 place, int count) {
    for (int64 q = place; q < place + count && q < scan.length; q++) {
        if (q < 0) continue;
        const int64 token = scan.token(q);
        fetch(scan.u, scan.u.at(batch, token) + block.first, block.count);
        fetch(scan.delta, scan.delta.at(batch, token) + block.first, block.count);
        if (scan.z.data != nullptr) fetch(scan.z, scan.z.at(batch, token) + block.first, block.count);
        const int states = static_cast<int>(scan.states);
        if (!scan.B_fixed) fetch(scan.B, scan.B.at(batch, token) + block.group * scan.B.group, states);
        if (!scan.C_fixed) fetch(scan.C, scan.C.at(batch, token) + block.group * scan.C.group, states);
    }
}

}  // namespace
