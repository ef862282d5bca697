// A matrix times few vectors on a CPU: out = x weight^T + bias, where reading the weight is what takes time.
//
// A task has some rows of the weight, which lie one after the other, so that memory is read in order and each row once:
// vectors that do not fit the registers at the same time find it in the first cache. How a sum is taken depends on K only.
#include "parallel.hpp"
#include "vector.hpp"

namespace {

// As in cpu.py; strides in numbers.
struct Linear {
    void* out;           // (M, N)
    const void* x;       // (M, K), unit stride in K
    const void* weight;  // (N, K), unit stride in K
    const float* bias;   // (N,), or null
    float* wide;         // (M, K) for x in fp32, or null where it is
    int64 x_row, weight_row, vectors, inputs, outputs, task_rows;  // vectors, inputs, outputs: M, K, N
    int64 number, threads;                                         // of x, weight and out
};

#define UNROLL _Pragma("GCC unroll 8")  // or sums would lie in memory

constexpr int MOST = 8;                                      // vectors
constexpr int AT_ONCE = PART == 16 ? 8 : PART == 8 ? 2 : 1;  // vectors whose sums fit the registers
constexpr int BLOCK = LANES;                                 // rows whose sums over lanes are taken together
constexpr int AHEAD = 8192;                                  // bytes that are asked for before they are needed

// The products of a row of the weight with COUNT vectors, added up in 16 lanes.
template <int COUNT, class T>
INLINE void multiply(const T* row, const float* x, int64 x_row, int64 inputs, float* products) {
    Floats even[COUNT] = {}, odd[COUNT] = {};
    int64 k = 0;
    for (; k + 2 * LANES <= inputs; k += 2 * LANES) {
        __builtin_prefetch(reinterpret_cast<const char*>(row + k) + AHEAD);
        if (sizeof(T) == 4) __builtin_prefetch(reinterpret_cast<const char*>(row + k + LANES) + AHEAD);
        const Floats first = load(row + k), second = load(row + k + LANES);
        UNROLL for (int m = 0; m < COUNT; m++) {
            even[m] = fma(first, load(x + m * x_row + k), even[m]);
            odd[m] = fma(second, load(x + m * x_row + k + LANES), odd[m]);
        }
    }
    for (; k < inputs; k += LANES) {
        const int count = static_cast<int>(inputs - k < LANES ? inputs - k : LANES);
        const Floats last = load(row + k, count);
        UNROLL for (int m = 0; m < COUNT; m++) even[m] = fma(last, load(x + m * x_row + k, count), even[m]);
    }
    UNROLL for (int m = 0; m < COUNT; m++) store(products + m * BLOCK * LANES, even[m] + odd[m]);
}

// A row with vectors from m on, COUNT at a time; fewer at a time as fewer are left.
template <int COUNT, class T>
INLINE void multiply_from(int64 m, const Linear& p, const T* row, float* products) {
    for (; m + COUNT <= p.vectors; m += COUNT) {
        const float* x = p.wide + m * p.x_row;
        multiply<COUNT>(row, x, p.x_row, p.inputs, products + m * BLOCK * LANES);
    }
    if constexpr (COUNT > 1) multiply_from<COUNT / 2>(m, p, row, products);
}

// Up to 16 outputs of every vector.
template <class T>
INLINE void write_block(const Linear& p, int64 n) {
    alignas(64) float products[MOST * BLOCK * LANES];
    const int count = static_cast<int>(p.outputs - n < BLOCK ? p.outputs - n : BLOCK);
    if (count < BLOCK) __builtin_memset(products, 0, sizeof products);
    const T* row = static_cast<const T*>(p.weight) + n * p.weight_row;
    for (int r = 0; r < count; r++) multiply_from<AT_ONCE>(0, p, row + r * p.weight_row, products + r * LANES);
    const Floats bias = p.bias == nullptr ? zeros() : load(p.bias + n, count);
    for (int64 m = 0; m < p.vectors; m++) {
        store(static_cast<T*>(p.out) + m * p.outputs + n, sums(products + m * BLOCK * LANES) + bias, count);
    }
}

template <class T>
void write(const Linear& p) {
    const int64 tasks = (p.outputs + p.task_rows - 1) / p.task_rows;
    parallel_for(tasks, static_cast<int>(p.threads), [&](int64 task, int) {
        const Linear local = p;  // a store may alias what a reference points to
        const int64 first = task * local.task_rows;
        const int64 end = first + local.task_rows < local.outputs ? first + local.task_rows : local.outputs;
        for (int64 n = first; n < end; n += BLOCK) write_block<T>(local, n);
    });
}

// x in fp32, its rows one after the other.
void widen(const Linear& p) {
    for (int64 m = 0; m < p.vectors; m++) {
        const bf16* row = static_cast<const bf16*>(p.x) + m * p.x_row;
        for (int64 k = 0; k < p.inputs; k += LANES) {
            const int count = static_cast<int>(p.inputs - k < LANES ? p.inputs - k : LANES);
            store(p.wide + m * p.inputs + k, load(row + k, count), count);
        }
    }
}

}  // namespace

KERNEL(linear)(const void* parameters) {
    Linear p = *static_cast<const Linear*>(parameters);
    if (p.number == BF16) {
        widen(p);
        p.x_row = p.inputs;
        return write<bf16>(p);
    }
    p.wide = const_cast<float*>(static_cast<const float*>(p.x));
    write<float>(p);
}
