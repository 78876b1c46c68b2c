"""delta_linear by library products: three calls for a LoRA. Formula and names: pefast/ops/delta_linear.py.

x is never copied to another dtype: a, b, c and d are brought to x's, which is small. x̂ lives only while a
product reads it.
"""

import torch
from torch import Tensor

from pefast.eager.activations import ACTIVATIONS

Pair = tuple[Tensor | None, Tensor | None]


def refuse(call) -> str:
    """Never: the eager hand takes every call."""
    return ""


def forward(call) -> tuple[Tensor, list[Pair]]:
    """y [M, N] and, for each segment, (h, z): the waist before the scale, and what the activation was given.

    With a gain one more pair follows, (u, None).
    """
    x, dtype = call.x, call.x.dtype
    bias = None if call.bias is None else call.bias.to(dtype)
    plain = call.gain is None and bias is not None
    u = torch.addmm(bias, x, call.w.t()) if plain else torch.mm(x, call.w.t())  # [M, N]
    saved = []
    for stream, s in enumerate(call.segments):
        h, z = _waist(call, s, stream)
        u.addmm_(h, _scaled_up(s, dtype).t())
        if s.d is not None:
            rows = _own_rows(call, s)
            step = s.d.to(dtype) * s.scale  # [N]
            u.add_(step if rows is None else rows[:, None] * step)
        saved.append((h, z))
    if call.gain is None:
        return u, saved
    y = u * call.gain.to(dtype)
    return (y if bias is None else y.add_(bias)), [*saved, (u, None)]


def _scaled_up(s, dtype: torch.dtype) -> Tensor:  # [N, R]
    """s·b, rounded once: the scale goes into the small factor, for a product with an alpha is slower."""
    return (s.b if s.scale == 1.0 else s.b * s.scale).to(dtype)


def _waist(call, s, stream: int) -> Pair:
    """h [M, R] of one segment, and z [M, R] where backward needs it."""
    dtype, z = call.x.dtype, None
    if s.h is None:
        x_hat = call.mask.forward(call.x, s.dropout, call.seed, stream) if s.dropout else call.x
        a_t = s.a.to(dtype).t()  # [K, R]
        h = torch.mm(x_hat, a_t) if s.c is None else torch.addmm(s.c.to(dtype), x_hat, a_t)
        if s.activation != "identity":
            h, z = ACTIVATIONS[s.activation].forward(h), h
    else:
        h = s.h.reshape(-1, s.h.shape[-1])
    rows = _own_rows(call, s)
    return (h if rows is None else h * rows[:, None]), z


def _own_rows(call, s) -> Tensor | None:
    """1 for the rows that belong to the segment's adapter, 0 for others [M]; None: all are its own."""
    return None if s.adapter is None else (call.ids == s.adapter).to(call.w.dtype)


def backward(call, saved: list[Pair], dy: Tensor, needs):
    """dx, dw, dbias, dgain and (da, db, dc, dd, dh) of each segment; None for what is not needed."""
    dtype = call.w.dtype
    du = dy if call.gain is None else dy * call.gain.to(dtype)  # [M, N]
    dx = torch.mm(du, call.w) if needs.x else None
    dw = torch.mm(du.t(), call.x) if needs.w else None
    dbias = dy.sum(0).to(call.bias.dtype) if needs.bias else None
    dgain = (dy * saved[-1][0]).sum(0).to(call.gain.dtype) if needs.gain else None
    deltas = []
    for stream, (s, (h, z), need) in enumerate(zip(call.segments, saved, needs.segments, strict=False)):
        deltas.append(_segment_backward(call, s, stream, h, z, du, dx, need))
    return dx, dw, dbias, dgain, deltas


def _segment_backward(call, s, stream: int, h, z, du: Tensor, dx: Tensor | None, need):
    """One segment's gradients; its part of dx is added to dx."""
    dtype, rows = call.w.dtype, _own_rows(call, s)
    da = db = dc = dd = None
    if need[1]:
        db = _scaled(torch.mm(du.t(), h), s.scale, s.b.dtype)
    if need[3]:
        dd = (du if rows is None else du * rows[:, None]).sum(0).to(s.d.dtype) * s.scale
    if not (need[0] or need[2] or need[4] or (dx is not None and s.h is None)):
        return da, db, dc, dd, None
    dh = torch.mm(du, _scaled_up(s, dtype))  # [M, R]  with the scale in it
    if rows is not None:
        dh = dh * rows[:, None]
    if s.h is not None:
        return da, db, dc, dd, dh.reshape(s.h.shape) if need[4] else None
    dz = dh if z is None else ACTIVATIONS[s.activation].backward(dh, z)
    if need[2]:
        dc = dz.sum(0).to(s.c.dtype)
    x_hat = _into_x(call, s, stream, dz, dx, need[0])
    if need[0]:
        da = torch.mm(dz.t(), x_hat).to(s.a.dtype)
    return da, db, dc, dd, None


def _into_x(call, s, stream: int, dz: Tensor, dx: Tensor | None, again: bool) -> Tensor | None:
    """Adds mask ⊙ (dz a) / (1-p) to dx, and makes x̂ [M, K] again where `again` asks for it."""
    a = s.a.to(dz.dtype)
    if not s.dropout:
        if dx is not None:
            dx.addmm_(dz, a)
        return call.x
    if dx is None:
        return call.mask.forward(call.x, s.dropout, call.seed, stream) if again else None
    through = torch.mm(dz, a)  # [M, K]
    if again:
        return call.mask.both_(call.x, through, dx, s.dropout, call.seed, stream)
    call.mask.add_(dx, through, s.dropout, call.seed, stream)
    return None


def _scaled(gradient: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    gradient = gradient.to(dtype)
    return gradient if scale == 1.0 else gradient.mul_(scale)
