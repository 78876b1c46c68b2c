// pefast._C: the bindings are the only files that know Python. They take addresses, sizes and strides, check them, and
// call a kernel.
#include "bindings.h"

#include <pybind11/stl.h>

#include <array>

#include "check.h"
#include "cpu/cross_entropy.h"
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
    bind_one_lora(m);
    bind_product(m);
    bind_attention(m);
    m.def("cross_entropy_here", &cross_entropy_here, "Whether cross_entropy runs on this processor.");
    m.def("cross_entropy", &cross_entropy_door, "Loss of rows of logits; the logits become their gradient.",
          py::call_guard<py::gil_scoped_release>());
}
