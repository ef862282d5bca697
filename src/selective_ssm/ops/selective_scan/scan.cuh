// What the forward and the backward kernels of the selective scan share: how the work is laid out over threads, and the
// maths of one token.
//
// A block of THREADS threads serves CHANNELS channels of one sequence. A channel is held by LANES neighbouring lanes of a
// warp, each of which keeps PER_LANE of its 16 states in registers. More than 16 states are served 16 at a time.
//
// Macros: U, DELTA, Z, B_MAP, C_MAP (number types), THREADS, N (states), LANES, and 0 or 1: HAS_Z, SOFTPLUS,
// ZOH, B_FIXED and C_FIXED (time-invariant maps), ALIGNED and MAPS_ALIGNED (see Octet).

#include "maths.cuh"

constexpr int STATES = 16;
constexpr int PASSES = (N + STATES - 1) / STATES;
constexpr int PER_LANE = STATES / LANES;
constexpr int CHANNELS = THREADS / LANES;
constexpr int OCTETS = CHANNELS / 8;
constexpr int CHUNK = 64;  // tokens between two states that are kept for the backward pass

// ---- where things lie ----------------------------------------------------------------------------------------------

// The rows of a (B, L, ...) tensor that belong to one sequence, in the order in which they are scanned.
template <class T> struct Rows {
    T* first;
    int64 step;
    __device__ __forceinline__ T* at(int64 t) const { return first + t * step; }
};

struct Strides {
    int64 batch, row, group;
};

// A run of tokens that one block scans: `length` of them, of which the first is number `from` of the sequence.
struct Piece {
    int sequence;  // which initial and final state is its own
    int index;     // among the pieces of the sequence
    int batch;
    int64 begin;  // the sequence in its row of the batch
    int64 sequence_length;
    int64 from;
    int64 length;
    bool is_last;
};

__device__ __forceinline__ int64 offset_at(const void* offsets, bool wide, int i, int64 low, int64 high) {
    const int64 x = wide ? static_cast<const int64*>(offsets)[i] : static_cast<const int*>(offsets)[i];
    return x < low ? low : x > high ? high : x;
}

// Piece number `index` of `pieces` of a sequence; pieces are whole chunks, as even as those allow. Offsets of packed
// sequences are clamped, so that no values of them lead out of bounds.
__device__ __forceinline__ Piece find_piece(
    int sequence, int index, int pieces, int64 row_length, const void* offsets, bool wide) {
    Piece p;
    p.sequence = sequence;
    p.index = index;
    p.batch = offsets ? 0 : sequence;
    p.begin = offsets ? offset_at(offsets, wide, sequence, 0, row_length) : 0;
    const int64 end = offsets ? offset_at(offsets, wide, sequence + 1, p.begin, row_length) : row_length;
    p.sequence_length = end - p.begin;
    const int64 chunks = (p.sequence_length + CHUNK - 1) / CHUNK;
    const int64 size = (chunks + pieces - 1) / pieces * CHUNK;
    const int64 rest = p.sequence_length - index * size;
    p.from = index * size;
    p.length = rest < 0 ? 0 : rest < size ? rest : size;
    p.is_last = rest <= size && (rest > 0 || index == 0);
    return p;
}

template <class T>
__device__ __forceinline__ Rows<T> rows_of(T* tensor, Strides s, const Piece& p, bool reverse, int group, int channel) {
    const int64 token = reverse ? p.begin + p.sequence_length - 1 - p.from : p.begin + p.from;
    return {tensor + p.batch * s.batch + token * s.row + group * s.group + channel, reverse ? -s.row : s.row};
}

// Which kept state is that before token `from` (a positive multiple of CHUNK) of a sequence which begins at `begin`. Two
// such tokens of a row lie at least CHUNK apart, hence the places differ, however the row is packed.
__device__ __forceinline__ int64 kept_index(int64 begin, int64 from) { return (begin + from) / CHUNK - 1; }

