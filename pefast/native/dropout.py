"""dropout by csrc/cpu/dropout*.cpp. Formula and layout of the mask: pefast/ops/dropout.py."""

import torch
from torch import Tensor

from pefast.native import WHY_NOT, C, rows_of, through_the_registry

# the numbers of enum Scalar in csrc/cpu/types.h
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def refuse(call) -> str:
    """Why csrc cannot make this dropout, or ""."""
    if C is None:
        return WHY_NOT
    if call.x.device.type != "cpu":
        return f"needs a CPU, x is on {call.x.device}"
    if call.x.dtype not in _TYPES:
        return (
            f"takes float32, bfloat16, float16 and float64, x is {str(call.x.dtype).removeprefix('torch.')}"
        )
    return ""


def forward(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """dropout(x) [M, K], contiguous, in x's dtype; seed is an int64 tensor of one element on the CPU."""
    if through_the_registry(x):
        return torch.ops.pefast.dropout(x, p, seed, stream)
    return _forward(x, p, seed, stream)


def add_(y: Tensor, t: Tensor, p: float, seed: Tensor, stream: int) -> None:
    """y += dropout(t), in place; y [M, K] is contiguous. A 16-bit sum is taken in fp32 and rounded once."""
    if through_the_registry(y):
        torch.ops.pefast.dropout_add_(y, t, p, seed, stream)
    else:
        _add_(y, t, p, seed, stream)


def both_(x: Tensor, t: Tensor, y: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """dropout(x), and y += dropout(t) in place: what backward of a layer asks for, the mask made once."""
    if through_the_registry(x):
        return torch.ops.pefast.dropout_both_(x, t, y, p, seed, stream)
    return _both_(x, t, y, p, seed, stream)


def _forward(x, p, seed, stream):
    x = rows_of(x)
    x_hat = _empty_like(x)
    _run(x, x_hat, None, None, p, seed, stream)
    return x_hat


def _add_(y, t, p, seed, stream):
    _check(y, t)
    _run(None, None, rows_of(t), y, p, seed, stream)


def _both_(x, t, y, p, seed, stream):
    _check(y, t)
    _check(y, x)
    x = rows_of(x)
    x_hat = _empty_like(x)
    _run(x, x_hat, rows_of(t), y, p, seed, stream)
    return x_hat


def _empty_like(x):
    # half the time of torch.empty(x.shape), which turns the shape into numbers and back
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _check(y, t):
    if y.shape != t.shape or y.dtype != t.dtype:
        one, other = f"{y.dtype} {tuple(y.shape)}", f"{t.dtype} {tuple(t.shape)}"
        raise ValueError(f"dropout: y is {one} and t is {other}; one shape and dtype would be right")
    if not y.is_contiguous():
        raise ValueError(f"dropout: y has strides {y.stride()}; a contiguous tensor would be right")


def _run(x, x_hat, t, y, p, seed, stream):
    """x̂ = dropout(x) and y += dropout(t) in one pass; a half whose input is None is left out."""
    if C is None:
        raise RuntimeError(f"dropout: the native kernel cannot run: {WHY_NOT}")
    m, k = (t if x is None else x).shape
    # a row's stride says nothing where there is only one
    first = (0, 0, 0) if x is None else (x.data_ptr(), max(x.stride(0), k), x_hat.data_ptr())
    second = (0, 0, 0, 0) if t is None else (t.data_ptr(), max(t.stride(0), k), y.data_ptr(), k)
    kind = _TYPES[(t if x is None else x).dtype]
    C.dropout(*first, *second, m, k, kind, p, int(seed), stream, torch.get_num_threads())


_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define("dropout(Tensor x, float p, Tensor seed, int stream) -> Tensor")
_LIBRARY.define("dropout_add_(Tensor(a!) y, Tensor t, float p, Tensor seed, int stream) -> ()")
_LIBRARY.define("dropout_both_(Tensor x, Tensor t, Tensor(a!) y, float p, Tensor seed, int stream) -> Tensor")
_LIBRARY.impl("dropout", _forward, "CPU")
_LIBRARY.impl("dropout_add_", _add_, "CPU")
_LIBRARY.impl("dropout_both_", _both_, "CPU")


@torch.library.register_fake("pefast::dropout", lib=_LIBRARY)
def _(x, p, seed, stream):
    return _empty_like(x)


@torch.library.register_fake("pefast::dropout_add_", lib=_LIBRARY)
def _(y, t, p, seed, stream):
    return None


@torch.library.register_fake("pefast::dropout_both_", lib=_LIBRARY)
def _(x, t, y, p, seed, stream):
    return _empty_like(x)
