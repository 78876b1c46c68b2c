// One plain LoRA, delta_linear's commonest call: its doors take tensors, for a call's addresses, sizes and types asked
// one by one in Python cost more than the kernel where x is small.
#include "bindings.h"
#include "check.h"
#include "cpu/delta_linear.h"
#include "dlpack.h"

namespace py = pybind11;

namespace pefast {

namespace {

const char* NAME = "delta_linear";

// torch.Tensor, torch.nn.Parameter and the way to see them; set once at import
PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
const dlpack::Exchange* exchange = nullptr;

// whether tensors can be seen: an older torch has no such table
bool one_lora_knows(py::type tensor, py::type parameter) {
    const py::object found = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    if (!PyCapsule_IsValid(found.ptr(), "dlpack_exchange_api")) return false;
    exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(found.ptr(), "dlpack_exchange_api"));
    while (exchange && exchange->version.major > dlpack::MAJOR) exchange = exchange->older;
    if (exchange && !exchange->view) exchange = nullptr;
    tensor_type = reinterpret_cast<PyTypeObject*>(tensor.release().ptr());
    parameter_type = reinterpret_cast<PyTypeObject*>(parameter.release().ptr());
    return exchange != nullptr;
}

bool see(py::handle object, dlpack::Tensor* view) {
    const PyTypeObject* type = Py_TYPE(object.ptr());
    if (type != tensor_type && type != parameter_type) return false;
    if (exchange->view(object.ptr(), view) == 0) return view->device_type == dlpack::CPU;
    PyErr_Clear();
    return false;
}

bool is_bf16(const dlpack::Tensor& t) { return t.code == dlpack::BFLOAT && t.bits == 16; }
bool is_fp32(const dlpack::Tensor& t) { return t.code == dlpack::FLOAT && t.bits == 32; }

bool contiguous(const dlpack::Tensor& t) {
    int64_t size = 1;
    bool dense = true;
    for (int d = t.ndim - 1; d >= 0; --d) {
        dense = dense && (t.shape[d] == 1 || t.strides[d] == size);
        size *= t.shape[d];
    }
    return dense || size == 0;
}

bool is_matrix(const dlpack::Tensor& t, int64_t rows, int64_t columns) {
    return t.ndim == 2 && t.shape[0] == rows && t.shape[1] == columns;
}

// a parameter of the delta or a bias: bf16 or an fp32 master, without gaps
bool is_master(const dlpack::Tensor& t) { return (is_bf16(t) || is_fp32(t)) && contiguous(t); }

uintptr_t data(const dlpack::Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) + t.byte_offset; }

// The arguments of one call as Python hands them over.
struct Given {
    PyObject* const* at;
    py::handle operator[](int i) const { return at[i]; }
    double real(int i) const { return right(PyFloat_AsDouble(at[i])); }
    int whole(int i) const { return static_cast<int>(right(PyLong_AsLong(at[i]))); }
    uint64_t word(int i) const { return right(PyLong_AsUnsignedLongLong(at[i])); }

