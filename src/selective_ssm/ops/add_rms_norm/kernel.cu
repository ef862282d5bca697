#include "device.cuh"

// A residual branch's add and the RMSNorm after it, forward and backward. A block takes ROWS rows at a time, LANES threads
// for each; a thread has eight neighbouring columns (and as many again SPAN further on, where a row is longer), which stay
// in registers between the sums over the row and what is written: each tensor is read once and written once. A wide row
// has a block to itself; narrow ones share it, each within a warp.
//
// Macros: BRANCH, STREAM, WEIGHT, OUTPUT (the formats of x, the residual stream, weight and y), WIDTH (D), LANES (threads of
// a row), ROWS (of a block), VECTORS (whether every row begins on a vector's boundary and holds whole ones),
// SHARES_GRADIENT (BRANCH is STREAM, so one gradient serves both).

constexpr int THREADS = LANES * ROWS;
constexpr int WARPS = LANES / 32;                  // of a row; none where it has a part of one
constexpr int SPAN = 8 * LANES;                    // columns that a row's threads read at once
constexpr int CHUNKS = (WIDTH + SPAN - 1) / SPAN;  // how often they do so
static_assert(ROWS == 1 || (CHUNKS == 1 && LANES <= 32 && WIDTH <= THREADS), "rows that share a block are narrow");

// Eight numbers of a row; zeros beyond its end.
template <class T> __device__ __forceinline__ void load(const T* row, int column, float (&x)[8]) {
    if constexpr (VECTORS) {
        if (column < WIDTH) return load8(row + column, x);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = !VECTORS && column + i < WIDTH ? to_float(row[column + i]) : 0.0f;
}

template <class T> __device__ __forceinline__ void store(T* row, int column, const float (&x)[8]) {
    if constexpr (VECTORS) {
        if (column < WIDTH) store8(row + column, x);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (column + i < WIDTH) row[column + i] = from_float<T>(x[i]);
        }
    }
}

// What storing in a format and loading again makes of a number.
template <class T> __device__ __forceinline__ float rounded(float x) { return to_float(from_float<T>(x)); }

// Which of the block's rows a thread serves, and from which column on. A row that is not there has no columns: nothing of it
// is read or written, and its sums are zero.
__device__ __forceinline__ int row_in_block() { return ROWS == 1 ? 0 : threadIdx.x / LANES; }
__device__ __forceinline__ int column_of(int chunk, bool present = true) {
    const int lane = ROWS == 1 ? threadIdx.x : threadIdx.x % LANES;
    return present ? 8 * (chunk * LANES + lane) : WIDTH;
}

// Sums over a row, in an order that never changes. Successive calls use the two halves of shared memory in turns, so that
// one barrier is enough: whoever writes a half again has passed the barrier that all readers had reached.
template <int COUNT> __device__ __forceinline__ void sum_over_row(float (&sums)[COUNT], bool second_half) {
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
#pragma unroll
        for (int mask = (LANES < 32 ? LANES : 32) / 2; mask > 0; mask /= 2) sums[i] += shuffle_xor(sums[i], mask);
    }
    if constexpr (WARPS > 1) {
        float* shared = reinterpret_cast<float*>(shared_memory()) + (second_half ? COUNT * WARPS : 0);
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) shared[i * WARPS + threadIdx.x / 32] = sums[i];
        }
        sync_block();
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            sums[i] = 0.0f;
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++) sums[i] += shared[i * WARPS + warp];
        }
    }
}

struct ForwardParameters {
    const BRANCH* x;
    const STREAM* residual;
    const WEIGHT* weight;
    OUTPUT* y;
    STREAM* total;
    int64 rows;
    float eps;
};

// Each row is met once.
extern "C" __global__ void __launch_bounds__(THREADS) forward(const __grid_constant__ ForwardParameters p) {
    const int64 row = int64(blockIdx.x) * ROWS + row_in_block(), start = row * WIDTH;
    const bool present = ROWS == 1 || row < p.rows;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        if (column_of(chunk) < WIDTH) prefetch(p.weight + column_of(chunk));
    }
    let_next_begin();
    wait_for_previous();
    float total[CHUNKS][8];
    float squares[1] = {0.0f};
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = column_of(chunk, present);
        float x[8];
        load(p.residual + start, column, total[chunk]);
        load(p.x + start, column, x);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            total[chunk][i] = rounded<STREAM>(total[chunk][i] + x[i]);
            squares[0] += total[chunk][i] * total[chunk][i];
        }
        store(p.total + start, column, total[chunk]);
    }
    sum_over_row(squares, false);
    const float scale = 1.0f / sqrtf(squares[0] / WIDTH + p.eps);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = column_of(chunk, present);
        float weight[8];
        load(p.weight, column, weight);
