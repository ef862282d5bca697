#include "device.cuh"

// What the kernels of a linear map are given. Macro NUMBER: the format of x, weight, bias and out.

struct Parameters {
    NUMBER* out;           // (M, N) contiguous
    const NUMBER* x;       // (M, K), unit stride in K
    const NUMBER* weight;  // (N, K), every row a number of whole vectors on their boundaries
    const NUMBER* bias;    // (N,), or null
    int64 x_row, weight_row;
    int vectors, inputs, outputs;  // M, K, N
};

constexpr int IN_VECTOR = sizeof(Vector) / sizeof(NUMBER);