// Channels are dealt to lanes in an order in which both the lanes that scan (a channel each) and the threads that work on
// 8 neighbouring channels of a token at once meet consecutive shared memory: place p holds pair p / 2 / OCTETS of the 8
// channels of octet p / 2 % OCTETS.
__device__ __forceinline__ int channel_at(int place) {
    return (place / 2 % OCTETS) * 8 + (place / 2 / OCTETS) * 2 + place % 2;
}
__device__ __forceinline__ int place_of_pair(int octet, int pair) { return (pair * OCTETS + octet) * 2; }

// Eight neighbouring numbers on their way from memory; zero where they are out of bounds. If rows are ALIGNED (begin at
// multiples of 16 bytes, and have multiples of 8 numbers), there are eight or none.
template <class T, bool ALIGNED_ROWS> struct Octet {
    Vector v[sizeof(T) / 2];

    __device__ __forceinline__ void fetch(const T* from, int valid) {
        if (ALIGNED_ROWS) {
#pragma unroll
            for (int i = 0; i < int(sizeof(T) / 2); i++) v[i] = Vector{};
            if (valid > 0) {
#pragma unroll
                for (int i = 0; i < int(sizeof(T) / 2); i++) v[i] = reinterpret_cast<const Vector*>(from)[i];
            }
        } else {
            alignas(16) T x[8];
#pragma unroll
            for (int k = 0; k < 8; k++) x[k] = k < valid ? from[k] : T{};
#pragma unroll
            for (int i = 0; i < int(sizeof(T) / 2); i++) v[i] = reinterpret_cast<const Vector*>(x)[i];
        }
    }
    __device__ __forceinline__ void get(float (&x)[8]) const { load8(reinterpret_cast<const T*>(v), x); }
};

// Where the octets that each of THREADS threads fetches wait for it. (A register on its way from memory would take one of the six
// scoreboards that the recurrence needs for its own reads.)
template <class T, bool ALIGNED_ROWS> struct Mailbox {
    static constexpr int VECTORS = sizeof(T) / 2;
    Vector v[VECTORS][THREADS];

    __device__ __forceinline__ void fetch(const T* from, int valid, int thread) {
        if (ALIGNED_ROWS && valid > 0) {
#pragma unroll
            for (int i = 0; i < VECTORS; i++) copy_async(&v[i][thread], reinterpret_cast<const Vector*>(from) + i);
        } else {
            Octet<T, ALIGNED_ROWS> octet;
            octet.fetch(from, valid);
#pragma unroll
            for (int i = 0; i < VECTORS; i++) v[i][thread] = octet.v[i];
        }
    }
    __device__ __forceinline__ Octet<T, ALIGNED_ROWS> take(int thread) const {
        Octet<T, ALIGNED_ROWS> octet;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) octet.v[i] = v[i][thread];
        return octet;
    }
};

// Eight neighbouring numbers to memory, as many of them as there are.
template <class T> __device__ __forceinline__ void write_octet(T* to, const float (&x)[8], int valid) {
    if (ALIGNED) {
        if (valid > 0) store8(to, x);
    } else {
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (k < valid) to[k] = from_float<T>(x[k]);
    }
}

// Numbers that lie together in memory, to and from registers.
template <int COUNT> __device__ __forceinline__ void read(float (&to)[COUNT], const float* from) {
    constexpr int WIDTH = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
    struct alignas(4 * WIDTH) Part {
        float x[WIDTH];
    };
#pragma unroll
    for (int i = 0; i < COUNT; i += WIDTH) {
        const Part part = *reinterpret_cast<const Part*>(from + i);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) to[i + j] = part.x[j];
    }
}
template <int COUNT> __device__ __forceinline__ void write(float* to, const float (&from)[COUNT]) {
    constexpr int WIDTH = COUNT % 4 == 0 ? 4 : COUNT % 2 == 0 ? 2 : 1;
    struct alignas(4 * WIDTH) Part {
        float x[WIDTH];
    };
#pragma unroll
    for (int i = 0; i < COUNT; i += WIDTH) {
        Part part;
#pragma unroll
        for (int j = 0; j < WIDTH; j++) part.x[j] = from[i + j];
        *reinterpret_cast<Part*>(to + i) = part;
    }
}

