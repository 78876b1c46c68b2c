// The doors of pefast._C to delta_linear's frozen product on CPUs without AMX.
#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "check.h"
#include "cpu/delta_linear.h"
#include "cpu/delta_linear_product.h"

namespace py = pybind11;

namespace pefast {

namespace {

// w [N, K] packed for x wᵀ, or for dy w; its mark
uint64_t product_pack_door(uintptr_t w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K, bool for_dx,
                           uintptr_t packed, int threads) {
    check_weight("delta_linear", N, K, w);
    check_threads("delta_linear", threads);
    const bf16* from = at<const bf16>(w);
    if (for_dx)
        product_pack(from, stride_n, stride_k, N, K, at<bf16>(packed), threads);
    else
        product_pack(from, stride_k, stride_n, K, N, at<bf16>(packed), threads);
    return weight_mark(from, stride_n, stride_k, N, K);
}

// place: w, its strides and its mark. False, and nothing done, where w is no longer what was packed
bool product_door(uintptr_t x, int64_t ldx, const std::tuple<uintptr_t, int64_t, int64_t, uint64_t>& place,
                  bool for_dx, uintptr_t packed, uintptr_t bias, uintptr_t y,
                  const std::array<int64_t, 3>& sizes, int threads) {
    const auto [w, stride_n, stride_k, mark] = place;
    const auto [M, N, K] = sizes;
    check_weight("delta_linear", N, K, w);
    check_threads("delta_linear", threads);
    check_matrix("delta_linear", for_dx ? "dy" : "x", at<void>(x), M, for_dx ? N : K, ldx);
    if (weight_mark(at<const bf16>(w), stride_n, stride_k, N, K) != mark) return false;
    if (M > 0)
        product({M, for_dx ? K : N, for_dx ? N : K, at<const bf16>(x), ldx, at<const bf16>(packed),
                 at<const float>(bias), at<bf16>(y)},
                threads);
    return true;
}

}  // namespace

void bind_product(py::module_& m) {
    m.def("product_here", &product_here, "Whether bf16 is multiplied faster as fp32 on this processor.");
    m.def("product_packed_size", &product_packed_size, "How many numbers a packed right factor takes.");
    m.def("product_pack", &product_pack_door, "Packs a frozen weight for one direction; returns its mark.",
          py::call_guard<py::gil_scoped_release>());
    m.def("product", &product_door, "x w^T + bias, or dy w; False where w was written to since its mark.",
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace pefast
