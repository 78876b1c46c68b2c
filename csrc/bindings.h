// What the files of pefast._C share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace pefast {

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void bind_attention(pybind11::module_& m);
void bind_delta_linear(pybind11::module_& m);
void bind_product(pybind11::module_& m);

}  // namespace pefast
