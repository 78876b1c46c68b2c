"""delta_linear for the few rows of a decoding step, by csrc/cpu/delta_linear_decode*: bf16 on AMX.

Generation asks each layer for a few rows again and again, with the same adapters and without gradients. A
Plan is what stays from step to step: the packed weight, and for each row where its adapters' a and b lie as
bf16. These copies hang on the storages of a and b, as the packed weight does on its own. Formula:
pefast/ops/delta_linear.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pefast.native import ISA, WHY_NOT, C, packs, rows_of
from pefast.native.sibling_linear import packed_weight

_HERE = C is not None and C.delta_linear_here()
_MASTERS = (torch.float32, torch.bfloat16)
# rows that one step may have
ROWS = C.DECODE_ROWS if C is not None else 0


class RowDelta(NamedTuple):
    """One LoRA on one row."""

    row: int
    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    scale: float


def takes(x: Tensor, named: bool) -> bool:
    """Whether x may be a step of csrc's: what can be said without its layer, named by the caller or not."""
    return x.dtype is torch.bfloat16 and x.is_cpu


def why_not(w: Tensor, bias: Tensor | None, deltas: list[RowDelta]) -> str:
    """Why csrc cannot take these deltas beside w [N, K], or ""."""
    if not _HERE:
        return WHY_NOT if C is None else f"needs AMX tiles for bfloat16, this process may use {ISA}"
    if w.dtype is not torch.bfloat16 or not w.is_cpu or not w.numel():
        return f"takes a bfloat16 weight on a CPU, it is {w.dtype} {list(w.shape)} on {w.device}"
    for t in (bias, *(t for delta in deltas for t in (delta.a, delta.b))):
        if t is not None and not (t.dtype in _MASTERS and t.is_cpu and t.is_contiguous() and t.numel()):
            return f"takes contiguous parameters in float32 or bfloat16, here is {t.dtype} {list(t.shape)}"
        if t is not None and t.is_inference():
            return "must see writes to a parameter, and those to an inference tensor cannot be seen"
    return "must see writes to the weight, an inference tensor" if w.is_inference() else ""


class Plan:
    """y = x wᵀ + bias and each row's deltas, as long as nobody writes to a parameter."""

    def __init__(self, w: Tensor, bias: Tensor | None, deltas: list[RowDelta], rows: int):
        (n, k), self.rows = w.shape, rows
        packed, mark = packed_weight(w, False)
        given, marks = [], {}
        # tensors whose addresses the plan holds
        self._kept = [w, bias, packed]
        for delta in deltas:
            a, b = (_copy(t, form) for t, form in ((delta.a, _rows), (delta.b, _strips)))
            for t, copy in ((delta.a, a), (delta.b, b)):
                marks[t.data_ptr()] = (t.data_ptr(), t.numel() * t.element_size(), copy[1])
                self._kept += (t, copy[0])
            given.append((delta.row, a[0].data_ptr(), b[0].data_ptr(), delta.a.shape[0], delta.scale))
        on_bias = (0, False) if bias is None else (bias.data_ptr(), bias.dtype is torch.float32)
        place = (w.data_ptr(), *w.stride(), mark, packed.data_ptr())
        self._plan = C.DecodePlan(*place, *on_bias, n, k, rows, given, list(marks.values()))
        self._n = n

    def run(self, x: Tensor) -> Tensor | None:  # [..., K] -> [..., N]
        """y; None, and the copies forgotten, where somebody wrote through .data and no version shows it."""
        y = x.new_empty((*x.shape[:-1], self._n))
        ldx = k = x.shape[-1]
        if not x.is_contiguous():
            x = rows_of(x.reshape(-1, k))
            ldx = x.stride(0) if self.rows > 1 else k
        if self._plan.run(x.data_ptr(), ldx, y.data_ptr(), torch.get_num_threads()):
            return y
        for t in self._kept:
            if t is not None and hasattr(t.untyped_storage(), "pefast_packs"):
                del t.untyped_storage().pefast_packs
        return None


def _copy(t: Tensor, form) -> tuple[Tensor, int]:
    """t as the kernel reads it, and the mark of t; from its storage, or made now."""

    def make():
        return form(t.detach()), C.parameter_mark(t.data_ptr(), t.numel() * t.element_size())

    return packs.packed(t, (t.dtype, form), make)


def _rows(a: Tensor) -> Tensor:  # [R, K]
    return a.to(torch.bfloat16)


def _strips(b: Tensor) -> Tensor:  # [ceil(N / 32), ceil(R / 2), 32, 2]
    n, r = b.shape
    wide = torch.nn.functional.pad(b.to(torch.bfloat16), (0, -r % 2, 0, -n % 32))
    return wide.view(-(-n // 32), 32, -(-r // 2), 2).transpose(1, 2).contiguous()
