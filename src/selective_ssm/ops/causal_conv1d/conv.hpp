// What both passes of the causal depthwise convolution share on a CPU: their arguments, and how the work is dealt out.
//
// Legend: B batch, L length, D channels, K width, H = K - 1 inputs of history, S sequences in a row.
//
// A task serves a block of channels and a run of a row's tokens, in pieces that each lie inside one sequence. A piece is
// worked off tile by tile: `TILE` tokens of the block, in fp32, after the H that came before them. Everything is counted as
// it is visited: position 0 of a sequence is its first token, or, in reverse, its last. Entry e of a sequence is its history
// where e < H, else the input at position e - H; the output at position p reads the entries p ... p + H.
#pragma once

#include "maths.hpp"
#include "parallel.hpp"

namespace {

constexpr int64 RUN = 256;  // tokens of a task
constexpr int TILE = 16;

// As in cpu.py.
struct Conv {
    // forward
    const void* x;         // (B, L, D), unit stride in D
    const float* weight;   // (D, K)
    const float* bias;     // (D,), or null
    const float* state;    // (B S, D, H), or null: zeros
    const int64* offsets;  // (S + 1,), non-decreasing from 0 to L, or null: one sequence a row
    void* out;             // (B, L, D)
    float* final_state;    // (B S, D, H)
    float* scratch;        // `scratch_size` numbers a thread
    // backward
    const void* d_out;     // (B, L, D), unit stride in D
    const float* d_final;  // (B S, D, H), or null: zeros
    void* d_x;             // (B, L, D)
    float* d_state;        // (B S, D, H), or null
    float* partials;       // (B runs, K + 1, D) what tasks leave of the gradients of weight and bias
    float* d_weight;       // (D, K)
    float* d_bias;         // (D,), or null
    // strides, in numbers
    int64 x_batch, x_token, d_out_batch, d_out_token;
    int64 batch, length, sequences, channels, width;
    int64 block, scratch_size;  // channels of a task, a multiple of LANES
    int number, threads, reverse, silu;
};

INLINE int64 ceil_div(int64 a, int64 b) { return (a + b - 1) / b; }

// The positions of a sequence that a task serves.
struct Piece {
    int64 row;       // of the states
    int64 length;    // of the whole sequence
    int64 from, to;  // positions
    int64 first;     // the token at position 0
    int64 step;      // from a position's token to the next one's: 1, or -1 in reverse

    int64 token(int64 position) const { return first + position * step; }
};

// The part of sequence `s` of row `b` that lies between two tokens.
INLINE Piece piece_of(const Conv& p, int64 b, int64 s, int64 begin, int64 end, int64 low, int64 high) {
    const int64 from = p.reverse ? end - high : low - begin;
    const int64 row = b * p.sequences + s;
    return {row, end - begin, from, from + high - low, p.reverse ? end - 1 : begin, p.reverse ? -1 : 1};
}

// Calls f(piece) for what sequences have of the tokens from `low` to `high` of row `b`; those without tokens are left out.
template <class F>
INLINE void for_pieces(const Conv& p, int64 b, int64 low, int64 high, F f) {
    if (p.offsets == nullptr) return f(piece_of(p, b, 0, 0, p.length, low, high));
    int64 s = 0, beyond = p.sequences;  // the last sequence that begins at or before `low`
    while (beyond - s > 1) {
        const int64 middle = (s + beyond) / 2;
        (p.offsets[middle] <= low ? s : beyond) = middle;
    }
    for (; s < p.sequences && p.offsets[s] < high; s++) {
        const int64 begin = p.offsets[s], end = p.offsets[s + 1];
        const int64 inside = most(begin, low), until = least(end, high);
        if (inside < until) f(piece_of(p, b, s, begin, end, inside, until));
    }
}

// A task's block of channels, and its scratch memory: rows of `p.block` numbers.
struct Block {
    int64 from;      // the first channel
    int64 channels;  // how many
    int64 stride;    // from a row to the next
    float *weight, *bias, *entries, *d_outs, *sums;

    int count(int64 c) const { return static_cast<int>(least(channels - c, LANES)); }
};

// Rows: K of the filter, one of the bias, H + TILE of entries; backward, as many of gradients, and K + 1 of sums.
CALLED Block block_of(const Conv& p, int64 index, int worker) {
    const int64 from = index * p.block, tile = p.width - 1 + TILE, stride = p.block + LANES;
    float* weight = p.scratch + worker * p.scratch_size;
    float* bias = weight + p.width * stride;
    float* entries = bias + stride;
    float* d_outs = entries + tile * stride;
    Block block{from, least(p.channels - from, p.block), stride, weight, bias, entries, d_outs, d_outs + tile * stride};
    for (int64 c = 0; c < block.channels; c += LANES) {
        const int count = block.count(c);
        for (int64 k = 0; k < p.width; k++) {
            store(weight + k * stride + c, gather(p.weight + (from + c) * p.width + k, p.width, count));
        }
        store(bias + c, p.bias == nullptr ? zeros() : load(p.bias + from + c, count));
    }
    return block;
}

INLINE void zero_row(Block block, float* row) {
    for (int64 c = 0; c < block.channels; c += LANES) store(row + c, zeros());
}

template <class T>
INLINE void fill_row(Block block, float* row, const T* from) {
    for (int64 c = 0; c < block.channels; c += LANES) store(row + c, load(from + c, block.count(c)));
}

// Column `entry` of a (D, H) state.
CALLED void fill_row_of_state(Block block, float* row, const float* state, int64 entry, int64 history) {
    const float* from = state + block.from * history + entry;
    for (int64 c = 0; c < block.channels; c += LANES) store(row + c, gather(from + c * history, history, block.count(c)));
}

// The H entries before a piece's first input; `x` is the sequence's row of tokens, at the block's first channel.
template <class T>
CALLED void fill_history(const Conv& p, const Block& block, const Piece& piece, const T* x) {
    const int64 history = p.width - 1;
    for (int64 i = 0; i < history; i++) {
        const int64 entry = piece.from + i;
        float* row = block.entries + i * block.stride;
        if (entry >= history) {
            fill_row(block, row, x + piece.token(entry - history) * p.x_token);
        } else if (p.state != nullptr) {
            fill_row_of_state(block, row, p.state + piece.row * p.channels * history, entry, history);
        } else {
            zero_row(block, row);
        }
    }
}

// Moves the last H of `used` tile rows to where the next tile's history lies.
CALLED void carry(const Conv& p, Block block, float* rows, int64 used) {
    for (int64 i = 0; i < p.width - 1; i++) {
        const float* from = rows + (i + used) * block.stride;
        for (int64 c = 0; c < block.channels; c += LANES) store(rows + i * block.stride + c, load(from + c));
    }
}

// Bias + sum_k weight_k entry_k at a vector of channels; `entries` is the first row that is read.
template <int WIDTH>
INLINE Floats convolve(int64 width, const Block& block, const float* entries, int64 c) {
    if (WIDTH > 0) width = WIDTH;
    Floats sum = load(block.bias + c);
    for (int64 k = 0; k < width; k++) {
        sum = fma(load(block.weight + k * block.stride + c), load(entries + k * block.stride + c), sum);
    }
    return sum;
}

// Calls f(b, run, block) for every task.
template <class F>
void for_tasks(const Conv& p, F f) {
    const int64 runs = ceil_div(p.length, RUN), blocks = ceil_div(p.channels, p.block);
    parallel_for(p.batch * runs * blocks, p.threads, [&](int64 task, int worker) {
        const int64 run = task / blocks;
        f(run / runs, run % runs, block_of(p, task % blocks, worker));
    });
}

}  // namespace
