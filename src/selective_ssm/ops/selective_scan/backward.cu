// The selective scan, backward.
//
// A block goes through its piece of a sequence from the last chunk of CHUNK tokens to the first, a quarter of a chunk a turn.
// As in the forward pass it has two roles, which a barrier a turn keeps in step:
//   - scanners run the recurrence (backward_scanner.cuh). Of a chunk they know the state before it, kept by the forward pass.
//     From there they note the state every SUB tokens, and then take the runs of SUB tokens from the last to the first:
//     forward again, now with all states and decays in registers, then back;
//   - helpers (backward_helper.cuh) turn what scanners have summed over states into the gradients of u, delta and z, and
//     work out dt and the gradient dy of the scan's output for a quarter that comes a chunk later, 8 neighbouring channels of a
//     token a thread.
// There is room for a quarter more than a chunk has: the one that has been scanned gives its place to the one that is prepared.
//
// Each block writes its sums over channels and tokens; sum.cu adds them up, in order: no atomics, the same bits every time.
//
// Macros: PARTS (bf16 numbers whose sum stands for a number in a product).

#include "scan.cuh"

struct Parameters {
    const U* d_out;
    const U* u;
    const DELTA* delta;
    const Z* z;
    const B_MAP* B;
    const C_MAP* C;
    const float* A;
    const float* D;
    const float* delta_bias;
    const float* initial;  // (sequences, D, N)
    const void* offsets;   // (sequences + 1,)
    const float* kept;     // (B, kept states, D, N)
    const float* d_final;  // (sequences, D, N)
    U* d_u;
    DELTA* d_delta;
    Z* d_z;
    float* d_initial;    // (sequences, D, N)
    float* B_parts;      // (blocks of a group, B, L, G, N); time-invariant (parts, D, N)
    float* C_parts;      // likewise
    float* A_parts;      // (parts, D, N)
    float* D_parts;      // (parts, D)
    float* bias_parts;   // (parts, D)
    float* piece_grad;   // (sequences, pieces, D, N): of the state after each piece, or before it (summary)
    float* piece_time;   // (sequences, pieces, D): the sum of dt
    Strides d_out_stride, u_stride, delta_stride, z_stride, B_stride, C_stride, out_stride;
    int64 length;
    int channels, groups, batch, sequences, slots, pieces;
    int kept_states;
    int wide_offsets, reverse;
};

constexpr int SUB = 8;
constexpr int SUBS = CHUNK / SUB;
constexpr int QUARTERS = 4;
constexpr int QUARTER = CHUNK / QUARTERS;
constexpr int PLACES = QUARTERS + 1;
constexpr int HELPERS = THREADS / 2;
constexpr int BLOCK = THREADS + HELPERS;
constexpr int WARPS = THREADS / 32;  // of scanners

// A block of 384 threads begins with 168 registers a thread; scanners need more, helpers fewer.
constexpr bool MOVE_REGISTERS = BLOCK == 384;
constexpr int SCANNER_REGISTERS = 208, HELPER_REGISTERS = 88;

constexpr bool IN_PLACE = PASSES == 1;        // whether results take the place of what they were made of
constexpr bool MAPS_VARY = !B_FIXED || !C_FIXED;

// The last numbers of these rows are never used: they keep lanes out of each other's banks.
struct Quarter {
    float step[QUARTER][CHANNELS + 2][2];  // dt and u; and then, of the gradients of u and dt, what comes through the states
    float dy[QUARTER][CHANNELS + 8];       // which gives way to y = sum C h
    float sums[IN_PLACE ? 1 : QUARTER][IN_PLACE ? 1 : CHANNELS][4];  // these three, where there are several passes

    __device__ __forceinline__ float& d_u(int t, int c) { return IN_PLACE ? step[t][c][0] : sums[t][c][0]; }
    __device__ __forceinline__ float& d_dt(int t, int c) { return IN_PLACE ? step[t][c][1] : sums[t][c][1]; }
    __device__ __forceinline__ float& y(int t, int c) { return IN_PLACE ? dy[t][c] : sums[t][c][2]; }
};
struct Maps {
    float B[QUARTER][4][4], C[QUARTER][4][4];  // by column of lanes: 4 states each
};
struct Shared {
    Quarter quarters[PLACES];
    Maps maps[PLACES];
    union {
        float states[2][32][4];  // those before a run of SUB tokens
        float maps[SUB][32];  // after it: the gradients of 16 states of B and of C of each token
    } runs[SUBS][WARPS];
    float bias[CHANNELS], skip[CHANNELS];
};

