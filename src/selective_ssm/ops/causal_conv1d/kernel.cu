#include "device.cuh"

// The causal depthwise convolution and, with BACKWARD, its gradients.
//
// A thread owns CHANNELS neighbouring channels, which move as one vector, and a run of consecutive tokens; the last
// WIDTH inputs stay in registers. A run is worked off in pieces, each inside one sequence; empty sequences are pieces
// too, so that every state is met by exactly one run.
//
// Tokens and sequences are counted in the order in which they are visited. A reversed convolution is then a forward
// one: pointers name the row's last token, strides over tokens are negative, and only `offset` and `state_row` know.
//
// Macros: X_TYPE, WEIGHT_TYPE, BIAS_TYPE, STATE_TYPE; WIDTH; SILU and BACKWARD, 0 or 1; THREADS; CHANNELS (more than
// one only in memory aligned to 16 bytes); UNROLL, the tokens on their way from memory at once; MIN_BLOCKS.

constexpr int HISTORY = WIDTH - 1;

struct Parameters {
    const X_TYPE* x;            // (B, L, D)
    const WEIGHT_TYPE* weight;  // (D, K) contiguous
    const BIAS_TYPE* bias;      // (D,) contiguous, or null
    const STATE_TYPE* state;    // (rows, D, K - 1), or null
    const void* offsets;        // (S + 1,) of int32, or int64 where `wide`; null where nothing is packed
    int64 x_batch, x_token, state_row, state_channel, state_entry;  // strides, as all below in bytes
    int64 length;
    int sequences, channels;
    int lanes;    // threads of a block that lie side by side along the channels
    int run;      // tokens of a thread
    int columns;  // blocks along the channels
    int tiles;    // blocks along a row's tokens
    int wide, reverse;
#if BACKWARD
    const X_TYPE* d_out;    // (B, L, D)
    const X_TYPE* d_final;  // (rows, D, K - 1), or null
    X_TYPE* d_x;            // (B, L, D) contiguous but for the sign of d_x_token
    STATE_TYPE* d_state;    // (rows, D, K - 1) contiguous, or null
    float* partials;        // (B tiles, columns, CHANNELS (K + 1), lanes): see `add_block`
    int64 d_out_batch, d_out_token, d_final_row, d_final_channel, d_final_entry, d_x_batch, d_x_token;
#else
    X_TYPE* out;          // (B, L, D) contiguous but for the sign of out_token
    X_TYPE* final_state;  // (rows, D, K - 1) contiguous
    int64 out_batch, out_token;
#endif
};

template <class T> __device__ __forceinline__ T* shifted(T* from, int64 bytes) {
    return (T*)((char*)from + bytes);
}

// ---- vectors of channels -----------------------------------------------------------------------------------------

// CHANNELS neighbouring numbers as they lie in memory.
template <class T> struct alignas(CHANNELS * sizeof(T) < 16 ? CHANNELS * sizeof(T) : 16) Row {
#if CHANNELS == 1
    T only;
#else
    uint32 word[CHANNELS * sizeof(T) / 4];
#endif
};

template <class T> __device__ __forceinline__ Row<T> read(const T* from) {
    return *reinterpret_cast<const Row<T>*>(from);
}

template <class T> __device__ __forceinline__ void unpack(const Row<T>& row, float (&x)[CHANNELS]) {
#if CHANNELS == 1
    x[0] = to_float(row.only);
#else
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
        if constexpr (sizeof(T) == 4) x[c] = __uint_as_float(row.word[c]);
        else x[c] = c % 2 ? high_half<T>(row.word[c / 2]) : low_half<T>(row.word[c / 2]);
    }
#endif
}

template <class T> __device__ __forceinline__ void write(T* to, const float (&x)[CHANNELS]) {
    Row<T> row;
#if CHANNELS == 1
    row.only = from_float<T>(x[0]);
#else
#pragma unroll
    for (int c = 0; c < CHANNELS; c += 2) {
        if constexpr (sizeof(T) == 4) {
            row.word[c] = __float_as_uint(x[c]);
            row.word[c + 1] = __float_as_uint(x[c + 1]);
        } else {
            row.word[c / 2] = pack<T>(x[c], x[c + 1]);
        }
    }
#endif
    *reinterpret_cast<Row<T>*>(to) = row;
}

