#include "linear.cuh"

// A matrix times many vectors, out = x weight^T + bias, in 16 bits: what takes time is what each multiprocessor reads.
//
// A block has VECTORS vectors and ROWS rows of the weight. Both come through shared memory in chunks of DEPTH numbers of K,
// STAGES - 1 of them on their way at once. Before anything is looked at that an earlier kernel wrote, as many of the weight
// are sent for, and the rest of it is asked for in the second cache. A warp multiplies the vectors of its team, one of
// TEAMS, with all rows, and of a chunk's steps every SPLIT'th; what a team's warps have summed is added in their order.
//
// Macros: NUMBER, bf16 or fp16; VECTORS; ROWS; DEPTH; STAGES; TEAMS; SPLIT. Rows of x begin on a vector's boundary.

constexpr int WARPS = TEAMS * SPLIT, THREADS = 32 * WARPS;
constexpr int STEP = 32;                 // numbers of K
constexpr int LINE = DEPTH / IN_VECTOR;  // vectors of a chunk of one row, of x or of the weight
constexpr int STAGE = (VECTORS + ROWS) * LINE;
constexpr int X_TILES = VECTORS / TEAMS / 16, TILES = ROWS / 8;
constexpr int PITCH = ROWS % 16 == 8 ? ROWS : ROWS + 8;  // of sums: four rows of a tile lie in different banks

// Where a vector lies among lines: those with the same part of K of eight lines one after another are in different banks.
__device__ __forceinline__ int place(int line, int vector) { return line * LINE + (vector ^ line % 8); }

// Sends for a chunk of LINES rows; zeros where there are no such rows, and beyond K.
template <int LINES>
__device__ __forceinline__ void send_for(Vector* lines, const NUMBER* rows, int64 stride, int count, int inputs) {
    constexpr int AT_ONCE = THREADS / LINE;
    const int first = threadIdx.x / LINE, vector = threadIdx.x % LINE;
    const NUMBER* from = rows + first * stride + vector * IN_VECTOR;
#pragma unroll
    for (int i = 0; i < LINES; i += AT_ONCE) {
        const int line = first + i;
        if (LINES % AT_ONCE != 0 && line >= LINES) break;
        copy_async_if(line < count && vector * IN_VECTOR < inputs, lines + place(line, vector), from + i * stride);
    }
}

// Asks for the rest of some rows in the second cache.
__device__ __forceinline__ void ask_for(const NUMBER* rows, int64 stride, int count, int inputs) {
    constexpr int CACHE_LINE = 128 / sizeof(NUMBER);
    for (int row = threadIdx.x / 32; row < count; row += WARPS) {
        for (int k = threadIdx.x % 32 * CACHE_LINE; k < inputs; k += 32 * CACHE_LINE) prefetch(rows + row * stride + k);
    }
}

// What a warp sums.
struct Sums {
    float sums[X_TILES][TILES][4] = {};

    // The part of K that begins with vector `begin` of the lines.
    __device__ __forceinline__ void add(const Vector* x, const Vector* weight, int begin) {
        const int lane = threadIdx.x % 32;
        uint32 w[TILES][4];
#pragma unroll
        for (int n = 0; n < TILES; n++) load_matrices(w[n], weight + place(8 * n + lane % 8, begin + lane / 8));
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint32 a[X_TILES][4];
#pragma unroll
            for (int m = 0; m < X_TILES; m++) {
                load_matrices(a[m], x + place(16 * m + lane % 16, begin + 2 * half + lane / 16));
            }
#pragma unroll
            for (int m = 0; m < X_TILES; m++) {
#pragma unroll
                for (int n = 0; n < TILES; n++) {
                    multiply_add<NUMBER>(sums[m][n], a[m], w[n][2 * half], w[n][2 * half + 1]);
                }
            }
        }
    }

    __device__ __forceinline__ void leave(float* to) const {
        to += threadIdx.x % 32 / 4 * PITCH + threadIdx.x % 4 * 2;
#pragma unroll
        for (int m = 0; m < X_TILES; m++) {
#pragma unroll
            for (int n = 0; n < TILES; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) to[(16 * m + 8 * (i / 2)) * PITCH + 8 * n + i % 2] = sums[m][n][i];
            }
        }
    }
};

