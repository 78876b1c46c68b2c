"""Frozen layers that read the same x, each with any segments, by csrc/cpu/delta_linear*: one walk over x.

delta_linear's native hand comes here with whatever is more than one plain LoRA in bf16: one sibling alone.
What is in fp32 goes to delta_linear_fp32.py. Formula and names: pefast/ops/delta_linear.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pefast.native import ISA, WHY_NOT, C, is_one_lora, packs, rows_of, through_the_registry
from pefast.native import delta_linear_fp32 as fp32

_HERE = C is not None and C.delta_linear_here()
_MASTERS = (torch.float32, torch.bfloat16)
# columns of all results together: with 2 x 1536 the layers took 1.02 of their time apart, with 3 x 768 0.84
_WIDTH = 2560
# products of one walk below which layers with a plain LoRA each learn faster one by one, by a shorter road:
# 64 x 384 x 768 took 1.5 of their time apart, 64 x 768 x 1536 1.06, 64 x 768 x 2304 0.95
_FEW = 10**8


class Siblings(NamedTuple):
    """A call, or what is asked for of it: the fields of Call and Needs of pefast/ops/sibling_linear.py."""

    x: Tensor | bool | None
    parts: tuple


def refuse(call) -> str:
    """Why csrc cannot run this call, or ""."""
    x, parts = call
    if x.dtype is torch.float32:
        return _refuse_fp32(call)
    if not _HERE:
        return WHY_NOT if C is None else f"needs AMX tiles for bfloat16, this process may use {ISA}"
    for part in parts:
        w, bias, gain = part.w, part.bias, part.gain
        if not (x.is_cpu and w.is_cpu):
            return f"needs a CPU, x is on {x.device} and the weight on {w.device}"
        if not (x.dtype is torch.bfloat16 and w.dtype is torch.bfloat16):
            return f"takes bfloat16, x is {_name(x.dtype)} and the weight {_name(w.dtype)}"
        if not w.numel():
            return f"takes no empty weight, w is {list(w.shape)}"
        if w.requires_grad and torch.is_grad_enabled():
            return "takes a frozen weight, here it trains"
        for name, t in (("bias", bias), ("gain", gain)):
            if t is not None and t.dtype not in _MASTERS:
                return f"takes a {name} in float32 or bfloat16, it is {_name(t.dtype)}"
        for s in part.segments:
            if why := _refuse_segment(s):
                return why
    return ""


def _refuse_fp32(call) -> str:
    if len({fp32.parts_of(part) for part in call.parts}) > 1:
        return "takes layers of one compute, here are several"
    for part in call.parts:
        if why := fp32.why_not_beside(call.x, part):
            return why
    return ""


def _refuse_segment(s) -> str:
    if not s.b.shape[1]:
        return "takes a rank of 1 or more, it is 0"
    if s.h is not None and s.h.dtype is not torch.bfloat16:
        return f"takes a waist from elsewhere in bfloat16, it is {_name(s.h.dtype)}"
    for name, t in (("a", s.a), ("b", s.b), ("c", s.c), ("d", s.d)):
        if t is not None and t.dtype not in _MASTERS:
            return f"takes {name} in float32 or bfloat16, it is {_name(t.dtype)}"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decline(call) -> str:
    """Why another hand is faster, or ""."""
    for part in call.parts:
        if call.x.dtype is torch.float32:
            if why := fp32.why_slower_beside(call.x, part):
                return why
            continue
        w = part.w
        if not isinstance(w, torch.nn.Parameter) and not isinstance(w._base, torch.nn.Parameter):
            return "packs a weight once for many calls, and one is no parameter: it may live for one call"
    width = sum(part.w.shape[0] for part in call.parts)
    if width > _WIDTH:
        return f"holds the gradients of all results in the cache, {width} columns; {_WIDTH} are the most"
    few = call.x.dtype is torch.bfloat16 and call.x.numel() * width < _FEW
    if few and torch.is_grad_enabled() and all(is_one_lora(part) for part in call.parts):
        return (
            f"takes more Python than layers one by one, for {call.x.numel()} numbers of x and {width} columns"
        )
    return ""


def forward(call) -> tuple[list[Tensor], list[Tensor | None]]:
    """y [M, N] of each part; the waist [M, all ranks] before the activations, and u of each or None."""
    x, parts = call
    if x.dtype is torch.float32:
        ys, kept = fp32.forward_all(x, parts)
        return ys, [t for own in kept for t in own]
    keep_u = [part.gain is not None and part.gain.requires_grad for part in parts]
    run = torch.ops.pefast.siblings_forward if through_the_registry(x) else _forward
    made = run(x, *_flat(parts), keep_u)
    count = len(parts)
    us = [u if keep else None for u, keep in zip(made[count + 1 :], keep_u, strict=True)]
    return made[:count], [made[count], *us]


def backward(call, saved, dys, needs):
    """dx of all parts together, and (dw, dbias, dgain, [(da, db, dc, dd, dh)]) of each; None: not needed."""
    if dys[0].dtype is torch.float32:
        return _backward_fp32(call, saved, dys, needs)
    (x, parts), (waist, *us) = call, saved
    asked = []
    for need in needs.parts:
        asked += [need.bias, need.gain, *(n for five in need.segments for n in five)]
    run = torch.ops.pefast.siblings_backward if through_the_registry(dys[0]) else _backward
    dx, *made = run(list(dys), x, *_flat(parts), waist, us, needs.x, asked)
    made = iter([t if wanted else None for t, wanted in zip(made, asked, strict=True)])
    gradients = []
    for part in parts:
        dbias, dgain = next(made), next(made)
        gradients.append((None, dbias, dgain, [tuple(next(made) for _ in range(5)) for _ in part.segments]))
    return dx if needs.x else None, gradients


def _backward_fp32(call, saved, dys, needs):
    kept, saved = [], iter(saved)
    for part in call.parts:
        kept.append([next(saved) for _ in range(fp32.kept_of(part))])
    return fp32.backward_all(call.x, call.parts, kept, dys, needs.x, needs.parts)


def _flat(parts) -> tuple:
    """The parts as lists of tensors and numbers, as an operator's schema can say them."""
    segments = [s for part in parts for s in part.segments]
    return (
        [part.w for part in parts],
        [part.bias for part in parts],
        [part.gain for part in parts],
        [len(part.segments) for part in parts],
        [t for s in segments for t in (s.a, s.b, s.c, s.d, s.h)],
        [float(s.scale) for s in segments],
        [s.activation for s in segments],
        [float(s.dropout) for s in segments],
        [s.adapter is not None for s in segments],
        [s.adapter or 0 for s in segments],
        next((part.ids for part in parts if part.ids is not None), None),
        [part.seed for part in parts],
    )


