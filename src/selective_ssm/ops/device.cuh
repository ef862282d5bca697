// What every kernel of ours is written in: number formats, fast functions, and the instructions that C++ has no word for.
// It includes nothing, so that the run-time compiler needs no toolkit. A vector is 16 bytes, aligned.

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

// ---- number formats -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(uint32(x.bits) << 16); }
__device__ __forceinline__ float to_float(fp16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Two numbers rounded to nearest and packed, the first in the low half.
template <class T> __device__ __forceinline__ uint32 pack(float low, float high);
template <> __device__ __forceinline__ uint32 pack<bf16>(float low, float high) {
    uint32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
template <> __device__ __forceinline__ uint32 pack<fp16>(float low, float high) {
    uint32 pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

template <class T> __device__ __forceinline__ T from_float(float x) { return T{uint16(pack<T>(x, 0.0f))}; }
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }

// The two halves of a packed pair.
template <class T> __device__ __forceinline__ float low_half(uint32 pair) { return to_float(T{uint16(pair)}); }
template <class T> __device__ __forceinline__ float high_half(uint32 pair) { return to_float(T{uint16(pair >> 16)}); }
template <> __device__ __forceinline__ float low_half<bf16>(uint32 pair) { return __uint_as_float(pair << 16); }
template <> __device__ __forceinline__ float high_half<bf16>(uint32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Eight neighbouring numbers from and to aligned memory: one vector, or two of fp32.
template <class T> __device__ __forceinline__ void load8(const T* from, float (&x)[8]) {
    const Vector v = *reinterpret_cast<const Vector*>(from);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = low_half<T>(v.word[i]);
        x[2 * i + 1] = high_half<T>(v.word[i]);
    }
}
template <> __device__ __forceinline__ void load8<float>(const float* from, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const Vector v = *reinterpret_cast<const Vector*>(from + i);
#pragma unroll
        for (int j = 0; j < 4; j++) x[i + j] = __uint_as_float(v.word[j]);
    }
}
template <class T> __device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
    Vector v;
#pragma unroll
    for (int i = 0; i < 4; i++) v.word[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    *reinterpret_cast<Vector*>(to) = v;
}
template <> __device__ __forceinline__ void store8<float>(float* to, const float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        Vector v;
#pragma unroll
        for (int j = 0; j < 4; j++) v.word[j] = __float_as_uint(x[i + j]);
        *reinterpret_cast<Vector*>(to + i) = v;
    }
}

// ---- functions: one instruction each, with the hardware's error (PTX ISA: 2 ulp and 1 ulp) -----------------------

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / (1 + exp(-x)). (By tanh.approx it would cost one special function rather than two, but far below 0 its error is
// as large as the result.)
__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(-LOG2_E * x)); }

// ---- threads ------------------------------------------------------------------------------------------------------

// What lane `from` of the warp gives; what the lane gives whose number differs in the bits of a mask; what the lane so many
// places lower gives, or, where there is none, x itself.
template <class T> __device__ __forceinline__ T shuffle(T x, int from) { return __shfl_sync(0xffffffffu, x, from); }
template <class T> __device__ __forceinline__ T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T> __device__ __forceinline__ T shuffle_up(T x, int places) {
    return __shfl_up_sync(0xffffffffu, x, places);
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Adds to what lies in shared memory, whoever else does so too; returns what was there before.
__device__ __forceinline__ uint32 add_shared(uint32* to, uint32 x) { return atomicAdd(to, x); }

// The block's dynamic shared memory, aligned to a vector.
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ Vector memory[];
    return reinterpret_cast<char*>(memory);
}

// ---- memory and matrices ------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32 shared_address(const void* x) { return uint32(__cvta_generic_to_shared(x)); }

// Copies a vector from global to shared memory in the background; copies are committed in groups and waited for in order.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
// The same, or zeros where it is not wanted.
__device__ __forceinline__ void copy_async_if(bool wanted, void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(wanted ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending> __device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}
__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// A vector where it is wanted, elsewhere zeros: without a branch, so that several can be on their way at once.
__device__ __forceinline__ Vector load_if(bool wanted, const void* global) {
    Vector v = {};
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %4, 0;\n@wanted ld.global.v4.u32 {%0, %1, %2, %3}, [%5];\n}"
                 : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3])
                 : "r"(uint32(wanted)), "l"(global));
    return v;
}
// The same of what no kernel writes and nobody will read again soon.
__device__ __forceinline__ Vector load_once_if(bool wanted, const void* global) {
    Vector v = {};
    asm volatile("{\n.reg .pred wanted;\nsetp.ne.u32 wanted, %4, 0;\n"
                 "@wanted ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%5];\n}"
                 : "+r"(v.word[0]), "+r"(v.word[1]), "+r"(v.word[2]), "+r"(v.word[3])
                 : "r"(uint32(wanted)), "l"(global));
    return v;
}

// An 8 x 8 matrix of 16-bit numbers, transposed, within a warp: lane i gives row i / 4, columns 2 (i % 4) and the next, and
// receives as much of the transposed one.
__device__ __forceinline__ uint32 transpose(uint32 pair) {
    uint32 transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
    return transposed;
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane i says where row i % 8 of matrix i / 8 lies, on a vector's
// boundary, and gets of each matrix row i / 4, columns 2 (i % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32 (&m)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(shared_address(row)));
}

// d += a b for (16, 16) a and (16, 8) b of 16 bits, as mma.m16n8k16 lays them out over a warp: with g = lane / 4 and
// t = lane % 4, a[i] holds row g + 8 (i % 2), columns 2 t + 8 (i / 2) and the next; b[i] rows 2 t + 8 i and the next of
// column g; d[i] row g + 8 (i / 2), column 2 t + i % 2.
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1);
template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<fp16>(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- kernels that overlap (`driver.overlapping`): in other launches, and before compute capability 9.0, nothing happens

// Holds the thread until all that earlier kernels of the stream have written can be seen. Before it a kernel may read
// what none of them writes, or send for it (`prefetch`), and writes nothing.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin once every block has said so or has ended; what it then reads it must wait for.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
