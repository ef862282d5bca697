// The plain C interface of the CPU library: what it is, what it was compiled for, and what this machine can run of it.
//
// Each kernel is one function for each instruction set, selective_ssm_<kernel>_<instruction set>, that takes a pointer to
// its arguments' structure (KERNEL in vector.hpp).

#include "parallel.hpp"

#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace selective_ssm {
bool has_openmp();
void set_forked();
}

// Raised with every change to an exported function; native.py refuses a library of another version.
EXPORT int selective_ssm_abi_version() { return 6; }

// A kernel and what it is called with.
struct Launch {
    void (*kernel)(const void*);
    const void* parameters;
};

// Kernels one after the other, of which none asks for more threads than given.
EXPORT void selective_ssm_run(const Launch* launches, std::int64_t count, int threads) {
    const auto step = [](void* context, std::int64_t i) {
        const Launch& launch = static_cast<const Launch*>(context)[i];
        launch.kernel(launch.parameters);
    };
    selective_ssm::run_in_a_row(count, threads, step, const_cast<Launch*>(launches));
}

// The instruction sets that there are kernels for and that this machine has, fastest first.
EXPORT const char* selective_ssm_vectors() {
#if defined(WITH_AVX)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        return "avx512 avx2 baseline";
    }
    if (avx2) return "avx2 baseline";
#endif
    return "baseline";
}

// What every machine of this kind has.
EXPORT const char* selective_ssm_baseline() {
#if defined(__x86_64__)
    return "SSE2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "no vector instructions";
#endif
}

// To be called in a forked child that loads the library itself: a fork before that goes unnoticed.
EXPORT void selective_ssm_forked() { selective_ssm::set_forked(); }

// Whose threads work is dealt out to.
EXPORT const char* selective_ssm_threads() { return selective_ssm::has_openmp() ? "OpenMP" : "its own"; }
