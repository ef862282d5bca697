// The words of ops/device.cuh for the CPU: same names, same meaning, the hardware's rounding where a result shows it.
// Like its model it includes nothing. The line of the caller rides along as a last argument, for the messages.
//
// A function of a whole warp is written with exchange(): it hands in this lane's operands and gives back all lanes'.
#pragma once

#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef long long int64;
typedef unsigned long long uint64;

struct alignas(2) bf16 {
    uint16 bits;
};
struct alignas(2) fp16 {
    uint16 bits;
};
struct alignas(16) Vector {
    uint32 word[4];
};

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// ---- what the compiler for the GPU knows by itself ----------------------------------------------------------------

struct uint3 {
    unsigned x, y, z;
};
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
template <class To, class From> inline To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    __builtin_memcpy(&y, &x, sizeof y);
    return y;
}
}  // namespace emulator
inline float __uint_as_float(uint32 x) { return emulator::bits_as<float>(x); }
inline float __int_as_float(int x) { return emulator::bits_as<float>(x); }
inline uint32 __float_as_uint(float x) { return emulator::bits_as<uint32>(x); }
inline int __float_as_int(float x) { return emulator::bits_as<int>(x); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline uint32 min(uint32 a, uint32 b) { return a < b ? a : b; }
inline uint32 max(uint32 a, uint32 b) { return a > b ? a : b; }
inline int64 min(int64 a, int64 b) { return a < b ? a : b; }
inline int64 max(int64 a, int64 b) { return a > b ? a : b; }
inline uint64 min(uint64 a, uint64 b) { return a < b ? a : b; }
inline uint64 max(uint64 a, uint64 b) { return a > b ? a : b; }
inline float min(float a, float b) { return __builtin_fminf(a, b); }
inline float max(float a, float b) { return __builtin_fmaxf(a, b); }
extern "C" {
float fmaf(float, float, float) noexcept;
float fminf(float, float) noexcept;
float fmaxf(float, float) noexcept;
float fabsf(float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
float truncf(float) noexcept;
float sqrtf(float) noexcept;
float expf(float) noexcept;
float exp2f(float) noexcept;
float expm1f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float log1pf(float) noexcept;
float tanhf(float) noexcept;
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// ---- the emulator, in runtime.cpp ---------------------------------------------------------------------------------

namespace emulator {

constexpr int lane_count = 32;
constexpr int slot_size = 64;  // bytes that a lane can hand to its warp

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
const char* gather(const void* mine, int bytes, const char* what, int line);
void wait_block(int line);
char* shared();
bool in_shared(const void* address, int bytes);
void copy(void* to, const void* from, int bytes, int line);
void commit();
void wait(int pending, int line);

// What each lane of the warp handed in, once all have.
template <class T> struct Gathered {
    const char* slots;
    const T& operator[](int lane) const { return *reinterpret_cast<const T*>(slots + slot_size * lane); }
};
template <class T> inline Gathered<T> exchange(const T& mine, const char* what, int line) {
    static_assert(sizeof(T) <= slot_size);
    return {gather(&mine, sizeof(T), what, line)};
}

inline void check_aligned(const void* address, const char* what, int line) {
    if (reinterpret_cast<unsigned long>(address) % sizeof(Vector))
        fail("%s at line %d is given %p, which is not aligned to a vector", what, line, address);
}
inline void check_shared(const void* address, int bytes, const char* what, int line) {
    if (!in_shared(address, bytes))
        fail("%s at line %d is given %d bytes at %p, which are not in shared memory", what, line, bytes, address);
}

inline float flush(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }

// Runs every block of a kernel: 0, or 1 and a sentence in `error`. `order` is 0 for forward, -1 for backward, otherwise
// a seed.
int launch(void (*kernel)(const void*), const void* parameters, int gx, int gy, int gz, int threads,
           unsigned long shared, int order, char* error, unsigned long error_bytes);
template <class P> inline void call(void (*kernel)(P), const void* parameters) {
    kernel(*static_cast<const P*>(parameters));
}
template <class P> constexpr unsigned long size(void (*)(P)) { return sizeof(P); }

}  // namespace emulator

// ---- number formats -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32(x.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 x) {
    const uint32 size = x.bits & 0x7fff;
    const float y = size < 0x400    ? size * 0x1p-24f
                    : size < 0x7c00 ? __uint_as_float((size << 13) + (112u << 23))
                                    : __uint_as_float(size << 13 | 0x7f800000u);
    return x.bits >> 15 ? -y : y;
}

namespace emulator {
template <class T> inline uint16 round_bits(float x);
template <> inline uint16 round_bits<bf16>(float x) {
    const uint32 bits = __float_as_uint(x);
    return x != x ? 0x7fff : uint16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <> inline uint16 round_bits<fp16>(float x) {
    const uint32 bits = __float_as_uint(x), size = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (x != x) return 0x7fff;
    if (size < 113u << 23) return uint16(sign | uint32(rintf(__uint_as_float(size) * 0x1p24f)));
    const uint32 rounded = (size + 0xfff + (size >> 13 & 1) - (112u << 23)) >> 13;
    return uint16(sign | (rounded < 0x7c00 ? rounded : 0x7c00));
}
}  // namespace emulator

template <class T> __device__ __forceinline__ uint32 pack(float low, float high) {
    return emulator::round_bits<T>(low) | uint32(emulator::round_bits<T>(high)) << 16;
}

template <class T> __device__ __forceinline__ T from_float(float x) { return T{emulator::round_bits<T>(x)}; }
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

template <class T> __device__ __forceinline__ float low_half(uint32 pair) { return to_float(T{uint16(pair)}); }
template <class T> __device__ __forceinline__ float high_half(uint32 pair) { return to_float(T{uint16(pair >> 16)}); }

template <class T>
__device__ __forceinline__ void load8(const T* from, float (&x)[8], int line = __builtin_LINE()) {
    emulator::check_aligned(from, "load8", line);
    for (int i = 0; i < 8; i++) x[i] = to_float(from[i]);
}
template <class T>
__device__ __forceinline__ void store8(T* to, const float (&x)[8], int line = __builtin_LINE()) {
    emulator::check_aligned(to, "store8", line);
    for (int i = 0; i < 8; i++) to[i] = from_float<T>(x[i]);
}

// ---- functions ----------------------------------------------------------------------------------------------------

// On average as much too small as that of an H200 was measured to be.
__device__ __forceinline__ float exp2_fast(float x) {
    return emulator::flush(float((1.0 - 0.3 * 0x1p-24) * __builtin_exp2(emulator::flush(x))));
}
__device__ __forceinline__ float reciprocal_fast(float x) { return emulator::flush(1.0f / emulator::flush(x)); }

// 1 / (1 + exp(-x)). (By tanh.approx it would cost one special function rather than two, but far below 0 its error is
// as large as the result.)
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-LOG2_E * x)); }

