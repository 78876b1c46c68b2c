"""fp32 calls with more beside the weight than one plain LoRA: waists by PyTorch, all that is wide natively.

    hs = [h₁ h₂ …]  [M, R]    bs = [s₁b₁ s₂b₂ …]  [N, R]    u = x wᵀ + hs bsᵀ    y = u ⊙ gain + bias

R: all ranks together; the bias of a delta that is for some rows alone, or under a gain, is one column more.
Formula of each h: pefast/ops/delta_linear.py.
"""

import torch
from torch import Tensor


def waists(call) -> bool:
    """Whether there is more beside the weight than one plain LoRA."""
    if len(call.segments) != 1:
        return len(call.segments) > 1
    s = call.segments[0]
    more = s.activation != "identity" or s.c is not None or s.adapter is not None
    return more or (s.d is not None and call.gain is not None)


def forward(call) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """hs [M, R], the bias [N] with the d's that stand for all rows, and each segment's z or None."""
    hs, zs, bias = [], [], call.bias
    for stream, s in enumerate(call.segments):
        h, z = _waist(call, s, stream)
        rows = _own_rows(call, s)
        hs.append(h if rows is None else h * rows)
        zs.append(z)
        if _own_column(call, s):
            hs.append(h.new_ones((len(h), 1)) if rows is None else rows)
        elif s.d is not None:
            step = s.d * s.scale  # [N]
            bias = step if bias is None else bias + step
    return torch.cat(hs, 1), bias, zs


def backward(call, zs, dhs, dbs, dbias, dx, needs):
    """(da, db, dc, dd, dh) of each segment, from those of hs, bs and bias; its part of dx is added."""
    deltas, at, walked = [], 0, through(call, needs, dx is not None)
    for stream, (s, z, need) in enumerate(zip(call.segments, zs, needs.segments, strict=True)):
        end, rows = at + s.b.shape[1], _own_rows(call, s)
        db = dbs[:, at:end] * s.scale if need[1] else None
        dd = None
        if need[3]:
            dd = (dbs[:, end] if _own_column(call, s) else dbias) * s.scale
        da = dc = dh = None
        if walked[stream]:
            dh = dhs[:, at:end] if rows is None else dhs[:, at:end] * rows
            if s.h is None:
                da, dc = _before_the_waist(call, s, stream, dh, z, dx, need)
        given = dh.reshape(s.h.shape) if need[4] else None
        deltas.append((da, db, dc, dd, given))
        at = end + _own_column(call, s)
    return deltas


def through(call, needs, need_x: bool) -> list[bool]:
    """Whether a segment's dh is needed."""
    return [
        (need_x and s.h is None) or n[0] or n[2] or n[4]
        for s, n in zip(call.segments, needs.segments, strict=True)
    ]


def wide(call, needs) -> bool:
    """Whether the gradient of bs is needed."""
    return any(
        n[1] or (n[3] and _own_column(call, s)) for s, n in zip(call.segments, needs.segments, strict=True)
    )


def needs_sum(call, needs) -> bool:
    """Whether Σ dy is needed for a segment's d."""
    return any(n[3] and not _own_column(call, s) for s, n in zip(call.segments, needs.segments, strict=True))


def ups(call) -> Tensor:  # [N, R]
    """The scaled b's side by side, and where hs has a column for a d, that d."""
    made = []
    for s in call.segments:
        made.append(s.b * s.scale)
        if _own_column(call, s):
            made.append((s.d * s.scale)[:, None])
    return torch.cat(made, 1)


def _own_column(call, s) -> bool:
    """Whether d is a column of bs: it stands for some rows alone, or belongs to what the gain multiplies."""
    return s.d is not None and (s.adapter is not None or call.gain is not None)


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
    # [M, R] is small, and a chain of M additions in fp32 is off by four steps at 300 rows
    dc = dz.sum(0, dtype=torch.float64).float() if need[2] else None
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
