// What csrc needs of the DLPack exchange API (dmlc/dlpack 1.3): where a tensor lies, asked without Python in between.
#pragma once

#include <cstdint>

namespace pefast::dlpack {

struct Version {
    uint32_t major, minor;
};

struct Tensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

constexpr uint32_t MAJOR = 1;
constexpr int32_t CPU = 1;
constexpr uint8_t FLOAT = 2, BFLOAT = 4;

// the table that a type's __dlpack_c_exchange_api__ points to
struct Exchange {
    Version version;
    Exchange* older;
    void (*unused[3])();
    // 0, or -1 with an error of Python's; the view lives as long as the object is left alone
    int (*view)(void* object, Tensor* view);
    void (*stream)();
};

}  // namespace pefast::dlpack