// ---- threads ------------------------------------------------------------------------------------------------------

template <class T> __device__ __forceinline__ T shuffle(T x, int from, int line = __builtin_LINE()) {
    return emulator::exchange(x, "shuffle", line)[from];
}
template <class T> __device__ __forceinline__ T shuffle_xor(T x, int mask, int line = __builtin_LINE()) {
    return emulator::exchange(x, "shuffle_xor", line)[(threadIdx.x ^ mask) % emulator::lane_count];
}
template <class T> __device__ __forceinline__ T shuffle_up(T x, int places, int line = __builtin_LINE()) {
    const int lane = threadIdx.x % emulator::lane_count;
    return emulator::exchange(x, "shuffle_up", line)[lane < places ? lane : lane - places];
}
__device__ __forceinline__ void sync_warp(int line = __builtin_LINE()) { emulator::exchange(0, "sync_warp", line); }
__device__ __forceinline__ void sync_block(int line = __builtin_LINE()) { emulator::wait_block(line); }

__device__ __forceinline__ uint32 add_shared(uint32* to, uint32 x, int line = __builtin_LINE()) {
    emulator::check_shared(to, sizeof x, "add_shared", line);
    const uint32 before = *to;
    *to = before + x;
    return before;
}

__device__ __forceinline__ char* shared_memory() { return emulator::shared(); }

