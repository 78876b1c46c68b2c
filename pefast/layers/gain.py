"""Gains: trained factors on what a layer reads, on its product, or on what it gives.

    x ← x ⊙ l                          (IA)³ where a feed-forward layer reads
    y = (x wᵀ + s·h bᵀ) ⊙ g + bias     DoRA
    y ← y ⊙ l                          (IA)³ elsewhere, bias included

Papers: (IA)³, Liu et al. 2022, arXiv:2205.05638; DoRA, Liu et al. 2024, arXiv:2402.09353.

DoRA's g = m / ‖w + s·b a‖, the norm of each of the N rows, as a constant in the gradient (its section 4.3):

    ‖w_n + s·b_n a‖² = ‖w_n‖² + 2s (w aᵀ)_n · b_n + s² b_n (a aᵀ) b_nᵀ

so b a is never made. With several deltas on one layer a gain multiplies all that the product carries.
"""

import torch
from torch import Tensor, nn

from pefast.layers.lowrank import LowRank
from pefast.ops.delta_linear import OP, Call, delta_linear

# what a hand multiplies by a gain inside its product
_FUSED = (torch.bfloat16, torch.float32)
# with a gain behind it PyTorch's frozen fp32 product took 0.86 of the time at 64 rows, 1.15 at 512
_ROWS = 256


class Gain(nn.Module):
    """One factor for each column, all 1 at the start."""

    rides = False

    def __init__(self, size: int, at: str, device=None, dtype=None):
        super().__init__()
        self.gains = at  # "input" or "output"
        self.l = nn.Parameter(torch.ones(size, device=device, dtype=dtype))  # [K] or [N]

    def gain(self, weight: Tensor) -> Tensor:
        """The factors."""
        return self.l

    def extra_repr(self) -> str:
        return f"{self.l.shape[0]}, on the {self.gains}"


class Directed(LowRank):
    """DoRA: a LoRA that changes the direction of the weight's rows, and m [N], their lengths."""

    gains = "product"
    squares: tuple[int, int, Tensor] | None = None  # where the weight was, its version, and ‖w_n‖² [N]

    def __init__(self, rank: int, weight: Tensor, **settings):
        n, k = weight.shape
        super().__init__(rank, k, n, **settings)
        # b is zero, so these are the lengths of the weight's rows
        self.m = nn.Parameter(self._squares(weight).sqrt().to(self.a.dtype))  # [N]

    def gain(self, weight: Tensor) -> Tensor:  # [N, K] -> [N]
        """g; the norm in fp32 or wider."""
        return self.m / self.norm(weight)

    @torch.no_grad()
    def norm(self, weight: Tensor) -> Tensor:  # [N, K] -> [N]
        """‖w + s·b a‖ of each row."""
        squares = self._squares(weight)
        a, b = self.a.to(squares.dtype), self.b.to(squares.dtype) * self.scale
        # w stays in its own dtype: a copy of it in fp32 would be larger than all else
        cross = torch.mm(weight, self.a.to(weight.dtype).t()).to(squares.dtype)  # [N, R]
        own = torch.mm(b, torch.mm(a, a.t()))  # [N, R]
        # rounding can bring a row of nearly nothing below zero
        return (squares + ((2 * cross + own) * b).sum(1)).clamp(min=1e-24).sqrt()

    @torch.no_grad()
    def _squares(self, weight: Tensor) -> Tensor:  # [N, K] -> [N]
        """‖w_n‖², kept until somebody writes to the weight."""
        if torch.compiler.is_compiling():
            return _row_squares(weight)
        stamp = (weight.data_ptr(), weight._version)
        if self.squares is None or self.squares[:2] != stamp or self.squares[2].device != weight.device:
            self.squares = (*stamp, _row_squares(weight))
        return self.squares[2]


