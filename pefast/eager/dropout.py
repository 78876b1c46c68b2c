"""dropout in plain PyTorch. Formula and layout of the mask: pefast/ops/dropout.py.

One counter serves eight columns, so numbers are made for K/8 counters a row and then put in the columns'
order. Rows are taken in pieces, for the numbers are int64 and ten rounds of them would fill memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_PIECE = 1 << 20  # elements of x in a piece; the temporaries of one then fit in a cache
_LOW = 0xFFFFFFFF


def refuse(call) -> str:
    """Never: the eager hand takes every call."""
    return ""


def forward(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """dropout(x) [M, K], contiguous, in x's dtype; seed is an int64 tensor of one element on the CPU."""
    x_hat = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for piece, keep in _pieces(x, p, seed, stream):
        x_hat[piece] = _dropped(x[piece], keep, p)
    return x_hat


def add_(y: Tensor, t: Tensor, p: float, seed: Tensor, stream: int) -> None:
    """y += dropout(t), in place; y [M, K] is contiguous."""
    for piece, keep in _pieces(t, p, seed, stream):
        y[piece] += _dropped(t[piece], keep, p)


def both_(x: Tensor, t: Tensor, y: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """dropout(x), and y += dropout(t) in place: what backward of a layer asks for, the mask made once."""
    x_hat = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for piece, keep in _pieces(x, p, seed, stream):
        x_hat[piece] = _dropped(x[piece], keep, p)
        y[piece] += _dropped(t[piece], keep, p)
    return x_hat


def _dropped(x: Tensor, keep: Tensor, p: float) -> Tensor:
    # chosen, not multiplied by 0: what is dropped may be infinite
    return torch.where(keep, x * (1 / (1 - p)), 0)


def _pieces(x: Tensor, p: float, seed: Tensor, stream: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of x's rows, and which elements of each stay [rows, K]."""
    m, k = x.shape
    # a compiler fuses the rounds and needs no pieces; a loop over them would be unrolled
    rows = m if torch.compiler.is_compiling() else max(1, _PIECE // max(1, k))
    for first in range(0, m, max(1, rows)):
        row = torch.arange(first, min(first + rows, m), device=x.device)
        yield slice(first, first + rows), _keep(row, k, p, seed.to(x.device), stream)


def _keep(row: Tensor, k: int, p: float, seed: Tensor, stream: int) -> Tensor:
    """Which of k columns stay in these rows [rows, K]."""
    blocks = -(-k // 128)
    lane = torch.arange(16 * blocks, device=row.device)[None, :]
    other = torch.tensor([[0, stream]], device=row.device)
    words = _philox(lane, row[:, None], other[:, 1:], other[:, :1], seed & _LOW, seed >> 32 & _LOW)
    words = torch.stack([word.view(-1, blocks, 16) for word in words], dim=2)  # [rows, blocks, word, lane]
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=4)  # [rows, blocks, word, lane, half]
    return bits.view(-1, 128 * blocks)[:, :k] >= min(round(p * 65536), 65535)


def _philox(c0, c1, c2, c3, key0, key1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 on int64 tensors that hold 32-bit numbers; they broadcast, so early rounds are small."""
    for _ in range(10):
        # the product wraps beyond 63 bits; its two halves are right all the same
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (p1 >> 32 & _LOW) ^ c1 ^ key0, p1 & _LOW
        c2, c3 = (p0 >> 32 & _LOW) ^ c3 ^ key1, p0 & _LOW
        key0, key1 = key0 + 0x9E3779B9 & _LOW, key1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3
