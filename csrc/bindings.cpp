// pefast._C: the only file that knows Python. It takes addresses, sizes and strides, checks them, and calls a kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "check.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace pefast;

namespace {

std::vector<std::string> isas() {
    std::vector<std::string> names;
    for (Isa level : isa_levels()) names.emplace_back(isa_name(level));
    return names;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "pefast's native kernels; pefast.native.* are their Python faces";
    m.def("isa", [] { return isa_name(isa()); }, "The instruction set that kernels use.");
    m.def("isas", &isas, "Every instruction set that can run here, the least first.");
    m.def(
        "use_isa", [](const std::string& name) { use_isa(name.c_str()); }, py::arg("name") = "",
        "Use this instruction set; with no name, the highest.");
}
