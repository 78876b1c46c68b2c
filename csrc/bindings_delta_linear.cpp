// delta_linear's part of pefast._C.
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings.h"
#include "check.h"
#include "cpu/delta_linear.h"
#include "cpu/delta_linear_decode.h"
#include "cpu/pack.h"

namespace py = pybind11;

namespace pefast {

namespace {

// w [N, K] packed for x wᵀ, or for dy w; its mark
uint64_t delta_linear_pack_door(uintptr_t w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K,
                                bool for_dx, uintptr_t packed, int threads) {
    const char* name = "delta_linear";
    check_weight(name, N, K, w && packed);
    check_threads(name, threads);
    if (for_dx)
        delta_linear_pack(at<const bf16>(w), stride_n, stride_k, N, K, at<bf16>(packed), threads);
    else
        delta_linear_pack(at<const bf16>(w), stride_k, stride_n, K, N, at<bf16>(packed), threads);
    return weight_mark(at<const bf16>(w), stride_n, stride_k, N, K);
}

void check_sizes(int64_t M, int64_t N, int64_t K, int64_t R, double p, int threads) {
    const char* name = "delta_linear";
    check(N > 0 && K > 0 && R > 0, name, ": N, K and R are ", N, ", ", K, " and ", R,
          "; 1 or more would be right");
    check(M >= 0 && M < int64_t{1} << 32, name, ": x has ", M, " rows; 0 to 2^32 - 1 would be right");
    check(p >= 0 && p < 1, name, ": p is ", p, "; a rate from 0 to below 1 would be right");
    check_threads(name, threads);
}

Segment segment(Master a, Master b, int64_t R, float scale, double p, const int64_t* seed, uint32_t stream) {
    Segment s;
    s.a = a, s.b = b, s.R = R, s.scale = scale, s.dropout = p > 0;
    s.draw = make_draw(p, p > 0 ? *seed : 0, stream), s.keep_scale = static_cast<float>(1 / (1 - p));
    return s;
}

}  // namespace

// false, and nothing done, where w is no longer what was packed
bool delta_linear_forward_door(uintptr_t x, int64_t ldx, uintptr_t w, int64_t stride_n, int64_t stride_k,
                               uint64_t mark, uintptr_t packed, uintptr_t bias, bool bias_fp32, uintptr_t a,
                               bool a_fp32, uintptr_t b, bool b_fp32, float scale, double p, uintptr_t seed,
                               uintptr_t y, uintptr_t h, uintptr_t kept, bool kept_ready, int64_t M,
                               int64_t N, int64_t K, int64_t R, int threads) {
    check_sizes(M, N, K, R, p, threads);
    check_matrix("delta_linear", "x", at<void>(x), M, K, ldx);
    if (weight_mark(at<const bf16>(w), stride_n, stride_k, N, K) != mark) return false;
    SiblingForward one;
    one.N = N, one.w = at<const bf16>(packed), one.bias = {at<void>(bias), bias_fp32}, one.y = at<bf16>(y);
    one.segments = {segment({at<void>(a), a_fp32}, {at<void>(b), b_fp32}, R, scale, p, at<int64_t>(seed), 0)};
    DeltaForward call;
    call.M = M, call.K = K, call.x = at<const bf16>(x), call.ldx = ldx, call.waist = at<bf16>(h);
    call.siblings = {one}, call.kept = {at<bf16>(kept), kept_ready};
    delta_linear_forward(call, threads);
    return true;
}

uint64_t parameter_mark(uintptr_t address, int64_t bytes, int64_t samples) {
    uint64_t mark = 0xcbf29ce484222325;
    // four bytes at a time: half of an fp32 number would not tell 0 from 1
    for (int64_t i = 0; i < samples && bytes >= 4; ++i)
        mark = (mark ^ at<const uint32_t>(address)[i * (bytes / 4) / samples]) * 0x100000001b3;
    return bytes == 2 ? at<const bf16>(address)->bits : mark;
}

void delta_linear_backward_door(uintptr_t x, int64_t ldx, uintptr_t dy, int64_t lddy, uintptr_t h,
                                uintptr_t packed, uintptr_t a, bool a_fp32, uintptr_t b, bool b_fp32,
                                float scale, double p, uintptr_t seed, uintptr_t dx, uintptr_t da,
                                uintptr_t db, uintptr_t kept, bool kept_ready, int64_t M, int64_t N,
                                int64_t K, int64_t R, int threads) {
    check_sizes(M, N, K, R, p, threads);
    check_matrix("delta_linear", "x", at<void>(x), M, K, ldx);
    check_matrix("delta_linear", "dy", at<void>(dy), M, N, lddy);
    SiblingBackward one;
    one.N = N, one.w = at<const bf16>(packed), one.dy = at<const bf16>(dy), one.lddy = lddy;
    one.segments = {segment({at<void>(a), a_fp32}, {at<void>(b), b_fp32}, R, scale, p, at<int64_t>(seed), 0)};
    one.gradients = {{at<float>(da), at<float>(db), nullptr, nullptr, nullptr}};
    DeltaBackward call;
    call.M = M, call.K = K, call.x = at<const bf16>(x), call.ldx = ldx, call.waist = at<const bf16>(h);
    call.dx = at<bf16>(dx), call.siblings = {one}, call.kept = {at<bf16>(kept), kept_ready};
    delta_linear_backward(call, threads);
}

namespace {

// an address, and whether it is fp32
using Parameter = std::pair<uintptr_t, bool>;
// a, b, c, d; h; R; scale; activation; p; stream; whether rows are chosen, and by which id
using SegmentWords = std::tuple<std::array<Parameter, 4>, uintptr_t, int64_t, float, std::string, double,
                                uint32_t, bool, int64_t>;
// w, its strides and mark; packed; N; bias, gain; y, u; seed; segments
using ForwardWords = std::tuple<uintptr_t, int64_t, int64_t, uint64_t, uintptr_t, int64_t, Parameter,
                                Parameter, uintptr_t, uintptr_t, uintptr_t, std::vector<SegmentWords>>;
// packed; N; gain; dy, lddy; u; dbias, dgain; seed; segments, and da, db, dc, dd, dh of each
using BackwardWords =
    std::tuple<uintptr_t, int64_t, Parameter, uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t,
               std::vector<SegmentWords>, std::vector<std::array<uintptr_t, 5>>>;

Master master(const Parameter& p) { return {at<void>(p.first), p.second}; }

std::vector<Segment> segments(const std::vector<SegmentWords>& all, int64_t M, int64_t N, int64_t K,
                              const int64_t* ids, const int64_t* seed, int threads) {
    std::vector<Segment> made;
    for (const auto& [parameters, h, R, scale, activation, p, stream, routed, adapter] : all) {
        check_sizes(M, N, K, R, p, threads);
        check(!routed || ids || !M,
              "delta_linear: a segment belongs to an adapter and there are no ids; one for each row "
              "would be right");
        check(h || parameters[0].first || !M,
              "delta_linear: a segment has neither a nor h; one of them would be right");
        Segment s = segment(master(parameters[0]), master(parameters[1]), R, scale, p, seed, stream);
        s.c = master(parameters[2]), s.d = master(parameters[3]), s.activation = activation_of(activation);
        s.routed = routed, s.adapter = adapter, s.h = parameters[0].first ? nullptr : at<const bf16>(h);
        made.push_back(s);
    }
    return made;
}

// -1, or nothing done and which of the weights is no longer what was packed
int siblings_forward_door(uintptr_t x, int64_t ldx, int64_t M, int64_t K, uintptr_t ids, uintptr_t waist,
                          const std::vector<ForwardWords>& all, int threads) {
    DeltaForward call;
    call.M = M, call.K = K, call.x = at<const bf16>(x), call.ldx = ldx, call.ids = at<const int64_t>(ids);
    call.waist = at<bf16>(waist);
    check_matrix("delta_linear", "x", at<void>(x), M, K, ldx);
    for (const auto& [w, stride_n, stride_k, mark, packed, N, bias, gain, y, u, seed, words] : all) {
        check_sizes(M, N, K, 1, 0, threads);
        if (weight_mark(at<const bf16>(w), stride_n, stride_k, N, K) != mark)
            return static_cast<int>(call.siblings.size());
        SiblingForward one;
        one.N = N, one.w = at<const bf16>(packed), one.bias = master(bias), one.gain = master(gain);
        one.segments = segments(words, M, N, K, call.ids, at<const int64_t>(seed), threads);
        one.y = at<bf16>(y), one.u = at<bf16>(u);
        call.siblings.push_back(one);
    }
    delta_linear_forward(call, threads);
    return -1;
}

void siblings_backward_door(uintptr_t x, int64_t ldx, int64_t M, int64_t K, uintptr_t ids, uintptr_t waist,
                            uintptr_t dx, const std::vector<BackwardWords>& all, int threads) {
    DeltaBackward call;
    call.M = M, call.K = K, call.x = at<const bf16>(x), call.ldx = ldx, call.ids = at<const int64_t>(ids);
    call.waist = at<const bf16>(waist), call.dx = at<bf16>(dx);
    if (x) check_matrix("delta_linear", "x", at<void>(x), M, K, ldx);
    for (const auto& [packed, N, gain, dy, lddy, u, dbias, dgain, seed, words, gradients] : all) {
        check_sizes(M, N, K, 1, 0, threads);
        check_matrix("delta_linear", "dy", at<void>(dy), M, N, lddy);
        check(words.size() == gradients.size(), "delta_linear: there are ", words.size(), " segments and ",
              gradients.size(), " places for gradients; as many would be right");
        SiblingBackward one;
        one.N = N, one.w = at<const bf16>(packed), one.gain = master(gain), one.dy = at<const bf16>(dy);
        one.lddy = lddy, one.u = at<const bf16>(u), one.dbias = at<float>(dbias),
        one.dgain = at<float>(dgain);
        one.segments = segments(words, M, N, K, call.ids, at<const int64_t>(seed), threads);
        for (const auto& [da, db, dc, dd, dh] : gradients) {
            check(x || !da || !M, "delta_linear: da is asked for and there is no x");
            one.gradients.push_back(
                {at<float>(da), at<float>(db), at<float>(dc), at<float>(dd), at<bf16>(dh)});
        }
        call.siblings.push_back(one);
    }
    delta_linear_backward(call, threads);
}

// Everything about a layer and the adapters of its rows that stays from one decoding step to the next.
class DecodePlan {
  public:
    // row, a, b, R, scale
    using Delta = std::tuple<int64_t, uintptr_t, uintptr_t, int64_t, float>;
    // address, bytes, mark
    using Parameter = std::tuple<uintptr_t, int64_t, uint64_t>;

