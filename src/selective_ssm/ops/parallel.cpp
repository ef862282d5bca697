// Threads: those of torch's OpenMP where its library can be found, else threads of our own, started anew each time.
//
// Torch's are preferred because, for a while after its own work, they wait for more without sleeping, and would fight ours
// for the cores. They are found as a symbol of the process; nothing is linked. A forked child has none of its parent's
// threads, and OpenMP's library would wait for them forever: there, threads of our own serve.
#include "parallel.hpp"

#include <pthread.h>

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// As GCC's code calls it, since 4.9; LLVM's and Intel's libraries have it as well.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags) __attribute__((weak));

namespace selective_ssm {
namespace {

// While one exists, its thread takes subnormal numbers for zero, and makes none.
class FlushSubnormals {
#if defined(__x86_64__)
    const unsigned before = _mm_getcsr();

public:
    FlushSubnormals() { _mm_setcsr(before | 0x8040); }
    ~FlushSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    unsigned long before;

public:
    FlushSubnormals() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(before));
        __asm__ volatile("msr fpcr, %0" : : "r"(before | 1ul << 24));
    }
    ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(before)); }
#endif
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

std::atomic<bool> is_forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

struct Work {
    const std::int64_t tasks;
    void (*const task)(void*, std::int64_t, int);
    void* const context;
    std::atomic<std::int64_t> next{0};
    std::atomic<int> workers{0};

    void take_all() {
        const FlushSubnormals flush;
        const int worker = workers++;
        for (std::int64_t i = next++; i < tasks; i = next++) task(context, i, worker);
    }
};

void run_on_own_threads(Work& work, int threads) {
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        while (static_cast<int>(others.size()) < threads - 1) others.emplace_back([&work] { work.take_all(); });
    } catch (const std::system_error&) {
        // No more threads are to be had: those there are do the work.
    }
    work.take_all();
    for (std::thread& other : others) other.join();
}

}  // namespace

bool has_openmp() { return GOMP_parallel != nullptr && !is_forked; }

void run_tasks(std::int64_t tasks, int threads, void (*task)(void*, std::int64_t, int), void* context) {
    Work work{tasks, task, context};
    const int wanted = tasks < threads ? static_cast<int>(tasks) : threads;
    if (wanted <= 1) return work.take_all();
    if (!has_openmp()) return run_on_own_threads(work, wanted);
    const auto body = [](void* data) { static_cast<Work*>(data)->take_all(); };
    GOMP_parallel(body, &work, static_cast<unsigned>(wanted), 0);
}

}  // namespace selective_ssm
