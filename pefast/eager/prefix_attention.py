"""prefix_attention by PyTorch's scaled_dot_product_attention. Formula: pefast/ops/prefix_attention.py.

Prefix and sequence are concatenated, for that function takes one tensor of keys. Its dropout has a generator
of its own, so with dropout the weights are written out. PyTorch differentiates this hand.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def refuse(call) -> str:
    """Never: the eager hand takes every call."""
    return ""


def forward(call) -> tuple[Tensor, None]:
    """o [B, H, L, D], and None: what backward needs is kept by PyTorch."""
    q, (h, g) = call.q, (call.q.shape[1], call.k.shape[1])
    k, v = _with_prefix(call.prefix_k, call.k), _with_prefix(call.prefix_v, call.v)
    if call.dropout or not k.shape[2]:
        return _by_weights(call, k, v), None
    # without a mask PyTorch skips the blocks that nobody sees, and puts the diagonal where lengths are equal
    plain = call.causal and call.mask is None and q.shape[2] == k.shape[2]
    see = None if plain else _visible(call, k.shape[2])
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=see, is_causal=plain, scale=call.scale, enable_gqa=h != g
    )
    return o, None


def _with_prefix(prefix: Tensor | None, t: Tensor) -> Tensor:  # [B, G, P+S, D]
    return t if prefix is None else torch.cat((prefix.expand(t.shape[0], *prefix.shape[-3:]), t), 2)


def _visible(call, keys: int) -> Tensor | None:  # [B or 1, 1, L or 1, P+S]
    """Which keys a row may attend to; None: all."""
    see, l = None, call.q.shape[2]
    if call.mask is not None:
        see = F.pad(call.mask, (keys - call.k.shape[2], 0), value=True)
    # the last row sees every key, so one row needs no triangle
    if call.causal and l > 1:
        below = torch.ones(l, keys, dtype=torch.bool, device=call.q.device).tril(keys - l)[None, None]
        see = below if see is None else see & below
    return see


def _by_weights(call, k: Tensor, v: Tensor) -> Tensor:  # [B, H, L, D]
    """The formula, with the mask of dropout from its counter."""
    q, keys, times = call.q, k.shape[2], call.q.shape[1] // call.k.shape[1]
    if times > 1:
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    x = torch.matmul(q, k.transpose(2, 3)) * call.scale  # [B, H, L, P+S]
    see = _visible(call, keys)
    # finite, for -inf would make a row that sees nothing NaN
    w = (x if see is None else x.masked_fill(~see, torch.finfo(x.dtype).min)).softmax(3)
    if see is not None:
        w = w.masked_fill(~see, 0)
    if call.dropout:
        wide = torch.float64 if w.dtype == torch.float64 else torch.float32
        ones = torch.ones(w.shape[:3].numel(), keys, dtype=wide, device=w.device)
        # 0 or 1/(1-p), not yet rounded to 16 bits: the weights would be off by as much as that rounding
        keep = call.drop.forward(ones, call.dropout, call.seed, 0).view(w.shape)
        w = (w * keep).to(w.dtype)
    return torch.matmul(w, v)
