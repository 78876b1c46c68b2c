"""delta_linear by csrc/cpu/delta_linear*: every segment beside a frozen weight, on AMX.

One plain LoRA, the commonest call, has a road of its own, for it costs the least Python: at_once, prepare,
run and run_backward, in eager mode; in bf16 csrc then looks at the tensors itself, in fp32 the road is
delta_linear_fp32_short.py's. Other calls in bf16 go through sibling_linear.py, those in fp32 through
delta_linear_fp32.py. Without AMX both go through delta_linear_thin.py. What is on a GPU goes to
delta_linear_cuda.py.
Formula: pefast/ops/delta_linear.py.
"""

import sys

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from pefast.native import (
    WHY_NOT,
    C,
    is_one_lora,
    kept_factors,
    packs,
    register_one_lora,
    rows_of,
    sibling_linear,
    through_the_registry,
)
from pefast.native import delta_linear_cuda as cuda
from pefast.native import delta_linear_fp32 as fp32
from pefast.native import delta_linear_thin as thin
from pefast.native.delta_linear_fp32_short import short_road
from pefast.native.kept_factors import kept_bytes as kept_bytes
from pefast.native.packs import packed_bytes as packed_bytes
from pefast.native.sibling_linear import packed_weight, packed_weights

_HERE = C is not None and C.delta_linear_here()
# whether csrc can look at tensors itself; an older torch does not show them
_SEES = _HERE and C.one_lora_knows(Tensor, Parameter)
# no device's name to read, which costs 5 us where Python is cold; beside another device's autocast a call
# goes the long way
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: torch.is_autocast_enabled("cpu"))
# who computes a dtype that is not this file's
_OTHERS = {torch.float32: fp32 if fp32.HERE else thin}
if thin.HERE and not _HERE:
    _OTHERS[torch.bfloat16] = thin


def refuse(call) -> str:
    """Why csrc cannot run this call, or ""."""
    if call.x.is_cuda:
        return cuda.why_not(call)
    if other := _OTHERS.get(call.x.dtype):
        return other.why_not(call)
    return sibling_linear.refuse(sibling_linear.Siblings(call.x, (call,)))


def decline(call) -> str:
    """Why another hand is faster, or ""."""
    if call.x.is_cuda:
        return ""
    if other := _OTHERS.get(call.x.dtype):
        return other.why_slower(call)
    w = call.w
    if not isinstance(w, torch.nn.Parameter) and not isinstance(w._base, torch.nn.Parameter):
        return "packs the weight once for many calls, and this one is no parameter: it may live for one call"
    return ""


def at_once(x, w, bias, a, b, dropout: float, compute: str | None = None):
    """Who computes this LoRA as it stands: the commonest call, beside a frozen layer, in bf16 or in fp32.

    This module in bf16, a ShortRoad of delta_linear_fp32_short.py, or None. It asks quickly what refuse() and
    decline() ask in words; None sends the call to them.
    """
    # what another tracer hands in is no plain tensor, or none that csrc can see
    if not _SEES or is_dynamo_compiling() or not (fits := C.one_lora_fits(x, w, bias, a, b, dropout)):
        return None
    if type(w) is not Parameter and type(w._base) is not Parameter:
        return None
    if w.requires_grad or (bias is not None and bias.requires_grad) or _any_autocast():
        return None
    return _BF16 if fits == 1 else short_road(x, w, compute)


# What follows does all that Python has to do before its kernel: one leaves nothing of Python in the caches.


