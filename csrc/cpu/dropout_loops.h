// The dropout kernel in plain loops, which the compiler turns into the vectors of each file that includes it.
#pragma once

#include "dropout.h"

namespace pefast {
namespace {

// selected by bits: a choice between whole structs keeps the compiler from making vectors
inline double either(bool first, double a, double b) { return first ? a : b; }
inline float either(bool first, float a, float b) { return first ? a : b; }
inline bf16 either(bool first, bf16 a, bf16 b) { return {first ? a.bits : b.bits}; }
inline fp16 either(bool first, fp16 a, fp16 b) { return {first ? a.bits : b.bits}; }

template <class T>
inline void scale_kept(const T* __restrict x, T* __restrict x_hat, const uint16_t* keep, int64_t n,
                       double s) {
    const decltype(widen(T{})) scale = s;
    for (int64_t i = 0; i < n; ++i) {
        T kept;
        narrow(widen(x[i]) * scale, &kept);
        x_hat[i] = either(keep[i], kept, T{});
    }
}

template <class T>
inline void add_kept(const T* __restrict t, T* __restrict y, const uint16_t* keep, int64_t n, double s) {
    const decltype(widen(T{})) scale = s;
    for (int64_t i = 0; i < n; ++i) {
        T sum;
        narrow(widen(y[i]) + widen(t[i]) * scale, &sum);
        y[i] = either(keep[i], sum, y[i]);
    }
}

template <class T>
void tiles_of(const Dropout& d, int64_t begin, int64_t end) {
    const T *x = static_cast<const T*>(d.x), *t = static_cast<const T*>(d.t);
    T *x_hat = static_cast<T*>(d.x_hat), *y = static_cast<T*>(d.y);
    const int64_t in_row = tiles_in_row(d.K);
    for (int64_t tile = begin; tile < end; ++tile) {
        const int64_t row = tile / in_row, first = tile % in_row * TILE;
        const int64_t last = first + TILE < d.K ? first + TILE : d.K;
        for (int64_t col = first; col < last; col += 128) {
            const int64_t n = last - col < 128 ? last - col : 128;
            uint16_t keep[128];
            keep_128(d.draw, static_cast<uint32_t>(row), static_cast<uint32_t>(col / 128), keep);
            if (x) scale_kept(x + row * d.ldx + col, x_hat + row * d.K + col, keep, n, d.scale);
            if (t) add_kept(t + row * d.ldt + col, y + row * d.ldy + col, keep, n, d.scale);
        }
    }
}

inline void tiles_by_type(const Dropout& d, Scalar type, int64_t begin, int64_t end) {
    switch (type) {
        case Scalar::fp32:
            return tiles_of<float>(d, begin, end);
        case Scalar::bf16:
            return tiles_of<bf16>(d, begin, end);
        case Scalar::fp16:
            return tiles_of<fp16>(d, begin, end);
        case Scalar::fp64:
            return tiles_of<double>(d, begin, end);
    }
}

}  // namespace
}  // namespace pefast
