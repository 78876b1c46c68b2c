"""prefix_attention by csrc/cpu/attention*: bf16 on AMX, fp32 on AVX-512, and bf16 there in fp32.

Forward keeps o and the sum of each row's powers; backward computes the weights from it again. Formula:
pefast/ops/prefix_attention.py.
"""

import torch
from torch import Tensor

from pefast.native import ISA, WHY_NOT, C, through_the_registry

# whether the kernel of a type runs here, and what it needs
_HERE = {
    torch.bfloat16: C is not None and (C.attention_here(False) or C.attention_here(True)),
    torch.float32: C is not None and C.attention_here(True),
}
_NEEDS = {torch.bfloat16: "AMX or AVX-512 for bfloat16", torch.float32: "AVX-512 for float32"}
# whether bf16 is widened to fp32 on its way in and rounded on its way out: there are no tiles for it
_WIDENS = _HERE[torch.bfloat16] and not C.attention_here(False)
_NOWHERE = (0, 0, 0, 0)


def refuse(call) -> str:
    """Why csrc cannot run this call, or ""."""
    if C is None:
        return WHY_NOT
    dtype = call.q.dtype
    if not call.q.is_cpu:
        return f"needs a CPU, q is on {call.q.device}"
    if dtype not in _HERE:
        return f"takes bfloat16 and float32, q is {str(dtype).removeprefix('torch.')}"
    if not _HERE[dtype]:
        return f"needs {_NEEDS[dtype]}, this process may use {ISA}"
    if not call.scale > 0:
        return f"takes a scale above 0, it is {call.scale}"
    return ""


def decline(call) -> str:
    """Why another hand is faster, or ""."""
    h, l, g = call.q.shape[1], call.q.shape[2], call.k.shape[1]
    # one row took 2.8 times sdpa's time in bf16, and eight up to 1.6 in fp32; with a prefix, the eager hand
    # copies all keys
    few = 4 if call.q.dtype is torch.bfloat16 else 16
    if l * h < few * g and call.prefix_k is None and not (torch.is_grad_enabled() and _trains(call)):
        return f"computes 16 rows or more at a time, here are {l * h // g} for each key head and no gradient"
    # forward and backward took 0.4 to 1.0 of sdpa's time, forward alone 1.6 to 2.2
    if _widens(call.q) and not (torch.is_grad_enabled() and _trains(call)):
        return "computes bfloat16 in float32 here, which pays where there is a gradient to come"
    return ""


def _widens(q: Tensor) -> bool:
    return _WIDENS and q.dtype is torch.bfloat16


def _wide(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.float() for t in tensors]


def _trains(call) -> bool:
    given = call.q, call.k, call.v, call.prefix_k
    return any(t is not None and t.requires_grad for t in given)


def forward(call) -> tuple[Tensor, Tensor]:
    """o [B, H, L, D] and, for backward, what is kept of the sums."""
    run = torch.ops.pefast.prefix_attention if through_the_registry(call.q) else _forward
    return run(*call[:10])


def backward(call, o: Tensor, lse: Tensor, do: Tensor, needs) -> tuple[Tensor | None, ...]:
    """dq, dk, dv, dprefix_k and dprefix_v; None for what is not needed."""
    run = torch.ops.pefast.prefix_attention_backward if through_the_registry(do) else _backward
    found = run(do, o, lse, *call[:10], *needs)
    return tuple(t if need else None for t, need in zip(found, needs, strict=True))


def _forward(q, k, v, prefix_k, prefix_v, mask, causal, scale, p, seed):
    _check_here(q)
    if _widens(q):
        o, kept = _forward(*_wide(q, k, v, prefix_k, prefix_v), mask, causal, scale, p, seed)
        return o.to(q.dtype), kept
    o, lse = _room_for_o(q)
    tensors = _plain(q, k, v, prefix_k, prefix_v)
    sizes = _sizes(*tensors)
    if not q.numel() or not sizes[4] + sizes[5]:
        return o.zero_(), lse.zero_()
    mask = _bytes(mask)
    given = (sizes, [_place(t) for t in tensors], _mask_place(mask), causal, scale, p)
    run = C.attention_forward if q.dtype is torch.bfloat16 else C.attention_forward_fp32
    run(*given, _address(seed), _place(o), lse.data_ptr(), torch.get_num_threads())
    return o, lse