// ---- memory and matrices ------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32 shared_address(const void* x, int line = __builtin_LINE()) {
    emulator::check_shared(x, 1, "shared_address", line);
    return uint32(static_cast<const char*>(x) - emulator::shared());
}

__device__ __forceinline__ void copy_async_if(bool wanted, void* shared, const void* global,
                                              int line = __builtin_LINE()) {
    static const Vector zeros = {};
    emulator::check_aligned(shared, "copy_async", line);
    emulator::check_aligned(global, "copy_async", line);
    emulator::check_shared(shared, sizeof(Vector), "copy_async", line);
    emulator::copy(shared, wanted ? global : &zeros, sizeof(Vector), line);
}
__device__ __forceinline__ void copy_async(void* shared, const void* global, int line = __builtin_LINE()) {
    copy_async_if(true, shared, global, line);
}
__device__ __forceinline__ void commit_copies() { emulator::commit(); }
template <int pending> __device__ __forceinline__ void wait_copies(int line = __builtin_LINE()) {
    emulator::wait(pending, line);
}
__device__ __forceinline__ void prefetch(const void*) {}
__device__ __forceinline__ Vector load_if(bool wanted, const void* global, int line = __builtin_LINE()) {
    emulator::check_aligned(global, "load_if", line);
    return wanted ? *static_cast<const Vector*>(global) : Vector{};
}
__device__ __forceinline__ Vector load_once_if(bool wanted, const void* global, int line = __builtin_LINE()) {
    emulator::check_aligned(global, "load_once_if", line);
    return wanted ? *static_cast<const Vector*>(global) : Vector{};
}

__device__ __forceinline__ uint32 transpose(uint32 pair, int line = __builtin_LINE()) {
    const auto warp = emulator::exchange(pair, "transpose", line);
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
    const auto at = [&](int r, int c) { return warp[r * 4 + c / 2] >> (c % 2 * 16) & 0xffffu; };
    return at(column, row) | at(column + 1, row) << 16;
}

__device__ __forceinline__ void load_matrices(uint32 (&m)[4], const void* row, int line = __builtin_LINE()) {
    emulator::check_aligned(row, "load_matrices", line);
    emulator::check_shared(row, sizeof(Vector), "load_matrices", line);
    const auto warp = emulator::exchange(*static_cast<const Vector*>(row), "load_matrices", line);
    const int lane = threadIdx.x % emulator::lane_count;
    for (int i = 0; i < 4; i++) m[i] = warp[8 * i + lane / 4].word[lane % 4];
}

template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1,
                                             int line = __builtin_LINE()) {
    struct Operands {
        T a[4][2], b[2][2];
    } mine;
    __builtin_memcpy(mine.a, a, sizeof mine.a);
    __builtin_memcpy(mine.b[0], &b0, sizeof b0);
    __builtin_memcpy(mine.b[1], &b1, sizeof b1);
    const auto warp = emulator::exchange(mine, "multiply_add", line);
    const int g = threadIdx.x % emulator::lane_count / 4, t = threadIdx.x % 4;
    for (int i = 0; i < 4; i++) {
        const int column = 2 * t + i % 2;
        for (int k = 0; k < 16; k++) {
            const T x = warp[4 * g + k % 8 / 2].a[i / 2 + 2 * (k / 8)][k % 2];
            const T y = warp[4 * column + k % 8 / 2].b[k / 8][k % 2];
            d[i] += to_float(x) * to_float(y);
        }
    }
}

// Kernels run one after the other here.
__device__ __forceinline__ void wait_for_previous() {}
__device__ __forceinline__ void let_next_begin() {}
