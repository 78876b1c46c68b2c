"""linear_cross_entropy: a frozen output embedding and the cross entropy behind it, without a tensor of all
logits.

    z = x wᵀ                                   [M, V]  rounded to x's dtype, as the layer alone would
    loss = Σ_m (log Σ_v exp z_mv - z_mt) / n   over the rows whose target t counts, n of them; in fp32 or
    wider

    dz = (softmax(z) - onehot(t)) / n          [M, V]
    dx = dz w                                  [M, K]  w is frozen and gets no gradient

The gradient is made in forward, some rows at a time, where the logits still are; dx is all that is kept.

Paper: chunking the loss, Wijmans et al. 2024, "Cut your losses in large-vocabulary language models",
arXiv:2411.09009. torch.nn.functional.linear_cross_entropy does the same, but gives the loss in x's dtype:
11.0 for 10.92 in bf16.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pefast.dispatch import Operation
from pefast.eager import linear_cross_entropy as eager
from pefast.native import linear_cross_entropy as native_hand


class Call(NamedTuple):
    """What a hand is given: only rows that count."""

    x: Tensor  # [M, K]
    w: Tensor  # [V, K]  frozen
    target: Tensor  # [M]  int64


def reference(x: Tensor, w: Tensor, target: Tensor, count=None, ignore_index: int = -100) -> Tensor:
    """The formula and nothing else: any device, any dtype, plain autograd. The tests' oracle."""
    z = x.reshape(-1, x.shape[-1]) @ w.t()
    wide = z if z.dtype == torch.float64 else z.float()
    target = target.reshape(-1)
    n = (target != ignore_index).sum() if count is None else count
    return F.cross_entropy(wide, target, ignore_index=ignore_index, reduction="sum") / n


def linear_cross_entropy(
    x: Tensor,  # [..., K]
    w: Tensor,  # [V, K]
    target: Tensor,  # [...]  int64
    count: Tensor | int | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:  # []
    """The mean cross entropy of x wᵀ against `target`, or the sum divided by `count`; fp32, or float64 for
    float64.

    Rows whose target is `ignore_index` do not count. With no row that counts the loss is NaN, as PyTorch's.

    Raises ValueError where shapes, dtypes or targets do not fit, w asks for a gradient, or the named
    `backend` cannot run the call. Formula and papers: the head of this file.
    """
    _check(x, w, target)
    rows, target = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    kept = (target != ignore_index).nonzero()[:, 0]
    n = len(kept) if count is None else count
    if len(kept) != len(target):
        rows, target = rows[kept], target[kept]
    if len(target) and not (0 <= int(target.min()) and int(target.max()) < len(w)):
        raise ValueError(
            f"linear_cross_entropy: targets are {int(target.min())} to {int(target.max())}; 0 to {len(w) - 1}"
            f" or {ignore_index} would be right"
        )
    hand = OP.pick(Call(rows, w, target), backend)
    return _LinearCrossEntropy.apply(rows, w, target, n, hand)


class _LinearCrossEntropy(torch.autograd.Function):
    """Wiring only: the mathematics is in the hands."""

    @staticmethod
    def forward(ctx, x, w, target, n, hand):
        loss, dx = OP.hands[hand].forward(Call(x, w, target), ctx.needs_input_grad[0])
        ctx.save_for_backward(dx)
        ctx.n = n
        return loss / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        (dx,) = ctx.saved_tensors
        return dx * (dloss / ctx.n).to(dx.dtype), None, None, None, None


def _check(x, w, target) -> None:
    if x.shape[-1] != w.shape[1] or x.dtype != w.dtype:
        raise ValueError(
            f"linear_cross_entropy: x is {x.dtype} {tuple(x.shape)} and w {w.dtype} {tuple(w.shape)};"
            " one dtype and width would be right"
        )
    if target.shape != x.shape[:-1] or target.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: target is {target.dtype} {tuple(target.shape)};"
            f" int64 {tuple(x.shape[:-1])} would be right"
        )
    if w.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "linear_cross_entropy: w asks for a gradient; a frozen output embedding would be right"
        )


OP = Operation("linear_cross_entropy", {"native": native_hand, "eager": eager})
