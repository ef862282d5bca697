#include "linear.cuh"

// A matrix times few vectors, out = x weight^T + bias: the weight is read once, and all else is to hide behind that.
//
// A warp takes TILES tiles of eight rows of the weight, and of K a run of steps. A step is four vectors of each row: with
// g = lane / 4 and t = lane % 4, a lane reads vector t of row g. A thread has AHEAD steps on their way before it looks at
// anything that an earlier kernel wrote, and sends for another as soon as one is used. SPLIT warps share tiles; what they
// have summed is added in their order. GROUPS such teams make a block. Vectors that have no place in a block are served by
// others along the grid's second axis.
//
// Macros: NUMBER (the format of all four); TILES; AHEAD; SPLIT; GROUPS; WIDE, 1 for up to sixteen vectors of 16 bits
// rather than eight; ALIGNED, whether every row of x begins on a vector's boundary.

constexpr int STEP = 4 * IN_VECTOR;
constexpr int ROWS = 8 * TILES;         // of a team
constexpr int VECTORS = WIDE ? 16 : 8;  // places for them
constexpr int SUMS = VECTORS * ROWS;    // that a warp leaves
constexpr int THREADS = 32 * SPLIT * GROUPS;

__device__ __forceinline__ Vector read_x(bool wanted, const NUMBER* from) {
    if constexpr (ALIGNED) return load_if(wanted, from);
    const uint16* halves = reinterpret_cast<const uint16*>(from);
    Vector v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.word[i] = wanted ? halves[2 * i] | uint32(halves[2 * i + 1]) << 16 : 0;
    return v;
}

// What a warp sums in 16 bits, by products of matrices: sixteen rows of x times eight of the weight. Of the sixteen
// columns of a product lane (g, t) holds two neighbours and two more eight further on; but which of K these are does not
// matter if it is the same for both factors, so they are half of a vector as it was read. The halves have sums of their
// own, since each product waits for the one before it.
template <class T> struct Sums {
    static constexpr int STEPS = AHEAD, READ = WIDE ? 2 : 1;  // how many, and rows in each, a lane reads at once of x
    static __device__ __forceinline__ int row_of_x(int i, int g) { return g + 8 * i; }

    float sums[TILES][2][4] = {};

    __device__ __forceinline__ void add(int tile, const Vector& w, const Vector (&x)[READ]) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32 low = x[0].word[2 * half], high = x[0].word[2 * half + 1];
            const uint32 a[4] = {low, WIDE ? x[WIDE].word[2 * half] : 0, high, WIDE ? x[WIDE].word[2 * half + 1] : 0};
            multiply_add<T>(sums[tile][half], a, w.word[2 * half], w.word[2 * half + 1]);
        }
    }

    __device__ __forceinline__ void leave(float* to, int g, int t) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int i = 0; i < (WIDE ? 4 : 2); i++) {
                to[(g + 8 * (i / 2)) * ROWS + 8 * tile + 2 * t + i % 2] = sums[tile][0][i] + sums[tile][1][i];
            }
        }
    }
};

// And in fp32: each lane for itself, its part of the weight's row times that of every vector.
template <> struct Sums<float> {
    static constexpr int STEPS = 1, READ = 8;
    static __device__ __forceinline__ int row_of_x(int i, int) { return i; }

    float sums[TILES][8] = {};

    __device__ __forceinline__ void add(int tile, const Vector& w, const Vector (&x)[READ]) {
#pragma unroll
        for (int m = 0; m < 8; m++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                sums[tile][m] += __uint_as_float(x[m].word[i]) * __uint_as_float(w.word[i]);
            }
        }
    }

    __device__ __forceinline__ void leave(float* to, int g, int t) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (int m = 0; m < 8; m++) {
                float sum = sums[tile][m];
                sum += shuffle_xor(sum, 1);
                sum += shuffle_xor(sum, 2);
                if (m / 2 == t) to[m * ROWS + 8 * tile + g] = sum;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) linear(const __grid_constant__ Parameters p) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int share = (unsigned(p.inputs) + STEP * SPLIT - 1) / (STEP * SPLIT) * STEP;  // of K, for each of a team
    const int begin = warp % SPLIT * share, count = min(share, p.inputs - begin);
    const int left = count - t * IN_VECTOR;  // numbers from this lane's first vector on

    const NUMBER* rows[TILES];
    bool is_row[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const int row = (int(blockIdx.x) * GROUPS + warp / SPLIT) * ROWS + 8 * tile + g;
        rows[tile] = p.weight + row * p.weight_row + begin + t * IN_VECTOR;
        is_row[tile] = row < p.outputs;
    }
    Vector w[AHEAD][TILES];
    const auto send_for = [&](int i, int k) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            w[i][tile] = load_once_if(is_row[tile] && k < left, rows[tile] + k);
        }
    };
#pragma unroll
    for (int i = 0; i < AHEAD; i++) send_for(i, i * STEP);
    let_next_begin();
    wait_for_previous();

    typedef Sums<NUMBER> Of;
    Of sums;
    const int first_vector = blockIdx.y * VECTORS, vectors = p.vectors - first_vector;
    const NUMBER* x_rows = p.x + first_vector * p.x_row + begin + t * IN_VECTOR;
    for (int done = 0; done < count; done += AHEAD * STEP) {
#pragma unroll
        for (int first = 0; first < AHEAD; first += Of::STEPS) {
            Vector x[Of::STEPS][Of::READ];
#pragma unroll
            for (int i = 0; i < Of::STEPS; i++) {
                const int k = done + (first + i) * STEP;
#pragma unroll
                for (int j = 0; j < Of::READ; j++) {
                    const int m = Of::row_of_x(j, g);
                    x[i][j] = read_x(m < vectors && k < left, x_rows + m * p.x_row + k);
                }
            }
            sync_warp();  // the compiler would put off most loads until the first has been used
#pragma unroll
            for (int i = 0; i < Of::STEPS; i++) {
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) sums.add(tile, w[first + i][tile], x[i]);
                send_for(first + i, done + (AHEAD + first + i) * STEP);
            }
        }
    }

    float* shared = reinterpret_cast<float*>(shared_memory());  // (GROUPS, SPLIT, VECTORS, ROWS)
    sums.leave(shared + warp * SUMS, g, t);
    sync_block();
#pragma unroll 1
    for (int i = threadIdx.x; i < GROUPS * SUMS; i += THREADS) {
        const int team = unsigned(i) / SUMS, m = unsigned(i) % SUMS / ROWS;
        const int row = (int(blockIdx.x) * GROUPS + team) * ROWS + i % ROWS;
        if (m >= vectors || row >= p.outputs) continue;
        float sum = 0;
#pragma unroll
        for (int part = 0; part < SPLIT; part++) sum += shared[(team * SPLIT + part) * SUMS + i % SUMS];
        if (p.bias) sum += to_float(p.bias[row]);
        p.out[int64(first_vector + m) * p.outputs + row] = from_float<NUMBER>(sum);
    }
}