  private:
    template <class T>
    static T right(T value) {
        if (value == static_cast<T>(-1) && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }
};

// A function of COUNT arguments for Python, straight to its arguments: through pybind11's records and casters a call took
// 4 to 6 us more where they are in no cache, as between two layers of a model.
template <int COUNT, class Body>
PyObject* door(PyObject* const* at, Py_ssize_t count, const Body& body) {
    if (count != COUNT)
        return PyErr_Format(PyExc_TypeError, "%s: %zd arguments came; %d would be right", NAME, count, COUNT);
    try {
        return body(Given{at}).release().ptr();
    } catch (py::error_already_set& error) {
        error.restore();
    } catch (const std::invalid_argument& error) {
        PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
}

// other threads of Python may go on while one of these lives
class Released {
  public:
    Released() : state(PyEval_SaveThread()) {}
    ~Released() { PyEval_RestoreThread(state); }
    Released(const Released&) = delete;
    Released& operator=(const Released&) = delete;

  private:
    PyThreadState* state;
};

// x [..., K], w [N, K] of any strides, bias [N] or None, a [R, K], b [N, R], dropout. 1: all in bf16, but for fp32 masters;
// 2: all in fp32; 0: anything else.
int fits(const Given& given) {
    const py::handle bias = given[2], dropout = given[5];
    if (!PyFloat_Check(dropout.ptr())) return 0;
    const double p = PyFloat_AS_DOUBLE(dropout.ptr());
    if (!(p >= 0 && p < 1)) return 0;
    dlpack::Tensor sx, sw, sa, sb, sbias;
    if (!see(given[0], &sx) || !see(given[1], &sw) || !see(given[3], &sa) || !see(given[4], &sb)) return 0;
    const bool narrow = is_bf16(sx) && is_bf16(sw), wide = is_fp32(sx) && is_fp32(sw);
    if (!(narrow || wide) || !contiguous(sx) || sx.ndim < 1 || sw.ndim != 2) return 0;
    const auto right = [&](const dlpack::Tensor& t) { return is_master(t) && (narrow || is_fp32(t)); };
    const int64_t N = sw.shape[0], K = sw.shape[1];
    if (N < 1 || K < 1 || sx.shape[sx.ndim - 1] != K) return 0;
    if (!right(sa) || !right(sb) || sa.ndim != 2) return 0;
    const int64_t R = sa.shape[0];
    if (R < 1 || !is_matrix(sa, R, K) || !is_matrix(sb, N, R)) return 0;
    if (!bias.is_none() && !(see(bias, &sbias) && right(sbias) && sbias.ndim == 1 && sbias.shape[0] == N))
        return 0;
    return narrow ? 1 : 2;
}

PyObject* one_lora_fits(PyObject*, PyObject* const* at, Py_ssize_t count) {
    return door<6>(at, count, [](const Given& given) { return py::int_(fits(given)); });
}

dlpack::Tensor seen(py::handle object, const char* name) {
    dlpack::Tensor view;
    check(exchange && see(object, &view), NAME, ": ", name, " is no plain tensor on the CPU");
    check(contiguous(view), NAME, ": ", name, " has gaps");
    return view;
}

// an address, or 0 for None
uintptr_t place(py::handle object, const char* name) {
    return object.is_none() ? 0 : data(seen(object, name));
}

int64_t rows(const dlpack::Tensor& t) {
    int64_t rows = 1;
    for (int d = 0; d + 1 < t.ndim; ++d) rows *= t.shape[d];
    return rows;
}

// what both directions read: x [..., K], a [R, K], b [N, R]
struct OneLora {
    int64_t M, N, K, R;
    dlpack::Tensor x, a, b;

    OneLora(py::handle x_, py::handle a_, py::handle b_)
        : x(seen(x_, "x")), a(seen(a_, "a")), b(seen(b_, "b")) {
        check(x.ndim >= 1 && a.ndim == 2 && b.ndim == 2, NAME, ": x, a and b have ", x.ndim, ", ", a.ndim,
              " and ", b.ndim, " dimensions; 1 or more, 2 and 2 would be right");
        K = x.shape[x.ndim - 1], R = a.shape[0], N = b.shape[0], M = rows(x);
        check(is_bf16(x) && is_master(a) && is_master(b) && is_matrix(a, R, K) && is_matrix(b, N, R), NAME,
              ": x, a and b do not fit; bf16 [..., K], [R, K] and [N, R] would be right");
    }
};

// of a and b together: tells a write to one of them that no version shows
uint64_t mark_of(const dlpack::Tensor& a, const dlpack::Tensor& b) {
    const auto mark = [](const dlpack::Tensor& t) {
        check(t.ndim == 2, NAME, ": a and b have two dimensions, here are ", t.ndim);
        return parameter_mark(data(t), t.shape[0] * t.shape[1] * t.bits / 8, 32);
    };
    return mark(a) * 31 + mark(b);
}

// where a and b are kept packed, or 0 for None
uintptr_t kept_place(py::handle object, const OneLora& given) {
    if (object.is_none()) return 0;
    const dlpack::Tensor kept = seen(object, "kept");
    check(is_bf16(kept) && kept.ndim == 1 && kept.shape[0] >= KeptFactors::size(given.R, given.N, given.K),
          NAME, ": kept has no room for a and b; ", KeptFactors::size(given.R, given.N, given.K),
          " numbers of bf16 would be right");
    return data(kept);
}

// x, w, bias, a, b; w packed and its mark; seed; y [..., N] and h [M, R]; scale, p, threads; where a and b are kept packed or
// None, and their mark or None, which is to say that they are not there yet. -1; 0, and nothing done, where w is no longer
// what was packed, and 1 where a or b is not.
int forward(const Given& all) {
    const OneLora given(all[0], all[3], all[4]);
    const py::handle bias = all[2];
    dlpack::Tensor sw, sbias{};
    check(see(all[1], &sw) && is_bf16(sw) && is_matrix(sw, given.N, given.K), NAME, ": w is no bf16 [",
          given.N, ", ", given.K, "] on the CPU");
    if (!bias.is_none()) sbias = seen(bias, "bias");
    const uintptr_t at_packed = data(seen(all[5], "packed")), at_seed = place(all[7], "seed");
    const uintptr_t at_y = data(seen(all[8], "y")), at_h = data(seen(all[9], "h"));
    const uint64_t mark = all.word(6);
    const double scale = all.real(10), p = all.real(11);
    const int threads = all.whole(12);
    const uintptr_t kept = kept_place(all[13], given);
    const bool ready = kept && !all[14].is_none();
    if (ready && all.word(14) != mark_of(given.a, given.b)) return 1;
    const Released released;
    const bool done = delta_linear_forward_door(
        data(given.x), given.K, data(sw), sw.strides[0], sw.strides[1], mark, at_packed,
        bias.is_none() ? 0 : data(sbias), !bias.is_none() && is_fp32(sbias), data(given.a), is_fp32(given.a),
        data(given.b), is_fp32(given.b), static_cast<float>(scale), p, at_seed, at_y, at_h, kept, ready,
        given.M, given.N, given.K, given.R, threads);
    return done ? -1 : 0;
}

PyObject* one_lora_forward(PyObject*, PyObject* const* at, Py_ssize_t count) {
    return door<15>(at, count, [](const Given& all) { return py::int_(forward(all)); });
}

// dy, x, a, b, h; w packed; seed; dx [..., K], da [R, K] and db [N, R], None is left out; scale, p, threads; where a and b
// are kept packed or None, and whether they are there yet
void backward(const Given& all) {
    const OneLora given(all[1], all[2], all[3]);
    const dlpack::Tensor sdy = seen(all[0], "dy");
    check(is_bf16(sdy) && sdy.ndim >= 1 && sdy.shape[sdy.ndim - 1] == given.N && rows(sdy) == given.M, NAME,
          ": dy is no bf16 [", given.M, ", ", given.N, "]");
    const uintptr_t at_h = data(seen(all[4], "h")), at_packed = place(all[5], "packed"),
                    at_seed = place(all[6], "seed");
    const uintptr_t at_dx = place(all[7], "dx"), at_da = place(all[8], "da"), at_db = place(all[9], "db");
    check(!at_dx || at_packed, NAME, ": dx is asked for and there is no packed weight");
    const double scale = all.real(10), p = all.real(11);
    const int threads = all.whole(12);
    const uintptr_t kept = kept_place(all[13], given);
    const bool ready = kept && all[14].ptr() == Py_True;
    const Released released;
    delta_linear_backward_door(data(given.x), given.K, data(sdy), given.N, at_h, at_packed, data(given.a),
                               is_fp32(given.a), data(given.b), is_fp32(given.b), static_cast<float>(scale),
                               p, at_seed, at_dx, at_da, at_db, kept, ready, given.M, given.N, given.K,
                               given.R, threads);
}

PyObject* one_lora_backward(PyObject*, PyObject* const* at, Py_ssize_t count) {
    return door<15>(at, count, [](const Given& all) {
        backward(all);
        return py::none();
    });
}

// a, b
PyObject* one_lora_mark(PyObject*, PyObject* const* at, Py_ssize_t count) {
    return door<2>(at, count,
                   [](const Given& all) { return py::int_(mark_of(seen(all[0], "a"), seen(all[1], "b"))); });
}

PyMethodDef method(const char* name, PyObject* (*body)(PyObject*, PyObject* const*, Py_ssize_t),
                   const char* what) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(body)), METH_FASTCALL, what};
}

}  // namespace

void bind_one_lora(py::module_& m) {
    m.def("one_lora_kept_size", &KeptFactors::size,
          "How many numbers of bf16 keep a [R, K] and b [N, R] packed.");
    m.def("one_lora_knows", &one_lora_knows, "Takes torch's types of tensors; whether they can be seen.");
    // Python keeps the address of this table
    static PyMethodDef methods[] = {
        method("one_lora_fits", one_lora_fits,
               "1 where one_lora_forward may have these tensors, 2 where fp32_forward may; 0 says no more."),
        method("one_lora_forward", one_lora_forward,
               "y and h; -1, or 0 where w was written to since its mark, 1 where a or b was."),
        method("one_lora_mark", one_lora_mark, "A mark of a and b that tells writes to them."),
        method("one_lora_backward", one_lora_backward, "dx, da and db; None is left out."),
        {},
    };
    if (PyModule_AddFunctions(m.ptr(), methods)) throw py::error_already_set();
}

}  // namespace pefast
