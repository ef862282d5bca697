// Lets tests and benchmarks call the functions of maths.hpp, and the loads and stores of vector.hpp.
#include "maths.hpp"
#include "parallel.hpp"

namespace {

struct Apply {
    const void* x;
    void* out;
    int64 count;
    int from, to;  // Number
    int function;  // as below
};

INLINE Floats apply(int function, Floats x) {
    switch (function) {
        case 1: return exp2(x);
        case 2: return exp(x);
        case 3: return sigmoid(x);
        case 4: return softplus(x);
        case 5: return hold(x, exp(x));
        case 6: return hold_slope(x, exp(x), hold(x, exp(x)));
        default: return x;
    }
}

template <class From, class To>
void apply(const Apply& p) {
    const From* x = static_cast<const From*>(p.x);
    To* out = static_cast<To*>(p.out);
    for (int64 i = 0; i < p.count; i += LANES) {
        const int count = p.count - i < LANES ? static_cast<int>(p.count - i) : LANES;
        store(out + i, apply(p.function, load(x + i, count)), count);
    }
}

void run(void* context, int64, int) {
    const Apply& p = *static_cast<const Apply*>(context);
    if (p.from == FP32) return p.to == FP32 ? apply<float, float>(p) : apply<float, bf16>(p);
    return p.to == FP32 ? apply<bf16, float>(p) : apply<bf16, bf16>(p);
}

}  // namespace

KERNEL(apply)(const void* parameters) {
    selective_ssm::run_tasks(1, 1, run, const_cast<void*>(parameters));
}