// Adds up what the warps have left, (SPLIT, VECTORS, PITCH), and writes it, eight neighbours at a time.
__device__ __forceinline__ void write(const Parameters& p, const float* parts, int first_vector, int first_row) {
#pragma unroll 1
    for (int i = threadIdx.x; i < VECTORS * TILES; i += THREADS) {
        const int m = i / TILES, n = i % TILES * 8, row = first_row + n, count = min(8, p.outputs - row);
        if (first_vector + m >= p.vectors || count <= 0) continue;
        float sums[8] = {};
#pragma unroll
        for (int part = 0; part < SPLIT; part++) {
            float summands[8];
            load8(parts + (part * VECTORS + m) * PITCH + n, summands);
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] += summands[j];
        }
        if (p.bias) {
#pragma unroll
            for (int j = 0; j < 8; j++) sums[j] += j < count ? to_float(p.bias[row + j]) : 0;
        }
        NUMBER* out = p.out + int64(first_vector + m) * p.outputs + row;
        if (p.outputs % 8 == 0) {
            store8(out, sums);
            continue;
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (j < count) out[j] = from_float<NUMBER>(sums[j]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) linear_many(const __grid_constant__ Parameters p) {
    const int warp = threadIdx.x / 32, part = warp % SPLIT, team = warp / SPLIT;
    const int first_vector = blockIdx.y * VECTORS, first_row = blockIdx.x * ROWS;
    const int vectors = min(VECTORS, p.vectors - first_vector), rows = min(ROWS, p.outputs - first_row);
    const int chunks = (p.inputs + DEPTH - 1) / DEPTH;
    const NUMBER* x = p.x + first_vector * p.x_row;
    const NUMBER* weight = p.weight + first_row * p.weight_row;

    Vector* stages = reinterpret_cast<Vector*>(shared_memory());  // (STAGES, VECTORS and then ROWS, LINE)
    const auto send_for_weight = [&](int chunk) {
        Vector* lines = stages + chunk % STAGES * STAGE + VECTORS * LINE;
        const int k = chunk * DEPTH;
        if (chunk < chunks) send_for<ROWS>(lines, weight + k, p.weight_row, rows, p.inputs - k);
    };
    const auto send_for_x = [&](int chunk) {
        Vector* lines = stages + chunk % STAGES * STAGE;
        const int k = chunk * DEPTH;
        if (chunk < chunks) send_for<VECTORS>(lines, x + k, p.x_row, vectors, p.inputs - k);
        commit_copies();
    };
#pragma unroll 1
    for (int chunk = 0; chunk < STAGES - 1; chunk++) send_for_weight(chunk);
    constexpr int SENT_FOR = (STAGES - 1) * DEPTH;
    if (blockIdx.y == 0) ask_for(weight + SENT_FOR, p.weight_row, rows, p.inputs - SENT_FOR);
    let_next_begin();
    wait_for_previous();
#pragma unroll 1
    for (int chunk = 0; chunk < STAGES - 1; chunk++) send_for_x(chunk);

    Sums sums;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; chunk++) {
        wait_copies<STAGES - 2>();
        sync_block();
        send_for_weight(chunk + STAGES - 1);
        send_for_x(chunk + STAGES - 1);
        const Vector* lines = stages + chunk % STAGES * STAGE;
#pragma unroll
        for (int step = 0; step < DEPTH / STEP; step += SPLIT) {
            sums.add(lines + team * (VECTORS / TEAMS) * LINE, lines + VECTORS * LINE, (step + part) * (STEP / IN_VECTOR));
        }
    }
    sync_block();
    float* parts = reinterpret_cast<float*>(shared_memory());
    sums.leave(parts + (part * VECTORS + team * (VECTORS / TEAMS)) * PITCH);
    sync_block();
    write(p, parts, first_vector, first_row);
}