def _forward(
    x, ws, biases, gains, counts, tensors, scales, activations, rates, routed, adapters, ids, seeds, keep_u
):
    _check_here()
    x, kept = rows_of(x), []
    m, k = x.shape
    words = _segment_words(counts, tensors, scales, activations, rates, routed, adapters, kept)
    ys = [x.new_empty((m, w.shape[0])) for w in ws]
    us = [x.new_empty((m, w.shape[0]) if keep else 0) for w, keep in zip(ws, keep_u, strict=True)]
    waist = x.new_empty((m, sum(a.shape[0] for a in tensors[::5] if a is not None)))
    ids = None if ids is None else _plain(ids)
    shared = (_address(ids), waist.data_ptr())
    while True:
        calls = []
        for w, bias, gain, y, u, keep, seed, own in zip(
            ws, biases, gains, ys, us, keep_u, seeds, words, strict=True
        ):
            pack, mark = packed_weight(w, False)
            kept.append(pack)
            parameters = (_parameter(bias, kept), _parameter(gain, kept))
            results = (y.data_ptr(), u.data_ptr() if keep else 0)
            place = (w.data_ptr(), *w.stride(), mark, pack.data_ptr(), w.shape[0])
            calls.append((*place, *parameters, *results, _address(seed), own))
        stale = C.siblings_forward(x.data_ptr(), _ld(x), m, k, *shared, calls, torch.get_num_threads())
        if stale < 0:
            return [*ys, waist, *us]
        packs.drop(ws[stale])


def _backward(
    dys, x, ws, biases, gains, counts, tensors, scales, activations, rates, routed, adapters, ids, seeds,
    waist, us, need_x, asked,
):  # fmt: skip
    _check_here()
    x, kept = None if x is None else rows_of(x), []
    m, k = dys[0].shape[0], ws[0].shape[1]
    words = _segment_words(counts, tensors, scales, activations, rates, routed, adapters, kept)
    dx = dys[0].new_empty((m, k) if need_x else 0)
    likes = list(_likes(biases, gains, counts, tensors))
    # sums of parameters' gradients are fp32; that of a waist from elsewhere is rounded as the waist is
    made = [
        dx.new_empty(like.shape if wanted else 0, dtype=torch.bfloat16 if of_waist else torch.float32)
        for (like, of_waist), wanted in zip(likes, asked, strict=True)
    ]
    addresses = iter([t.data_ptr() if wanted else 0 for t, wanted in zip(made, asked, strict=True)])
    calls = []
    for w, gain, dy, u, seed, own in zip(ws, gains, dys, us, seeds, words, strict=True):
        pack = packed_weight(w, True)[0] if need_x else dx
        dy = rows_of(dy)
        kept += (pack, dy)
        given = (pack.data_ptr(), w.shape[0], _parameter(gain, kept), dy.data_ptr(), _ld(dy), _address(u))
        results = (next(addresses), next(addresses))
        gradients = [[next(addresses) for _ in range(5)] for _ in own]
        calls.append((*given, *results, _address(seed), own, gradients))
    ids, waist = None if ids is None else _plain(ids), _plain(waist)
    shared = (_address(ids), waist.data_ptr(), dx.data_ptr() if need_x else 0)
    on_x = (_address(x), 0 if x is None else _ld(x))
    C.siblings_backward(*on_x, m, k, *shared, calls, torch.get_num_threads())
    return [dx, *(_in_dtype(t, like) for t, (like, _) in zip(made, likes, strict=True))]