#pragma unroll
        for (int i = 0; i < 8; i++) weight[i] *= total[chunk][i] * scale;
        store(p.y + start, column, weight);
    }
}

struct BackwardParameters {
    const OUTPUT* d_y;
    const STREAM* d_total;  // null for zero
    const STREAM* total;
    const WEIGHT* weight;
    STREAM* d_residual;
    BRANCH* d_x;           // null where SHARES_GRADIENT
    float* partials;  // (blocks, WIDTH) each block's part of the weight's gradient
    int64 rows;
    float eps;
};

// A block takes ROWS rows of every gridDim.x · ROWS.
extern "C" __global__ void __launch_bounds__(THREADS) backward(const __grid_constant__ BackwardParameters p) {
    float d_weight[CHUNKS][8] = {};
    bool second_half = false;
    for (int64 first = int64(blockIdx.x) * ROWS; first < p.rows; first += int64(gridDim.x) * ROWS) {
        const int64 row = first + row_in_block(), start = row * WIDTH;
        const bool present = ROWS == 1 || row < p.rows;
        float total[CHUNKS][8], d_y[CHUNKS][8], d_total[CHUNKS][8] = {};
        float sums[2] = {0.0f, 0.0f};  // of total², of weight · d_y · total
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int column = column_of(chunk, present);
            float weight[8];
            load(p.total + start, column, total[chunk]);
            load(p.d_y + start, column, d_y[chunk]);
            if (p.d_total) load(p.d_total + start, column, d_total[chunk]);
            load(p.weight, column, weight);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                sums[0] += total[chunk][i] * total[chunk][i];
                sums[1] += weight[i] * d_y[chunk][i] * total[chunk][i];
            }
        }
        sum_over_row(sums, second_half);
        second_half = !second_half;
        const float scale = present ? 1.0f / sqrtf(sums[0] / WIDTH + p.eps) : 0.0f;
        const float slope = sums[1] / WIDTH * scale * scale;
#pragma unroll
        for (int chunk = 0; chunk < CHUNKS; chunk++) {
            const int column = column_of(chunk, present);
            float d[8];
            load(p.weight, column, d);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                d_weight[chunk][i] += d_y[chunk][i] * total[chunk][i] * scale;
                d[i] = (d[i] * d_y[chunk][i] - total[chunk][i] * slope) * scale + d_total[chunk][i];
            }
            store(p.d_residual + start, column, d);
            if constexpr (!SHARES_GRADIENT) store(p.d_x + start, column, d);
        }
    }
    float* shared = reinterpret_cast<float*>(shared_memory());  // (ROWS, WIDTH), where rows share the block
    float* part = p.partials + int64(blockIdx.x) * WIDTH;
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        const int column = column_of(chunk);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (column + i < WIDTH) (ROWS == 1 ? part : shared + row_in_block() * WIDTH)[column + i] = d_weight[chunk][i];
        }
    }
    if constexpr (ROWS > 1) {
        sync_block();
        if (threadIdx.x < WIDTH) {
            float sum = 0.0f;
            for (int row = 0; row < ROWS; row++) sum += shared[row * WIDTH + threadIdx.x];
            part[threadIdx.x] = sum;
        }
    }
}

struct SumParameters {
    const float* partials;
    WEIGHT* d_weight;
    int blocks;
};

constexpr int SUM_WARPS = 8;

// Sums the blocks' parts of the weight's gradient: a block for 32 columns, a lane a column, a warp every eighth part.
extern "C" __global__ void __launch_bounds__(32 * SUM_WARPS) sum_partials(const __grid_constant__ SumParameters p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int column = 32 * blockIdx.x + lane;
    float sum = 0.0f;
    if (column < WIDTH) {
#pragma unroll 4
        for (int block = warp; block < p.blocks; block += SUM_WARPS) sum += p.partials[int64(block) * WIDTH + column];
    }
    float* shared = reinterpret_cast<float*>(shared_memory());
    shared[threadIdx.x] = sum;
    sync_block();
    if (warp == 0 && column < WIDTH) {
        sum = 0.0f;
#pragma unroll
        for (int other = 0; other < SUM_WARPS; other++) sum += shared[32 * other + lane];
        p.d_weight[column] = from_float<WEIGHT>(sum);
    }
}