def _backward(do, o, lse, q, k, v, prefix_k, prefix_v, mask, causal, scale, p, seed, *needs):
    _check_here(q)
    if _widens(q):
        given = *_wide(do, o), lse, *_wide(q, k, v, prefix_k, prefix_v)
        found = _backward(*given, mask, causal, scale, p, seed, *needs)
        return tuple(t.to(q.dtype) for t in found)
    tensors = _plain(q, k, v, prefix_k, prefix_v)
    sizes = _sizes(*tensors)
    results = _results(q, k, v, prefix_k, prefix_v, needs)
    if not q.numel() or not sizes[4] + sizes[5]:
        return tuple(t.zero_() for t in results)
    mask, do, o = _bytes(mask), _row(do), _row(o)
    given = (sizes, [_place(t) for t in tensors], _mask_place(mask), causal, scale, p)
    there = [_place(t) if need else _NOWHERE for t, need in zip(results, needs, strict=True)]
    beside = (_place(o), _place(do), lse.data_ptr(), there)
    run = C.attention_backward if q.dtype is torch.bfloat16 else C.attention_backward_fp32
    run(*given, _address(seed), *beside, torch.get_num_threads())
    return results


def _check_here(q: Tensor) -> None:
    if not _HERE.get(q.dtype):
        why = WHY_NOT or f"it needs {_NEEDS.get(q.dtype, 'bfloat16 or float32')}"
        raise RuntimeError(f"prefix_attention: the native kernel cannot run: {why}")


def _room_for_o(q: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, H, L, D], its heads side by side as the next layer wants them, and what is kept of the sums.

    In bf16 on AMX that is their logarithm [B, H, L]; in fp32, where a logarithm would lose digits, the
    largest x and the sum beside it [2, B, H, L].
    """
    b, h, l, d = q.shape
    kept = (b, h, l) if q.dtype is torch.bfloat16 and not _WIDENS else (2, b, h, l)
    return q.new_empty(b, l, h, d).transpose(1, 2), q.new_empty(kept, dtype=torch.float32)


def _room(t: Tensor) -> Tensor:
    """As t in shape and, where the numbers of a row are neighbours, in layout."""
    return torch.empty_like(t) if t.stride(-1) == 1 else t.new_empty(t.shape)


def _results(q, k, v, prefix_k, prefix_v, needs) -> tuple[Tensor, ...]:
    """Room for the gradients, in the layout of their tensors; an empty tensor for what is not needed."""
    pairs = zip((q, k, v, prefix_k, prefix_v), needs, strict=True)
    return tuple(_room(t) if need else q.new_empty(0) for t, need in pairs)


def _plain(q, k, v, prefix_k, prefix_v) -> tuple[Tensor | None, ...]:
    """The tensors as csrc reads them: the numbers of a row are neighbours, a batch of prefixes lies apart."""
    if prefix_k is not None and prefix_k.dim() == 4:
        prefix_k, prefix_v = prefix_k.contiguous(), prefix_v.contiguous()
    return _row(q), _row(k), _row(v), _row(prefix_k), _row(prefix_v)


def _row(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.stride(3) == 1 or mask.shape[3] == 1 else mask.contiguous()


def _sizes(q, k, v, prefix_k, prefix_v) -> tuple[int, ...]:
    (b, h, l, d), (g, s) = q.shape, k.shape[1:3]
    return b, h, g, l, s, 0 if prefix_k is None else prefix_k.shape[-2], d


def _place(t: Tensor | None) -> tuple[int, int, int, int]:
    """Address and strides; a batch stride of 0 where all rows of the batch share it."""
    if t is None:
        return _NOWHERE
    *outer, _ = t.stride()
    return (t.data_ptr(), *outer) if len(outer) == 3 else (t.data_ptr(), 0, *outer)


def _mask_place(mask: Tensor | None) -> tuple[int, int, int]:
    if mask is None:
        return 0, 0, 0
    stride_b, _, stride_l, _ = mask.stride()
    return mask.data_ptr(), stride_b if mask.shape[0] > 1 else 0, stride_l if mask.shape[2] > 1 else 0


def _address(seed: Tensor | None) -> int:
    return 0 if seed is None else seed.data_ptr()


_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor? prefix_k, Tensor? prefix_v, Tensor? mask, bool causal,"
    " float scale, float p, Tensor? seed"
)
_ASKED = "bool need_q, bool need_k, bool need_v, bool need_prefix_k, bool need_prefix_v"
_LIBRARY.define(f"prefix_attention({_GIVEN}) -> (Tensor, Tensor)")
_LIBRARY.define(
    f"prefix_attention_backward(Tensor do, Tensor o, Tensor lse, {_GIVEN}, {_ASKED})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.impl("prefix_attention", _forward, "CPU")
_LIBRARY.impl("prefix_attention_backward", _backward, "CPU")


@torch.library.register_fake("pefast::prefix_attention", lib=_LIBRARY)
def _(q, k, v, prefix_k, prefix_v, mask, causal, scale, p, seed):
    return _room_for_o(q)


@torch.library.register_fake("pefast::prefix_attention_backward", lib=_LIBRARY)
def _(do, o, lse, q, k, v, prefix_k, prefix_v, mask, causal, scale, p, seed, *needs):
    return _results(q, k, v, prefix_k, prefix_v, needs)