def _row_squares(weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()


def product(
    x: Tensor,  # [B, ..., K]
    weight: Tensor,  # [N, K]
    segments: tuple,
    gains: list[tuple[Tensor, int | None]],  # as multiplied() takes them
    rows: Tensor | None,  # [B]
    bias: Tensor | None,  # [N]
    compute: str | None,
) -> Tensor:  # [B, ..., N]
    """(x wᵀ + the segments' deltas) ⊙ Πg + bias."""
    y = _inside(x, weight, segments, gains, rows, bias, compute)
    if y is not None:
        return y
    return multiplied(delta_linear(x, weight, segments, ids=rows, compute=compute), gains, rows, bias)


def output(
    x: Tensor,  # [B, ..., K]
    weight: Tensor,  # [N, K]
    gains: list[tuple[Tensor, int | None]],  # as multiplied() takes them
    bias: Tensor | None,  # [N]
    compute: str | None,
) -> Tensor | None:  # [B, ..., N]
    """(x wᵀ + bias) ⊙ Πg of a frozen fp32 layer in one native product; None: the product comes first."""
    if x.dtype is not torch.float32 or x.shape[:-1].numel() < _ROWS:
        return None
    g = gains[0][0]
    return _inside(x, weight, (), gains, None, None if bias is None else bias * g, compute)


def _inside(x, weight, segments, gains, rows, bias, compute) -> Tensor | None:
    """The product with its gain by the native hand of AMX, which multiplies its fp32 sums and rounds once.

    None where others would round the gain or walk over the product again.
    """
    (g, index), *more = gains
    if x.dtype is weight.dtype and x.dtype in _FUSED and index is None and not more:
        call = Call(x, weight, bias, g, rows, None, segments, None, compute)
        if OP.free("native") and not OP.why_not("native", call) and not OP.hands["native"].decline(call):
            return delta_linear(x, weight, segments, bias, g, rows, compute=compute)
    return None


def multiplied(
    y: Tensor,  # [B, ..., N]
    gains: list[tuple[Tensor, int | None]],  # [N] each, and the index of its adapter in a routed batch
    rows: Tensor | None,  # [B]  the adapter of each sequence
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """y ⊙ Πg + bias, rounded once; a gain with an index is for that adapter's rows alone."""
    total = None
    for g, index in gains:
        if index is not None:
            own = (rows == index).view(-1, *[1] * (y.dim() - 1))
            g = torch.where(own, g, torch.ones_like(g))  # [B, 1, N]
        total = g if total is None else total * g
    halves = y.is_cpu and y.dtype in (torch.bfloat16, torch.float16) and total.dim() == 1
    if halves and not torch.compiler.is_compiling():
        return _Columns.apply(y, total, bias)
    product = y * total
    return (product if bias is None else product + bias).to(y.dtype)


class _Columns(torch.autograd.Function):
    """y ⊙ g + bias for halves on a CPU, some rows at a time: what is computed in fp32 stays in cache."""

    ROWS = 128

    @staticmethod
    def forward(ctx, y, g, bias):
        ctx.save_for_backward(y, g)
        ctx.bias = None if bias is None else bias.dtype
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        wide = None if bias is None else bias.to(g.dtype)
        for rows, into in zip(_flat(y).split(_Columns.ROWS), _flat(out).split(_Columns.ROWS), strict=True):
            product = rows * g
            into.copy_(product if wide is None else product.add_(wide))
        return out

    @staticmethod
    def backward(ctx, dy):
        y, g = ctx.saved_tensors
        needs_y, needs_g, needs_bias = ctx.needs_input_grad
        du = torch.empty_like(dy, memory_format=torch.contiguous_format) if needs_y else None
        dg = torch.zeros_like(g) if needs_g else None
        # always the same order of rows, so the same bits
        for start in range(0, y.numel() // len(g), _Columns.ROWS):
            part = slice(start, start + _Columns.ROWS)
            wide = _flat(dy)[part].to(g.dtype)
            if needs_g:
                dg += (wide * _flat(y)[part]).sum(0)
            if needs_y:
                _flat(du)[part] = wide.mul_(g)
        dbias = _flat(dy).sum(0).to(ctx.bias) if needs_bias else None
        return du, dg, dbias


def _flat(y: Tensor) -> Tensor:  # [..., N] -> [M, N]
    return y.reshape(-1, y.shape[-1])
