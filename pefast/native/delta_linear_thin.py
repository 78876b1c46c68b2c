"""delta_linear by csrc/cpu/delta_linear_thin*: a frozen product, and all of the LoRA in one pass beside it.

For CPUs without AMX, fp32 and bf16. The frozen product is PyTorch's, or csrc/cpu/delta_linear_product* where
that multiplies bf16 faster; layers with nothing beside them are then taken too.
Formula: pefast/ops/delta_linear.py.
"""

import torch
from torch import Tensor

from pefast.native import ISA, WHY_NOT, C, packs, register_one_lora, rows_of, through_the_registry

HERE = C is not None and C.thin_here()
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_MASTERS = (torch.float32, torch.bfloat16)
# from here on a waist is no thin product: PyTorch's is faster, and more exact for sums of so many terms
WIDE_WAIST = 64


def why_not(call) -> str:
    """Why csrc cannot run this call, or ""."""
    if not HERE:
        return WHY_NOT if C is None else f"needs AVX2, this process may use {ISA}"
    x, w, bias, segments = call.x, call.w, call.bias, call.segments
    if not (x.is_cpu and w.is_cpu):
        return f"needs a CPU, x is on {x.device} and the weight on {w.device}"
    if x.dtype not in _TYPES or w.dtype is not x.dtype:
        return f"takes float32 and bfloat16, x is {_name(x.dtype)} and the weight {_name(w.dtype)}"
    if len(segments) > 1 or not (segments or _multiplies(x.dtype)):
        return f"takes one segment, here are {len(segments)}"
    if call.gain is not None:
        return "has no output gain"
    if not w.numel():
        return f"takes no empty weight, w is {list(w.shape)}"
    if (w.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled():
        return "takes a frozen weight and bias, here one of them trains"
    return _why_not_segment(segments[0]) if segments else ""


def _why_not_segment(s) -> str:
    if s.h is not None:
        return "computes the waist itself, here it is given"
    if s.activation != "identity":
        return f"has no activation, the segment's is {s.activation}"
    if s.c is not None or s.d is not None:
        return "has no trained biases inside a segment"
    if s.adapter is not None:
        return "has no adapter ids"
    if s.a.dtype not in _MASTERS or s.b.dtype not in _MASTERS:
        return f"takes a and b in float32 or bfloat16, they are {_name(s.a.dtype)} and {_name(s.b.dtype)}"
    r = s.a.shape[0]
    return "" if 0 < r < WIDE_WAIST else f"takes ranks from 1 to {WIDE_WAIST - 1}, it is {r}"


def why_slower(call) -> str:
    """Why another hand is faster, or ""."""
    if call.x.dtype is torch.float32 and not call.segments[0].dropout:
        return "without AMX or dropout PyTorch's own products in fp32 are as fast"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the frozen product is csrc's and not PyTorch's."""
    return dtype is torch.bfloat16 and C.product_here()


def forward(call) -> tuple[Tensor, list[tuple[Tensor, None]]]:
    """y [M, N] and [(h [M, R], None)], in x's dtype; no pair where there is no segment."""
    if not call.segments:
        run = torch.ops.pefast.frozen_product if through_the_registry(call.x) else _product
        return run(call.x, call.w, call.bias, False), []
    s = call.segments[0]
    run = torch.ops.pefast.delta_linear_thin if through_the_registry(call.x) else _forward
    seed = call.seed if s.dropout else None
    y, h = run(call.x, call.w, call.bias, s.a, s.b, s.scale, s.dropout, seed)
    return y, [(h, None)]


def backward(call, saved, dy: Tensor, needs):
    """dx, None, None, None and [(da, db, None, None, None)]; None for what is not needed."""
    if not call.segments:
        run = torch.ops.pefast.frozen_product if through_the_registry(dy) else _product
        return run(dy, call.w, None, True), None, None, None, []
    s, (need_a, need_b, *_) = call.segments[0], needs.segments[0]
    run = torch.ops.pefast.delta_linear_thin_backward if through_the_registry(dy) else _backward
    asked, seed = (needs.x, need_a, need_b), call.seed if s.dropout else None
    got = run(dy, call.x, call.w, s.a, s.b, saved[0][0], s.scale, s.dropout, seed, *asked)
    dx, da, db = (t if need else None for t, need in zip(got, asked, strict=True))
    return dx, None, None, None, [(da, db, None, None, None)]


def _check_here() -> None:
    if not HERE:
        raise RuntimeError(f"delta_linear: the native kernel cannot run: {WHY_NOT or 'it needs AVX2'}")


def _forward(x, w, bias, a, b, scale, p, seed):
    _check_here()
    (m, k), (n, r) = x.shape, b.shape
    y = _product(x, w, bias, False)
    x, a, b = rows_of(x), _fp32(a), _fp32(b)
    h = x.new_empty((m, r))
    waist = (a.data_ptr(), b.data_ptr(), r, scale, p, 0 if seed is None else seed.data_ptr())
    ldx, threads = x.stride(0) if m > 1 else k, torch.get_num_threads()
    C.thin_forward(x.data_ptr(), ldx, waist, y.data_ptr(), h.data_ptr(), (m, n, k), _TYPES[x.dtype], threads)
    return y, h


def _backward(dy, x, w, a, b, h, scale, p, seed, need_x, need_a, need_b):
    _check_here()
    (m, k), (n, r) = x.shape, b.shape
    dx = _product(dy, w, None, True) if need_x else dy.new_empty(0)
    da = dy.new_empty((r, k) if need_a else 0, dtype=torch.float32)
    db = dy.new_empty((n, r) if need_b else 0, dtype=torch.float32)
    dy, x, h, wide_a, wide_b = rows_of(dy), rows_of(x), h.contiguous(), _fp32(a), _fp32(b)
    waist = (wide_a.data_ptr(), wide_b.data_ptr(), r, scale, p, 0 if seed is None else seed.data_ptr())
    ldx, lddy = (x.stride(0), dy.stride(0)) if m > 1 else (k, n)
    given = (x.data_ptr(), ldx, dy.data_ptr(), lddy, h.data_ptr(), waist)
    results = (dx.data_ptr(), da.data_ptr(), db.data_ptr())
    C.thin_backward(*given, results, (m, n, k), _TYPES[x.dtype], torch.get_num_threads())
    return dx, da.to(a.dtype), db.to(b.dtype)


def _product(x: Tensor, w: Tensor, bias: Tensor | None, for_dx: bool) -> Tensor:
    """x wᵀ + bias [M, N]; or x w [M, K], x being dy."""
    if not _multiplies(x.dtype):
        if for_dx:
            return torch.mm(x, w)
        return torch.mm(x, w.t()) if bias is None else torch.addmm(bias.to(x.dtype), x, w.t())
    x, (n, k), threads = rows_of(x), w.shape, torch.get_num_threads()
    bias = None if bias is None else _fp32(bias)
    m = x.shape[0]
    y = x.new_empty((m, k if for_dx else n))

    def pack():
        made = x.new_empty(C.product_packed_size(n, k) if for_dx else C.product_packed_size(k, n))
        return made, C.product_pack(w.data_ptr(), *w.stride(), n, k, for_dx, made.data_ptr(), threads)

    ldx, on_bias = x.stride(0) if m > 1 else x.shape[1], 0 if bias is None else bias.data_ptr()
    while True:
        packed, mark = packs.packed(w, ("product", for_dx), pack)
        place = (w.data_ptr(), *w.stride(), mark)
        given = (x.data_ptr(), ldx, place, for_dx, packed.data_ptr(), on_bias)
        if C.product(*given, y.data_ptr(), (m, n, k), threads):
            return y
        packs.drop(w)


def _fp32(t: Tensor) -> Tensor:
    return t.to(torch.float32).contiguous()


_LIBRARY = register_one_lora("delta_linear_thin", _forward, _backward)
_LIBRARY.define("frozen_product(Tensor x, Tensor w, Tensor? bias, bool for_dx) -> Tensor")
_LIBRARY.impl("frozen_product", _product, "CPU")


@torch.library.register_fake("pefast::frozen_product", lib=_LIBRARY)
def _(x, w, bias, for_dx):
    return x.new_empty((x.shape[0], w.shape[1 if for_dx else 0]))