    DecodePlan(uintptr_t w, int64_t stride_n, int64_t stride_k, uint64_t mark, uintptr_t packed,
               uintptr_t bias, bool bias_fp32, int64_t N, int64_t K, int64_t M,
               const std::vector<Delta>& given, std::vector<Parameter> parameters)
        : w(w), stride_n(stride_n), stride_k(stride_k), mark(mark), parameters(std::move(parameters)) {
        check_sizes(M, N, K, 1, 0, 1);
        check(M <= DECODE_ROWS, "delta_linear: a decoding step of ", M, " rows; up to ", DECODE_ROWS,
              " would be right");
        int64_t last = 0;
        for (const auto& [row, a, b, R, scale] : given) {
            check(row >= last && row < M && R > 0 && a && b, "delta_linear: row ", row, " of rank ", R,
                  "; rows in order and below ", M, ", and ranks above 0, would be right");
            deltas.push_back({row, at<const bf16>(a), at<const bf16>(b), R, scale});
            last = row;
        }
        call = {M,
                N,
                K,
                nullptr,
                K,
                at<const bf16>(packed),
                {at<void>(bias), bias_fp32},
                deltas.data(),
                static_cast<int64_t>(deltas.size()),
                nullptr};
    }
    DecodePlan(const DecodePlan&) = delete;

