"""delta_linear by csrc/cpu/delta_linear_fp32*: fp32 activations, products of bf16 parts on AMX.

A number is the sum of three bf16 parts, which hold all 24 bits of it; with compute="bf16" it is rounded to
one. Sums and results are fp32. What is more than one plain LoRA goes through delta_linear_fp32_many.py.
Formula: pefast/ops/delta_linear.py; arithmetic: csrc/cpu/delta_linear_fp32.h.
"""

import torch
from torch import Tensor

from pefast.native import WHY_NOT, C, packs, rows_of, through_the_registry
from pefast.native import delta_linear_fp32_many as many

HERE = C is not None and C.fp32_here()
# with fewer rows PyTorch reads the weight in less time than three parts of it are read
FEW_ROWS = 8


def why_not(call) -> str:
    """Why csrc cannot run this call, or ""."""
    if not HERE:
        return WHY_NOT if C is None else f"needs AMX tiles for bfloat16, this process may use {C.isa()}"
    x, w, bias, segments = call.x, call.w, call.bias, call.segments
    if not (x.is_cpu and w.is_cpu):
        return f"needs a CPU, x is on {x.device} and the weight on {w.device}"
    if not (x.dtype is torch.float32 and w.dtype is torch.float32):
        return f"takes float32, x is {_name(x.dtype)} and the weight {_name(w.dtype)}"
    if call.gain is not None:
        return "has no output gain"
    if not w.numel():
        return f"takes no empty weight, w is {list(w.shape)}"
    if (w.requires_grad or (bias is not None and bias.requires_grad)) and torch.is_grad_enabled():
        return "takes a frozen weight and bias, here one of them trains"
    if bias is not None and bias.dtype is not torch.float32:
        return f"takes a bias in float32, it is {_name(bias.dtype)}"
    for s in segments:
        if why := _refuse_segment(s):
            return why
    if _is_many(call) and call.mask is None and any(s.dropout for s in segments):
        return "needs a hand for the dropout of several segments, and the call brings none"
    return ""


def _is_many(call) -> bool:
    """Whether there is more beside the weight than one plain LoRA."""
    if len(call.segments) != 1:
        return len(call.segments) > 1
    s = call.segments[0]
    return s.activation != "identity" or s.c is not None or s.adapter is not None


def _refuse_segment(s) -> str:
    for t in (s.a, s.b, s.c, s.d, s.h):
        if t is not None and t.dtype is not torch.float32:
            return f"takes a, b, c, d and h in float32, one is {_name(t.dtype)}"
    if not s.b.shape[1]:
        return "takes a rank of 1 or more, it is 0"
    return ""


def why_slower(call) -> str:
    """Why another hand is faster, or ""."""
    w = call.w
    if not isinstance(w, torch.nn.Parameter) and not isinstance(w._base, torch.nn.Parameter):
        return "packs the weight once for many calls, and this one is no parameter: it may live for one call"
    if call.x.shape[0] < FEW_ROWS:
        return f"reads a weight of three parts, which {call.x.shape[0]} rows are too few for"
    if not torch.compiler.is_compiling():
        parts = _parts(call)
        # one pack for each direction
        size = 4 * C.fp32_packed_size(*w.shape, parts)
        if not packs.room(w, (False, parts), size):
            return f"packs the weight in {size / 1e6:.0f} MB, and a quarter of the memory is to stay free"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parts(call) -> int:
    return 1 if call.compute == "bf16" else 3


def forward(call) -> tuple[Tensor, list[tuple[Tensor, None]]]:
    """y [M, N] and [(h [M, R], None)], in fp32; no pair where there is no segment."""
    run = torch.ops.pefast.delta_linear_fp32 if through_the_registry(call.x) else _forward
    if _is_many(call):

        def product(bias, ups, waist):
            return run(call.x, call.w, bias, None, ups, waist, 1.0, 0.0, None, _parts(call))[0]

        return many.forward(call, product)
    if not call.segments:
        y, _ = run(call.x, call.w, call.bias, None, None, None, 1.0, 0.0, None, _parts(call))
        return y, []
    s, bias = call.segments[0], call.bias
    if s.d is not None:
        step = s.d * s.scale  # [N]
        bias = step if bias is None else bias + step
    given = None if s.h is None else s.h.reshape(-1, s.h.shape[-1])
    seed = call.seed if s.dropout else None
    y, h = run(call.x, call.w, bias, s.a, s.b, given, s.scale, s.dropout, seed, _parts(call))
    return y, [(h if given is None else given, None)]


