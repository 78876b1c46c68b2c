// What the kernels of this room ask of a GPU beyond C++.
//
// The same source is compiled by a C++ compiler as well and runs on a CPU, where sanitizers watch it: then
// tests/ladder/cuda/on_host.h stands here.
#pragma once

#if !defined(__CUDACC__)
#include "on_host.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define SHARED(type, name, extent) __shared__ type name extent

namespace pefast {

using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(bf16 value) { return __bfloat162float(value); }
__device__ inline float widen(fp16 value) { return __half2float(value); }

__device__ inline void narrow(float value, float* to) { *to = value; }
__device__ inline void narrow(float value, bf16* to) { *to = __float2bfloat16(value); }
__device__ inline void narrow(float value, fp16* to) { *to = __float2half(value); }

// 16 bytes that nobody writes while the kernel runs
__device__ inline uint4 unchanging(const void* at) { return __ldg(static_cast<const uint4*>(at)); }

// 16 bytes that other blocks of this launch may have written: past the first cache, which does not see them
__device__ inline float4 fresh(const float* at) { return __ldcg(reinterpret_cast<const float4*>(at)); }

// sums [16, 8] += x [16, 16] w [8, 16]ᵀ of a warp. Lane 4g + t holds x and w as pairs of neighbours: row g of x and
// of w at columns 2t and 2t + 8, row g + 8 of x likewise; and of the sums rows g and g + 8 at columns 2t, 2t + 1.
// The columns are summed over, so that any order of them serves that x and w share.
__device__ inline void multiply(float (&sums)[4], const unsigned (&x)[4], unsigned w0, unsigned w1, bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(w0), "r"(w1));
}

__device__ inline void multiply(float (&sums)[4], const unsigned (&x)[4], unsigned w0, unsigned w1, fp16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(w0), "r"(w1));
}

// another lane's 16 bytes, as fp32
__device__ inline float4 of_lane(const uint4& own, int lane) {
    const auto word = [&](unsigned bits) { return __uint_as_float(__shfl_sync(~0u, bits, lane)); };
    return {word(own.x), word(own.y), word(own.z), word(own.w)};
}

// the sum over lanes 4g to 4g + 3, in each of them
__device__ inline float of_four(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

// the count before one is added. What this block wrote is seen by whoever sees the new count, and the reverse
__device__ inline unsigned add_one(unsigned* count) {
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
    return before;
}

// waits until the count has come so far
__device__ inline void await(const unsigned* count, unsigned far) {
    unsigned now;
    do asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
    while (now < far);
}

template <class Step>
int launch(void (*kernel)(Step), int64_t blocks, int threads, const Step& step, void* stream) {
    void* arguments[] = {const_cast<Step*>(&step)};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), static_cast<unsigned>(blocks), threads,
                            arguments, 0, static_cast<cudaStream_t>(stream));
}

}  // namespace pefast

#endif
