// Adds up the parts that blocks have written, in order, and rounds the sums to the dtype of the result.

#include "device.cuh"

constexpr int THREADS = 256;
constexpr int JOBS = 5;

struct Job {
    const float* parts;  // (parts, count)
    void* total;         // (count,)
    int64 count;
    int part_count;
    int format;  // of the total: 0 fp32, 1 bf16, 2 fp16
};

struct Parameters {
    Job jobs[JOBS];  // of which the last may be empty
};

extern "C" __global__ void __launch_bounds__(THREADS) sum_parts(const __grid_constant__ Parameters p) {
    int64 i = int64(blockIdx.x) * THREADS + threadIdx.x;
    for (int j = 0; j < JOBS; j++) {
        const Job& job = p.jobs[j];
        const int64 threads = (job.count + THREADS - 1) / THREADS * THREADS;
        if (i >= threads) {
            i -= threads;
            continue;
        }
        if (i >= job.count) return;
        float total = 0.0f;
#pragma unroll 8
        for (int part = 0; part < job.part_count; part++) total += job.parts[part * job.count + i];
        if (job.format == 0) static_cast<float*>(job.total)[i] = total;
        if (job.format == 1) static_cast<bf16*>(job.total)[i] = from_float<bf16>(total);
        if (job.format == 2) static_cast<fp16*>(job.total)[i] = from_float<fp16>(total);
        return;
    }
}
