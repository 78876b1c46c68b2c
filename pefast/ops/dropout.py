"""dropout: zeroes elements by a mask that is a function of a seed, so that it can be made again anywhere.

    u  = 16 random bits of (seed, stream, row, column)     [M, K]
    m  = u >= round(65536·p)                               [M, K]   the mask; p counts in steps of 2^-16
    y  = m ⊙ x / (1-p)                                     [M, K]   +0 where m is 0, whatever x holds

    dx = m ⊙ dy / (1-p)                                    [M, K]   the same mask, made again

The bits are those of Philox 4x32-10, its key the two words of the seed. For 128 columns 16 counters give 4
words each, a word two columns; in this order vectors of 16 words need no shuffle:

    counter = (16·(column // 128) + (column % 32) // 2, row, stream, 0)
    word    = (column % 128) // 32
    u       = the word's low half for even columns, its high half for odd ones

Every hand makes this mask bit for bit. `stream` tells apart the dropouts that share a seed: in a layer, its
segment. 1/(1-p) is rounded to fp32 and the product once to x's dtype; float64 is computed in float64.

Papers: dropout, Srivastava et al. 2014, JMLR 15. Philox, Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3", section 4.3.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pefast.dispatch import Operation
from pefast.eager import dropout as eager
from pefast.kernels import dropout as triton_hand
from pefast.native import dropout as native_hand


class Call(NamedTuple):
    """What a hand is given."""

    x: Tensor  # [M, K]
    p: float
    seed: Tensor  # [1]  int64 on the CPU
    stream: int


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox 4x32-10: four words from four words of counter and two of key, all int64 tensors below 2^32."""
    low = 0xFFFFFFFF
    (c0, c1, c2, c3), (key0, key1) = counter, key
    for _ in range(10):
        # int64 products wrap, and their high and low words are right all the same
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ key0, p1 & low, (p0 >> 32 & low) ^ c3 ^ key1, p0 & low
        key0, key1 = key0 + 0x9E3779B9 & low, key1 + 0xBB67AE85 & low
    return [c0, c1, c2, c3]


def keep_mask(m: int, k: int, p: float, seed: Tensor | int, stream: int = 0) -> Tensor:  # [M, K]
    """Which elements stay: the formula, column by column."""
    row, column = torch.arange(m)[:, None], torch.arange(k)[None, :]
    seed, none = torch.as_tensor(seed), torch.zeros(m, k, dtype=torch.int64)
    counter = [none + column // 128 * 16 + column % 32 // 2, none + row, none + stream, none]
    words = torch.stack(philox(counter, [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]))  # [4, M, K]
    word = words.gather(0, (none + column % 128 // 32)[None])[0]
    return (word >> column % 2 * 16 & 0xFFFF) >= min(round(p * 65536), 65535)


def reference(x: Tensor, p: float, seed: Tensor | int, stream: int = 0) -> Tensor:  # x [..., K]
    """The formula and nothing else: any device, any dtype, plain autograd. The tests' oracle."""
    k = x.shape[-1]
    keep = keep_mask(x.shape[:-1].numel(), k, p, seed, stream).view(x.shape).to(x.device)
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(keep, wide * (1 / (1 - p)), 0).to(x.dtype)


def draw_seed() -> Tensor:  # [1]
    """A new seed, int64 on the CPU, from torch's default generator, so that torch.manual_seed fixes it."""
    if torch.compiler.is_dynamo_compiling():
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device="cpu")
    # the same number, in two thirds of the time; a compiler takes it for a write to what it was given
    return torch.empty(1, dtype=torch.int64, device="cpu").random_(0, 2**63 - 1)


def as_seed(seed: Tensor | int) -> Tensor:  # [1]
    """The seed as hands take it: int64 on the CPU. Raises ValueError for one that does not fit."""
    if isinstance(seed, Tensor):
        if seed.dtype == torch.int64 and seed.numel() == 1 and seed.device.type == "cpu":
            return seed.reshape(1)
        came = f"a {seed.dtype} tensor of shape {tuple(seed.shape)} on {seed.device}"
        raise ValueError(f"dropout: seed is {came}; one int64 on the CPU would be right")
    if not 0 <= seed < 2**63:
        raise ValueError(f"dropout: seed is {seed}; 0 to 2^63 - 1 would be right")
    return torch.tensor([seed], dtype=torch.int64, device="cpu")


def dropout(
    x: Tensor,  # [..., K]
    p: float = 0.5,
    training: bool = True,
    seed: Tensor | int | None = None,
    backend: str | None = None,
) -> Tensor:  # [..., K]
    """x with elements zeroed with probability p and the rest divided by 1-p; x itself where not training.

    `seed` fixes the mask: an int, or an int64 tensor of one element on the CPU; None draws one from torch's
    generator. Backward makes the mask again, so only the seed is kept.

    Raises ValueError where p is not from 0 to below 1, x is not of floating point, the seed does not fit, or
    the named `backend` cannot run the call. Formula and papers: the head of this file.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}; a rate from 0 to below 1 would be right")
    if not x.is_floating_point():
        raise ValueError(f"dropout: x is {x.dtype}; a floating-point dtype would be right")
    if not training or p == 0 or not x.numel():
        return x
    seed = draw_seed() if seed is None else as_seed(seed)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1] if x.dim() else 1)
    hand = OP.pick(Call(rows, p, seed, 0), backend)
    if torch.is_grad_enabled() and x.requires_grad:
        y = _Dropout.apply(rows, p, seed, hand)
    else:
        y = OP.hands[hand].forward(rows, p, seed, 0)
    return y if x.dim() == 2 else y.view(x.shape)


class _Dropout(torch.autograd.Function):
    """Wiring only: the mathematics is in the hands."""

    @staticmethod
    def forward(ctx, x, p, seed, hand):
        ctx.p, ctx.hand = p, hand
        ctx.save_for_backward(seed)
        return OP.hands[hand].forward(x, p, seed, 0)

    @staticmethod
    def backward(ctx, dy):
        # linear in x, so its gradient is itself, and so on
        return _Dropout.apply(dy, ctx.p, *ctx.saved_tensors, ctx.hand), None, None, None


OP = Operation("dropout", {"native": native_hand, "triton": triton_hand, "eager": eager})
