"""prefix_attention in Triton: refusals and launches. Formula: pefast/ops/prefix_attention.py.

The kernels are in prefix_attention_tiles.py. Forward keeps o and of each row the logarithm of its sum of
powers, in fp32 two numbers. The gradient of a shared prefix is left in one part for each row of the batch and
added in its order.
Not yet run or timed on a GPU: tests/ladder says what was shown without one, and runs there too.
"""

import torch
from torch import Tensor

from . import prefix_attention_tiles as kernels
from . import tiles, triton
from .dropout import mask_numbers
from .launch import INTERPRETED, checked, through_the_registry, why_not_here

# the widest head whose tiles fit on chip
MOST_D = 128


def refuse(call) -> str:
    """Why these kernels cannot run this call, or ""."""
    if why := why_not_here(call.q):
        return why.replace("x is", "q is")
    if call.q.shape[3] > MOST_D:
        return f"takes heads up to {MOST_D} wide, these have {call.q.shape[3]}"
    for tensor in call[1:6]:
        if tensor is not None and tensor.device != call.q.device:
            return f"needs every tensor on {call.q.device}, one is on {tensor.device}"
    return ""


def decline(call) -> str:
    """Why another hand is faster here, or ""."""
    if INTERPRETED:
        return "triton's interpreter is for tests, a thousand times slower"
    if call.prefix_k is None and not call.dropout:
        return "without a prefix and dropout PyTorch's own attention is expected to be faster"
    return ""


def forward(call) -> tuple[Tensor, Tensor]:
    """o [B, H, L, D] and, for backward, the logarithm in base 2 of each row's sum of powers [B, H, L].

    In fp32 that is two numbers [B, H, L, 2]: the row's largest power, and one over its sum of weights.
    """
    run = torch.ops.pefast.prefix_attention_triton if through_the_registry(call.q) else _forward
    return run(*call[:10])


def backward(call, o: Tensor, lse: Tensor, do: Tensor, needs) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dprefix_k and dprefix_v; None for what is not needed."""
    run = torch.ops.pefast.prefix_attention_triton_backward if through_the_registry(do) else _backward
    found = run(do, o, lse, *call[:10])
    return tuple(t if need else None for t, need in zip(found, needs, strict=True))


def _forward(q, k, v, prefix_k, prefix_v, mask, causal, scale, p, seed):
    (b, h, l, d), keys = q.shape, k.shape[2] + (0 if prefix_k is None else prefix_k.shape[-2])
    # heads side by side, as the next layer wants them
    o, lse = q.new_empty(b, l, h, d).transpose(1, 2), _sums(q)
    if not q.numel() or not keys:
        return o.zero_(), lse.zero_()
    tensors = _plain(q, k, v, prefix_k, prefix_v)
    mask, mask_strides = _mask(mask, b, l, p > 0)
    block = tiles.attention(q.dtype, d, p > 0)
    with torch.cuda.device_of(q):
        kernels.attend[(triton.cdiv(l, block["BLOCK_L"]) * h * b,)](
            *tensors, mask, o, lse, *_sizes(*tensors), *_strides(*tensors), *mask_strides, *o.stride()[:3],
            scale, *_numbers(p, seed), CAUSAL=causal, ALIGNED=_aligned(tensors), DROPOUT=p > 0,
            PRECISION=_precision(q), **block,
        )  # fmt: skip
    return o, lse


def _backward(do, o, lse, q, k, v, prefix_k, prefix_v, mask, causal, scale, p, seed):
    """All five gradients; those of a prefix that is not there are empty."""
    tensors = _plain(q, k, v, prefix_k, prefix_v)
    (b, h, l, d), g, prefix = q.shape, k.shape[1], tensors[3].shape[2]
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    parts = [q.new_empty((b, g, prefix, d), dtype=torch.float32) for _ in range(2)]
    keys = k.shape[2] + prefix
    if not q.numel() or not keys:
        found = (*(t.zero_() for t in (dq, dk, dv)), *(part.zero_() for part in parts))
        return *found[:3], _of_prefix(found[3], prefix_k), _of_prefix(found[4], prefix_v)
    mask, mask_strides = _mask(mask, b, l, p > 0)
    do = do if do.stride(-1) == 1 else do.contiguous()
    o = o if o.stride(-1) == 1 else o.contiguous()
    dots = q.new_empty((b, h, l), dtype=torch.float32)
    block, by_keys = tiles.attention(q.dtype, d, p > 0, 1), tiles.attention_keys(q.dtype, d, p > 0)
    settings = (scale, *_numbers(p, seed))
    sizes, strides = _sizes(*tensors), _strides(*tensors)
    flags = {"CAUSAL": causal, "ALIGNED": _aligned(tensors), "DROPOUT": p > 0, "PRECISION": _precision(q)}
    with torch.cuda.device_of(q):
        kernels.towards_q[(triton.cdiv(l, block["BLOCK_L"]) * h * b,)](
            *tensors, mask, o, do, lse, dots, dq, *sizes, *strides, *mask_strides, *o.stride()[:3],
            *do.stride()[:3], *settings, **flags, **block,
        )  # fmt: skip
        kernels.towards_keys[(triton.cdiv(keys, by_keys["BLOCK_C"]) * g * b,)](
            *tensors, mask, do, lse, dots, dk, dv, *parts, *sizes, *strides, *mask_strides,
            *do.stride()[:3], *settings, **flags, **by_keys,
        )  # fmt: skip
    return dq, dk, dv, _of_prefix(parts[0], prefix_k), _of_prefix(parts[1], prefix_v)


def _sums(q: Tensor) -> Tensor:
    """Room for what forward keeps of each row beside o."""
    return q.new_empty((*q.shape[:3], *[2] * (q.dtype == torch.float32)), dtype=torch.float32)


def _of_prefix(part: Tensor, prefix: Tensor | None) -> Tensor:
    """The gradient of a prefix from its parts [B, G, P, D]."""
    if prefix is None:
        return part.new_empty(0)
    return (part if prefix.dim() == 4 else part.sum(0)).to(prefix.dtype)


def _plain(q, k, v, prefix_k, prefix_v) -> tuple[Tensor, ...]:
    """The tensors with a row's numbers as neighbours; a shared prefix has stride 0 over the batch."""
    b, none = q.shape[0], k[:, :, :0]
    prefix_k, prefix_v = (
        none if prefix is None else prefix if prefix.dim() == 4 else prefix.expand(b, *prefix.shape)
        for prefix in (prefix_k, prefix_v)
    )
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, prefix_k, prefix_v))


