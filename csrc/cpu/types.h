// The 16-bit floating types as bits, and how they become numbers and are rounded back (to nearest, ties to even).
// In an anonymous namespace: each translation unit compiles its own copy with its own instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace pefast {

enum class Scalar { fp32, bf16, fp16, fp64 };

struct bf16 {
    uint16_t bits;
};

struct fp16 {
    uint16_t bits;
};

namespace {

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline double widen(double v) { return v; }
inline float widen(float v) { return v; }
inline float widen(bf16 v) { return from_bits(static_cast<uint32_t>(v.bits) << 16); }

inline void narrow(double v, double* to) { *to = v; }
inline void narrow(float v, float* to) { *to = v; }

inline void narrow(float v, bf16* to) {
    const uint32_t bits = to_bits(v);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    // rounding could carry a NaN into infinity
    to->bits = static_cast<uint16_t>(v != v ? 0x7fc0 : rounded);
}

#if defined(__F16C__)

inline float widen(fp16 v) { return _cvtsh_ss(v.bits); }
inline void narrow(float v, fp16* to) { to->bits = _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT); }

#else

inline float widen(fp16 v) {
    const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16, rest = (v.bits & 0x7fffu) << 13;
    const uint32_t exponent = rest >> 23;
    float size;
    if (exponent == 0) {
        // a subnormal: put it behind the leading 1 of 2^-14, then take that away
        size = from_bits(rest + (113u << 23)) - from_bits(113u << 23);
    } else {
        size = from_bits(rest + ((exponent == 31 ? 224u : 112u) << 23));
    }
    return from_bits(to_bits(size) | sign);
}

inline void narrow(float v, fp16* to) {
    const uint32_t bits = to_bits(v), sign = bits >> 16 & 0x8000;
    uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) {
        rest = 0x7e00;
    } else if (rest >= 0x47800000) {
        // 65536 and more; what lies between the largest number and this rounds below
        rest = 0x7c00;
    } else if (rest < 0x38800000) {
        // a subnormal: the step of numbers near one half is its step, so the addition rounds
        rest = to_bits(from_bits(rest) + 0.5f) - to_bits(0.5f);
    } else {
        rest -= 112u << 23;
        rest = (rest + 0xfff + (rest >> 13 & 1)) >> 13;
    }
    to->bits = static_cast<uint16_t>(rest | sign);
}

#endif

}  // namespace
}  // namespace pefast