def prepare(x, w, bias, a, b, scale, p, seed, needs_dx):
    """For a call that at_once() lets through: y [..., N] and h [M, R], and what others take.

    That is run_backward(); run(); and stay(), None where run() packs no a and b to stay.

    run() fills y and h and says -1, or which was written to unseen by autograd: stale() forgets its pack.
    """
    n, r = b.shape
    *rows, k = x.shape
    # sizes one by one: read from a tuple they cost 7 us more where Python is cold
    y, h = x.new_empty(*rows, n), x.new_empty(x.numel() // k, r)
    (packed, mark), for_dx = packed_weights(w, needs_dx)
    kept = kept_factors.of(a, b, scale)
    room, ready = (None, None) if kept is None else kept.room_for_y(a, b)
    threads = torch.get_num_threads()
    given = x, w, bias, a, b, packed, mark, seed, y, h, scale, p, threads, room, ready
    return y, h, (for_dx, kept), given, (kept, room) if room is not None and ready is None else None


def stay(kept, room) -> None:
    """After run(): what it has packed of a and b is there for the calls that come."""
    kept.for_y = room


run = C.one_lora_forward if C is not None else None


def stale(which: int, w: Tensor, a: Tensor) -> None:
    """Forgets what was packed of w, where run() said 0, or of a and b, where it said 1."""
    kept_factors.drop(a) if which else packs.drop(w)


def run_backward(dy, x, made, a, b, h, scale, p, seed, needs):
    """dx, da and db of run(), None for what is not needed; and autograd's last None.

    `made` is what prepare() has made for it, `needs` autograd's word for x, a, b, rest. dy lies without gaps.
    """
    (packed, kept), (need_x, need_a, need_b, _) = made, needs
    dx = torch.empty_like(x) if need_x else None
    da = torch.empty_like(a, dtype=torch.float32) if need_a else None
    db = torch.empty_like(b, dtype=torch.float32) if need_b else None
    room, ready = kept.room_for_dx(a, b) if kept is not None and kept.holds(a, b) else (None, False)
    masters = a.dtype is b.dtype is torch.float32
    results = dx, da, db, None
    threads = torch.get_num_threads()
    C.one_lora_backward(dy, x, a, b, h, packed, seed, dx, da, db, scale, p, threads, room, ready)
    if room is not None and not ready:
        kept.for_dx = room
    if masters:
        return results
    return dx, None if da is None else da.to(a.dtype), None if db is None else db.to(b.dtype), None


def forward(call) -> tuple[Tensor, list[tuple[Tensor, Tensor | None]]]:
    """y [M, N] and one pair: the waist before its activations [M, all ranks], and u [M, N] or None.

    On a GPU y alone.
    """
    if call.x.is_cuda:
        return cuda.forward(call)
    if other := _OTHERS.get(call.x.dtype):
        return other.forward(call)
    if not is_one_lora(call):
        (y,), saved = sibling_linear.forward(sibling_linear.Siblings(call.x, (call,)))
        return y, [tuple(saved)]
    s = call.segments[0]
    run = torch.ops.pefast.delta_linear if through_the_registry(call.x) else _forward
    y, h = run(call.x, call.w, call.bias, s.a, s.b, s.scale, s.dropout, call.seed if s.dropout else None)
    return y, [(h, None)]


def backward(call, saved, dy: Tensor, needs):
    """dx, None, dbias, dgain and (da, db, dc, dd, dh) of each segment; None for what is not needed."""
    if other := _OTHERS.get(dy.dtype):
        return other.backward(call, saved, dy, needs)
    if not is_one_lora(call):
        alone, asked = sibling_linear.Siblings(call.x, (call,)), sibling_linear.Siblings(needs.x, (needs,))
        dx, (gradients,) = sibling_linear.backward(alone, saved[0], (dy,), asked)
        return dx, *gradients
    s, (need_a, need_b, *_) = call.segments[0], needs.segments[0]
    run = torch.ops.pefast.delta_linear_backward if through_the_registry(dy) else _backward
    asked = (needs.x, need_a, need_b)
    seed = call.seed if s.dropout else None
    dx, da, db = run(dy, call.x, call.w, s.a, s.b, saved[0][0], s.scale, s.dropout, seed, *asked)
    return (
        dx if needs.x else None,
        None,
        None,
        None,
        [(da if need_a else None, db if need_b else None, None, None, None)],
    )


def _forward(x, w, bias, a, b, scale, p, seed):
    if not _HERE:
        raise RuntimeError(f"delta_linear: the native kernel cannot run: {WHY_NOT or 'it needs AMX'}")
    x, a, b = rows_of(x), _plain(a), _plain(b)
    bias = None if bias is None else _plain(bias)
    (m, k), (n, r) = x.shape, b.shape
    y, h = x.new_empty((m, n)), x.new_empty((m, r))
    stride_n, stride_k = w.stride()
    on_bias = (0, False) if bias is None else (bias.data_ptr(), bias.dtype is torch.float32)
    waist = (*_master(a), *_master(b), scale, p, seed.data_ptr() if p else 0)
    threads, ldx = torch.get_num_threads(), x.stride(0) if m > 1 else k
    while True:
        packed, mark = packed_weight(w, False)
        place = (w.data_ptr(), stride_n, stride_k, mark, packed.data_ptr())
        sizes = (y.data_ptr(), h.data_ptr(), 0, False, m, n, k, r, threads)
        if C.delta_linear_forward(x.data_ptr(), ldx, *place, *on_bias, *waist, *sizes):
            return y, h
        packs.drop(w)


def _backward(dy, x, w, a, b, h, scale, p, seed, need_x, need_a, need_b):
    if not _HERE:
        raise RuntimeError(f"delta_linear: the native kernel cannot run: {WHY_NOT or 'it needs AMX'}")
    dy, x, a, b, h = rows_of(dy), rows_of(x), _plain(a), _plain(b), _plain(h)
    (m, k), (n, r) = x.shape, b.shape
    dx = x.new_empty((m, k) if need_x else 0)
    da = a.new_empty((r, k) if need_a else 0, dtype=torch.float32)
    db = b.new_empty((n, r) if need_b else 0, dtype=torch.float32)
    packed, _ = packed_weight(w, True) if need_x else (dx, 0)
    ldx, lddy = (x.stride(0), dy.stride(0)) if m > 1 else (k, n)
    waist = (*_master(a), *_master(b), scale, p, seed.data_ptr() if p else 0)
    given = (x.data_ptr(), ldx, dy.data_ptr(), lddy, h.data_ptr(), packed.data_ptr())
    threads = torch.get_num_threads()
    C.delta_linear_backward(
        *given, *waist, dx.data_ptr(), da.data_ptr(), db.data_ptr(), 0, False, m, n, k, r, threads
    )
    return (
        dx,
        da if a.dtype is torch.float32 else da.to(a.dtype),
        db if b.dtype is torch.float32 else db.to(b.dtype),
    )


def _plain(t: Tensor) -> Tensor:
    return t if t.is_contiguous() else t.contiguous()


def _master(t: Tensor) -> tuple[int, bool]:
    return t.data_ptr(), t.dtype is torch.float32


_BF16 = sys.modules[__name__]
_LIBRARY = register_one_lora("delta_linear", _forward, _backward)
