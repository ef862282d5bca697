// Work dealt out over threads. What a task sums, and in which order tasks' sums are added, must depend on sizes only: then the
// number of threads changes no bit.
#pragma once

#include <cstdint>

namespace selective_ssm {

// Calls task(context, index, worker) for each index below `tasks`, on at most so many threads, with subnormals flushed to
// zero. A worker is below `threads`, and runs one task at a time: it may own scratch memory. One task or one thread starts
// nothing. Any thread may call this at any time, in a forked child too, but no task may.
void run_tasks(std::int64_t tasks, int threads, void (*task)(void*, std::int64_t, int), void* context);

// Calls step(context, index) for each index below `count`, one after the other, on this thread. Meanwhile the others stay
// awake, and run_tasks hands out work to them in a fraction of the time that it takes to begin anew.
void run_in_a_row(std::int64_t count, int threads, void (*step)(void*, std::int64_t), void* context);

}  // namespace selective_ssm

namespace {

// Calls f(task, worker) for each task; see run_tasks.
template <class F>
inline void parallel_for(std::int64_t tasks, int threads, F f) {
    const auto call = [](void* context, std::int64_t task, int worker) { (*static_cast<F*>(context))(task, worker); };
    selective_ssm::run_tasks(tasks, threads, call, &f);
}

}  // namespace
