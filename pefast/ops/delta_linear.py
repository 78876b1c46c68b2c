"""delta_linear: a frozen linear layer and every low-rank delta beside it, in one pass over x.

    x̂ = dropout(x)                            [M, K]   made from a seed, never stored
    z = x̂ aᵀ + c                              [M, R]
    h = σ(z)                                  [M, R]   the waist; rows of another adapter are zero
    u = x wᵀ + Σ s·(h bᵀ + d)                 [M, N]   one term for each segment of the waist
    y = u ⊙ g + bias                          [M, N]

    du = dy ⊙ g        dg = Σ_m dy ⊙ u        dbias = Σ_m dy
    dh = s·du b        db = s·duᵀ h           dd = s·Σ_m du
    dz = dh ⊙ σ'(z)    da = dzᵀ x̂             dc = Σ_m dz
    dx = du w + mask ⊙ (dz a) / (1-p)         w gets a gradient only where it is asked for

A LoRA is a segment with σ = identity; a parallel adapter has an activation and perhaps c and d; an output
gain g is (IA)³'s or DoRA's. A segment whose waist was computed at another place brings h instead of a.

Papers: LoRA, Hu et al. 2021, arXiv:2106.09685, eq. 3. Parallel adapter, He et al. 2021, arXiv:2110.04366,
table 1. (IA)³, Liu et al. 2022, arXiv:2205.05638. DoRA, Liu et al. 2024, arXiv:2402.09353.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from pefast.dispatch import Operation
from pefast.eager import delta_linear as eager
from pefast.eager.activations import ACTIVATIONS
from pefast.kernels import delta_linear as triton_hand
from pefast.native import delta_linear as native_hand
from pefast.native import is_plain
from pefast.ops import dropout as dropout_op


class Segment(NamedTuple):
    """One delta's part of the waist."""

    a: Tensor | None  # [R, K]  down; None where h is given
    b: Tensor  # [N, R]  up
    scale: float = 1.0
    activation: str = "identity"
    c: Tensor | None = None  # [R]  bias of the waist
    d: Tensor | None = None  # [N]  bias of the delta, scaled with it
    dropout: float = 0.0  # on x, for this segment alone
    adapter: int | None = None  # only rows with this id; None: every row
    h: Tensor | None = None  # [M, R]  a waist computed elsewhere


class Call(NamedTuple):
    """What a hand is given. Leading dimensions are flattened to M rows."""

    x: Tensor  # [M, K]  None in a backward that does not look at it
    w: Tensor  # [N, K]  frozen, any strides
    bias: Tensor | None  # [N]
    gain: Tensor | None  # [N]
    ids: Tensor | None  # [M]  int64, the adapter of each row; -1: none
    seed: Tensor | None  # [1]  int64 on the CPU, where a segment has dropout
    segments: tuple[Segment, ...] | list[Segment]
    mask: ModuleType | None = None  # the dropout hand, for hands that make no mask of their own
    compute: str | None = None  # "bf16": products of fp32 numbers may round them to bf16 first
    activations: dict = ACTIVATIONS  # for hands that have none of their own


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    w: bool
    bias: bool
    gain: bool
    segments: list[tuple[bool, bool, bool, bool, bool]]  # a, b, c, d, h of each


def reference(
    x: Tensor,  # [..., K]
    w: Tensor,  # [N, K]
    segments=(),
    bias: Tensor | None = None,  # [N]
    gain: Tensor | None = None,  # [N]
    ids: Tensor | None = None,  # [...] or [B]
    seed: Tensor | int | None = None,
) -> Tensor:  # [..., N]
    """The formula and nothing else: any device, any dtype, plain autograd. The tests' oracle."""
    rows = x.reshape(-1, x.shape[-1])
    u = rows @ w.t()
    for stream, s in enumerate(segments):
        if s.h is None:
            x_hat = dropout_op.reference(rows, s.dropout, seed, stream) if s.dropout else rows
            z = x_hat @ s.a.t().to(x.dtype)
            h = ACTIVATIONS[s.activation].forward(z if s.c is None else z + s.c.to(x.dtype))
        else:
            h = s.h.reshape(-1, s.h.shape[-1])
        delta = h @ s.b.t().to(x.dtype)
        delta = s.scale * (delta if s.d is None else delta + s.d.to(x.dtype))
        u = u + (delta if s.adapter is None else delta * (_row_ids(ids, x) == s.adapter)[:, None])
    y = u if gain is None else u * gain.to(x.dtype)
    y = y if bias is None else y + bias.to(x.dtype)
    return y.reshape(*x.shape[:-1], w.shape[0])