    // false, and nothing done, where w or a parameter is no longer what was packed
    bool run(uintptr_t x, int64_t ldx, uintptr_t y, int threads) const {
        check_threads("delta_linear", threads);
        check_matrix("delta_linear", "x", at<void>(x), call.M, call.K, ldx);
        if (weight_mark(at<const bf16>(w), stride_n, stride_k, call.N, call.K) != mark) return false;
        for (const auto& [address, bytes, before] : parameters)
            if (parameter_mark(address, bytes) != before) return false;
        Decode now = call;
        now.x = at<const bf16>(x), now.ldx = ldx, now.y = at<bf16>(y);
        delta_linear_decode(now, threads);
        return true;
    }

  private:
    const uintptr_t w;
    const int64_t stride_n, stride_k;
    const uint64_t mark;
    const std::vector<Parameter> parameters;
    std::vector<RowDelta> deltas;
    Decode call;
};

}  // namespace

void bind_delta_linear(py::module_& m) {
    m.def("delta_linear_here", &delta_linear_here, "Whether delta_linear's kernels run on this processor.");
    m.def("packed_size", &packed_size, "How many bf16 numbers a packed weight takes.");
    m.def("delta_linear_pack", &delta_linear_pack_door,
          "Packs a frozen weight for one direction; returns its mark.",
          py::call_guard<py::gil_scoped_release>());
    m.def("delta_linear_forward", &delta_linear_forward_door,
          "y and h; False where w was written to since its mark.", py::call_guard<py::gil_scoped_release>());
    m.def("delta_linear_backward", &delta_linear_backward_door,
          "dx, da and db; those of address 0 are left out.", py::call_guard<py::gil_scoped_release>());
    m.def("siblings_forward", &siblings_forward_door,
          "y of layers that read the same x; -1, or which weight was written to since its mark.",
          py::call_guard<py::gil_scoped_release>());
    m.def("siblings_backward", &siblings_backward_door,
          "Gradients of layers that read the same x; those of address 0 are left out.",
          py::call_guard<py::gil_scoped_release>());
    m.attr("DECODE_ROWS") = DECODE_ROWS;
    m.def(
        "parameter_mark", [](uintptr_t address, int64_t bytes) { return parameter_mark(address, bytes); },
        "A mark of a contiguous parameter that tells writes to it.");
    py::class_<DecodePlan>(m, "DecodePlan", "A layer and the adapters of each row, for many decoding steps.")
        .def(py::init<uintptr_t, int64_t, int64_t, uint64_t, uintptr_t, uintptr_t, bool, int64_t, int64_t,
                      int64_t, std::vector<DecodePlan::Delta>, std::vector<DecodePlan::Parameter>>())
        .def("run", &DecodePlan::run, "y; False where something was written to since it was packed.",
             py::call_guard<py::gil_scoped_release>());
    bind_low_rank(m);
}

}  // namespace pefast