// ---- where threads and sequences lie -----------------------------------------------------------------------------

// Where a thread stands: its channels, and its run, of whose tokens the first is number 0 below.
struct Place {
    int64 start;  // of the run in its row
    int lane, column, channel;
    int group;  // of blocks that share tokens
    int batch, count;
    bool is_inside, is_last;

    __device__ __forceinline__ explicit Place(const Parameters& p) {
        lane = int(threadIdx.x) % p.lanes;
        column = int(blockIdx.x) % p.columns;
        channel = (column * p.lanes + lane) * CHANNELS;
        group = int(blockIdx.x) / p.columns;
        batch = group / p.tiles;
        start = (int64(group % p.tiles) * (THREADS / p.lanes) + int(threadIdx.x) / p.lanes) * p.run;
        is_inside = channel < p.channels && start < p.length;
        is_last = start + p.run >= p.length;
        count = is_last ? int(p.length - start) : p.run;
    }
    // The first of the thread's numbers in a (B, L, D) tensor.
    template <class T> __device__ __forceinline__ T* in(T* x, int64 batch_stride, int64 token_stride) const {
        return shifted(x + channel, batch * batch_stride + start * token_stride);
    }
};

// Where a sequence begins in its row; the first at 0, what follows the last at the length, whatever cu_seqlens holds.
__device__ __forceinline__ int64 offset(const Parameters& p, int sequence) {
    if (sequence <= 0) return 0;
    if (sequence >= p.sequences) return p.length;
    const int at = p.reverse ? p.sequences - sequence : sequence;
    const int64 value = p.wide ? static_cast<const int64*>(p.offsets)[at] : static_cast<const int*>(p.offsets)[at];
    const int64 inside = value < 0 ? 0 : value > p.length ? p.length : value;
    return p.reverse ? p.length - inside : inside;
}

// The part [first, last) of a run that is inside the sequence [begin, end).
struct Piece {
    int sequence, begin, end, first, last;

    // The sequence that the run starts inside of or, where some begin there, the first of those.
    __device__ __forceinline__ Piece(const Parameters& p, const Place& place) {
        int before = -1, found = p.sequences;  // offset(before) < start <= offset(found)
        while (found - before > 1) {
            const int middle = before + (found - before) / 2;
            if (offset(p, middle) < place.start) before = middle;
            else found = middle;
        }
        sequence = offset(p, found) > place.start ? found - 1 : found;
        begin = in_run(offset(p, sequence), place);
        measure(p, place);
    }
    // Goes on to the next sequence; false where that begins after the run.
    __device__ __forceinline__ bool advance(const Parameters& p, const Place& place) {
        sequence++;
        begin = end;
        if (sequence == p.sequences || (begin >= place.count && !place.is_last)) return false;
        measure(p, place);
        return true;
    }
    __device__ __forceinline__ int64 state_row(const Parameters& p, const Place& place) const {
        return place.batch + (p.reverse ? p.sequences - 1 - sequence : sequence);
    }

  private:
    __device__ __forceinline__ void measure(const Parameters& p, const Place& place) {
        end = max(in_run(offset(p, sequence + 1), place), begin);
        first = max(begin, 0);
        last = max(min(end, place.count), first);
    }
    // Far is as good as very far.
    static __device__ __forceinline__ int in_run(int64 token, const Place& place) {
        constexpr int64 FAR = 1 << 30;
        return int(max(-FAR, min(FAR, token - place.start)));
    }
};

// ---- what both directions compute --------------------------------------------------------------------------------

// The last WIDTH numbers of a stream, oldest first.
struct Window {
    float at[WIDTH][CHANNELS];

    __device__ __forceinline__ void push(const float (&x)[CHANNELS]) {
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
#pragma unroll
            for (int k = 0; k < HISTORY; k++) at[k][c] = at[k + 1][c];
            at[HISTORY][c] = x[c];
        }
    }
    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) {
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) at[k][c] = 0;
        }
    }
};

