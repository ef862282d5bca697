// The add of a residual branch and the RMSNorm after it on a CPU, forward and backward: op.py has the maths. Each row is
// read from memory once, and stays in the first cache between its sums and what is made of them.
#include "parallel.hpp"
#include "vector.hpp"

namespace {

constexpr int64 ROWS = 32;      // of a task, as in cpu.py
constexpr int64 COLUMNS = 256;  // of a task that adds up what others have left

// As in cpu.py. All rows lie without gaps.
struct Norm {
    const void* x;         // (rows, width)
    const void* residual;  // (rows, width)
    const float* weight;   // (width,)
    void* y;               // (rows, width)
    void* total;           // (rows, width), in the residual's numbers; an input backward
    const void* d_y;       // (rows, width), in y's numbers
    const void* d_total;   // (rows, width), in the residual's; may be null
    void* d_residual;      // (rows, width)
    void* d_x;             // (rows, width), in x's numbers; null where the residual's gradient serves
    float* partials;       // (tasks, width), of the weight's gradient
    float* d_weight;       // (width,)
    int64 rows, width;
    float eps;
    int x_number, residual_number, y_number, threads;
};


// Calls f(column, how many of a vector's numbers there are) along a row.
template <class F>
INLINE void for_columns(int64 from, int64 to, F f) {
    int64 c = from;
    for (; c + LANES <= to; c += LANES) f(c, LANES);
    if (c < to) f(c, static_cast<int>(to - c));
}

// Calls f(first row, the row after the last, the task) for so many rows a task.
template <class F>
INLINE void for_rows(const Norm& p, F f) {
    parallel_for((p.rows + ROWS - 1) / ROWS, p.threads, [&](int64 task, int) {
        f(task * ROWS, least((task + 1) * ROWS, p.rows), task);
    });
}

// 1 / sqrt(mean(x²) + eps) of a row whose squares add up to `squares`.
INLINE float scale_of(const Norm& p, Floats squares) {
    return 1 / __builtin_sqrtf(sum(squares) / static_cast<float>(p.width) + p.eps);
}

template <class X, class R, class Y>
void forward_row(const Norm& p, const X* x, const R* residual, R* total, Y* y) {
    const float* weight = p.weight;
    Floats squares = zeros();
    for_columns(0, p.width, [&](int64 c, int count) __attribute__((always_inline)) {
        store(total + c, load(residual + c, count) + load(x + c, count), count);
        const Floats rounded = load(total + c, count);
        squares = fma(rounded, rounded, squares);
    });
    const Floats scale = splat(scale_of(p, squares));
    for_columns(0, p.width, [&](int64 c, int count) __attribute__((always_inline)) {
        store(y + c, load(total + c, count) * scale * load(weight + c, count), count);
    });
}

// The gradient of the sum, from n = total · scale and g = weight · dy: (g − n mean(g n)) scale + d_total.
template <class X, class R, class Y>
void backward_row(const Norm& p, int64 from, float* d_weight) {
    const R* total = static_cast<const R*>(p.total) + from;
    const Y* d_y = static_cast<const Y*>(p.d_y) + from;
    const R* d_total = p.d_total == nullptr ? nullptr : static_cast<const R*>(p.d_total) + from;
    R* d_residual = static_cast<R*>(p.d_residual) + from;
    X* d_x = p.d_x == nullptr ? nullptr : static_cast<X*>(p.d_x) + from;
    const float* weight = p.weight;
    Floats squares = zeros(), products = zeros();
    for_columns(0, p.width, [&](int64 c, int count) __attribute__((always_inline)) {
        const Floats sum = load(total + c, count);
        squares = fma(sum, sum, squares);
        products = fma(load(d_y + c, count) * load(weight + c, count), sum, products);
    });
    const float one = scale_of(p, squares);
    const Floats scale = splat(one), mean = splat(sum(products) * one / static_cast<float>(p.width));
    for_columns(0, p.width, [&](int64 c, int count) __attribute__((always_inline)) {
        const Floats slope = load(d_y + c, count), normal = load(total + c, count) * scale;
        store(d_weight + c, fma(slope, normal, load(d_weight + c, count)), count);
        Floats d = (slope * load(weight + c, count) - normal * mean) * scale;
        if (d_total != nullptr) d = d + load(d_total + c, count);
        store(d_residual + c, d, count);
        if (d_x != nullptr) store(d_x + c, d, count);
    });
}

template <class X, class R, class Y>
void forward(const Norm& p) {
    for_rows(p, [&](int64 from, int64 to, int64) {
        for (int64 at = from * p.width; at < to * p.width; at += p.width) {
            forward_row(p, static_cast<const X*>(p.x) + at, static_cast<const R*>(p.residual) + at,
                        static_cast<R*>(p.total) + at, static_cast<Y*>(p.y) + at);
        }
    });
}

template <class X, class R, class Y>
void backward(const Norm& p) {
    for_rows(p, [&](int64 from, int64 to, int64 task) {
        float* d_weight = p.partials + task * p.width;
        for (int64 c = 0; c < p.width; c++) d_weight[c] = 0;
        for (int64 row = from; row < to; row++) backward_row<X, R, Y>(p, row * p.width, d_weight);
    });
    // Added up in the tasks' order, whichever was done first.
    const int64 tasks = (p.rows + ROWS - 1) / ROWS;
    parallel_for((p.width + COLUMNS - 1) / COLUMNS, p.threads, [&](int64 index, int) {
        for_columns(index * COLUMNS, least((index + 1) * COLUMNS, p.width), [&](int64 c, int count) __attribute__((always_inline)) {
            Floats sum = zeros();
            for (int64 task = 0; task < tasks; task++) sum = sum + load(p.partials + task * p.width + c, count);
            store(p.d_weight + c, sum, count);
        });
    });
}

#define FOR_NUMBERS(name)                                                                       \
    const Norm& p = *static_cast<const Norm*>(parameters);                                      \
    const int numbers = p.x_number + 2 * p.residual_number + 4 * p.y_number;                    \
    switch (numbers) {                                                                          \
        case 0: return name<float, float, float>(p);                                            \
        case 1: return name<bf16, float, float>(p);                                             \
        case 2: return name<float, bf16, float>(p);                                             \
        case 3: return name<bf16, bf16, float>(p);                                              \
        case 4: return name<float, float, bf16>(p);                                             \
        case 5: return name<bf16, float, bf16>(p);                                              \
        case 6: return name<float, bf16, bf16>(p);                                              \
        default: return name<bf16, bf16, bf16>(p);                                              \
    }

}  // namespace

KERNEL(add_rms_norm)(const void* parameters) { FOR_NUMBERS(forward) }

KERNEL(add_rms_norm_backward)(const void* parameters) { FOR_NUMBERS(backward) }