def delta_linear(
    x: Tensor,  # [..., K]
    w: Tensor,  # [N, K]
    segments: Segment | tuple[Segment, ...] | list[Segment] = (),
    bias: Tensor | None = None,  # [N]
    gain: Tensor | None = None,  # [N]
    ids: Tensor | None = None,  # [...] one id a row of x, or [B] one id a sequence
    *,
    seed: Tensor | int | None = None,
    compute: str | None = None,
    backend: str | None = None,
) -> Tensor:  # [..., N]
    """y = (x wᵀ + Σ s·(σ(dropout(x) aᵀ + c) bᵀ + d)) ⊙ gain + bias, the segments' deltas in one pass.

    x and w share a dtype, or autocast gives them one; a, b, c, d, gain and bias may be wider (fp32 masters on
    a bf16 weight) and their gradients come in their own dtype. `seed` fixes the dropout masks: an int, or an
    int64 tensor of one element on the CPU; None draws one from torch's generator. `ids` chooses rows for
    segments with an `adapter`. compute="bf16" lets a hand round fp32 factors to bf16 where that is faster;
    sums, results and gradients stay fp32.

    Raises ValueError where shapes, activations or dropout rates do not fit, or the named `backend` cannot run
    the call. Formula and papers: the head of this file.
    """
    segments = (segments,) if isinstance(segments, Segment) else tuple(segments)
    if len(segments) == 1 and gain is ids is backend is None and is_plain(segments[0]):
        s = segments[0]
        if (y := _at_once(x, w, s.a, s.b, s.scale, s.dropout, bias, seed, compute)) is not None:
            return y
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w = x.to(dtype), w.to(dtype)
    dropped = _check(x, w, segments, ids)
    if ids is not None:
        ids = _row_ids(ids, x)
    mask = None
    if dropped:
        seed = dropout_op.draw_seed() if seed is None else dropout_op.as_seed(seed)
        mask = dropout_op.OP.hands[dropout_op.OP.pick(dropout_op.Call(x, 0.5, seed, 0))]
    flat = x.dim() == 2
    # flattened outside autograd: a view of x and one of y would be two more nodes of the graph
    rows = x if flat else x.detach().reshape(-1, x.shape[-1])
    call = Call(rows, w, bias, gain, ids, seed if dropped else None, segments, mask, compute)
    hand = OP.pick(call, backend)
    if len(segments) == 1 and _only_lora(call, hand):
        s = segments[0]
        if torch.is_grad_enabled() and (x.requires_grad or s.a.requires_grad or s.b.requires_grad):
            return _OneLoRA.apply(call, hand, x, s.a, s.b)
    tensors = [x, w, bias, gain]
    for s in segments:
        tensors += (s.a, s.b, s.c, s.d, s.h)
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return _DeltaLinear.apply(call, hand, *tensors)
    y, _ = OP.hands[hand].forward(call)
    return shaped(y, x)


def one_lora(
    x: Tensor,  # [..., K]
    w: Tensor,  # [N, K]
    a: Tensor,  # [R, K]
    b: Tensor,  # [N, R]
    scale: float,
    dropout: float = 0.0,
    bias: Tensor | None = None,  # [N]
    compute: str | None = None,
) -> Tensor:  # [..., N]
    """delta_linear of one plain LoRA: the same, with less Python on its way to the commonest hand."""
    if (y := _at_once(x, w, a, b, scale, dropout, bias, None, compute)) is not None:
        return y
    return delta_linear(x, w, Segment(a, b, scale, dropout=dropout), bias, compute=compute)


def _at_once(x, w, a, b, scale, dropout, bias, seed, compute) -> Tensor | None:
    """y where the native hand takes this LoRA as it stands."""
    if not OP.free("native") or (road := native_hand.at_once(x, w, bias, a, b, dropout, compute)) is None:
        return None
    if torch._C._are_functorch_transforms_active():
        return None
    if dropout:
        seed = dropout_op.draw_seed() if seed is None else dropout_op.as_seed(seed)
    # asked here, for inside of a Function gradients are off
    needs_dx = x.requires_grad and torch.is_grad_enabled()
    return _apply_at_once(x, a, b, (road, w, bias, scale, dropout, seed if dropout else None, needs_dx))