def _sizes(q, k, v, prefix_k, prefix_v) -> tuple[int, ...]:
    """H, G, L, S, P, D."""
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2], prefix_k.shape[2], q.shape[3]


def _strides(*tensors) -> list[int]:
    return [stride for t in tensors for stride in t.stride()[:3]]


def _mask(mask: Tensor | None, b: int, l: int, drops: bool) -> tuple[Tensor | None, tuple[int, int, int]]:
    """The mask as integers, and its strides over batch, rows and keys."""
    if mask is None:
        return None, (0, 0, 0)
    # triton 3.6 and 3.7 take weights from bytes and a dropout mask for 4-bit numbers, and mma.sync leaves
    # out half of a sum over 16 rows: dk and dv were wrong on sm_80 (its pull requests 10645, 11691)
    mask = mask.to(torch.int16) if drops else mask.view(torch.uint8)
    strides = mask.expand(b, 1, l, mask.shape[3]).stride()
    return mask, (strides[0], strides[2], strides[3])


def _numbers(p: float, seed: Tensor | None) -> tuple[int, float, int]:
    return (*mask_numbers(p), int(seed)) if p else (0, 1.0, 0)


def _aligned(tensors) -> bool:
    """Whether every row begins a multiple of eight numbers after memory's first."""
    starts = [(t.data_ptr() // t.element_size(), *t.stride()[:3]) for t in tensors]
    return all(number % 8 == 0 for start in starts for number in start)


def _precision(q: Tensor) -> str:
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? mask, bool causal,"
    " float scale, float p, Tensor? seed"
)
_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define(f"prefix_attention_triton({_CALL}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"prefix_attention_triton_backward(Tensor do, Tensor o, Tensor lse, {_CALL})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
for _device in ("CUDA", "CPU"):
    _LIBRARY.impl("prefix_attention_triton", checked(_forward), _device)
    _LIBRARY.impl("prefix_attention_triton_backward", checked(_backward), _device)


@torch.library.register_fake("pefast::prefix_attention_triton", lib=_LIBRARY)
def _(q, k, v, prefix_k, prefix_v, mask, causal, scale, p, seed):
    b, h, l, d = q.shape
    return q.new_empty(b, l, h, d).transpose(1, 2), _sums(q)


@torch.library.register_fake("pefast::prefix_attention_triton_backward", lib=_LIBRARY)
def _(do, o, lse, q, k, v, prefix_k, prefix_v, mask, causal, scale, p, seed):
    of_prefix = (
        t.new_empty(t.shape) if t is not None else q.new_empty(0, dtype=torch.float32)
        for t in (prefix_k, prefix_v)
    )
    return *(t.new_empty(t.shape) for t in (q, k, v)), *of_prefix