def backward(call, saved, dy: Tensor, needs):
    """dx, None, None, None and [(da, db, None, dd, dh)]; None for what is not needed."""
    run = torch.ops.pefast.delta_linear_fp32_backward if through_the_registry(dy) else _backward
    parts = _parts(call)
    if _is_many(call):

        def product(ups, waist, need_h, need_b):
            asked = (needs.x, need_h, False, need_b)
            dx, dh, _, db = run(dy, None, call.w, None, ups, waist, 1.0, 0.0, None, parts, *asked)
            return dx if needs.x else None, dh, db

        dx, deltas = many.backward(call, saved, dy, needs, product)
        return dx, None, None, None, deltas
    if not call.segments:
        dx = run(dy, None, call.w, None, None, None, 1.0, 0.0, None, parts, True, False, False, False)[0]
        return dx, None, None, None, []
    s, (need_a, need_b, _, need_d, need_h) = call.segments[0], needs.segments[0]
    asked = (needs.x, need_h, need_a, need_b)
    seed = call.seed if s.dropout else None
    got = run(dy, call.x, call.w, s.a, s.b, saved[0][0], s.scale, s.dropout, seed, parts, *asked)
    dx, dh, da, db = (t if need else None for t, need in zip(got, asked, strict=True))
    dd = dy.sum(0) * s.scale if need_d else None
    return dx, None, None, None, [(da, db, None, dd, None if dh is None else dh.reshape(s.h.shape))]


def _check_here() -> None:
    if not HERE:
        raise RuntimeError(f"delta_linear: the native kernel cannot run: {WHY_NOT or 'it needs AMX'}")


def _forward(x, w, bias, a, b, h, scale, p, seed, parts):
    _check_here()
    x, a, b, bias, given = rows_of(x), _plain(a), _plain(b), _plain(bias), _plain(h)
    (m, k), n, r = x.shape, w.shape[0], 0 if b is None else b.shape[1]
    y = x.new_empty((m, n))
    h = x.new_empty((m, r) if given is None else 0)
    waist = (_at(a), _at(b), r, scale, p, _at(seed))
    results = (y.data_ptr(), (h if given is None else given).data_ptr(), (m, n, k), torch.get_num_threads())
    while True:
        packed, mark = _packed(w, False, parts)
        place = (w.data_ptr(), *w.stride(), mark)
        ldx = x.stride(0) if m > 1 else k
        if C.fp32_forward(x.data_ptr(), ldx, place, packed.data_ptr(), parts, _at(bias), waist, *results):
            return y, h
        packs.drop(w)


def _backward(dy, x, w, a, b, h, scale, p, seed, parts, need_x, need_h, need_a, need_b):
    _check_here()
    dy, a, b, h = rows_of(dy), _plain(a), _plain(b), _plain(h)
    x = rows_of(x) if need_a else None
    m, (n, k), r = dy.shape[0], w.shape, 0 if b is None else b.shape[1]
    sizes = ((m, k), (m, r), (r, k), (n, r))
    asked = (need_x, need_h, need_a, need_b)
    results = [dy.new_empty(size if need else 0) for size, need in zip(sizes, asked, strict=True)]
    packed = _packed(w, True, parts)[0].data_ptr() if need_x else 0
    ldx, lddy = (0 if x is None else x.stride(0), dy.stride(0)) if m > 1 else (k, n)
    waist = (_at(a), _at(b), r, scale, p, _at(seed))
    given = (_at(x), ldx, dy.data_ptr(), lddy, _at(h), packed, parts, waist)
    C.fp32_backward(*given, [t.data_ptr() for t in results], (m, n, k), torch.get_num_threads())
    return tuple(results)


def _plain(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _packed(w: Tensor, for_dx: bool, parts: int) -> tuple[Tensor, int]:
    """w [N, K] packed for x wᵀ or for dy w, and its mark."""

    def make():
        n, k = w.shape
        size = C.fp32_packed_size(n, k, parts) if for_dx else C.fp32_packed_size(k, n, parts)
        pack = torch.empty(size, dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        return pack, C.fp32_pack(w.data_ptr(), *w.stride(), n, k, for_dx, parts, pack.data_ptr(), threads)

    return packs.packed(w, (for_dx, parts), make)


_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define(
    "delta_linear_fp32(Tensor x, Tensor w, Tensor? bias, Tensor? a, Tensor? b, Tensor? h, float scale,"
    " float p, Tensor? seed, int parts) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "delta_linear_fp32_backward(Tensor dy, Tensor? x, Tensor w, Tensor? a, Tensor? b, Tensor? h, float scale,"
    " float p, Tensor? seed, int parts, bool need_x, bool need_h, bool need_a, bool need_b)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("delta_linear_fp32", _forward, "CPU")
_LIBRARY.impl("delta_linear_fp32_backward", _backward, "CPU")


@torch.library.register_fake("pefast::delta_linear_fp32", lib=_LIBRARY)
def _(x, w, bias, a, b, h, scale, p, seed, parts):
    waist = (x.shape[0], b.shape[1]) if h is None and b is not None else (x.shape[0], 0) if h is None else 0
    return x.new_empty((x.shape[0], w.shape[0])), x.new_empty(waist)


@torch.library.register_fake("pefast::delta_linear_fp32_backward", lib=_LIBRARY)
def _(dy, x, w, a, b, h, scale, p, seed, parts, need_x, need_h, need_a, need_b):
    r = 0 if b is None else b.shape[1]
    sizes = ((dy.shape[0], w.shape[1]), (dy.shape[0], r), (r, w.shape[1]), (w.shape[0], r))
    asked = (need_x, need_h, need_a, need_b)
    return tuple(dy.new_empty(size if need else 0) for size, need in zip(sizes, asked, strict=True))