def shaped(y: Tensor, x: Tensor) -> Tensor:  # [M, N] -> [..., N]
    """A new result with the leading dimensions of x; no view, for a Function's view may not be written to."""
    if x.dim() == 2:
        return y
    shape = (*x.shape[:-1], y.shape[-1])
    return y.view(shape) if torch.compiler.is_compiling() else y.resize_(shape)


class _DeltaLinear(torch.autograd.Function):
    """Wiring only: the mathematics is in the hands."""

    @staticmethod
    def forward(ctx, call, hand, x, w, bias, gain, *tensors):
        # call holds the same tensors, x flattened; they stand in the list as well so that autograd sees them
        y, saved = OP.hands[hand].forward(call)
        ctx.hand, ctx.mask, ctx.compute = hand, call.mask, call.compute
        ctx.specs = [(s.scale, s.activation, s.dropout, s.adapter) for s in call.segments]
        pairs = [t for pair in saved for t in pair]
        ctx.shape = x.shape
        # where every waist came from elsewhere and w is frozen, backward never looks at x
        kept = x if w.requires_grad or any(s.a is not None for s in call.segments) else None
        ctx.save_for_backward(kept, w, bias, gain, call.ids, call.seed, *tensors, *pairs)
        return shaped(y, x)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("delta_linear: has no second derivative; create_graph=False would be right")
        x, w, bias, gain, ids, seed, *rest = ctx.saved_tensors
        need = ctx.needs_input_grad
        segments, segment_needs, at = [], [], 0
        for scale, activation, rate, adapter in ctx.specs:
            a, b, c, d, h = rest[at : at + 5]
            segments.append(Segment(a, b, scale, activation, c, d, rate, adapter, h))
            segment_needs.append(need[at + 6 : at + 11])
            at += 5
        saved = list(zip(rest[at::2], rest[at + 1 :: 2], strict=True))
        flat = len(ctx.shape) == 2
        if not flat:
            x, dy = None if x is None else x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        call = Call(x, w, bias, gain, ids, seed, segments, ctx.mask, ctx.compute)
        needs = Needs(*need[2:6], segment_needs)
        backward = getattr(OP.hands[ctx.hand], "backward", eager.backward)
        dx, dw, dbias, dgain, deltas = backward(call, saved, dy, needs)
        if dx is not None and not flat:
            dx = dx.view(ctx.shape)
        return None, None, dx, dw, dbias, dgain, *(t for five in deltas for t in five)


def _only_lora(call: Call, hand: str) -> bool:
    """Whether nothing but x, a and b of the one segment could want a gradient."""
    w, bias, s = call.w, call.bias, call.segments[0]
    return (
        s.h is None
        and s.c is None
        and s.d is None
        and call.gain is None
        and not w.requires_grad
        and (bias is None or not bias.requires_grad)
        and hasattr(OP.hands[hand], "backward")
    )


class _OneLoRA(torch.autograd.Function):
    """_DeltaLinear for the commonest call, one LoRA beside a frozen layer, in half of the Python time."""

    @staticmethod
    def forward(ctx, call, hand, x, a, b):
        y, saved = OP.hands[hand].forward(call)
        s = call.segments[0]
        ctx.save_for_backward(x, a, b, call.w, call.seed, call.ids, *(t for pair in saved for t in pair))
        ctx.spec = hand, call.mask, call.compute, s.scale, s.activation, s.dropout, s.adapter
        return shaped(y, x)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("delta_linear: has no second derivative; create_graph=False would be right")
        x, a, b, w, seed, ids, *rest = ctx.saved_tensors
        saved = list(zip(rest[::2], rest[1::2], strict=True))
        hand, mask, compute, scale, activation, rate, adapter = ctx.spec
        _, _, need_x, need_a, need_b = ctx.needs_input_grad
        shape = x.shape
        if x.dim() != 2:
            x, dy = x.reshape(-1, shape[-1]), dy.reshape(-1, dy.shape[-1])
        segment = Segment(a, b, scale, activation, None, None, rate, adapter)
        call = Call(x, w, None, None, ids, seed, (segment,), mask, compute)
        needs = Needs(need_x, False, False, False, ((need_a, need_b, False, False, False),))
        dx, _, _, _, ((da, db, *_),) = OP.hands[hand].backward(call, saved, dy, needs)
        if dx is not None and len(shape) != 2:
            dx = dx.view(shape)
        return None, None, dx, da, db


