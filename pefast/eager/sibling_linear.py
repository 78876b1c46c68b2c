"""sibling_linear as a loop over delta_linear's eager hand. Formula: pefast/ops/sibling_linear.py."""

from torch import Tensor

from pefast.eager import delta_linear


def refuse(call) -> str:
    """Never: the eager hand takes every call."""
    return ""


def forward(call) -> tuple[list[Tensor], list[Tensor | None]]:
    """y [M, N] of each part, and in one row what backward needs of each."""
    ys, saved = [], []
    for part in call.parts:
        y, pairs = delta_linear.forward(part)
        ys.append(y)
        saved += [t for pair in pairs for t in pair]
    return ys, saved


def backward(call, saved, dys, needs):
    """dx of all parts together, and (dw, dbias, dgain, [(da, db, dc, dd, dh)]) of each; None: not needed."""
    dx, gradients, at = None, [], 0
    for part, dy, need in zip(call.parts, dys, needs.parts, strict=True):
        count = 2 * (len(part.segments) + (part.gain is not None))
        own = saved[at : at + count]
        at += count
        pairs = list(zip(own[::2], own[1::2], strict=True))
        step, *rest = delta_linear.backward(part, pairs, dy, need)
        gradients.append(rest)
        if step is not None:
            dx = step if dx is None else dx.add_(step)
    return dx, gradients
