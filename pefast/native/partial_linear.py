"""partial_linear by csrc/cpu/delta_linear*: a few rows or columns of a frozen bf16 weight, on AMX.

With e the columns of the identity that an index names, and δ = values - w at its entries,

    rows       x w'ᵀ = x wᵀ + (x δᵀ) eᵀ     dvalues = (dy e)ᵀ x
    columns    x w'ᵀ = x wᵀ + (x e) δᵀ      dvalues = dyᵀ (x e)

so the entries are the waist of a delta that rides on the frozen product.
Formula: pefast/ops/partial_linear.py.
"""

import torch
from torch import Tensor

from pefast.native import ISA, WHY_NOT, C

_HERE = C is not None and C.delta_linear_here()
# from one entry in so many on, the waist is too wide to ride
_MANY = 8


def refuse(call) -> str:
    """Why csrc cannot run this call, or ""."""
    if not _HERE:
        return WHY_NOT if C is None else f"needs AMX tiles for bfloat16, this process may use {ISA}"
    x, w, bias = call.x, call.w, call.bias
    if not (x.is_cpu and w.is_cpu):
        return f"needs a CPU, x is on {x.device} and the weight on {w.device}"
    if not (x.dtype is torch.bfloat16 and w.dtype is torch.bfloat16):
        return f"takes bfloat16, x is {_name(x.dtype)} and the weight {_name(w.dtype)}"
    kinds = {index.kind for _, index in call.parts}
    if kinds - {"rows", "columns"} or len(kinds) != 1:
        return f"takes rows or columns, here are {' and '.join(sorted(kinds)) or 'none'}"
    count = sum(values.numel() for values, _ in call.parts)
    if not count or _MANY * count > w.numel():
        return f"takes 1 entry in {_MANY} or fewer, here are {count} of {w.numel()}"
    if w.requires_grad and torch.is_grad_enabled():
        return "takes a frozen weight, here it trains"
    if bias is not None and bias.dtype not in (torch.float32, torch.bfloat16):
        return f"takes a bias in float32 or bfloat16, it is {_name(bias.dtype)}"
    return ""


def decline(call) -> str:
    """Why another hand is faster, or ""."""
    w = call.w
    if not isinstance(w, torch.nn.Parameter) and not isinstance(w._base, torch.nn.Parameter):
        return "packs the weight once for many calls, and this one is no parameter: it may live for one call"
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def forward(call) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """y [M, N] in bfloat16, and the delta: a [C, K], b [N, C] and its waist h [M, C]."""
    a, b = _factors(call)
    y, h = torch.ops.pefast.delta_linear(call.x, call.w, call.bias, a, b, 1.0, 0.0, None)
    return y, (a, b, h)


def backward(call, saved: tuple[Tensor, Tensor, Tensor], dy: Tensor, needs):
    """dx, None, dbias and dvalues of each part; None for what is not needed."""
    rows, any_part = call.parts[0][1].kind == "rows", any(needs.parts)
    asked = (needs.x, rows and any_part, not rows and any_part)
    dx, da, db = torch.ops.pefast.delta_linear_backward(dy, call.x, call.w, *saved, 1.0, 0.0, None, *asked)
    parts = [None] * len(call.parts)
    if any_part:
        sizes = [len(index.at) for _, index in call.parts]
        gradients = da.split(sizes, 0) if rows else db.split(sizes, 1)
        for i, (gradient, (values, _)) in enumerate(zip(gradients, call.parts, strict=True)):
            parts[i] = gradient.to(values.dtype) if needs.parts[i] else None
    dbias = dy.sum(0).to(call.bias.dtype) if needs.bias else None
    return dx if needs.x else None, None, dbias, parts


def _factors(call) -> tuple[Tensor, Tensor]:
    """a [C, K] and b [N, C] of the delta: δ, in fp32, and the columns of the identity."""
    (values, index), *more = call.parts
    across = 0 if index.kind == "rows" else 1
    at, values = index.at, values.detach()
    if more:
        at = torch.cat([at, *(other.at for _, other in more)])
        values = torch.cat([values, *(other.detach() for other, _ in more)], across)
    delta = values.float() - call.w.index_select(across, at)
    e = _identity(at, call.w.shape[across], call.w.dtype)
    return (delta, e) if across == 0 else (e.t().contiguous(), delta.contiguous())


def _identity(at: Tensor, size: int, dtype: torch.dtype) -> Tensor:  # [size, C]
    """The columns of the identity that an index names; kept with the index, which never changes."""
    if torch.compiler.is_compiling():
        return _columns(at, size, dtype)
    found = getattr(at, "pefast_columns", None)
    if found is None or found.shape[0] != size or at._version != found.pefast_version:
        found = at.pefast_columns = _columns(at, size, dtype)
        found.pefast_version = at._version
    return found


def _columns(at: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    ones = torch.ones(1, len(at), dtype=dtype, device=at.device)
    return torch.zeros(size, len(at), dtype=dtype, device=at.device).scatter_(0, at[None], ones)