class _AtOnce(torch.autograd.Function):
    """_OneLoRA where native_hand.at_once() said yes, in half of the Python time again."""

    @staticmethod
    def forward(ctx, x, a, b, rest):
        road, w, bias, scale, p, seed, needs_dx = rest
        ctx.road, ctx.spec = road, (scale, p)
        while True:
            y, h, ctx.made, given, fresh = road.prepare(x, w, bias, a, b, scale, p, seed, needs_dx)
            # w for its version alone: what was packed is right as long as nobody writes to it
            ctx.save_for_backward(x, a, b, w, h, seed)
            if (which := road.run(*given)) < 0:
                if fresh is not None:
                    road.stay(*fresh)
                return y
            road.stale(which, w, a)

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            raise RuntimeError("delta_linear: has no second derivative; create_graph=False would be right")
        x, a, b, _, h, seed = ctx.saved_tensors
        dy = dy if dy.is_contiguous() else dy.contiguous()
        return ctx.road.run_backward(dy, x, ctx.made, a, b, h, *ctx.spec, seed, ctx.needs_input_grad)


# Function.apply looks for functorch in every argument; _at_once() has asked. On its way back PyTorch asks
# each time in which of its ways a Function says how to; this one has the plain one.
_apply_at_once = super(torch.autograd.Function, _AtOnce).apply
_AtOnce._backward_cls.apply = _AtOnce.backward


def _row_ids(ids: Tensor, x: Tensor) -> Tensor:
    """ids for every row of x: given for each row, or for each sequence of the batch."""
    rows = x.shape[:-1].numel()
    if ids.numel() == rows:
        return ids.reshape(-1)
    if x.dim() > 2 and ids.shape == x.shape[:1]:
        return ids.repeat_interleave(rows // x.shape[0])
    raise ValueError(
        f"delta_linear: ids has shape {tuple(ids.shape)}; one id for each of {rows} rows of x would be right"
    )


def _check(x, w, segments, ids) -> bool:
    """Whether a segment has dropout. Raises ValueError where something does not fit."""
    n, k = w.shape
    if x.shape[-1] != k:
        raise ValueError(f"delta_linear: x has {x.shape[-1]} columns, the weight [{n}, {k}] takes {k}")
    if x.dtype != w.dtype:
        raise ValueError(
            f"delta_linear: x is {x.dtype} and the weight {w.dtype}; one dtype, or autocast, would be right"
        )
    dropped = False
    for s in segments:
        if s.dropout:
            dropped = True
        if (
            s.activation not in ACTIVATIONS
            or not 0 <= s.dropout < 1
            or (s.adapter is not None and ids is None)
        ):
            _refuse_settings(s)
        if s.a is None or s.h is not None:
            fits = s.a is None and s.h is not None and s.h.shape[-1] == s.b.shape[1] and s.b.shape[0] == n
        else:
            r, own_k = s.a.shape
            fits = own_k == k and s.b.shape == (n, r)
        if not fits:
            _refuse_shapes(s, n, k)
    return dropped


def _refuse_settings(s: Segment) -> None:
    if s.activation not in ACTIVATIONS:
        raise ValueError(f"delta_linear: no activation {s.activation!r}; there are {', '.join(ACTIVATIONS)}")
    if not 0 <= s.dropout < 1:
        raise ValueError(f"delta_linear: dropout is {s.dropout}; a rate from 0 to below 1 would be right")
    raise ValueError(
        f"delta_linear: a segment belongs to adapter {s.adapter}; ids must say which rows are its own"
    )


def _refuse_shapes(s: Segment, n: int, k: int) -> None:
    if (s.a is None) == (s.h is None):
        raise ValueError("delta_linear: a segment takes either a or h, not both and not neither")
    down = f"h {tuple(s.h.shape)}" if s.a is None else f"a {tuple(s.a.shape)}"
    raise ValueError(f"delta_linear: {down} and b {tuple(s.b.shape)} do not fit a weight of [{n}, {k}]")


OP = Operation("delta_linear", {"native": native_hand, "triton": triton_hand, "eager": eager})
