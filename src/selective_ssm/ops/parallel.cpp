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

bool has_openmp();
void set_forked();

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
#else
public:
    FlushSubnormals() {}
#endif
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

std::atomic<bool> is_forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

struct Work {
    const std::int64_t tasks;
    const int threads;
    void (*const task)(void*, std::int64_t, int);
    void* const context;
    std::atomic<std::int64_t> next{0};
    std::atomic<int> workers{0};

    void take_all() {
        const int worker = workers++;
        if (worker >= threads) return;
        const FlushSubnormals flush;
        for (std::int64_t i = next++; i < tasks; i = next++) task(context, i, worker);
    }
};

// Tells the processor that this thread waits.
inline void pause_briefly() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Threads that stay awake for one piece of work after the other. Whoever comes late finds the work done: the thread that
// hands it out waits only for those that have begun.
struct Team {
    std::atomic<Work*> work{nullptr};
    std::atomic<std::int64_t> handed_out{0};
    std::atomic<int> busy{0};
    std::atomic<bool> is_over{false};

    void run(Work& one) {
        work = &one;
        handed_out++;
        one.take_all();
        work = nullptr;
        while (busy != 0) pause_briefly();
    }

    void help() {
        std::int64_t seen = 0;
        for (int idle = 1; !is_over; idle++) {
            const std::int64_t now = handed_out;
            if (now != seen) {
                seen = now;
                idle = 0;
                busy++;  // before the work is looked for: from here on it stays
                if (Work* one = work) one->take_all();
                busy--;
            } else if (idle % 4096 == 0) {
                std::this_thread::yield();  // whoever hands work out may need this core
            } else {
                pause_briefly();
            }
        }
    }
};

thread_local Team* team = nullptr;  // of the thread that hands work out

// Calls a function on so many threads, this one included.
void call_on_own_threads(void (*body)(void*), void* data, int threads) {
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        while (static_cast<int>(others.size()) < threads - 1) others.emplace_back(body, data);
    } catch (const std::system_error&) {
        // No more threads are to be had: those there are do the work.
    }
    body(data);
    for (std::thread& other : others) other.join();
}

void call_on_threads(void (*body)(void*), void* data, int threads) {
    if (!has_openmp()) return call_on_own_threads(body, data, threads);
    GOMP_parallel(body, data, static_cast<unsigned>(threads), 0);
}

}  // namespace

bool has_openmp() { return GOMP_parallel != nullptr && !is_forked; }

void set_forked() { is_forked = true; }

void run_tasks(std::int64_t tasks, int threads, void (*task)(void*, std::int64_t, int), void* context) {
    const int wanted = tasks < threads ? static_cast<int>(tasks) : threads;
    Work work{tasks, wanted, task, context};
    if (wanted <= 1) return work.take_all();
    if (team != nullptr) return team->run(work);
    const auto body = [](void* data) { static_cast<Work*>(data)->take_all(); };
    call_on_threads(body, &work, wanted);
}

void run_in_a_row(std::int64_t count, int threads, void (*step)(void*, std::int64_t), void* context) {
    struct Row {
        const std::int64_t count;
        void (*const step)(void*, std::int64_t);
        void* const context;
        const std::thread::id leader;
        Team team;
    } row{count, step, context, std::this_thread::get_id(), {}};
    const auto body = [](void* data) {
        Row& row = *static_cast<Row*>(data);
        if (std::this_thread::get_id() != row.leader) return row.team.help();
        team = &row.team;
        for (std::int64_t i = 0; i < row.count; i++) row.step(row.context, i);
        team = nullptr;
        row.team.is_over = true;
    };
    if (threads <= 1) {
        for (std::int64_t i = 0; i < count; i++) step(context, i);
    } else {
        call_on_threads(body, &row, threads);
    }
}

}  // namespace selective_ssm
