"""delta_linear by csrc/cpu/delta_linear_fp32*: fp32 activations, products of bf16 parts on AMX.

A number is the sum of three bf16 parts, which hold all 24 bits of it; with compute="bf16" it is rounded to
one. Sums and results are fp32. Layers that read the same x take part in one call. What is more than one plain
LoRA gets its waist in delta_linear_fp32_many.py. Formula: pefast/ops/delta_linear.py; arithmetic:
csrc/cpu/delta_linear_fp32.h.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pefast.native import ISA, WHY_NOT, C, is_one_lora, packs, rows_of, through_the_registry
from pefast.native import delta_linear_fp32_many as many

HERE = C is not None and C.fp32_here()
# with fewer rows PyTorch reads the weight in less time than three parts of it are read
FEW_ROWS = 8


class Layer(NamedTuple):
    """A frozen product with at most one waist beside it, as csrc takes it."""

    w: Tensor  # [N, K]
    gain: Tensor | None = None  # [N]
    bias: Tensor | None = None  # [N]
    a: Tensor | None = None  # [R, K]
    b: Tensor | None = None  # [N, R]
    h: Tensor | None = None  # [M, R]  a waist from elsewhere; in backward always there
    scale: float = 1.0
    p: float = 0.0
    seed: Tensor | None = None


def why_not(call) -> str:
    """Why csrc cannot run this call, or ""."""
    if many.waists(call) and call.mask is None and any(s.dropout for s in call.segments):
        return "needs a hand for the dropout of several segments, and the call brings none"
    return why_not_beside(call.x, call)


def why_not_beside(x: Tensor, call) -> str:
    """Why csrc cannot run a layer that reads x, or ""."""
    if not HERE:
        return WHY_NOT if C is None else f"needs AMX tiles for bfloat16, this process may use {ISA}"
    w = call.w
    if not (x.is_cpu and w.is_cpu):
        return f"needs a CPU, x is on {x.device} and the weight on {w.device}"
    if not (x.dtype is torch.float32 and w.dtype is torch.float32):
        return f"takes float32, x is {_name(x.dtype)} and the weight {_name(w.dtype)}"
    if not w.numel():
        return f"takes no empty weight, w is {list(w.shape)}"
    if w.requires_grad and torch.is_grad_enabled():
        return "takes a frozen weight, here it trains"
    for name, t in (("bias", call.bias), ("gain", call.gain)):
        if t is not None and t.dtype is not torch.float32:
            return f"takes a {name} in float32, it is {_name(t.dtype)}"
    for s in call.segments:
        if why := _refuse_segment(s):
            return why
    return ""


def _refuse_segment(s) -> str:
    for t in (s.a, s.b, s.c, s.d, s.h):
        if t is not None and t.dtype is not torch.float32:
            return f"takes a, b, c, d and h in float32, one is {_name(t.dtype)}"
    if not s.b.shape[1]:
        return "takes a rank of 1 or more, it is 0"
    return ""


def why_slower(call) -> str:
    """Why another hand is faster, or ""."""
    return why_slower_beside(call.x, call)


def why_slower_beside(x: Tensor, call) -> str:
    """Why another hand is faster for a layer that reads x, or ""."""
    w = call.w
    if not isinstance(w, torch.nn.Parameter) and not isinstance(w._base, torch.nn.Parameter):
        return "packs the weight once for many calls, and this one is no parameter: it may live for one call"
    if (rows := x.shape[:-1].numel()) < FEW_ROWS:
        return f"reads a weight of three parts, which {rows} rows are too few for"
    if not torch.compiler.is_compiling():
        parts = parts_of(call)
        # one pack for each direction
        size = 4 * C.fp32_packed_size(*w.shape, parts)
        if not packs.room(w, (False, parts), size):
            return f"packs the weight in {size / 1e6:.0f} MB, and a quarter of the memory is to stay free"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parts_of(call) -> int:
    """How many bf16 parts a number of the call has."""
    return 1 if call.compute == "bf16" else 3


def forward(call) -> tuple[Tensor, list[tuple[Tensor | None, Tensor | None]]]:
    """y [M, N] and [(h [M, R], u [M, N] or None), (z, None) of each waist that is not csrc's], in fp32."""
    # one LoRA's own way is 20 µs shorter in each direction
    if is_one_lora(call) and not through_the_registry(call.x):
        return _forward_one(call, call.segments[0])
    (y,), ((h, u, *zs),) = forward_all(call.x, (call,))
    return y, [(h, u), *((z, None) for z in zs)] if call.segments or u is not None else []


def backward(call, saved, dy: Tensor, needs):
    """dx, None, dbias, dgain and [(da, db, dc, dd, dh)]; None for what is not needed."""
    if is_one_lora(call) and not through_the_registry(dy):
        return _backward_one(call, call.segments[0], saved[0][0], dy, needs)
    kept = [*saved[0], *(z for z, _ in saved[1:])] if saved else [None, None]
    dx, (gradients,) = backward_all(call.x, (call,), (kept,), (dy,), needs.x, (needs,))
    return dx, *gradients


def _forward_one(call, s) -> tuple[Tensor, list[tuple[Tensor, None]]]:
    _check_here()
    x, w, kept, parts = rows_of(call.x), call.w, [], parts_of(call)
    (m, k), (n, r) = x.shape, s.b.shape
    y, h = x.new_empty((m, n)), x.new_empty((m, r))
    waist = _waist(s.a, s.b, s.scale, s.dropout, call.seed if s.dropout else None, kept)
    rest = (n, 0, _at(_plain(call.bias, kept)), waist, y.data_ptr(), 0, h.data_ptr())
    ldx, threads = x.stride(0) if m > 1 else k, torch.get_num_threads()
    while True:
        pack, mark = packed_weight(w, False, parts)
        layer = ((w.data_ptr(), *w.stride(), mark), pack.data_ptr(), *rest)
        if C.fp32_forward(x.data_ptr(), ldx, m, k, [layer], parts, threads) < 0:
            return y, [(h, None)]
        packs.drop(w)


def _backward_one(call, s, h: Tensor, dy: Tensor, needs):
    _check_here()
    need_a, need_b, *_ = needs.segments[0]
    dy, x, kept, parts = rows_of(dy), rows_of(call.x) if need_a else None, [], parts_of(call)
    m, (n, k) = dy.shape[0], call.w.shape
    dx = dy.new_empty((m, k)) if needs.x else None
    da, db = dy.new_empty(s.a.shape) if need_a else None, dy.new_empty(s.b.shape) if need_b else None
    pack = packed_weight(call.w, True, parts)[0] if needs.x else None
    waist = _waist(s.a, s.b, s.scale, s.dropout, call.seed if s.dropout else None, kept)
    ldx, lddy = (0 if x is None else x.stride(0), dy.stride(0)) if m > 1 else (k, n)
    given = (_at(pack), n, dy.data_ptr(), lddy, 0, 0, _at(_plain(h, kept)))
    layer = (*given, waist, [0, _at(da), _at(db), 0, 0])
    C.fp32_backward(_at(x), ldx, m, k, _at(dx), [layer], parts, torch.get_num_threads())
    return dx, None, None, None, [(da, db, None, None, None)]


def forward_all(x: Tensor, calls) -> tuple[list[Tensor], list[list[Tensor | None]]]:
    """y [M, N] of layers that read the same x, and of each what backward needs: h, u, and z of its waists."""
    layers, kept = [], []
    for call in calls:
        layer, zs = _lowered(call)
        layers.append(layer)
        kept.append(zs)
    keep_u = [call.gain is not None and call.gain.requires_grad for call in calls]
    run = torch.ops.pefast.delta_linear_fp32 if through_the_registry(x) else _forward
    made = run(x, *_columns(layers), keep_u, parts_of(calls[0]))
    count = len(calls)
    for i, (layer, keep) in enumerate(zip(layers, keep_u, strict=True)):
        h = made[2 * count + i] if layer.h is None else layer.h
        kept[i] = [h if layer.b is not None else None, made[count + i] if keep else None, *kept[i]]
    return list(made[:count]), kept


def kept_of(call) -> int:
    """How many things forward_all() keeps of a layer."""
    return 2 + (len(call.segments) if many.waists(call) else 0)


def backward_all(x: Tensor | None, calls, kept, dys, need_x: bool, needs):
    """dx of all layers together, and (None, dbias, dgain, [(da, db, dc, dd, dh)]) of each."""
    layers = [_with_waist(call, h) for call, (h, *_) in zip(calls, kept, strict=True)]
    us = [u for _, u, *_ in kept]
    asked = [flag for call, need in zip(calls, needs, strict=True) for flag in _asked(call, need, need_x)]
    run = torch.ops.pefast.delta_linear_fp32_backward if through_the_registry(dys[0]) else _backward
    any_a = any(asked[1::5])
    dx, *made = run(list(dys), x if any_a else None, *_columns(layers), us, parts_of(calls[0]), need_x, asked)
    made = [t if wanted else None for t, wanted in zip(made, asked, strict=True)]
    dx, gradients = dx if need_x else None, []
    for i, (call, need) in enumerate(zip(calls, needs, strict=True)):
        dh, da, db, dgain, dbias = made[5 * i : 5 * i + 5]
        if many.waists(call):
            deltas = many.backward(call, kept[i][2:], dh, db, dbias, dx, need)
        elif call.segments:
            s, (_, _, _, need_d, _) = call.segments[0], need.segments[0]
            dd = dbias * s.scale if need_d else None
            deltas = [(da, db, None, dd, None if dh is None else dh.reshape(s.h.shape))]
        else:
            deltas = []
        gradients.append((None, dbias if need.bias else None, dgain, deltas))
    return dx, gradients


def _lowered(call) -> tuple[Layer, list[Tensor | None]]:
    """The call with its waist, and what backward needs of waists that csrc does not make."""
    if many.waists(call):
        waist, bias, zs = many.forward(call)
        return Layer(call.w, call.gain, bias, None, many.ups(call), waist), zs
    if not call.segments:
        return Layer(call.w, call.gain, call.bias), []
    s, bias = call.segments[0], call.bias
    if s.d is not None:
        step = s.d * s.scale  # [N]
        bias = step if bias is None else bias + step
    given = None if s.h is None else s.h.reshape(-1, s.h.shape[-1])
    seed = call.seed if s.dropout else None
    return Layer(call.w, call.gain, bias, s.a, s.b, given, s.scale, s.dropout, seed), []


def _with_waist(call, h: Tensor | None) -> Layer:
    """The call as its backward pass takes it."""
    if many.waists(call):
        return Layer(call.w, call.gain, None, None, many.ups(call), h)
    if not call.segments:
        return Layer(call.w, call.gain)
    s = call.segments[0]
    return Layer(call.w, call.gain, None, s.a, s.b, h, s.scale, s.dropout, call.seed if s.dropout else None)


def _asked(call, need, need_x: bool) -> tuple[bool, bool, bool, bool, bool]:
    """Whether dh, da, db, dgain and dbias are csrc's to make."""
    dbias = need.bias or many.needs_sum(call, need)
    if many.waists(call):
        return any(many.through(call, need, need_x)), False, many.wide(call, need), need.gain, dbias
    if not call.segments:
        return False, False, False, need.gain, dbias
    need_a, need_b, _, _, need_h = need.segments[0]
    return need_h, need_a, need_b, need.gain, dbias


def _columns(layers: list[Layer]) -> tuple:
    """The fields of all layers, each a list, as an operator's schema can say them."""
    return tuple(list(field) for field in zip(*layers, strict=True))


def _check_here() -> None:
    if not HERE:
        raise RuntimeError(f"delta_linear: the native kernel cannot run: {WHY_NOT or 'it needs AMX'}")


def _forward(x, ws, gains, biases, as_, bs, hs, scales, rates, seeds, keep_u, parts):
    _check_here()
    x, kept = rows_of(x), []
    m, k = x.shape
    ys = [x.new_empty((m, w.shape[0])) for w in ws]
    us = [x.new_empty((m, w.shape[0]) if keep else 0) for w, keep in zip(ws, keep_u, strict=True)]
    made = [x.new_empty(_waist_size(m, b, h)) for b, h in zip(bs, hs, strict=True)]
    layers = []
    for i, h in enumerate(hs):
        waist = _waist(as_[i], bs[i], scales[i], rates[i], seeds[i], kept)
        given = made[i] if h is None else _plain(h, kept)
        results = (ys[i].data_ptr(), us[i].data_ptr() if keep_u[i] else 0, given.data_ptr())
        layers.append((_at(_plain(gains[i], kept)), _at(_plain(biases[i], kept)), waist, *results))
    ldx = x.stride(0) if m > 1 else k
    while True:
        calls = []
        for w, layer in zip(ws, layers, strict=True):
            pack, mark = packed_weight(w, False, parts)
            kept.append(pack)
            calls.append(((w.data_ptr(), *w.stride(), mark), pack.data_ptr(), w.shape[0], *layer))
        stale = C.fp32_forward(x.data_ptr(), ldx, m, k, calls, parts, torch.get_num_threads())
        if stale < 0:
            return [*ys, *us, *made]
        packs.drop(ws[stale])


def _backward(dys, x, ws, gains, biases, as_, bs, hs, scales, rates, seeds, us, parts, need_x, asked):
    _check_here()
    x, kept = None if x is None else rows_of(x), []
    m, k = dys[0].shape[0], ws[0].shape[1]
    dx = dys[0].new_empty((m, k) if need_x else 0)
    made = [dys[0].new_empty(size) for size in _gradient_sizes(m, k, ws, bs, asked)]
    places = [t.data_ptr() if wanted else 0 for t, wanted in zip(made, asked, strict=True)]
    layers = []
    for i, (w, dy) in enumerate(zip(ws, dys, strict=True)):
        n, dy = w.shape[0], rows_of(dy)
        pack = packed_weight(w, True, parts)[0] if need_x else dx
        kept += (pack, dy)
        given = (dy.data_ptr(), dy.stride(0) if m > 1 else n, _at(_plain(gains[i], kept)), _at(us[i]))
        waist = _waist(as_[i], bs[i], scales[i], rates[i], seeds[i], kept)
        layers.append(
            (pack.data_ptr(), n, *given, _at(_plain(hs[i], kept)), waist, places[5 * i : 5 * i + 5])
        )
    on_x = (_at(x), x.stride(0) if x is not None and m > 1 else k)
    C.fp32_backward(*on_x, m, k, dx.data_ptr() if need_x else 0, layers, parts, torch.get_num_threads())
    return [dx, *made]


def _waist_size(m: int, b: Tensor | None, h: Tensor | None) -> tuple[int, ...]:
    return (m, b.shape[1]) if b is not None and h is None else (0,)


def _gradient_sizes(m: int, k: int, ws, bs, asked):
    """Of dh, da, db, dgain and dbias of each layer."""
    for i, (w, b) in enumerate(zip(ws, bs, strict=True)):
        n, r = w.shape[0], 0 if b is None else b.shape[1]
        sizes = ((m, r), (r, k), (n, r), (n,), (n,))
        yield from (size if asked[5 * i + j] else (0,) for j, size in enumerate(sizes))


def _waist(a, b, scale, p, seed, kept) -> tuple:
    r = 0 if b is None else b.shape[1]
    return _at(_plain(a, kept)), _at(_plain(b, kept)), r, scale, p, _at(seed)


def _plain(t: Tensor | None, kept: list) -> Tensor | None:
    """t as csrc reads it; `kept` gets what must outlive the addresses."""
    if t is None or t.is_contiguous():
        return t
    kept.append(t.contiguous())
    return kept[-1]


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def packed_weight(w: Tensor, for_dx: bool, parts: int) -> tuple[Tensor, int]:
    """w [N, K] packed for x wᵀ or for dy w, and its mark."""

    def make():
        n, k = w.shape
        size = C.fp32_packed_size(n, k, parts) if for_dx else C.fp32_packed_size(k, n, parts)
        pack = torch.empty(size, dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        return pack, C.fp32_pack(w.data_ptr(), *w.stride(), n, k, for_dx, parts, pack.data_ptr(), threads)

    return packs.packed(w, (for_dx, parts), make)


_LAYERS = (
    "Tensor[] w, Tensor?[] gain, Tensor?[] bias, Tensor?[] a, Tensor?[] b, Tensor?[] h, float[] scale,"
    " float[] p, Tensor?[] seed"
)
_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define(f"delta_linear_fp32(Tensor x, {_LAYERS}, bool[] keep_u, int parts) -> Tensor[]")
_LIBRARY.define(
    f"delta_linear_fp32_backward(Tensor[] dy, Tensor? x, {_LAYERS}, Tensor?[] u, int parts, bool need_x,"
    " bool[] asked) -> Tensor[]"
)
_LIBRARY.impl("delta_linear_fp32", _forward, "CPU")
_LIBRARY.impl("delta_linear_fp32_backward", _backward, "CPU")


@torch.library.register_fake("pefast::delta_linear_fp32", lib=_LIBRARY)
def _(x, ws, gains, biases, as_, bs, hs, scales, rates, seeds, keep_u, parts):
    m = x.shape[0]
    ys = [x.new_empty((m, w.shape[0])) for w in ws]
    us = [x.new_empty((m, w.shape[0]) if keep else (0,)) for w, keep in zip(ws, keep_u, strict=True)]
    return [*ys, *us, *(x.new_empty(_waist_size(m, b, h)) for b, h in zip(bs, hs, strict=True))]


@torch.library.register_fake("pefast::delta_linear_fp32_backward", lib=_LIBRARY)
def _(dys, x, ws, gains, biases, as_, bs, hs, scales, rates, seeds, us, parts, need_x, asked):
    m, k = dys[0].shape[0], ws[0].shape[1]
    dx = dys[0].new_empty((m, k) if need_x else (0,))
    return [dx, *(dys[0].new_empty(size) for size in _gradient_sizes(m, k, ws, bs, asked))]
