"""delta_linear in Triton, for one LoRA segment. Formula and names: pefast/ops/delta_linear.py.

Split at the waist, so that no tile of y computes it again:

    _waist             h = x̂ aᵀ                    and dh = dy b
    _product           y = s·h bᵀ + x wᵀ + bias    the sum starts from the waist's part and walks K once
                       dx = mask ⊙ s·(dh a)/(1-p) + dy w
    _gradient_parts    dhᵀ x̂ and hᵀ dy             each strip of rows leaves its part of the sum

x̂ is made in registers from the seed and never stored. Parts are added in a fixed order and there are no
atomics: same input, same bits. dy is read once for dh and once for db: on one common reading every 64 rows
would leave a part of db, together R/16 times the size of dy.

Shown without a GPU, with triton 3.6.0 and 3.7.1 (tests/ladder): values, gradients, bounds and races in the
interpreter; machine code for sm_80 and sm_90 has tensor-core instructions and no spills. Shown once, by hand:
the PTX that 3.7.1 makes for sm_80 and sm_90a, executed on a CPU, gives the same values and races nowhere in
shared memory. Not yet run or timed on a GPU: the tiles are untuned. There, `pytest tests/ladder` runs them.
"""

import torch
from torch import Tensor

from . import tl, triton
from .dropout import dropped, keep_tile, mask_numbers
from .launch import INTERPRETED, checked, through_the_registry, why_not_here

# the widest waist that fits beside a tile without spills
MAX_RANK = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
# above, a vendor's product is 2 to 5 % faster than Triton's: a model, not yet a measurement
MAX_ROWS = 256


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _waist(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K]
    h_ptr,  # [M, R]  contiguous
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    threshold: tl.uint32,
    keep_scale: tl.float32,
    seed: tl.int64,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of 128 where DROPOUT
    BLOCK_R: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[:, None]
    mask_r = (offs_r < R)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    a_ptrs = a_ptr + offs_r[None, :].to(tl.int64) * stride_ar + offs_k[:, None].to(tl.int64) * stride_ak

    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask_m & mask_k[None, :], other=0.0)
        a_t = tl.load(a_ptrs, mask_k[:, None] & mask_r, other=0.0).to(x.dtype)
        if DROPOUT:
            keep = keep_tile(offs_m, k, threshold, seed, 0, BLOCK_M, BLOCK_K)
            x = dropped(x, keep, keep_scale)
        h = tl.dot(x, a_t, h, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        a_ptrs += BLOCK_K * stride_ak

    # rounded as PyTorch would when it stores it: backward reads the stored h
    tl.store(h_ptr + offs_m[:, None] * R + offs_r[None, :], h.to(h_ptr.dtype.element_ty), mask_m & mask_r)


@triton.jit(do_not_specialize=["M", "seed", "threshold"])
def _product(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    h_ptr,  # [M, R]  contiguous
    b_ptr,  # [N, R]
    bias_ptr,  # [N], or None
    y_ptr,  # [M, N]  contiguous
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    scale: tl.float32,
    threshold: tl.uint32,
    keep_scale: tl.float32,
    seed: tl.int64,
    DROPOUT: tl.constexpr,  # on the waist's part of y: the way back through x̂
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a multiple of 128 where DROPOUT
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # GROUP_M rows of tiles share their columns of w while those are in the cache
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    pid_m = first_m + tl.program_id(0) % group % rows
    pid_n = tl.program_id(0) % group // rows

    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    mask_r = offs_r < R
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :].to(tl.int64) * stride_xk
    w_ptrs = w_ptr + offs_n[None, :] * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk

    # the scale goes into the narrow factor: beside the sum it would need a second one, which spills
    h = tl.load(h_ptr + offs_m[:, None] * R + offs_r[None, :], mask_m & mask_r[None, :], other=0.0)
    b_ptrs = b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None].to(tl.int64) * stride_br
    b_t = tl.load(b_ptrs, mask_r[:, None] & mask_n, other=0.0).to(h.dtype)
    y = tl.dot((h.to(tl.float32) * scale).to(h.dtype), b_t, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        keep = keep_tile(offs_m, pid_n * BLOCK_N, threshold, seed, 0, BLOCK_M, BLOCK_N)
        y = dropped(y, keep, keep_scale)

    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask_m & mask_k[None, :], other=0.0)
        w_t = tl.load(w_ptrs, mask_k[:, None] & mask_n, other=0.0)
        y = tl.dot(x, w_t, y, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk

    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask_m & mask_n)


