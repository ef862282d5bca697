// The plain C interface of the CPU library: what it is, and what it was compiled for.

#define EXPORT extern "C" __attribute__((visibility("default")))

// Raised with every change to an exported function; native.py refuses a library of another version.
EXPORT int selective_ssm_abi_version() { return 1; }

#if defined(__AVX512F__)
#define VECTORS "AVX-512"
#elif defined(__AVX2__)
#define VECTORS "AVX2"
#elif defined(__x86_64__)
#define VECTORS "SSE2"
#elif defined(__ARM_NEON)
#define VECTORS "NEON"
#else
#define VECTORS "no vector instructions"
#endif

#if defined(_OPENMP)
#define THREADS "OpenMP"
#else
#define THREADS "one thread"
#endif

EXPORT const char* selective_ssm_build() { return VECTORS ", " THREADS; }
