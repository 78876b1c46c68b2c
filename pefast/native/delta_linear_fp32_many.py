"""fp32 calls with more beside the weight than one plain LoRA: waists by PyTorch, all that is wide natively.

    hs = [h₁ h₂ …]  [M, R]    bs = [s₁b₁ s₂b₂ …]  [N, R]    y = x wᵀ + hs bsᵀ + bias

R: all ranks together; the bias of a delta that is for some rows alone is one column more. A `product` is
delta_linear_fp32's, with the waist given. Formula of each h: pefast/ops/delta_linear.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def forward(call, product: Callable) -> tuple[Tensor, list[tuple[Tensor | None, None]]]:
    """y [M, N], and for backward hs and each segment's z or None; product(bias, bs, hs) -> y."""
    hs, zs, bias = [], [], call.bias
    for stream, s in enumerate(call.segments):
        h, z = _waist(call, s, stream)
        rows = _own_rows(call, s)
        hs.append(h if rows is None else h * rows)
        zs.append(z)
        if s.d is not None and rows is not None:
            hs.append(rows)
        elif s.d is not None:
            step = s.d * s.scale  # [N]
            bias = step if bias is None else bias + step
    waist = torch.cat(hs, 1)
    return product(bias, _ups(call), waist), [(waist, None), *((z, None) for z in zs)]


def backward(call, saved, dy: Tensor, needs, product: Callable):
    """dx and (da, db, dc, dd, dh) of each segment; product(bs, hs, need_h, need_b) -> dx, dhs, dbs."""
    (waist, _), *zs = saved
    through = [
        (needs.x and s.h is None) or n[0] or n[2] or n[4]
        for s, n in zip(call.segments, needs.segments, strict=True)
    ]
    wide = any(n[1] or n[3] for n in needs.segments)
    dx, dhs, dbs = product(_ups(call), waist, any(through), wide)
    deltas, at = [], 0
    for stream, (s, (z, _), need) in enumerate(zip(call.segments, zs, needs.segments, strict=True)):
        end, rows = at + s.b.shape[1], _own_rows(call, s)
        db = dbs[:, at:end] * s.scale if need[1] else None
        own_d = s.d is not None and rows is not None
        dd = None
        if need[3]:
            dd = dbs[:, end] * s.scale if own_d else dy.sum(0) * s.scale
        da = dc = dh = None
        if through[stream]:
            dh = dhs[:, at:end] if rows is None else dhs[:, at:end] * rows
            if s.h is None:
                da, dc = _before_the_waist(call, s, stream, dh, z, dx, need)
        given = dh.reshape(s.h.shape) if need[4] else None
        deltas.append((da, db, dc, dd, given))
        at = end + own_d
    return dx, deltas


def _ups(call) -> Tensor:  # [N, R]
    """The scaled b's side by side, and where hs has a column for a d, that d."""
    ups = []
    for s in call.segments:
        ups.append(s.b * s.scale)
        if s.d is not None and s.adapter is not None:
            ups.append((s.d * s.scale)[:, None])
    return torch.cat(ups, 1)


def _own_rows(call, s) -> Tensor | None:
    """1 for the rows of the segment's adapter, 0 for others [M, 1]; None: all are its own."""
    return None if s.adapter is None else (call.ids == s.adapter).to(call.w.dtype)[:, None]


def _waist(call, s, stream: int) -> tuple[Tensor, Tensor | None]:
    """h [M, R] of one segment, and z [M, R] where backward needs it."""
    if s.h is not None:
        return s.h.reshape(-1, s.h.shape[-1]), None
    x_hat = call.mask.forward(call.x, s.dropout, call.seed, stream) if s.dropout else call.x
    z = torch.mm(x_hat, s.a.t()) if s.c is None else torch.addmm(s.c, x_hat, s.a.t())
    if s.activation == "identity":
        return z, None
    return call.activations[s.activation].forward(z), z


def _before_the_waist(call, s, stream: int, dh: Tensor, z: Tensor | None, dx: Tensor | None, need):
    """da and dc of one segment; its part of dx is added to dx."""
    dz = dh if z is None else call.activations[s.activation].backward(dh, z)
    dc = dz.sum(0) if need[2] else None
    x_hat = call.x
    if not s.dropout:
        if dx is not None:
            dx.addmm_(dz, s.a)
    elif dx is None:
        x_hat = call.mask.forward(call.x, s.dropout, call.seed, stream) if need[0] else None
    elif need[0]:
        x_hat = call.mask.both_(call.x, torch.mm(dz, s.a), dx, s.dropout, call.seed, stream)
    else:
        call.mask.add_(dx, torch.mm(dz, s.a), s.dropout, call.seed, stream)
    return torch.mm(dz.t(), x_hat) if need[0] else None, dc
