"""sibling_linear: frozen linear layers that read the same x, each with deltas of its own, in one walk over x.

    y_i = delta_linear(x, part i)                            [M, N_i]

    dx  = Σ_i du_i w_i + mask_i ⊙ (dz_i a_i) / (1-p_i)       [M, K]   summed once, over all parts

Everything else is each part's own, as pefast/ops/delta_linear.py has it, where the names and papers are too.
A part has its own seed, so that it drops what it would drop alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pefast.dispatch import Operation
from pefast.eager import sibling_linear as eager
from pefast.native import sibling_linear as native_hand
from pefast.ops import delta_linear as delta_op
from pefast.ops import dropout as dropout_op


class Part(NamedTuple):
    """One of the layers that read x."""

    w: Tensor  # [N, K]  frozen
    segments: tuple[delta_op.Segment, ...] = ()
    bias: Tensor | None = None  # [N]
    gain: Tensor | None = None  # [N]
    seed: Tensor | int | None = None  # of its dropout
    compute: str | None = None  # as delta_linear's


class Call(NamedTuple):
    """What a hand is given: rows of x, and each part as a call of delta_linear on them."""

    x: Tensor  # [M, K]
    parts: tuple[delta_op.Call, ...]


class Needs(NamedTuple):
    """Which gradients are asked for; of the parts only their own fields count."""

    x: bool
    parts: tuple[delta_op.Needs, ...]


def reference(
    x: Tensor, parts, ids: Tensor | None = None
) -> tuple[Tensor, ...]:  # [..., K] -> [..., N] of each
    """The formula and nothing else: any device, any dtype, plain autograd. The tests' oracle."""
    return tuple(delta_op.reference(x, p.w, p.segments, p.bias, p.gain, ids, p.seed) for p in parts)


def sibling_linear(
    x: Tensor,  # [..., K]
    parts: tuple[Part, ...] | list[Part],
    ids: Tensor | None = None,  # [...] one id a row of x, or [B] one id a sequence
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:  # [..., N] of each part
    """delta_linear(x, ...) of every part, with one read of x and one gradient of it.

    Arguments are delta_linear's. Raises ValueError where something does not fit, there is no part, or the
    named `backend` cannot run the call. Formula: the head of this file.
    """
    if not parts:
        raise ValueError("sibling_linear: there are no parts; one or more would be right")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, parts = x.to(dtype), [part._replace(w=part.w.to(dtype)) for part in parts]
    call = prepare(x, parts, ids)
    return run(x, call, OP.pick(call, backend))


def prepare(x: Tensor, parts, ids: Tensor | None) -> Call:
    """The parts of x, checked, seeds drawn where there is dropout and none is given."""
    rows = x if x.dim() == 2 else x.detach().reshape(-1, x.shape[-1])
    row_ids = None if ids is None else delta_op._row_ids(ids, x)
    calls, mask = [], None
    for w, segments, bias, gain, seed, compute in parts:
        dropped = delta_op._check(x, w, segments, ids)
        if dropped:
            seed = dropout_op.draw_seed() if seed is None else dropout_op.as_seed(seed)
            mask = mask or dropout_op.OP.hands[dropout_op.OP.pick(dropout_op.Call(x, 0.5, seed, 0))]
        own = (seed, segments, mask) if dropped else (None, segments, None)
        calls.append(delta_op.Call(rows, w, bias, gain, row_ids, *own, compute))
    return Call(rows, tuple(calls))


def run(x: Tensor, call: Call, hand: str) -> tuple[Tensor, ...]:
    """The call of prepare(x, ...) by one hand, with its place in the graph."""
    tensors = [x]
    for part in call.parts:
        tensors += (part.w, part.bias, part.gain)
        tensors += [t for s in part.segments for t in (s.a, s.b, s.c, s.d, s.h)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _SiblingLinear.apply(call, hand, *tensors)
    ys, _ = OP.hands[hand].forward(call)
    return tuple(delta_op.shaped(y, x) for y in ys)


class _SiblingLinear(torch.autograd.Function):
    """Wiring only: the mathematics is in the hands."""

    @staticmethod
    def forward(ctx, call, hand, x, *tensors):
        # call holds the same tensors, x flattened; they stand in the list as well so that autograd sees them
        ys, saved = OP.hands[hand].forward(call)
        ctx.hand, ctx.count = hand, len(tensors)
        ctx.specs = [
            [(s.scale, s.activation, s.dropout, s.adapter) for s in part.segments] for part in call.parts
        ]
        ctx.options = [(part.mask, part.compute) for part in call.parts]
        seeds = [part.seed for part in call.parts]
        ctx.save_for_backward(x, call.parts[0].ids, *seeds, *tensors, *saved)
        return tuple(delta_op.shaped(y, x) for y in ys)

    @staticmethod
    def backward(ctx, *dys):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("sibling_linear: has no second derivative; create_graph=False would be right")
        x, ids, *rest = ctx.saved_tensors
        count = len(ctx.specs)
        seeds, tensors, saved = rest[:count], rest[count : count + ctx.count], rest[count + ctx.count :]
        need, rows = ctx.needs_input_grad[3:], x.reshape(-1, x.shape[-1])
        calls, needs, at = [], [], 0
        for specs, options, seed in zip(ctx.specs, ctx.options, seeds, strict=True):
            own, wanted = tensors[at : at + 3], need[at : at + 3]
            at += 3
            segments, five = [], []
            for scale, activation, rate, adapter in specs:
                a, b, c, d, h = tensors[at : at + 5]
                segments.append(delta_op.Segment(a, b, scale, activation, c, d, rate, adapter, h))
                five.append(need[at : at + 5])
                at += 5
            calls.append(delta_op.Call(rows, *own, ids, seed, segments, *options))
            needs.append(delta_op.Needs(ctx.needs_input_grad[2], *wanted, five))
        dys = [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        asked = Needs(ctx.needs_input_grad[2], tuple(needs))
        dx, gradients = OP.hands[ctx.hand].backward(Call(rows, tuple(calls)), saved, dys, asked)
        flat = []
        for dw, dbias, dgain, deltas in gradients:
            flat += [dw, dbias, dgain, *(t for five in deltas for t in five)]
        return None, None, None if dx is None else dx.view(x.shape), *flat


OP = Operation("sibling_linear", {"native": native_hand, "eager": eager})