@triton.jit(do_not_specialize=["M", "rows", "seed", "threshold"])
def _gradient_parts(
    x_ptr,  # [M, K]
    z_ptr,  # [M, R]  contiguous
    parts_ptr,  # [strips, R, K]  contiguous, fp32
    M,
    K,
    R,
    rows,  # of x in a strip, a multiple of BLOCK_M
    stride_xm,
    stride_xk,
    threshold: tl.uint32,
    keep_scale: tl.float32,
    seed: tl.int64,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of 128 where DROPOUT
    BLOCK_R: tl.constexpr,
):
    strip = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_K
    offs_k = first.to(tl.int64) + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k = (offs_k < K)[None, :]
    mask_r = (offs_r < R)[:, None]

    part = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for m in range(0, rows, BLOCK_M):
        offs_m = strip * rows + m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
        x = tl.load(x_ptrs, mask_m[:, None] & mask_k, other=0.0)
        if DROPOUT:
            keep = keep_tile(offs_m, first, threshold, seed, 0, BLOCK_M, BLOCK_K)
            x = dropped(x, keep, keep_scale)
        z_t = tl.load(z_ptr + offs_m[None, :] * R + offs_r[:, None], mask_r & mask_m[None, :], other=0.0)
        part = tl.dot(z_t, x, part, input_precision=PRECISION)

    part_ptrs = parts_ptr + (strip * R + offs_r[:, None]) * K + offs_k[None, :]
    tl.store(part_ptrs, part, mask_r & mask_k)


def refuse(call) -> str:
    """Why these kernels cannot run this call, or ""."""
    if why := why_not_here(call.x):
        return why
    if len(call.segments) != 1:
        return f"takes one segment, {len(call.segments)} came"
    if call.gain is not None:
        return "has no output gain"
    s = call.segments[0]
    if s.a is None:
        return "makes the waist itself, the segment brings one computed elsewhere"
    if s.activation != "identity" or s.c is not None or s.d is not None:
        return f"takes a plain LoRA, the segment has an activation ({s.activation}) or biases of its own"
    if s.adapter is not None:
        return "takes a segment for every row, this one belongs to one adapter's rows"
    if s.a.shape[0] > (most := MAX_RANK[call.x.dtype]):
        return f"rank {s.a.shape[0]} does not fit on chip, {most} is the most for {call.x.dtype}"
    if s.dropout and call.seed is None:
        return "needs a seed for its dropout"
    for tensor in (call.w, call.bias, s.a, s.b):
        if tensor is not None and tensor.device != call.x.device:
            return f"needs every tensor on {call.x.device}, one is on {tensor.device}"
    return ""


def decline(call) -> str:
    """Why another hand is faster here, or ""."""
    if INTERPRETED:
        return "triton's interpreter is for tests, a thousand times slower"
    # beside a mask made by other means the product's few percent do not count
    if call.x.shape[0] > MAX_ROWS and not call.segments[0].dropout:
        return f"above {MAX_ROWS} rows the vendor's product is expected to be faster, x has {call.x.shape[0]}"
    return ""


def forward(call) -> tuple[Tensor, list[tuple[Tensor, None]]]:
    """y [M, N] and (h, None), h [M, R] without the scale, both in x's dtype."""
    s = call.segments[0]
    run = torch.ops.pefast.delta_linear_triton if through_the_registry(call.x) else _forward
    y, h = run(call.x, call.w, call.bias, s.a, s.b, s.scale, s.dropout, call.seed)
    return y, [(h, None)]


def backward(call, saved, dy: Tensor, needs):
    """dx, dw, dbias, dgain and (da, db, dc, dd, dh) of the segment; None for what is not needed."""
    s, h = call.segments[0], saved[0][0]
    need_a, need_b = needs.segments[0][:2]
    dx = da = db = None
    if needs.x or need_a or need_b:
        run = torch.ops.pefast.delta_linear_triton_backward if through_the_registry(dy) else _backward
        tensors = (dy, call.x, call.w, s.a, s.b, h)
        dx, da, db = run(*tensors, s.scale, s.dropout, call.seed, needs.x, need_a, need_b)
    dw = torch.mm(dy.t(), call.x) if needs.w else None
    dbias = dy.sum(0).to(call.bias.dtype) if needs.bias else None
    five = (da if need_a else None, db if need_b else None, None, None, None)
    return dx if needs.x else None, dw, dbias, None, [five]


def _forward(x, w, bias, a, b, scale, dropout, seed):
    h = torch.empty((x.shape[0], a.shape[0]), dtype=x.dtype, device=x.device)
    y = torch.empty((x.shape[0], w.shape[0]), dtype=x.dtype, device=x.device)
    _launch_waist(x, a, h, dropout, seed)
    _launch_product(x, w, h, b, bias, y, scale, 0.0, None)
    return y, h


def _backward(dy, x, w, a, b, h, scale, dropout, seed, need_x, need_a, need_b):
    """dx, da, db; an empty tensor for what is not needed."""
    dx = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    da, db = x.new_empty(0), x.new_empty(0)
    if need_x or need_a:
        dh = torch.empty_like(h)
        _launch_waist(dy, b.t(), dh, 0.0, None)
    if need_x:
        _launch_product(dy, w.t(), dh, a.t(), None, dx, scale, dropout, seed)
    if need_a:
        da = _transposed_product(dh, x, dropout, seed).mul_(scale).to(a.dtype)
    if need_b:
        db = _transposed_product(h, dy, 0.0, None).mul_(scale).to(b.dtype).t().contiguous()
    return dx, da, db