struct Filter {
    float tap[CHANNELS][WIDTH];
    float bias[CHANNELS];

    __device__ __forceinline__ Filter(const Parameters& p, int channel) {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) {
            float x[CHANNELS];
            unpack(read(p.weight + int64(channel) * WIDTH + i * CHANNELS), x);
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) tap[(i * CHANNELS + c) / WIDTH][(i * CHANNELS + c) % WIDTH] = x[c];
        }
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) bias[c] = 0;
        if (p.bias != nullptr) unpack(read(p.bias + channel), bias);
    }
    __device__ __forceinline__ float apply(const Window& window, int c) const {
        float sum = bias[c];
#pragma unroll
        for (int k = 0; k < WIDTH; k++) sum += tap[c][k] * window.at[k][c];
        return sum;
    }
};

// The window as it stands before a piece's first token, to which `x` points: earlier tokens of the sequence, or what
// the initial state holds.
__device__ __forceinline__ void enter(Window& window, const Parameters& p, const Place& place, const Piece& piece,
                                      const X_TYPE* x) {
    const int known = piece.first - piece.begin;
    x = shifted(x, -HISTORY * p.x_token);
#pragma unroll
    for (int h = 0; h < HISTORY; h++, x = shifted(x, p.x_token)) {
        float (&entry)[CHANNELS] = window.at[h + 1];
        if (HISTORY - h <= known) {
            unpack(read(x), entry);
        } else if (p.state == nullptr) {
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) entry[c] = 0;
        } else {
            const int64 offset = piece.state_row(p, place) * p.state_row + place.channel * p.state_channel;
            const STATE_TYPE* from = shifted(p.state, offset + (h + known) * p.state_entry);
#pragma unroll
            for (int c = 0; c < CHANNELS; c++, from = shifted(from, p.state_channel)) entry[c] = to_float(*from);
        }
    }
}

#if !BACKWARD

template <int count>
__device__ __forceinline__ void convolve(Window& window, const Filter& filter, const Parameters& p, const X_TYPE*& x,
                                         X_TYPE*& out) {
    Row<X_TYPE> rows[count];
#pragma unroll
    for (int i = 0; i < count; i++, x = shifted(x, p.x_token)) rows[i] = read(x);
#pragma unroll
    for (int i = 0; i < count; i++, out = shifted(out, p.out_token)) {
        float y[CHANNELS];
        unpack(rows[i], y);
        window.push(y);
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
            y[c] = filter.apply(window, c);
            if (SILU) y[c] *= sigmoid(y[c]);
        }
        write(out, y);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) causal_conv1d(const __grid_constant__ Parameters p) {
    const Place place(p);
    if (!place.is_inside) return;
    const X_TYPE* x = place.in(p.x, p.x_batch, p.x_token);
    X_TYPE* out = place.in(p.out, p.out_batch, p.out_token);
    const Filter filter(p, place.channel);
    Piece piece(p, place);
    do {
        Window window;
        enter(window, p, place, piece, x);
        int left = piece.last - piece.first;
        for (; left >= UNROLL; left -= UNROLL) convolve<UNROLL>(window, filter, p, x, out);
        for (; left > 0; left--) convolve<1>(window, filter, p, x, out);
        if (piece.last == piece.end) {
            X_TYPE* to = p.final_state + (piece.state_row(p, place) * p.channels + place.channel) * HISTORY;
#pragma unroll
            for (int c = 0; c < CHANNELS; c++) {
#pragma unroll
                for (int h = 0; h < HISTORY; h++) to[c * HISTORY + h] = from_float<X_TYPE>(window.at[h + 1][c]);
            }
        }
    } while (piece.advance(p, place));
}

#else

// A token's output gradient becomes that of what was convolved; pushing it completes the gradient of the input HISTORY
// tokens before, or of an entry of the initial state.
struct Adjoint {
    Window window, d_window;
    float d_tap[CHANNELS][WIDTH];
    float d_bias[CHANNELS];

