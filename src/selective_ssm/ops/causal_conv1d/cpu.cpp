// The causal depthwise convolution on a CPU, forward and backward; conv.hpp says how the work is dealt out.
#include "conv.hpp"

namespace {

constexpr int64 AHEAD = 4;  // tokens

// Asks for a row of a tensor: rows lie pages apart, and the machine foresees nothing across pages.
template <class T>
INLINE void prefetch_row(const Block& block, const T* row) {
    for (int64 c = 0; c < block.channels; c += 64 / static_cast<int64>(sizeof(T))) __builtin_prefetch(row + c);
}

// One token: what its tile's row `i` of entries and those after it give. `ahead` is a token that comes soon.
template <int WIDTH, class T>
INLINE void forward_token(const Conv& p, const Block block, int64 i, const T* x, T* out, int64 token, int64 ahead) {
    const int64 width = p.width;
    const bool with_silu = p.silu;
    const float* entries = block.entries + i * block.stride;
    prefetch_row(block, x + ahead * p.x_token);
    prefetch_row(block, out + ahead * p.channels);
    out += token * p.channels;
    for (int64 c = 0; c < block.channels; c += LANES) {
        Floats sum = convolve<WIDTH>(width, block, entries, c);
        if (with_silu) sum = silu(sum);
        store(out + c, sum, block.count(c));
    }
}

template <int WIDTH, class T>
void forward_piece(const Conv& p, const Block& block, const Piece& piece, const T* x, T* out) {
    float* inputs = block.entries + (p.width - 1) * block.stride;
    fill_history(p, block, piece, x);
    for (int64 position = piece.from; position < piece.to; position += TILE) {
        const int64 tokens = least(piece.to - position, TILE);
        for (int64 i = 0; i < tokens; i++) {
            const int64 token = piece.token(position + i);
            const int64 ahead = piece.token(least(position + i + AHEAD, piece.to - 1));
            fill_row(block, inputs + i * block.stride, x + token * p.x_token);
            forward_token<WIDTH>(p, block, i, x, out, token, ahead);
        }
        carry(p, block, block.entries, tokens);
    }
}

// The last H entries of a sequence, whose row of tokens begins at `x`.
template <class T>
void final_state(const Conv& p, const Piece& sequence, const T* x) {
    const int64 history = p.width - 1;
    for (int64 c = 0; c < p.channels; c++) {
        const int64 state = (sequence.row * p.channels + c) * history;
        for (int64 i = 0; i < history; i++) {
            const int64 entry = sequence.length + i;
            const bool is_input = entry >= history;
            const float before = p.state == nullptr || is_input ? 0 : p.state[state + entry];
            p.final_state[state + i] = is_input ? to_float(x[sequence.token(entry - history) * p.x_token + c]) : before;
        }
    }
}

// Calls f(sequence, b) for each sequence of every row.
template <class F>
void for_sequences(const Conv& p, F f) {
    parallel_for(p.batch * p.sequences, p.threads, [&](int64 row, int) {
        const int64 b = row / p.sequences, s = row % p.sequences;
        const int64 begin = p.offsets == nullptr ? 0 : p.offsets[s];
        const int64 end = p.offsets == nullptr ? p.length : p.offsets[s + 1];
        f(piece_of(p, b, s, begin, end, begin, end), b);
    });
}

template <int WIDTH, class T>
void forward(const Conv& p) {
    const T* x = static_cast<const T*>(p.x);
    T* out = static_cast<T*>(p.out);
    for_tasks(p, [&](int64 b, int64 run, const Block& block) {
        const T* row = x + b * p.x_batch + block.from;
        T* out_row = out + b * p.length * p.channels + block.from;
        for_pieces(p, b, run * RUN, least((run + 1) * RUN, p.length), [&](const Piece& piece) {
            forward_piece<WIDTH>(p, block, piece, row, out_row);
        });
    });
    if (p.width > 1) for_sequences(p, [&](const Piece& sequence, int64 b) { final_state(p, sequence, x + b * p.x_batch); });
}

// The gradient of what SiLU is applied to, for the output that reads the row `entries` and those after it.
template <int WIDTH, class T>
INLINE void differentiate(const Conv& p, const Block block, const float* entries, const T* d_out, float* d_row) {
    const int64 width = p.width;
    const bool with_silu = p.silu;
    for (int64 c = 0; c < block.channels; c += LANES) {
        Floats d = load(d_out + c, block.count(c));
        if (with_silu) {
            const Floats sum = convolve<WIDTH>(width, block, entries, c);
            const Floats gate = sigmoid(sum);
            d = d * gate * fma(sum, splat(1) - gate, splat(1));
        }
        store(d_row + c, d);
    }
}

// Brings some tokens' entries and the gradients of their outputs into a tile; past the sequence's end these are zero.
template <int WIDTH, class T>
INLINE void fill_tile(const Conv& p, const Block& block, const Piece& piece, int64 position, int64 tokens, const T* x,
                      const T* d_out) {
    for (int64 i = 0; i < tokens; i++) {
        float* inputs = block.entries + (p.width - 1 + i) * block.stride;
        float* d_row = block.d_outs + (p.width - 1 + i) * block.stride;
        if (position + i >= piece.length) {
            zero_row(block, d_row);
            continue;
        }
        const int64 token = piece.token(position + i);
        const int64 ahead = piece.token(least(position + i + AHEAD, piece.length - 1));
        prefetch_row(block, x + ahead * p.x_token);
        prefetch_row(block, d_out + ahead * p.d_out_token);
        fill_row(block, inputs, x + token * p.x_token);
        differentiate<WIDTH>(p, block, block.entries + i * block.stride, d_out + token * p.d_out_token, d_row);
    }
}

// Adds what some tokens of a tile give to the gradients of weight and bias.
template <int WIDTH>
CALLED void add_up(int64 width, const Block block, int64 tokens) {
    constexpr int TAPS = WIDTH > 0 ? WIDTH : 1;  // at once
    const float* d_rows = block.d_outs + (width - 1) * block.stride;
    for (int64 c = 0; c < block.channels; c += LANES) {
        for (int64 k = 0; k < width; k += TAPS) {
            Floats sums[TAPS];
            float* kept = block.sums + k * block.stride + c;
            for (int j = 0; j < TAPS; j++) sums[j] = load(kept + j * block.stride);
            for (int64 i = 0; i < tokens; i++) {
                const Floats d = load(d_rows + i * block.stride + c);
                const float* entry = block.entries + (i + k) * block.stride + c;
                for (int j = 0; j < TAPS; j++) sums[j] = fma(d, load(entry + j * block.stride), sums[j]);
            }
            for (int j = 0; j < TAPS; j++) store(kept + j * block.stride, sums[j]);
        }
        Floats sum = load(block.sums + width * block.stride + c);
        for (int64 i = 0; i < tokens; i++) sum = sum + load(d_rows + i * block.stride + c);
        store(block.sums + width * block.stride + c, sum);
    }
}

// Calls emit(c, the entry's gradient) for each vector of channels; the entry is the first that the tile's output `i` reads.
template <int WIDTH, class F>
INLINE void entry_gradient(const Conv& p, const Block block, const Piece& piece, int64 entry, int64 i, F emit) {
    const int64 width = WIDTH > 0 ? WIDTH : p.width, history = width - 1;
    const float* d_row = block.d_outs + (history + i) * block.stride;
    const float* d_final = p.d_final == nullptr || entry < piece.length
                               ? nullptr
                               : p.d_final + (piece.row * p.channels + block.from) * history + entry - piece.length;
    for (int64 c = 0; c < block.channels; c += LANES) {
        Floats sum = d_final == nullptr ? zeros() : gather(d_final + c * history, history, block.count(c));
        for (int64 k = 0; k < width; k++) {
            sum = fma(load(block.weight + k * block.stride + c), load(d_row - k * block.stride + c), sum);
        }
        emit(c, sum);
    }
}

// Walks over the entries from the piece's first: entry e is read by the outputs at positions e - H ... e, so that its
// gradient is complete once that of output e is there. A piece goes H outputs beyond its end for that.
template <int WIDTH, class T>
void backward_piece(const Conv& p, const Block& block, const Piece& piece, const T* x, const T* d_out, T* d_x) {
    const int64 history = p.width - 1, end = piece.to + history;
    fill_history(p, block, piece, x);
    for (int64 i = 0; i < history; i++) zero_row(block, block.d_outs + i * block.stride);
    for (int64 position = piece.from; position < end; position += TILE) {
        const int64 tokens = least(end - position, TILE);
        fill_tile<WIDTH>(p, block, piece, position, tokens, x, d_out);
        add_up<WIDTH>(p.width, block, most(least(piece.to - position, tokens), 0));
        for (int64 i = 0; i < tokens; i++) {
            const int64 entry = position + i;
            if (entry - history >= piece.from) {
                T* row = d_x + piece.token(entry - history) * p.channels;
                prefetch_row(block, d_x + piece.token(least(entry - history + AHEAD, piece.to - 1)) * p.channels);
                entry_gradient<WIDTH>(p, block, piece, entry, i, [&](int64 c, Floats d) {
                    store(row + c, d, block.count(c));
                });
            } else if (piece.from == 0 && p.d_state != nullptr) {
                float* column = p.d_state + (piece.row * p.channels + block.from) * history + entry;
                entry_gradient<WIDTH>(p, block, piece, entry, i, [&](int64 c, Floats d) {
                    scatter(column + c * history, history, d, block.count(c));
                });
            }
        }
        carry(p, block, block.entries, tokens);
        carry(p, block, block.d_outs, tokens);
    }
}

// The gradient of an empty sequence's initial state is that of its final one.
void hand_back(const Conv& p, const Piece& sequence) {
    const int64 size = p.channels * (p.width - 1);
    if (sequence.length > 0) return;
    for (int64 i = 0; i < size; i++) {
        p.d_state[sequence.row * size + i] = p.d_final == nullptr ? 0 : p.d_final[sequence.row * size + i];
    }
}

// Adds up what tasks have left, in their order.
void sum_partials(const Conv& p) {
    const int64 groups = p.batch * ceil_div(p.length, RUN), rows = p.width + 1;
    parallel_for(ceil_div(p.channels, p.block), p.threads, [&](int64 index, int) {
        const int64 from = index * p.block, to = least(p.channels, from + p.block);
        for (int64 k = 0; k < rows; k++) {
            for (int64 c = from; c < to; c += LANES) {
                const int count = static_cast<int>(least(to - c, LANES));
                Floats sum = zeros();
                for (int64 group = 0; group < groups; group++) {
                    sum = sum + load(p.partials + (group * rows + k) * p.channels + c, count);
                }
                if (k < p.width) {
                    scatter(p.d_weight + c * p.width + k, p.width, sum, count);
                } else if (p.d_bias != nullptr) {
                    store(p.d_bias + c, sum, count);
                }
            }
        }
    });
}

template <int WIDTH, class T>
void backward(const Conv& p) {
    const int64 runs = ceil_div(p.length, RUN);
    for_tasks(p, [&](int64 b, int64 run, const Block& block) {
        const T* x = static_cast<const T*>(p.x) + b * p.x_batch + block.from;
        const T* d_out = static_cast<const T*>(p.d_out) + b * p.d_out_batch + block.from;
        T* d_x = static_cast<T*>(p.d_x) + b * p.length * p.channels + block.from;
        for (int64 k = 0; k <= p.width; k++) zero_row(block, block.sums + k * block.stride);
        for_pieces(p, b, run * RUN, least((run + 1) * RUN, p.length), [&](const Piece& piece) {
            backward_piece<WIDTH>(p, block, piece, x, d_out, d_x);
        });
        for (int64 k = 0; k <= p.width; k++) {
            float* partial = p.partials + ((b * runs + run) * (p.width + 1) + k) * p.channels + block.from;
            const float* sums = block.sums + k * block.stride;
            for (int64 c = 0; c < block.channels; c += LANES) store(partial + c, load(sums + c), block.count(c));
        }
    });
    sum_partials(p);
    if (p.d_state != nullptr && p.offsets != nullptr) {
        for_sequences(p, [&](const Piece& sequence, int64) { hand_back(p, sequence); });
    }
}

}  // namespace

KERNEL(causal_conv1d)(const void* parameters) {
    const Conv& p = *static_cast<const Conv*>(parameters);
    if (p.number == FP32) return p.width == 4 ? forward<4, float>(p) : forward<0, float>(p);
    return p.width == 4 ? forward<4, bf16>(p) : forward<0, bf16>(p);
}

KERNEL(causal_conv1d_backward)(const void* parameters) {
    const Conv& p = *static_cast<const Conv*>(parameters);
    if (p.number == FP32) return p.width == 4 ? backward<4, float>(p) : backward<0, float>(p);
    return p.width == 4 ? backward<4, bf16>(p) : backward<0, bf16>(p);
}
