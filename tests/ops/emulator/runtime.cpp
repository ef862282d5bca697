// Runs a kernel on one CPU thread: block after block, the threads of a block as fibers with stacks of their own.
//
// A fiber runs until it must wait for its warp or its block; then the next one runs, in the chosen order. A warp runs
// as far as it can before another does (in a random order, as far as chance has it). So whatever lacks a barrier
// meets, in one order or another, memory that is not yet or no longer what it should be.

#include "device.cuh"

#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <sys/mman.h>
#include <utility>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

using emulator::lane_count;
using emulator::slot_size;
constexpr int POISON = 0xff;  // repeated, a NaN in every number format
constexpr size_t GUARD = 4096;
constexpr size_t STACK = 1 << 17;
constexpr uint32 ALL = 0xffffffffu;

// ---- fibers -------------------------------------------------------------------------------------------------------

[[noreturn]] void fiber_main();

// switch_stacks puts the registers that a function must keep on its stack, and goes on where another stack left off.
#if defined(__x86_64__)
extern "C" void switch_stacks(void** from, void* to) __asm__("emulator_switch_stacks");
__asm__(R"(
.text
.p2align 4
emulator_switch_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmp *%rcx
)");
#elif defined(__aarch64__)
extern "C" void switch_stacks(void** from, void* to) __asm__("emulator_switch_stacks");
__asm__(R"(
.text
.p2align 4
emulator_switch_stacks:
    sub sp, sp, #160
    stp x29, x30, [sp]
    stp x19, x20, [sp, #16]
    stp x21, x22, [sp, #32]
    stp x23, x24, [sp, #48]
    stp x25, x26, [sp, #64]
    stp x27, x28, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x29, x30, [sp]
    ldp x19, x20, [sp, #16]
    ldp x21, x22, [sp, #32]
    ldp x23, x24, [sp, #48]
    ldp x25, x26, [sp, #64]
    ldp x27, x28, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#endif

struct Fiber {
#if defined(__x86_64__) || defined(__aarch64__)
    void* stack;

    void prepare(char* bottom, size_t bytes) {
        void** top = reinterpret_cast<void**>(bottom + bytes);  // aligned to 16
#if defined(__x86_64__)
        top -= 8;  // six registers, where to go, and where a caller would have left its address
        memset(top, 0, 8 * sizeof(void*));
        top[6] = reinterpret_cast<void*>(fiber_main);
#else
        top -= 20;
        memset(top, 0, 20 * sizeof(void*));
        top[1] = reinterpret_cast<void*>(fiber_main);
#endif
        stack = top;
    }
    void switch_to(Fiber& other) { switch_stacks(&stack, other.stack); }
#else
    ucontext_t context;

    void prepare(char* bottom, size_t bytes) {
        getcontext(&context);
        context.uc_stack.ss_sp = bottom;
        context.uc_stack.ss_size = bytes;
        makecontext(&context, fiber_main, 0);
    }
    void switch_to(Fiber& other) { swapcontext(&context, &other.context); }
#endif
};

// ---- a block ------------------------------------------------------------------------------------------------------

struct Copy {
    char* to;
    const char* from;
    int bytes, group, line;
};

struct Thread {
    Fiber fiber;
    std::vector<Copy> copies;  // issued and not yet done
    int groups;                // committed so far
    int line;                  // of the sync_block that it waits in
};

// Sets of lanes: able to run, waiting for their warp, waiting for their block; the others have returned.
struct Warp {
    uint32 ready, at_warp, at_block;
    const char* what;  // what those at_warp wait in
    int line, parity;
    // What lanes hand in, by turns in two places, so that a fast lane spoils nothing for a slow one.
    alignas(slot_size) char slots[2][lane_count * slot_size];
};

struct Machine {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<char*> stacks;
    std::vector<char> memory;  // guard, shared memory, guard
    char* shared;
    size_t shared_bytes;
    uint32 awake;  // warps with a lane that can run
    int current;
    bool running;
    Fiber outside;
    void (*kernel)(const void*);
    const void* parameters;
    int order;  // 0 forward, -1 backward, otherwise random
    uint64 random;
    char* error;
    size_t error_bytes;
} machine;

uint32 random_number() {
    machine.random = machine.random * 6364136223846793005u + 1442695040888963407u;
    return uint32(machine.random >> 33);
}

// One of a set, by the chosen order.
int choose(uint32 set) {
    if (machine.order == 0) return __builtin_ctz(set);
    if (machine.order < 0) return 31 - __builtin_clz(set);
    const int turn = random_number() % 32;
    return (__builtin_ctz(set >> turn | set << (31 & -turn)) + turn) % 32;
}

void say(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(machine.error, machine.error_bytes, format, arguments);
    va_end(arguments);
}

std::string lanes(uint32 set) {
    std::string text;
    for (int first = 0; first < lane_count; first++) {
        if (!(set >> first & 1)) continue;
        int last = first;
        while (last + 1 < lane_count && set >> (last + 1) & 1) last++;
        text += (text.empty() ? "" : ", ") + std::to_string(first);
        if (last > first) text += "-" + std::to_string(last);
        first = last;
    }
    return text;
}

// The lanes of a warp that stand where they can never meet.
[[noreturn]] void fail_diverged(int w) {
    const Warp& warp = machine.warps[w];
    const std::string met = lanes(warp.at_warp), waiting = lanes(warp.at_block);
    const std::string gone = lanes(ALL & ~(warp.at_warp | warp.at_block));
    std::string others;
    if (warp.at_block) {
        const int line = machine.threads[w * lane_count + __builtin_ctz(warp.at_block)].line;
        others = "lanes " + waiting + " wait in sync_block at line " + std::to_string(line);
    }
    if (!gone.empty()) others += (others.empty() ? "" : " and ") + ("lanes " + gone + " have returned or never were");
    emulator::fail("warp %d has diverged: lanes %s wait in %s at line %d, but %s", w, met.c_str(), warp.what, warp.line,
                   others.c_str());
}

// The thread that runs next, or -1 when all have returned.
int next_thread() {
    const int w = machine.current / lane_count;
    Warp& warp = machine.warps[w];
    bool leave = false;
    if (!warp.ready) {
        if (warp.at_warp == ALL) {
            warp.ready = ALL;
            warp.at_warp = 0;
            warp.parity ^= 1;
            leave = machine.order > 0 && random_number() % 4 == 0;
        } else if (warp.at_warp) {
            fail_diverged(w);
        } else {
            machine.awake &= ~(1u << w);
            leave = true;
        }
    }
    if (!leave) return w * lane_count + choose(warp.ready);
    if (!machine.awake) {
        for (size_t i = 0; i < machine.warps.size(); i++) {
            Warp& each = machine.warps[i];
            each.ready = each.at_block;
            each.at_block = 0;
            machine.awake |= uint32(each.ready != 0) << i;
        }
        if (!machine.awake) return -1;
    }
    const int other = choose(machine.awake);
    return other * lane_count + choose(machine.warps[other].ready);
}

void run_others() {
    Fiber& mine = machine.threads[machine.current].fiber;
    const int next = next_thread();
    if (next == machine.current) return;
    if (next < 0) {
        machine.running = false;
        mine.switch_to(machine.outside);
    }
    machine.current = next;
    threadIdx.x = next;
    mine.switch_to(machine.threads[next].fiber);
}

void fiber_main() {
    machine.kernel(machine.parameters);
    machine.warps[machine.current / lane_count].ready &= ~(1u << machine.current % lane_count);
    run_others();
    __builtin_unreachable();
}

// Gives back the stacks that only large blocks need: each kernel has a machine of its own, each stack two mappings, and a
// process may have but so many of these.
struct StackGuard {
    ~StackGuard() {
        constexpr size_t KEPT = 256;
        for (; machine.stacks.size() > KEPT; machine.stacks.pop_back()) munmap(machine.stacks.back(), STACK);
    }
};

bool prepare_block() {
    const size_t threads = blockDim.x, page = 16384;
    while (machine.stacks.size() < threads) {
        void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) {
            say("there is no memory for the stacks of %zu threads", threads);
            return false;
        }
        mprotect(stack, page, PROT_NONE);
        machine.stacks.push_back(static_cast<char*>(stack));
    }
    machine.threads.resize(threads);
    machine.warps.resize((threads + lane_count - 1) / lane_count);
    machine.awake = 0;
    for (size_t i = 0; i < threads; i++) {
        // Stacks begin at different places of a page: otherwise they would fight for the same few lines of the cache.
        machine.threads[i].fiber.prepare(machine.stacks[i], STACK - i * 320 % 8192);
        machine.threads[i].copies.clear();
        machine.threads[i].groups = 0;
    }
    for (size_t i = 0; i < machine.warps.size(); i++) {
        const size_t left = threads - i * lane_count;
        machine.warps[i].ready = left < lane_count ? (1u << left) - 1 : ALL;
        machine.warps[i].at_warp = machine.warps[i].at_block = 0;
        machine.awake |= 1u << i;
    }
    memset(machine.memory.data(), POISON, machine.memory.size());
    return true;
}

bool run_block() {
    if (!prepare_block()) return false;
    const int w = choose(machine.awake);
    machine.current = w * lane_count + choose(machine.warps[w].ready);
    threadIdx.x = machine.current;
    machine.running = true;
    machine.outside.switch_to(machine.threads[machine.current].fiber);
    if (machine.error[0]) return false;
    for (size_t i = 0; i < GUARD; i++) {
        const bool before = uint8(machine.shared[-1 - int64(i)]) != POISON;
        const bool after = uint8(machine.shared[machine.shared_bytes + i]) != POISON;
        if (!before && !after) continue;
        say("block (%u, %u, %u) wrote outside its shared memory, %zu bytes %s it", blockIdx.x, blockIdx.y, blockIdx.z,
            i + before, before ? "before" : "behind");
        return false;
    }
    return true;
}

// ---- bad addresses ------------------------------------------------------------------------------------------------

constexpr int SIGNALS[] = {SIGSEGV, SIGBUS};

void on_signal(int signal, siginfo_t* info, void*) {
    if (!machine.running) {
        std::signal(signal, SIG_DFL);  // not the kernel's fault: on return it happens again
        return;
    }
    emulator::fail("memory at %p cannot be read or written", info->si_addr);
}

// While it lives, a bad address ends the kernel and not the process.
class SignalGuard {
    std::vector<char> stack_ = std::vector<char>(1 << 16);
    stack_t old_stack_;
    struct sigaction old_[2];

  public:
    SignalGuard() {
        stack_t stack = {};
        stack.ss_sp = stack_.data();
        stack.ss_size = stack_.size();
        sigaltstack(&stack, &old_stack_);
        struct sigaction action = {};
        action.sa_sigaction = on_signal;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler is left by a switch of stacks
        for (int i = 0; i < 2; i++) sigaction(SIGNALS[i], &action, &old_[i]);
    }
    ~SignalGuard() {
        for (int i = 0; i < 2; i++) sigaction(SIGNALS[i], &old_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }
};

}  // namespace

// ---- what device.cuh calls ----------------------------------------------------------------------------------------

namespace emulator {

void fail(const char* format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    say("block (%u, %u, %u), thread %u: %s", blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, text);
    machine.running = false;
    Fiber abandoned;
    abandoned.switch_to(machine.outside);
    __builtin_unreachable();
}

const char* gather(const void* mine, int bytes, const char* what, int line) {
    Warp& warp = machine.warps[machine.current / lane_count];
    const int lane = machine.current % lane_count;
    if (!warp.at_warp) {
        warp.what = what;
        warp.line = line;
    } else if (warp.line != line || strcmp(warp.what, what)) {
        fail("its warp has diverged: it calls %s at line %d, but lanes %s wait in %s at line %d", what, line,
             lanes(warp.at_warp).c_str(), warp.what, warp.line);
    }
    char* slots = warp.slots[warp.parity];
    memcpy(slots + lane * slot_size, mine, bytes);
    warp.ready &= ~(1u << lane);
    warp.at_warp |= 1u << lane;
    run_others();
    return slots;
}

void wait_block(int line) {
    Warp& warp = machine.warps[machine.current / lane_count];
    const uint32 bit = 1u << machine.current % lane_count;
    machine.threads[machine.current].line = line;
    warp.ready &= ~bit;
    warp.at_block |= bit;
    run_others();
}

char* shared() { return machine.shared; }

bool in_shared(const void* address, int bytes) {
    const char* from = static_cast<const char*>(address);
    return from >= machine.shared && from + bytes <= machine.shared + machine.shared_bytes;
}

// Until it is waited for, a copy's destination holds poison.
void copy(void* to, const void* from, int bytes, int line) {
    Thread& thread = machine.threads[machine.current];
    memset(to, POISON, bytes);
    thread.copies.push_back({static_cast<char*>(to), static_cast<const char*>(from), bytes, thread.groups, line});
}

void commit() { machine.threads[machine.current].groups++; }

void wait(int pending, int line) {
    Thread& thread = machine.threads[machine.current];
    size_t done = 0;
    for (; done < thread.copies.size() && thread.copies[done].group < thread.groups - pending; done++) {
        const Copy& copy = thread.copies[done];
        for (int i = 0; i < copy.bytes; i++)
            if (uint8(copy.to[i]) != POISON)
                fail("what copy_async at line %d was to fill was written before wait_copies at line %d", copy.line,
                     line);
        memcpy(copy.to, copy.from, copy.bytes);
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + done);
}

int launch(void (*kernel)(const void*), const void* parameters, int gx, int gy, int gz, int threads,
           unsigned long shared, int order, char* error, unsigned long error_bytes) {
    machine.kernel = kernel;
    machine.parameters = parameters;
    machine.order = order;
    machine.random = uint64(order) * 0x9e3779b97f4a7c15u;
    machine.error = error;
    machine.error_bytes = error_bytes;
    error[0] = 0;
    gridDim = {unsigned(gx), unsigned(gy), unsigned(gz)};
    blockDim = {unsigned(threads), 1, 1};
    machine.memory.resize(2 * GUARD + shared + 128);
    machine.shared = machine.memory.data() + GUARD;
    machine.shared += -reinterpret_cast<uintptr_t>(machine.shared) % 128;
    machine.shared_bytes = shared;

    const size_t blocks = size_t(gx) * gy * gz;
    std::vector<size_t> turns(blocks);
    for (size_t i = 0; i < blocks; i++) turns[i] = order < 0 ? blocks - 1 - i : i;
    if (order > 0)
        for (size_t i = blocks; i > 1; i--) std::swap(turns[i - 1], turns[random_number() % i]);

    const SignalGuard signals;
    const StackGuard stacks;
    for (size_t block : turns) {
        blockIdx = {unsigned(block % gx), unsigned(block / gx % gy), unsigned(block / gx / gy)};
        if (!run_block()) return 1;
    }
    return 0;
}

}  // namespace emulator

// ---- what g++ calls where -fsanitize finds undefined behaviour ----------------------------------------------------

namespace {
struct Place {
    const char* file;
    uint32 line, column;
};
struct Misuse {
    Place place;
    const void* type;
    uint8 log_alignment, kind;
};
}  // namespace

extern "C" void __ubsan_handle_type_mismatch_v1_abort(const Misuse* misuse, uintptr_t address) {
    emulator::fail("%s:%u uses %p, which is not aligned to %d bytes", misuse->place.file, misuse->place.line,
                   reinterpret_cast<void*>(address), 1 << misuse->log_alignment);
}
extern "C" void __ubsan_handle_out_of_bounds_abort(const Place* place, uintptr_t index) {
    emulator::fail("%s:%u uses entry %lld of a shorter array", place->file, place->line, int64(index));
}
#define ARITHMETIC(NAME) \
    extern "C" void __ubsan_handle_##NAME##_abort(const Place* place, uintptr_t, uintptr_t) { \
        emulator::fail("%s:%u has a result that its whole number cannot hold", place->file, place->line); \
    }
ARITHMETIC(add_overflow)
ARITHMETIC(sub_overflow)
ARITHMETIC(mul_overflow)
ARITHMETIC(negate_overflow)
ARITHMETIC(divrem_overflow)
ARITHMETIC(shift_out_of_bounds)
