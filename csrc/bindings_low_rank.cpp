// The part of pefast._C that delta_linear has in fp32 by parts, and without tiles: one LoRA beside each frozen layer.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "bindings.h"
#include "check.h"
#include "cpu/delta_linear_fp32.h"
#include "cpu/delta_linear_thin.h"

namespace py = pybind11;

namespace pefast {

namespace {

// w [N, K] fp32 packed in parts, for x wᵀ or for dy w; its mark
uint64_t fp32_pack_door(uintptr_t w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K, bool for_dx,
                        int parts, uintptr_t packed, int threads) {
    const char* name = "delta_linear";
    check_weight(name, N, K, w && packed);
    check_threads(name, threads);
    if (for_dx)
        delta_linear_fp32_pack(at<const float>(w), stride_n, stride_k, N, K, parts, at<bf16>(packed),
                               threads);
    else
        delta_linear_fp32_pack(at<const float>(w), stride_k, stride_n, K, N, parts, at<bf16>(packed),
                               threads);
    return weight_mark(at<const float>(w), stride_n, stride_k, N, K);
}

// a, b, R, scale, p and the address of the seed
using LoraPlace = std::tuple<uintptr_t, uintptr_t, int64_t, float, double, uintptr_t>;

LowRank low_rank(const LoraPlace& place, const std::array<int64_t, 3>& sizes, int threads) {
    const auto [a, b, R, scale, p, seed] = place;
    const auto [M, N, K] = sizes;
    const char* name = "delta_linear";
    check(N > 0 && K > 0, name, ": N and K are ", N, " and ", K, "; 1 or more would be right");
    check(M >= 0 && M < int64_t{1} << 32, name, ": x has ", M, " rows; 0 to 2^32 - 1 would be right");
    check(p >= 0 && p < 1, name, ": p is ", p, "; a rate from 0 to below 1 would be right");
    check(R >= 0 && (R == 0 || b), name, ": R is ", R, "; 0, or 1 or more with a b, would be right");
    check_threads(name, threads);
    const int64_t number = p > 0 ? *at<const int64_t>(seed) : 0;
    return {at<const float>(a),
            at<const float>(b),
            R,
            scale,
            p > 0,
            make_draw(p, number, 0),
            static_cast<float>(1 / (1 - p))};
}

// w, its strides and mark; packed; N; gain, bias; LoRA; y, u, h
using Fp32Words = std::tuple<std::tuple<uintptr_t, int64_t, int64_t, uint64_t>, uintptr_t, int64_t, uintptr_t,
                             uintptr_t, LoraPlace, uintptr_t, uintptr_t, uintptr_t>;
// packed; N; dy, lddy; gain; u, h; LoRA; dh, da, db, dgain, dbias
using Fp32BackwardWords = std::tuple<uintptr_t, int64_t, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t,
                                     LoraPlace, std::array<uintptr_t, 5>>;

// -1, or nothing done and which of the weights is no longer what was packed
int fp32_forward_door(uintptr_t x, int64_t ldx, int64_t M, int64_t K, const std::vector<Fp32Words>& all,
                      int parts, int threads) {
    check_matrix("delta_linear", "x", at<void>(x), M, K, ldx);
    Fp32Forward call = {M, K, at<const float>(x), ldx, {}};
    for (const auto& [w, packed, N, gain, bias, place, y, u, h] : all) {
        const LowRank lora = low_rank(place, {M, N, K}, threads);
        const auto [address, stride_n, stride_k, mark] = w;
        if (weight_mark(at<const float>(address), stride_n, stride_k, N, K) != mark)
            return static_cast<int>(call.layers.size());
        call.layers.push_back({N, at<const bf16>(packed), lora, at<const float>(gain), at<const float>(bias),
                               at<float>(y), at<float>(u), at<float>(h)});
    }
    delta_linear_fp32_forward(call, parts, threads);
    return -1;
}

// what has the address 0 is left out
void fp32_backward_door(uintptr_t x, int64_t ldx, int64_t M, int64_t K, uintptr_t dx,
                        const std::vector<Fp32BackwardWords>& all, int parts, int threads) {
    if (x) check_matrix("delta_linear", "x", at<void>(x), M, K, ldx);
    Fp32Backward call = {M, K, at<const float>(x), ldx, at<float>(dx), {}};
    for (const auto& [packed, N, dy, lddy, gain, u, h, place, results] : all) {
        const LowRank lora = low_rank(place, {M, N, K}, threads);
        check_matrix("delta_linear", "dy", at<void>(dy), M, N, lddy);
        const auto [dh, da, db, dgain, dbias] = results;
        check(x || !da || M == 0, "delta_linear: da is asked for and x is not there");
        check(u || !dgain || M == 0, "delta_linear: dgain is asked for and u is not there");
        call.layers.push_back({N, at<const float>(dy), lddy, at<const float>(gain), at<const float>(u),
                               at<const float>(h), at<const bf16>(packed), lora, at<float>(dh), at<float>(da),
                               at<float>(db), at<float>(dgain), at<float>(dbias)});
    }
    delta_linear_fp32_backward(call, parts, threads);
}

// what both directions of the thin products check: type as in dropout_door, 0 or 1
LowRank thin_lora(const LoraPlace& place, uintptr_t x, int64_t ldx, const std::array<int64_t, 3>& sizes,
                  int type, int threads) {
    const LowRank lora = low_rank(place, sizes, threads);
    check(lora.R > 0 && lora.a && type >= 0 && type <= 1, "delta_linear: R is ", lora.R, " and the type ",
          type, "; 1 or more with an a, and 0 or 1, would be right");
    check_matrix("delta_linear", "x", at<void>(x), sizes[0], sizes[2], ldx);
    return lora;
}

// y holds x wᵀ + bias
void thin_forward_door(uintptr_t x, int64_t ldx, const LoraPlace& place, uintptr_t y, uintptr_t h,
                       const std::array<int64_t, 3>& sizes, int type, int threads) {
    const auto [M, N, K] = sizes;
    const LowRank lora = thin_lora(place, x, ldx, sizes, type, threads);
    if (type)
        delta_linear_thin_forward<bf16>({M, N, K, at<const bf16>(x), ldx, lora, at<bf16>(y), at<bf16>(h)},
                                        threads);
    else
        delta_linear_thin_forward<float>({M, N, K, at<const float>(x), ldx, lora, at<float>(y), at<float>(h)},
                                         threads);
}

template <class T>
void thin_backward(uintptr_t x, int64_t ldx, uintptr_t dy, int64_t lddy, uintptr_t h, const LowRank& lora,
                   const std::array<uintptr_t, 3>& results, const std::array<int64_t, 3>& sizes,
                   int threads) {
    const auto [M, N, K] = sizes;
    delta_linear_thin_backward<T>({M, N, K, at<const T>(x), ldx, at<const T>(dy), lddy, at<const T>(h), lora,
                                   at<T>(results[0]), at<float>(results[1]), at<float>(results[2])},
                                  threads);
}

// results: dx, which holds dy w, da, db; those of address 0 are left out
void thin_backward_door(uintptr_t x, int64_t ldx, uintptr_t dy, int64_t lddy, uintptr_t h,
                        const LoraPlace& place, const std::array<uintptr_t, 3>& results,
                        const std::array<int64_t, 3>& sizes, int type, int threads) {
    const auto [M, N, K] = sizes;
    const LowRank lora = thin_lora(place, x, ldx, sizes, type, threads);
    check_matrix("delta_linear", "dy", at<void>(dy), M, N, lddy);
    (type ? thin_backward<bf16> : thin_backward<float>)(x, ldx, dy, lddy, h, lora, results, sizes, threads);
}

}  // namespace

void bind_low_rank(py::module_& m) {
    m.def("fp32_here", &delta_linear_fp32_here, "Whether delta_linear_fp32's kernels run on this processor.");
    m.def("fp32_packed_size", &fp32_packed_size, "How many bf16 numbers a weight takes in so many parts.");
    m.def("fp32_pack", &fp32_pack_door, "Packs a frozen fp32 weight for one direction; returns its mark.",
          py::call_guard<py::gil_scoped_release>());
    m.def("fp32_forward", &fp32_forward_door,
          "y, u and h of layers that read the same x; -1, or which weight was written to since its mark.",
          py::call_guard<py::gil_scoped_release>());
    m.def("fp32_backward", &fp32_backward_door,
          "Gradients of layers that read the same x; those of address 0 are left out.",
          py::call_guard<py::gil_scoped_release>());
    m.def("thin_here", &delta_linear_thin_here,
          "Whether delta_linear's thin products run on this processor.");
    m.def("thin_forward", &thin_forward_door, "h, and y with the delta added.",
          py::call_guard<py::gil_scoped_release>());
    m.def("thin_backward", &thin_backward_door, "dx with the delta added, da and db.",
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace pefast
