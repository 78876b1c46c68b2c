"""prefix_attention: attention over [prefix ; sequence], where the prefix belongs to the task.

    k', v' = [prefix_k ; k], [prefix_v ; v]   [B, G, P+S, D]   read as one, never concatenated
    x  = scale·q k'ᵀ                          [B, H, L, P+S]   query head h reads key head h // (H/G)
    w  = softmax over the keys a row sees     [B, H, L, P+S]   0 elsewhere, and in a row that sees none
    ŵ  = dropout(w)                           [B, H, L, P+S]   row (b·H + h)·L + l of the mask, column of k'
    o  = ŵ v'                                 [B, H, L, D]

    dv' = ŵᵀ do                               [B, G, P+S, D]   summed over the H/G query heads of a key head
    dw  = mask ⊙ (do v'ᵀ) / (1-p)             [B, H, L, P+S]
    dx  = w ⊙ (dw - Σ_d do ⊙ o)               [B, H, L, P+S]   the sum is that of w ⊙ dw over the keys
    dq  = scale·dx k'                         [B, H, L, D]
    dk' = scale·dxᵀ q                         [B, G, P+S, D]   summed as dv'
    dprefix_k, dprefix_v: the first P keys of dk', dv'; of a shared prefix summed over the batch, in its order

A row sees the whole prefix, and the keys of the sequence that `mask` and `causal` allow. Causal: query i sees
key j of the sequence where j <= i + S - L, so that the last query sees the last key.

Papers: prefix tuning, Li and Liang 2021, arXiv:2101.00190. Without storing x: FlashAttention, Dao et al.
2022, arXiv:2205.14135; FlashAttention-2, Dao 2023, arXiv:2307.08691. Grouped queries, Ainslie et al. 2023,
arXiv:2305.13245.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pefast.dispatch import Operation
from pefast.eager import prefix_attention as eager
from pefast.kernels import prefix_attention as triton_hand
from pefast.native import prefix_attention as native_hand
from pefast.ops import dropout as dropout_op


class Call(NamedTuple):
    """What a hand is given. All floating tensors have one dtype."""

    q: Tensor  # [B, H, L, D]
    k: Tensor  # [B, G, S, D]
    v: Tensor  # [B, G, S, D]
    prefix_k: Tensor | None  # [G, P, D] or [B, G, P, D]
    prefix_v: Tensor | None  # as prefix_k
    mask: Tensor | None  # [B or 1, 1, L or 1, S]  bool, True: attend
    causal: bool
    scale: float
    dropout: float
    seed: Tensor | None  # [1]  int64 on the CPU, where there is dropout
    drop: ModuleType | None  # the dropout hand, for hands that make no mask of their own


def reference(
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, G, S, D]
    v: Tensor,  # [B, G, S, D]
    prefix_k: Tensor | None = None,  # [G, P, D] or [B, G, P, D]
    prefix_v: Tensor | None = None,
    mask: Tensor | None = None,  # [B or 1, 1, L or 1, S]
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
) -> Tensor:  # [B, H, L, D]
    """The formula and nothing else: any device, any dtype, plain autograd. The tests' oracle."""
    (b, h, l, d), (g, s) = q.shape, k.shape[1:3]
    if prefix_k is not None:
        k = torch.cat((prefix_k.expand(b, *prefix_k.shape[-3:]), k), 2)
        v = torch.cat((prefix_v.expand(b, *prefix_v.shape[-3:]), v), 2)
    keys = k.shape[2]
    see = torch.ones(l, keys, dtype=torch.bool, device=q.device)
    if causal:
        see = see.tril(keys - l)
    if mask is not None:
        see = see & F.pad(mask, (keys - s, 0), value=True)  # [B, 1, L, P+S]
    k, v = k.repeat_interleave(h // g, 1), v.repeat_interleave(h // g, 1)
    x = (q @ k.transpose(2, 3)) * (d**-0.5 if scale is None else scale)
    # -inf would make a row that sees nothing, and its gradient, NaN
    w = x.masked_fill(~see, torch.finfo(x.dtype).min).softmax(3).masked_fill(~see, 0)
    return (dropout_op.reference(w, dropout, seed) if dropout else w) @ v


def prefix_attention(
    q: Tensor,  # [B, H, L, D]
    k: Tensor,  # [B, G, S, D]
    v: Tensor,  # [B, G, S, D]
    prefix_k: Tensor | None = None,  # [G, P, D] for the whole batch, or [B, G, P, D]
    prefix_v: Tensor | None = None,  # as prefix_k
    mask: Tensor | None = None,  # [B or 1, 1, L or 1, S]  bool, True: attend
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:  # [B, H, L, D]
    """softmax(scale·q [prefix_k ; k]ᵀ) [prefix_v ; v], over the keys that mask and causal allow.

    H is a multiple of G: H/G query heads share a key head. Every row sees the prefix; `mask` is over the
    sequence, and a row that sees nothing gives zeros. `scale` is 1/√D where it is None. `dropout` acts on the
    weights; `seed` fixes its mask: an int, or an int64 tensor of one element on the CPU; None draws one from
    torch's generator. q, k and v share a dtype, or autocast gives them one; the prefix may be wider, and its
    gradient comes in its own dtype.

    Raises ValueError where shapes, dtypes or the rate do not fit, or the named `backend` cannot run the call.
    Formula and papers: the head of this file.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, mask, causal, dropout)
    if prefix_k is not None or prefix_v is not None:
        _check_prefix(q, k, prefix_k, prefix_v)
        prefix_k, prefix_v = prefix_k.to(q.dtype), prefix_v.to(q.dtype)
    drop = None
    if dropout:
        seed = dropout_op.draw_seed() if seed is None else dropout_op.as_seed(seed)
        drop = dropout_op.OP.hands[dropout_op.OP.pick(dropout_op.Call(q, 0.5, seed, 0))]
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    call = Call(q, k, v, prefix_k, prefix_v, mask, causal, scale, dropout, seed if dropout else None, drop)
    name = OP.pick(call, backend)
    hand = OP.hands[name]
    # a hand without a backward is differentiated by PyTorch
    if hasattr(hand, "backward") and torch.is_grad_enabled():
        for t in call[:5]:
            if t is not None and t.requires_grad:
                return _PrefixAttention.apply(call, name, *call[:5])
    return hand.forward(call)[0]


class _PrefixAttention(torch.autograd.Function):
    """Wiring only: the mathematics is in the hands."""

    @staticmethod
    def forward(ctx, call, hand, q, k, v, prefix_k, prefix_v):
        # call holds the same tensors; they stand in the list as well so that autograd sees them
        o, lse = OP.hands[hand].forward(call)
        ctx.hand, ctx.settings = hand, (call.causal, call.scale, call.dropout)
        ctx.drop = call.drop
        ctx.save_for_backward(q, k, v, prefix_k, prefix_v, call.mask, call.seed, o, lse)
        return o

    @staticmethod
    def backward(ctx, do):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "prefix_attention: has no second derivative; create_graph=False would be right"
            )
        q, k, v, prefix_k, prefix_v, mask, seed, o, lse = ctx.saved_tensors
        call = Call(q, k, v, prefix_k, prefix_v, mask, *ctx.settings, seed, ctx.drop)
        return None, None, *OP.hands[ctx.hand].backward(call, o, lse, do, ctx.needs_input_grad[2:])


def _check(q, k, v, mask, causal, dropout) -> None:
    """Raises ValueError where q, k, v, mask or the rate do not fit."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        shapes = f"q is {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        raise ValueError(f"prefix_attention: {shapes}; [B, H, L, D] and twice [B, G, S, D] would be right")
    (b, h, l, d), (_, g, s, _) = q.shape, k.shape
    if k.shape[0] != b or k.shape[3] != d or not g or h % g:
        shapes = f"q is {list(q.shape)} and k {list(k.shape)}"
        raise ValueError(f"prefix_attention: {shapes}; one B and D, and H a multiple of G, would be right")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        came = f"q is {q.dtype}, k {k.dtype} and v {v.dtype}"
        raise ValueError(f"prefix_attention: {came}; one floating dtype would be right")
    if not 0 <= dropout < 1:
        raise ValueError(f"prefix_attention: dropout is {dropout}; a rate from 0 to below 1 would be right")
    if causal and s < l:
        raise ValueError(
            f"prefix_attention: causal with {l} queries and {s} keys; at least as many keys as queries"
            " would be right"
        )
    if mask is not None and not (
        mask.dtype == torch.bool
        and mask.dim() == 4
        and mask.shape[0] in (1, b)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, l)
        and mask.shape[3] == s
    ):
        raise ValueError(
            f"prefix_attention: mask is {mask.dtype} {list(mask.shape)}; a bool [{b}, 1, {l}, {s}] or"
            f" [{b}, 1, 1, {s}] would be right"
        )


def _check_prefix(q, k, prefix_k, prefix_v) -> None:
    if prefix_k is None or prefix_v is None:
        raise ValueError(
            "prefix_attention: one of prefix_k and prefix_v is missing; both or none would be right"
        )
    b, g, _, d = k.shape
    p = prefix_k.shape[-2] if prefix_k.dim() > 1 else 0
    fits = prefix_k.shape == prefix_v.shape and tuple(prefix_k.shape) in ((g, p, d), (b, g, p, d))
    if not fits or not (prefix_k.is_floating_point() and prefix_v.is_floating_point()):
        came = f"prefix_k is {list(prefix_k.shape)} and prefix_v {list(prefix_v.shape)}"
        raise ValueError(
            f"prefix_attention: {came}; [{g}, P, {d}] or [{b}, {g}, P, {d}] would be right for both"
        )


OP = Operation("prefix_attention", {"native": native_hand, "triton": triton_hand, "eager": eager})