    __device__ __forceinline__ Adjoint() {
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
            d_bias[c] = 0;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) d_tap[c][k] = 0;
        }
    }
    __device__ __forceinline__ void push(const Filter& filter, const Row<X_TYPE>& x, const Row<X_TYPE>& d_out,
                                         bool is_owned) {
        float y[CHANNELS], d[CHANNELS];
        unpack(x, y);
        window.push(y);
        unpack(d_out, d);
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
            if (SILU) {
                const float pre = filter.apply(window, c), gate = sigmoid(pre);
                d[c] *= gate * (1 + pre * (1 - gate));
            }
            if (is_owned) {
                d_bias[c] += d[c];
#pragma unroll
                for (int k = 0; k < WIDTH; k++) d_tap[c][k] += d[c] * window.at[k][c];
            }
        }
        d_window.push(d);
    }
    __device__ __forceinline__ void read_off(const Filter& filter, float (&d_x)[CHANNELS]) const {
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) {
            d_x[c] = 0;
#pragma unroll
            for (int k = 0; k < WIDTH; k++) d_x[c] += filter.tap[c][HISTORY - k] * d_window.at[k][c];
        }
    }
};

// The gradient that the token number `done` of a piece completes: of the input HISTORY tokens before, to which `d_x`
// points, or of an entry of the initial state. Another piece completes what lies before a piece inside a sequence.
__device__ __forceinline__ void put(const float (&x)[CHANNELS], const Parameters& p, const Place& place,
                                    const Piece& piece, X_TYPE* d_x, int done) {
    if (done >= HISTORY) {
        write(d_x, x);
    } else if (p.d_state != nullptr && piece.first == piece.begin) {
        STATE_TYPE* d_state = p.d_state + (piece.state_row(p, place) * p.channels + place.channel) * HISTORY + done;
#pragma unroll
        for (int c = 0; c < CHANNELS; c++) d_state[c * HISTORY] = from_float<STATE_TYPE>(x[c]);
    }
}

template <int count>
__device__ __forceinline__ void run_back(Adjoint& adjoint, const Filter& filter, const Parameters& p,
                                         const Place& place, const Piece& piece, const X_TYPE*& x,
                                         const X_TYPE*& d_out, X_TYPE*& d_x, int& done) {
    Row<X_TYPE> rows[count], d_rows[count];
#pragma unroll
    for (int i = 0; i < count; i++) {
        rows[i] = read(x);
        d_rows[i] = read(d_out);
        x = shifted(x, p.x_token);
        d_out = shifted(d_out, p.d_out_token);
    }
#pragma unroll
    for (int i = 0; i < count; i++, done++, d_x = shifted(d_x, p.d_x_token)) {
        adjoint.push(filter, rows[i], d_rows[i], true);
        float y[CHANNELS];
        adjoint.read_off(filter, y);
        put(y, p, place, piece, d_x, done);
    }
}

// What follows a piece completes the gradients of its last inputs: the sequence's next tokens, then its final state.
__device__ __forceinline__ void leave(Adjoint& adjoint, const Filter& filter, const Parameters& p, const Place& place,
                                      const Piece& piece, const X_TYPE* x, const X_TYPE* d_out, X_TYPE* d_x, int done) {
    Row<X_TYPE> rows[WIDTH], d_rows[WIDTH];  // one too many, as there is no array of none
    const int more = piece.end - piece.last;
#pragma unroll
    for (int i = 0; i < HISTORY; i++) {
        if (i < more) {
            rows[i] = read(x);
            d_rows[i] = read(d_out);
        }
        x = shifted(x, p.x_token);
        d_out = shifted(d_out, p.d_out_token);
    }
#pragma unroll
    for (int i = 0; i < HISTORY; i++, done++, d_x = shifted(d_x, p.d_x_token)) {
        float y[CHANNELS] = {};
        if (i < more) adjoint.push(filter, rows[i], d_rows[i], false);
        else adjoint.d_window.push(y);
        adjoint.read_off(filter, y);
        if (i >= more && p.d_final != nullptr) {
            const int64 offset = piece.state_row(p, place) * p.d_final_row + place.channel * p.d_final_channel;
            const X_TYPE* from = shifted(p.d_final, offset + (i - more) * p.d_final_entry);
#pragma unroll
            for (int c = 0; c < CHANNELS; c++, from = shifted(from, p.d_final_channel)) y[c] += to_float(*from);
        }
        put(y, p, place, piece, d_x, done);
    }
}