def _launch_waist(x, a, h, dropout, seed):
    """h = x̂ aᵀ [M, R]."""
    (m, k), rank = x.shape, a.shape[0]
    if not m:
        return
    block = _waist_tiles(x, rank, dropout)
    with torch.cuda.device_of(x):
        _waist[(triton.cdiv(m, block["BLOCK_M"]),)](
            x, a, h, m, k, rank, *x.stride(), *a.stride(),
            *_mask(dropout, seed), **_constants(x, rank), DROPOUT=dropout > 0, **block,
        )  # fmt: skip


def _launch_product(x, w, h, b, bias, y, scale, dropout, seed):
    """y = dropout(s·h bᵀ) + x wᵀ + bias [M, N]."""
    (m, k), n, rank = x.shape, w.shape[0], h.shape[1]
    if not m:
        return
    block = _product_tiles(x)
    grid = (triton.cdiv(m, block["BLOCK_M"]) * triton.cdiv(n, block["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        _product[grid](
            x, w, h, b, bias, y, m, n, k, rank, *x.stride(), *w.stride(), *b.stride(), scale,
            *_mask(dropout, seed), **_constants(x, rank), DROPOUT=dropout > 0, GROUP_M=8, **block,
        )  # fmt: skip


def _transposed_product(z, x, dropout, seed):
    """zᵀ x̂ [R, K], fp32. How the rows are cut does not depend on the GPU."""
    (m, k), rank = x.shape, z.shape[1]
    block = _parts_tiles(x, rank)
    tiles = triton.cdiv(k, block["BLOCK_K"])
    # about 256 programs keep a large GPU busy
    strips = max(1, min(256 // tiles, triton.cdiv(m, block["BLOCK_M"])))
    rows = triton.cdiv(triton.cdiv(m, strips), block["BLOCK_M"]) * block["BLOCK_M"]
    strips = triton.cdiv(m, rows) if m else 0
    parts = torch.empty((strips, rank, k), dtype=torch.float32, device=x.device)
    if strips:
        with torch.cuda.device_of(x):
            _gradient_parts[(tiles, strips)](
                x, z, parts, m, k, rank, rows, *x.stride(),
                *_mask(dropout, seed), **_constants(x, rank), DROPOUT=dropout > 0, **block,
            )  # fmt: skip
    return parts.sum(0)


def _mask(dropout, seed):
    """Threshold, factor and seed for a kernel; numbers without meaning where nothing is dropped."""
    return (*mask_numbers(dropout), int(seed)) if dropout else (0, 1.0, 0)


def _constants(x, rank):
    # a dot's inner dimension is at least 16
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRECISION": "tf32" if tf32 else "ieee", "BLOCK_R": max(16, triton.next_power_of_2(rank))}


# fp32 products run without tensor cores and hold a tile's whole inner dimension in registers: shorter tiles,
# more warps. Every choice below passes the ladder's gate: no spills on sm_80 and sm_90.


def _waist_tiles(x, rank, dropout):
    rows = 16 if x.shape[0] <= 16 else 32
    if x.dtype == torch.float32:
        return {"BLOCK_M": rows, "BLOCK_K": 128 if dropout else 32, "num_warps": 8, "num_stages": 2}
    if rank > 64:
        return {"BLOCK_M": rows, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": rows, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3}


def _product_tiles(x):
    rows = 16 if x.shape[0] <= 16 else 64
    if x.dtype == torch.float32:
        return {"BLOCK_M": rows, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    if x.shape[0] <= 64:
        return {"BLOCK_M": rows, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _parts_tiles(x, rank):
    if x.dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_K": 128, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_K": 128, "num_warps": 4 if rank <= 32 else 8, "num_stages": 2}


_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define(
    "delta_linear_triton(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, float scale, float dropout,"
    " Tensor? seed) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "delta_linear_triton_backward(Tensor dy, Tensor x, Tensor w, Tensor a, Tensor b, Tensor h, float scale,"
    " float dropout, Tensor? seed, bool need_x, bool need_a, bool need_b) -> (Tensor, Tensor, Tensor)"
)
for _device in ("CUDA", "CPU"):
    _LIBRARY.impl("delta_linear_triton", checked(_forward), _device)
    _LIBRARY.impl("delta_linear_triton_backward", checked(_backward), _device)


@torch.library.register_fake("pefast::delta_linear_triton", lib=_LIBRARY)
def _(x, w, bias, a, b, scale, dropout, seed):
    return x.new_empty((x.shape[0], w.shape[0])), x.new_empty((x.shape[0], a.shape[0]))


@torch.library.register_fake("pefast::delta_linear_triton_backward", lib=_LIBRARY)
def _(dy, x, w, a, b, h, scale, dropout, seed, need_x, need_a, need_b):
    dx = torch.empty(x.shape if need_x else 0, dtype=x.dtype, device=x.device)
    da = torch.empty(a.shape if need_a else 0, dtype=a.dtype if need_a else x.dtype, device=x.device)
    db = torch.empty(b.shape if need_b else 0, dtype=b.dtype if need_b else x.dtype, device=x.device)
    return dx, da, db
