"""linear_cross_entropy by csrc/cpu/cross_entropy*: the library's products, and one kernel between them that
turns logits into their gradient where they lie. Formula: pefast/ops/linear_cross_entropy.py.
"""

import torch
from torch import Tensor

from pefast.native import WHY_NOT, C, through_the_registry

# the numbers of enum Scalar in csrc/cpu/types.h
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
# logits of so many rows live at once: the product wants many, memory few
_ROWS = 256


def refuse(call) -> str:
    """Why csrc cannot run this call, or ""."""
    if C is None or not C.cross_entropy_here():
        return WHY_NOT if C is None else "needs a processor with AVX-512, which this one lacks"
    if not (call.x.is_cpu and call.w.is_cpu):
        return f"needs a CPU, x is on {call.x.device} and w on {call.w.device}"
    if call.x.dtype not in _TYPES:
        return f"takes float32 and bfloat16, x is {str(call.x.dtype).removeprefix('torch.')}"
    return ""


def forward(call, need_x: bool) -> tuple[Tensor, Tensor | None]:
    """The sum of the losses [], and dx [M, K] of that sum where it is asked for."""
    run = torch.ops.pefast.linear_cross_entropy if through_the_registry(call.x) else _forward
    loss, dx = run(call.x, call.w, call.target, need_x)
    return loss, dx if need_x else None


def _forward(x, w, target, need_x):
    if C is None:
        raise RuntimeError(f"linear_cross_entropy: the native kernel cannot run: {WHY_NOT}")
    m, v = len(x), len(w)
    losses = torch.empty(m, dtype=torch.float32)
    dx = torch.empty(x.shape if need_x else (0, x.shape[1]), dtype=x.dtype)
    # one piece of memory for every turn: a new one of this size costs more in page faults than the kernel
    logits = torch.empty((min(m, _ROWS), v), dtype=x.dtype)
    target = target.contiguous()
    for begin in range(0, m, _ROWS):
        rows = min(_ROWS, m - begin)
        z = torch.mm(x[begin : begin + rows], w.t(), out=logits[:rows])  # [rows, V]
        at, loss = target.data_ptr() + 8 * begin, losses.data_ptr() + 4 * begin
        C.cross_entropy(z.data_ptr(), at, loss, rows, v, _TYPES[x.dtype], torch.get_num_threads())
        if need_x:
            torch.mm(z, w, out=dx[begin : begin + rows])
    return losses.sum(), dx


_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define("linear_cross_entropy(Tensor x, Tensor w, Tensor target, bool need_x) -> (Tensor, Tensor)")
_LIBRARY.impl("linear_cross_entropy", _forward, "CPU")


@torch.library.register_fake("pefast::linear_cross_entropy", lib=_LIBRARY)
def _(x, w, target, need_x):
    return x.new_empty((), dtype=torch.float32), x.new_empty(x.shape if need_x else (0, x.shape[1]))