constexpr int VALUES = CHANNELS * (WIDTH + 1);  // what a thread gathers of weight and bias

// Sums over the block's runs what its threads have gathered: a (VALUES, lanes) part.
__device__ __forceinline__ void add_block(const Parameters& p, const Place& place, const Adjoint& adjoint) {
    float* shared = reinterpret_cast<float*>(shared_memory());  // (VALUES, THREADS)
#pragma unroll
    for (int c = 0; c < CHANNELS; c++) {
#pragma unroll
        for (int k = 0; k < WIDTH; k++) shared[(c * (WIDTH + 1) + k) * THREADS + threadIdx.x] = adjoint.d_tap[c][k];
        shared[(c * (WIDTH + 1) + WIDTH) * THREADS + threadIdx.x] = adjoint.d_bias[c];
    }
    sync_block();
    const int count = p.lanes * VALUES;
    float* to = p.partials + (int64(place.group) * p.columns + place.column) * count;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const float* from = shared + i / p.lanes * THREADS + i % p.lanes;
        float sum = 0;
        for (int slot = 0; slot < THREADS; slot += p.lanes) sum += from[slot];
        to[i] = sum;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    causal_conv1d_backward(const __grid_constant__ Parameters p) {
    const Place place(p);
    Adjoint adjoint;
    if (place.is_inside) {
        const X_TYPE* x = place.in(p.x, p.x_batch, p.x_token);
        const X_TYPE* d_out = place.in(p.d_out, p.d_out_batch, p.d_out_token);
        X_TYPE* d_x = shifted(place.in(p.d_x, p.d_x_batch, p.d_x_token), -HISTORY * p.d_x_token);
        const Filter filter(p, place.channel);
        Piece piece(p, place);
        do {
            enter(adjoint.window, p, place, piece, x);
            adjoint.d_window.clear();
            const int count = piece.last - piece.first;
            int done = 0;
            while (done + UNROLL <= count) run_back<UNROLL>(adjoint, filter, p, place, piece, x, d_out, d_x, done);
            while (done < count) run_back<1>(adjoint, filter, p, place, piece, x, d_out, d_x, done);
            leave(adjoint, filter, p, place, piece, x, d_out, d_x, done);
        } while (piece.advance(p, place));
    }
    add_block(p, place, adjoint);
}

constexpr int SUM_THREADS = 256;

struct SumParameters {
    const float* partials;  // (groups, columns, VALUES, lanes)
    WEIGHT_TYPE* d_weight;  // (D, K)
    BIAS_TYPE* d_bias;      // (D,), or null
    int groups, columns, lanes, channels;
};

// Adds up what the blocks have left, always in the same order: 32 sums a block, each by SUM_THREADS / 32 threads.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) causal_conv1d_sum(const __grid_constant__ SumParameters p) {
    const int part = p.lanes * VALUES, count = p.columns * part;
    const int i = int(blockIdx.x) * 32 + int(threadIdx.x) % 32;
    float sum = 0;
    if (i < count) {
#pragma unroll 8
        for (int group = int(threadIdx.x) / 32; group < p.groups; group += SUM_THREADS / 32)
            sum += p.partials[int64(group) * count + i];
    }
    float* shared = reinterpret_cast<float*>(shared_memory());  // (SUM_THREADS,)
    shared[threadIdx.x] = sum;
    sync_block();
    if (threadIdx.x >= 32 || i >= count) return;
    sum = 0;
    for (int other = int(threadIdx.x); other < SUM_THREADS; other += 32) sum += shared[other];
    const int value = i % part / p.lanes, k = value % (WIDTH + 1);
    const int channel = (i / part * p.lanes + i % p.lanes) * CHANNELS + value / (WIDTH + 1);
    if (channel >= p.channels) return;
    if (k < WIDTH) p.d_weight[int64(channel) * WIDTH + k] = from_float<WEIGHT_TYPE>(sum);
    else if (p.d_bias != nullptr) p.d_bias[channel] = from_float<BIAS_TYPE>(sum);
}

#endif