// A lane's part of (…, N) memory, zero beyond N and where there is none.
template <class T>
__device__ __forceinline__ void read_states(float (&to)[PER_LANE], const T* from, int first, bool present) {
#pragma unroll
    for (int r = 0; r < PER_LANE; r++) to[r] = present && first + r < N ? to_float(from[first + r]) : 0.0f;
}
__device__ __forceinline__ void write_states(float* to, const float (&from)[PER_LANE], int first, bool present) {
#pragma unroll
    for (int r = 0; r < PER_LANE; r++)
        if (present && first + r < N) to[first + r] = from[r];
}

// What a block is to do: its channels, of one group, and a piece of a sequence.
struct Task {
    int group, block_of_group;
    int first, valid;  // channels
    int sequence, piece;

    __device__ __forceinline__ Task(int channels, int groups, int pieces) {
        const int of_group = channels / groups;
        const int blocks_of_group = (of_group + CHANNELS - 1) / CHANNELS, blocks = blocks_of_group * groups;
        const int block = blockIdx.x % blocks, part = blockIdx.x / blocks;
        group = block / blocks_of_group;
        block_of_group = block % blocks_of_group;
        first = group * of_group + block_of_group * CHANNELS;
        valid = min(of_group - block_of_group * CHANNELS, CHANNELS);
        sequence = part / pieces;
        piece = part % pieces;
    }
};

// Where in shared memory the states of octet `half` of a token's map begin, so that each lane reads its states of B and then
// of C in one run.
__device__ __forceinline__ int map_start(int half) { return PER_LANE == 16 ? 8 * half : 16 * half; }
__device__ __forceinline__ void write_map(float* to, const float (&x)[8]) {
    constexpr int WIDTH = PER_LANE > 8 ? 8 : PER_LANE;  // states of the octet that a lane reads together
#pragma unroll
    for (int k = 0; k < 8; k += WIDTH) {
        float part[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; i++) part[i] = x[k + i];
        write(to + 2 * k, part);
    }
}

// Hands states on from piece to piece, in place, one thread a state: the place of a piece, (sequences, pieces, D, N), holds
// what comes out of it when nothing goes in, and gets what goes in. A piece decays by exp(A times its time), whichever way.
__device__ __forceinline__ void hand_over(
    float* places, const float* times, const float* first, const float* A, int channels, int sequences, int pieces,
    bool from_end) {
    const int64 i = int64(blockIdx.x) * THREADS + threadIdx.x;
    const int64 states = int64(channels) * N;
    if (i >= sequences * states) return;
    const int64 sequence = i / states, state = i % states;
    const float rate = A[state] * LOG2_E;
    float carry = first ? first[i] : 0.0f;
    for (int turn = 0; turn < pieces; turn++) {
        const int64 index = sequence * pieces + (from_end ? pieces - 1 - turn : turn);
        float& place = places[index * states + state];
        const float from_nothing = place;
        place = carry;
        carry = fmaf(exp2_fast(rate * times[index * channels + state / N]), carry, from_nothing);
    }
}

// Sums over COUNT neighbouring lanes of one number a step, COUNT steps at a time: lane s of them gets the sum of x[s].
template <int COUNT> __device__ __forceinline__ float sum_over_lanes(float (&x)[COUNT]) {
#pragma unroll
    for (int width = COUNT / 2; width >= 1; width /= 2) {
        const bool upper = threadIdx.x & width;
#pragma unroll
        for (int j = 0; j < width; j++) {
            const float other = upper ? x[j] : x[j + width];
            x[j] = (upper ? x[j + width] : x[j]) + shuffle_xor(other, width);
        }
    }
    return x[0];
}
