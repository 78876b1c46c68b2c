"""dropout in Triton. Formula, layout of the mask and names: pefast/ops/dropout.py.

One Philox call gives sixteen bits each to eight columns: of counter 16·(col // 128) + (col % 32) // 2 the
word (col % 128) // 32, and of that word half col % 2. So a tile whose first column is a multiple of 128 makes
each number once.

Shown without a GPU: masks and values as kernels/delta_linear.py says. Not yet run or timed on one.
"""

import torch
from torch import Tensor

from . import tl, triton
from .launch import INTERPRETED, checked, through_the_registry, why_not_here


@triton.jit
def keep_tile(row, first, threshold, seed, stream, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which elements of a tile stay [BLOCK_M, BLOCK_N]; `first`, its first column, is a multiple of 128.

    Or of BLOCK_N where that is 64, 32 or 16: then a half, or three quarters, of the numbers are made for
    nothing.
    """
    BLOCK_C: tl.constexpr = BLOCK_N // 2 if BLOCK_N <= 32 else 16 if BLOCK_N == 64 else BLOCK_N // 8
    counter = first // 128 * 16 + tl.arange(0, BLOCK_C)
    if BLOCK_N < 32:
        counter += first % 32 // 2
    c0 = counter.to(tl.uint32)[None, :]
    c1 = row.to(tl.uint32)[:, None]
    word_0, word_1, word_2, word_3 = tl.philox(seed, c0, c1, stream, 0)  # [BLOCK_M, BLOCK_C] each

    # from (128 columns, lane, word) to the order of the columns: (128 columns, word, lane)
    if BLOCK_N <= 32:
        part = first % 128 // 32
        words = tl.where(part < 2, tl.where(part == 0, word_0, word_1), tl.where(part == 2, word_2, word_3))
    elif BLOCK_N == 64:
        right = first % 128 >= 64
        words = tl.join(tl.where(right, word_2, word_0), tl.where(right, word_3, word_1))
        words = tl.reshape(tl.permute(words, (0, 2, 1)), (BLOCK_M, BLOCK_N // 2))
    else:
        words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
        words = tl.reshape(words, (BLOCK_M, BLOCK_N // 128, 16, 4))
        words = tl.reshape(tl.permute(words, (0, 1, 3, 2)), (BLOCK_M, BLOCK_N // 2))
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_M, BLOCK_N))
    return bits >= threshold


@triton.jit
def dropped(x, keep, scale):
    """x where it stays, times scale, rounded once to x's dtype; +0 elsewhere."""
    return tl.where(keep, x.to(tl.float32) * scale, 0.0).to(x.dtype)


@triton.jit(do_not_specialize=["M", "seed", "stream", "threshold"])
def _dropout(
    x_ptr,  # [M, K]
    y_ptr,  # [M, K]  contiguous
    M,
    K,
    stride_xm,
    stride_xk,
    threshold: tl.uint32,
    scale: tl.float32,
    seed: tl.int64,
    stream: tl.uint32,
    ADD: tl.constexpr,  # y += dropout(x) in place of y = dropout(x)
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_k = tl.cdiv(K, BLOCK_K)
    first = tl.program_id(0) % tiles_k * BLOCK_K
    offs_m = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = first + tl.arange(0, BLOCK_K)
    mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]

    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    x = tl.load(x_ptrs, mask, other=0.0)
    keep = keep_tile(offs_m, first, threshold, seed, stream, BLOCK_M, BLOCK_K)
    y_ptrs = y_ptr + offs_m[:, None] * K + offs_k[None, :]
    if ADD:
        y = tl.load(y_ptrs, mask, other=0.0)
        step = tl.where(keep, x.to(tl.float32) * scale, 0.0)
        y = (y.to(tl.float32) + step).to(y.dtype)
    else:
        y = dropped(x, keep, scale)
    tl.store(y_ptrs, y, mask)


def mask_numbers(p: float) -> tuple[int, float]:
    """The threshold on sixteen bits, and the factor of what stays."""
    return min(round(p * 65536), 65535), 1.0 / (1.0 - p)


def refuse(call) -> str:
    """Why this kernel cannot run this call, or ""."""
    return why_not_here(call.x)


def decline(call) -> str:
    """Why another hand is faster here, or ""."""
    return "triton's interpreter is for tests, a thousand times slower" if INTERPRETED else ""


def forward(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """dropout(x) [M, K], contiguous, in x's dtype; seed is an int64 tensor of one element on the CPU."""
    if through_the_registry(x):
        return torch.ops.pefast.dropout_triton(x, p, seed, stream)
    return _forward(x, p, seed, stream)


def add_(y: Tensor, t: Tensor, p: float, seed: Tensor, stream: int) -> None:
    """y += dropout(t), in place; y [M, K] is contiguous. The sum is taken in fp32 and rounded once."""
    if through_the_registry(y):
        torch.ops.pefast.dropout_triton_add_(y, t, p, seed, stream)
    else:
        _add_(y, t, p, seed, stream)


def both_(x: Tensor, t: Tensor, y: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """dropout(x), and y += dropout(t) in place: what backward of a layer asks for, under one mask."""
    add_(y, t, p, seed, stream)
    return forward(x, p, seed, stream)


def _forward(x, p, seed, stream):
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, y, p, seed, stream, add=False)
    return y


def _add_(y, t, p, seed, stream):
    if not y.is_contiguous():
        raise ValueError(f"dropout: y has strides {y.stride()}; a contiguous tensor would be right")
    _launch(t, y, p, seed, stream, add=True)


def _launch(x, y, p, seed, stream, add):
    m, k = x.shape
    if not m or not k:
        return
    threshold, scale = mask_numbers(p)
    grid = (triton.cdiv(m, 8) * triton.cdiv(k, 256),)
    # triton launches on the current device, which need not be x's
    with torch.cuda.device_of(x):
        _dropout[grid](
            x, y, m, k, *x.stride(), threshold, scale, int(seed), stream, ADD=add, BLOCK_M=8, BLOCK_K=256
        )  # fmt: skip


_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define("dropout_triton(Tensor x, float p, Tensor seed, int stream) -> Tensor")
_LIBRARY.define("dropout_triton_add_(Tensor(a!) y, Tensor t, float p, Tensor seed, int stream) -> ()")
for _device in ("CUDA", "CPU"):
    _LIBRARY.impl("dropout_triton", checked(_forward), _device)
    _LIBRARY.impl("dropout_triton_add_", checked(_add_), _device)


@torch.library.register_fake("pefast::dropout_triton", lib=_LIBRARY)
def _(x, p, seed, stream):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("pefast::dropout_triton_add_", lib=_LIBRARY)
def _(y, t, p, seed, stream):
    return None