def _likes(biases, gains, counts, tensors):
    """What has a gradient, in the order of the gradients, and whether it is a waist from elsewhere."""
    at = 0
    for bias, gain, count in zip(biases, gains, counts, strict=True):
        yield bias, False
        yield gain, False
        for i in range(at, at + 5 * count):
            yield tensors[i], i % 5 == 4
        at += 5 * count


def _in_dtype(gradient: Tensor, like: Tensor | None) -> Tensor:
    return gradient if like is None or gradient.dtype is like.dtype else gradient.to(like.dtype)


def _segment_words(counts, tensors, scales, activations, rates, routed, adapters, kept):
    """Each part's segments as csrc takes them; `kept` gets the tensors whose addresses they hold."""
    words = []
    # a segment's stream of dropout is its number in its own part
    streams = [stream for count in counts for stream in range(count)]
    for i, scale in enumerate(scales):
        a, b, c, d, h = tensors[5 * i : 5 * i + 5]
        rank = b.shape[1]
        if h is not None:
            h = _plain(h.reshape(-1, rank))
            kept.append(h)
        parameters = [_parameter(t, kept) for t in (a, b, c, d)]
        own = (scale, activations[i], rates[i], streams[i], routed[i], adapters[i])
        words.append((parameters, _address(h), rank, *own))
    begins = [sum(counts[:i]) for i in range(len(counts))]
    return [words[begin : begin + count] for begin, count in zip(begins, counts, strict=True)]


def _parameter(t: Tensor | None, kept: list) -> tuple[int, bool]:
    if t is None:
        return 0, False
    kept.append(_plain(t))
    return kept[-1].data_ptr(), t.dtype is torch.float32


def _plain(t: Tensor) -> Tensor:
    return t if t.is_contiguous() else t.contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _ld(t: Tensor) -> int:
    return t.stride(0) if t.shape[0] > 1 else t.shape[1]


def packed_weight(w: Tensor, for_dx: bool) -> tuple[Tensor, int]:
    """w [N, K] packed for x wᵀ or for dy w, and its mark; from the storage, or made now."""

    def make():
        n, k = w.shape
        pack = torch.empty(C.packed_size(n, k) if for_dx else C.packed_size(k, n), dtype=torch.bfloat16)
        threads = torch.get_num_threads()
        return pack, C.delta_linear_pack(w.data_ptr(), *w.stride(), n, k, for_dx, pack.data_ptr(), threads)

    return packs.packed(w, for_dx, make)


def packed_weights(w: Tensor, and_for_dx: bool) -> tuple[tuple[Tensor, int], Tensor | None]:
    """w packed for x wᵀ, and its mark; and for dy w, or None. One look at the storage where all is there."""
    if and_for_dx:
        found = packs.found(w)
        if True in found and False in found:
            return found[False], found[True][0]
        return packed_weight(w, False), packed_weight(w, True)[0]
    return packed_weight(w, False), None


def _check_here() -> None:
    if not _HERE:
        raise RuntimeError(f"delta_linear: the native kernel cannot run: {WHY_NOT or 'it needs AMX'}")


_PARTS = (
    "Tensor[] w, Tensor?[] bias, Tensor?[] gain, int[] counts, Tensor?[] tensors, float[] scales,"
    " str[] activations, float[] rates, bool[] routed, int[] adapters, Tensor? ids, Tensor?[] seeds"
)
_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define(f"siblings_forward(Tensor x, {_PARTS}, bool[] keep_u) -> Tensor[]")
_LIBRARY.define(
    f"siblings_backward(Tensor[] dy, Tensor? x, {_PARTS}, Tensor waist, Tensor?[] u, bool need_x,"
    " bool[] asked) -> Tensor[]"
)
_LIBRARY.impl("siblings_forward", _forward, "CPU")
_LIBRARY.impl("siblings_backward", _backward, "CPU")


@torch.library.register_fake("pefast::siblings_forward", lib=_LIBRARY)
def _(x, ws, biases, gains, counts, tensors, *rest):
    ys, keep_u = [x.new_empty((x.shape[0], w.shape[0])) for w in ws], rest[-1]
    waist = x.new_empty((x.shape[0], sum(a.shape[0] for a in tensors[::5] if a is not None)))
    return [
        *ys,
        waist,
        *(torch.empty_like(y) if keep else x.new_empty(0) for y, keep in zip(ys, keep_u, strict=True)),
    ]


@torch.library.register_fake("pefast::siblings_backward", lib=_LIBRARY)
def _(dys, x, ws, biases, gains, counts, tensors, *rest):
    need_x, asked = rest[-2:]
    made = [dys[0].new_empty((dys[0].shape[0], ws[0].shape[1]) if need_x else 0)]
    for (like, of_waist), wanted in zip(_likes(biases, gains, counts, tensors), asked, strict=True):
        kind = like.dtype if like is not None else torch.bfloat16 if of_waist else torch.float32
        made.append(dys[0].new_empty(like.shape if wanted else 0, dtype=kind))
    return made
