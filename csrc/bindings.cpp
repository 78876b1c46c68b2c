// pefast._C: the bindings are the only files that know Python. They take addresses, sizes and strides, check them, and
// call a kernel.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "check.h"
#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/delta_linear_thin.h"
#include "cpu/dropout.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace pefast;

namespace {

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (Isa level : isa_levels()) names.emplace_back(isa_name(level));
    return names;
}

// x and t, each with where its result goes; an address of 0 leaves that half out
void dropout_door(uintptr_t x, int64_t ldx, uintptr_t x_hat, uintptr_t t, int64_t ldt, uintptr_t y,
                  int64_t ldy, int64_t M, int64_t K, int type, double p, int64_t seed, uint32_t stream,
                  int threads) {
    check(p >= 0 && p < 1, "dropout: p is ", p, "; a rate from 0 to below 1 would be right");
    check(type >= 0 && type <= 3, "dropout: no type has the number ", type, "; 0 to 3 would be right");
    check(M < int64_t{1} << 32, "dropout: x has ", M, " rows; fewer than 2^32 would be right");
    check_threads("dropout", threads);
    if (x) check_matrix("dropout", "x", at<void>(x), M, K, ldx);
    if (x) check_matrix("dropout", "x_hat", at<void>(x_hat), M, K, K);
    if (t) check_matrix("dropout", "t", at<void>(t), M, K, ldt);
    if (t) check_matrix("dropout", "y", at<void>(y), M, K, ldy);
    if (M == 0 || K == 0) return;
    dropout({at<const void>(x), ldx, at<void>(x_hat), at<const void>(t), ldt, at<void>(y), ldy, M, K,
             make_draw(p, seed, stream), 1 / (1 - p)},
            static_cast<Scalar>(type), threads);
}

// a tensor [batch, heads, rows, D]: its address, and its strides but the last, which is 1
using Place = std::array<int64_t, 4>;

template <class T>
Heads<T> heads(const Place& p) {
    return {at<T>(p[0]), p[1], p[2], p[3]};
}

// B, H, G, L, S, P, D; the addresses of q, k, v and the prefix; the mask's address and strides
Attention attention(const std::array<int64_t, 7>& sizes, const std::array<Place, 5>& tensors,
                    const std::array<int64_t, 3>& mask, bool causal, float scale, double p, uintptr_t seed,
                    int threads) {
    const char* name = "prefix_attention";
    const auto [B, H, G, L, S, P, D] = sizes;
    check(B > 0 && G > 0 && H > 0 && H % G == 0 && L > 0 && D > 0 && S >= 0 && P >= 0 && P + S > 0, name,
          ": B, H, G, L, S, P and D are ", B, ", ", H, ", ", G, ", ", L, ", ", S, ", ", P, " and ", D,
          "; 1 or more of each and of keys, and H a multiple of G, would be right");
    check(B * H * L < int64_t{1} << 32, name, ": there are ", B * H * L,
          " rows; fewer than 2^32 would be right");
    check(
        tensors[0][0] && (!S || (tensors[1][0] && tensors[2][0])) && (!P || (tensors[3][0] && tensors[4][0])),
        name, ": a tensor has no storage");
    check(!causal || S >= L, name, ": causal with ", L, " queries and ", S,
          " keys; as many keys would be right");
    check(scale > 0 && p >= 0 && p < 1, name, ": scale is ", scale, " and p is ", p,
          "; above 0, and from 0 to below 1, would be right");
    check_threads(name, threads);
    const int64_t number = p > 0 ? *at<const int64_t>(seed) : 0;
    return {B,
            H,
            G,
            L,
            S,
            P,
            D,
            heads<const bf16>(tensors[0]),
            heads<const bf16>(tensors[1]),
            heads<const bf16>(tensors[2]),
            heads<const bf16>(tensors[3]),
            heads<const bf16>(tensors[4]),
            at<const uint8_t>(mask[0]),
            mask[1],
            mask[2],
            causal,
            scale,
            p > 0,
            make_draw(p, number, 0),
            static_cast<float>(1 / (1 - p))};
}

void attention_forward_door(const std::array<int64_t, 7>& sizes, const std::array<Place, 5>& tensors,
                            const std::array<int64_t, 3>& mask, bool causal, float scale, double p,
                            uintptr_t seed, const Place& o, uintptr_t lse, int threads) {
    const Attention call = attention(sizes, tensors, mask, causal, scale, p, seed, threads);
    attention_forward({call, heads<bf16>(o), at<float>(lse)}, threads);
}

// results: dq, dk, dv and those of the prefix; an address of 0 leaves one out
void attention_backward_door(const std::array<int64_t, 7>& sizes, const std::array<Place, 5>& tensors,
                             const std::array<int64_t, 3>& mask, bool causal, float scale, double p,
                             uintptr_t seed, const Place& o, const Place& d_o, uintptr_t lse,
                             const std::array<Place, 5>& results, int threads) {
    const Attention call = attention(sizes, tensors, mask, causal, scale, p, seed, threads);
    attention_backward(
        {call, heads<const bf16>(o), heads<const bf16>(d_o), at<const float>(lse), heads<bf16>(results[0]),
         heads<bf16>(results[1]), heads<bf16>(results[2]), heads<bf16>(results[3]), heads<bf16>(results[4])},
        threads);
}

void cross_entropy_door(uintptr_t z, uintptr_t target, uintptr_t loss, int64_t M, int64_t V, int type,
                        int threads) {
    const char* name = "linear_cross_entropy";
    check(type == 0 || type == 1, name, ": no type has the number ", type, "; 0 or 1 would be right");
    check(V > 0, name, ": there are ", V, " classes; 1 or more would be right");
    check_matrix(name, "z", at<void>(z), M, V, V);
    check_threads(name, threads);
    const int64_t* t = at<const int64_t>(target);
    for (int64_t m = 0; m < M; ++m)
        check(t[m] >= 0 && t[m] < V, name, ": target ", t[m], " of row ", m, " is none of ", V, " classes");
    cross_entropy({at<void>(z), t, at<float>(loss), M, V}, static_cast<Scalar>(type), threads);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "pefast's native kernels; pefast.native.* are their Python faces";
    m.def("isa", [] { return isa_name(isa()); }, "The instruction set that kernels use.");
    m.def("isas", &isas, "Every instruction set that can run here, the least first.");
    m.def(
        "use_isa", [](const std::string& name) { use_isa(name.c_str()); }, py::arg("name") = "",
        "Use this instruction set; with no name, the highest.");
    m.def("dropout", &dropout_door, "x_hat = mask x scale and y += mask t scale with one mask, one pass.",
          py::arg("x"), py::arg("ldx"), py::arg("x_hat"), py::arg("t"), py::arg("ldt"), py::arg("y"),
          py::arg("ldy"), py::arg("M"), py::arg("K"), py::arg("type"), py::arg("p"), py::arg("seed"),
          py::arg("stream"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());
    bind_delta_linear(m);
    m.def("attention_here", &attention_here, "Whether attention's kernels run on this processor.");
    m.def("attention_forward", &attention_forward_door, "o, and the logsumexp of each row.",
          py::call_guard<py::gil_scoped_release>());
    m.def("attention_backward", &attention_backward_door, "Gradients; those of address 0 are left out.",
          py::call_guard<py::gil_scoped_release>());
    m.def("cross_entropy_here", &cross_entropy_here, "Whether cross_entropy runs on this processor.");
    m.def("cross_entropy", &cross_entropy_door, "Loss of rows of logits; the logits become their gradient.",
          py::call_guard<py::gil_scoped_release>());
}