// What both roles know of a block's work.
struct Work {
    const Parameters& p;
    Shared& shared;
    const Task task;
    const int thread;  // within the role
    Piece piece;

    __device__ __forceinline__ Work(const Parameters& p, Shared& shared)
        : p(p), shared(shared), task(p.channels, p.groups, p.pieces),
          thread(threadIdx.x < THREADS ? threadIdx.x : threadIdx.x - THREADS) {}

    __device__ __forceinline__ void set_piece(int sequence) {
        piece = find_piece(sequence, task.piece, p.pieces, p.length, p.offsets, p.wide_offsets);
    }
    __device__ __forceinline__ int64 piece_index() const { return int64(piece.sequence) * p.pieces + piece.index; }
    __device__ __forceinline__ int64 chunks() const { return (piece.length + CHUNK - 1) / CHUNK; }
};

// A quarter of a chunk in one pass over its states; turns are counted as they are taken.
struct Turn {
    int64 number;

    __device__ __forceinline__ int64 chunk() const { return number / QUARTERS / PASSES; }  // from the last
    __device__ __forceinline__ int pass() const { return PASSES == 1 ? 0 : number / QUARTERS % PASSES; }
    __device__ __forceinline__ int quarter() const { return QUARTERS - 1 - number % QUARTERS; }
    __device__ __forceinline__ bool is_first_of_pass() const { return number % QUARTERS == 0; }
    __device__ __forceinline__ bool is_last_pass() const { return pass() == PASSES - 1; }
    // The chunk's first token.
    __device__ __forceinline__ int64 from(const Work& work) const { return (work.chunks() - 1 - chunk()) * CHUNK; }
    // The places of its maps, and of all that serves every pass; quarter q of the chunk rather than its own.
    __device__ __forceinline__ int maps_place(int q) const { return (number / QUARTERS * QUARTERS + QUARTERS - 1 - q) % PLACES; }
    __device__ __forceinline__ int place(int q) const { return (chunk() * QUARTERS + QUARTERS - 1 - q) % PLACES; }
};

#include "backward_scanner.cuh"

#include "backward_helper.cuh"

template <class Role> __device__ __forceinline__ void run(Role&& role, bool summary) {
    const int part = role.task.sequence * role.p.pieces + role.task.piece;
    for (int sequence = role.task.sequence; sequence < role.p.sequences; sequence += role.p.slots) {
        role.set_piece(sequence);
        if (summary) role.summarize();
        else role.run();
    }
    if (!summary) role.write_totals(part);
}

template <bool SUMMARY> __device__ __forceinline__ void scan(const Parameters& p) {
    const Work work(p, *reinterpret_cast<Shared*>(shared_memory()));
    for (int c = threadIdx.x; c < CHANNELS; c += BLOCK) {
        const bool present = c < work.task.valid;
        work.shared.bias[c] = present && p.delta_bias ? p.delta_bias[work.task.first + c] : 0.0f;
        work.shared.skip[c] = present && p.D ? p.D[work.task.first + c] : 0.0f;
    }
    sync_block();
    if (threadIdx.x < THREADS) {
        if (MOVE_REGISTERS) take_registers<SCANNER_REGISTERS>();
        run(Scanner(work), SUMMARY);
    } else {
        if (MOVE_REGISTERS) leave_registers<HELPER_REGISTERS>();
        run(Helper(work), SUMMARY);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, 1) selective_scan_backward(const __grid_constant__ Parameters p) {
    scan<false>(p);
}

// The gradient of the state before each piece, from a zero one of that after it; and the time that the piece takes.
extern "C" __global__ void __launch_bounds__(BLOCK, 1) selective_scan_backward_summary(const __grid_constant__ Parameters p) {
    scan<true>(p);
}

// Turns the gradients of the states before the pieces, in place, into those of the states after them: one thread a state.
extern "C" __global__ void __launch_bounds__(THREADS)
    selective_scan_backward_hand_over(const __grid_constant__ Parameters p) {
    hand_over(p.piece_grad, p.piece_time, p.d_final, p.A, p.channels, p.sequences, p.pieces, true);
}
