"""The short road of one plain LoRA in fp32: what delta_linear.py has for bf16, with little Python on the way.

It is open once the weight is packed, which a call on the long road does. Arithmetic and packs are those of
delta_linear_fp32.py.
"""

import torch
from torch import Tensor

from pefast.native import C, packs
from pefast.native.delta_linear_fp32 import FEW_ROWS, packed_weight


class ShortRoad:
    """What delta_linear.py has as functions, for fp32 in so many parts; it keeps nothing of a and b."""

    run = C.fp32_forward if C is not None else None

    def __init__(self, parts: int):
        self.parts = parts

    def prepare(self, x, w, bias, a, b, scale, p, seed, needs_dx):
        """y [..., N] and h [M, R], what run_backward() takes, what run() takes, and None."""
        n, r = b.shape
        *rows, k = x.shape
        m = x.numel() // k
        y, h = x.new_empty(*rows, n), x.new_empty(m, r)
        pack, mark = packed_weight(w, False, self.parts)
        for_dx = packed_weight(w, True, self.parts)[0] if needs_dx else None
        on_w = w.data_ptr(), *w.stride(), mark
        lora = a.data_ptr(), b.data_ptr(), r, scale, p, _at(seed)
        layer = on_w, pack.data_ptr(), n, 0, _at(bias), lora, y.data_ptr(), 0, h.data_ptr()
        given = x.data_ptr(), k, m, k, [layer], self.parts, torch.get_num_threads()
        # the pack for y goes along: its address is in `given`
        return y, h, (for_dx, pack), given, None

    def stale(self, which: int, w: Tensor, a: Tensor) -> None:
        """Forgets what was packed of w, the one pack there is."""
        packs.drop(w)

    def run_backward(self, dy, x, made, a, b, h, scale, p, seed, needs):
        """dx, da and db of run(), None for what is not needed; and autograd's last None."""
        (n, r), k, (need_x, need_a, need_b, _) = b.shape, x.shape[-1], needs
        dx = torch.empty_like(x) if need_x else None
        da = torch.empty_like(a) if need_a else None
        db = torch.empty_like(b) if need_b else None
        lora = a.data_ptr(), b.data_ptr(), r, scale, p, _at(seed)
        results = [0, _at(da), _at(db), 0, 0]
        layer = _at(made[0]), n, dy.data_ptr(), n, 0, 0, h.data_ptr(), lora, results
        m, gradients = x.numel() // k, (dx, da, db, None)
        C.fp32_backward(x.data_ptr(), k, m, k, _at(dx), [layer], self.parts, torch.get_num_threads())
        return gradients


def short_road(x: Tensor, w: Tensor, compute: str | None) -> ShortRoad | None:
    """Who computes one plain LoRA with little Python; None for few rows, or a weight not packed yet."""
    road = _ONE_PART if compute == "bf16" else _THREE_PARTS
    forms = packs.found(w)
    there = (False, road.parts) in forms and ((True, road.parts) in forms or not torch.is_grad_enabled())
    return road if there and x.numel() >= FEW_ROWS * w.shape[1] else None


def _at(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


_THREE_PARTS, _ONE_PART = ShortRoad(3), ShortRoad(1)
