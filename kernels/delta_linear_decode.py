"""delta_linear for the few rows of a decoding step, in Triton: one launch for the layer and all its deltas.

    y_p    = x wᵀ + Σ s·(x aᵀ) bᵀ    over strip p of K        [M, N]
    y      = Σ_p y_p ⊙ gain + bias   the strips in their order

The deltas have no activation, so their sums over strips of K are as good as the layer's. The memory sets the
time: w is read once, by about 256 programs whatever N and K are. Only where that takes more than one strip a
second launch adds their parts; no atomics, the same bits each time.

A step's slots are the ranks of its adapters side by side, each one a row of some a and a column of some b. A
slot's bits say which rows of x it belongs to, so ranks may differ from row to row and nothing is padded. The
parameters are read where they lie; a Plan keeps their addresses. Formula: pefast/ops/delta_linear.py.

Shown without a GPU, as kernels/delta_linear.py says. Not yet run or timed on one.
"""

import torch
from torch import Tensor

from . import forms, tiles, tl, triton
from .delta_linear_products import near, plus
from .launch import DTYPES, INTERPRETED, why_not_here

# rows that one step may have: those of the smallest product on tensor cores
ROWS = 16


@triton.jit
def _waist_rows(a_ptr, slot_ptr, first, count, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr):
    """Addresses of the first number of each slot's row of a [BLOCK_R]."""
    slots = first + tl.arange(0, BLOCK_R)
    places = tl.load(slot_ptr + slots * 4, slots < count, other=0)
    # what a table says about alignment, the compiler cannot see
    if ALIGNED:
        places = tl.multiple_of(places, 8)
    return a_ptr + places


@triton.jit
def _with_delta(
    y_t,  # [BLOCK_N, 16]
    z_t,  # [BLOCK_R, 16]  a xᵀ of these slots
    b_ptr,
    slot_ptr,
    scale_ptr,
    first,
    count,
    offs_n,
    mask_n,
    dtype: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y and one tile of slots' part of it."""
    slots = first + tl.arange(0, BLOCK_R)
    mask_r = slots < count
    scale = tl.load(scale_ptr + slots, mask_r, other=0.0)
    bits = tl.load(slot_ptr + slots * 4 + 3, mask_r, other=0)
    own = (bits[:, None] >> tl.arange(0, 16)[None, :]) & 1
    h_t = tl.where(own != 0, z_t * scale[:, None], 0.0).to(dtype)
    place = tl.load(slot_ptr + slots * 4 + 1, mask_r, other=0)
    stride = tl.load(slot_ptr + slots * 4 + 2, mask_r, other=0)
    b_ptrs = b_ptr + (place[None, :] + offs_n[:, None] * stride[None, :])
    b = tl.load(b_ptrs, mask_n[:, None] & mask_r[None, :], other=0.0).to(dtype)
    return plus(y_t, b, h_t, PRECISION)


@triton.jit(do_not_specialize=["M", "count"])
def step(
    x_ptr,  # [M, K]  numbers of a row side by side
    w_ptr,  # [N, K]
    a_ptr,  # what places of a are counted from
    b_ptr,  # what places of b are counted from
    slot_ptr,  # [count, 4]  int64: place of a row of a, of a column of b, step along that, rows' bits
    scale_ptr,  # [count]  fp32
    gain_ptr,  # [N], or None
    bias_ptr,  # [N], or None
    y_ptr,  # [M, N] or, where PARTS, [strips, M, N] in fp32; contiguous
    M,
    N,
    K,
    count,  # of slots
    length,  # of a strip of K, a multiple of BLOCK_K
    stride_xm,
    stride_wn,
    stride_wk,
    PARTS: tl.constexpr,  # a strip's part, without gain and bias
    ALIGNED: tl.constexpr,  # rows of a begin at multiples of 16 bytes
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One strip of K's part of a tile of y, upright: warps share out a tile's rows, and 16 are too few."""
    columns = tl.cdiv(N, BLOCK_N)
    column, strip = tl.program_id(0) % columns, tl.program_id(0) // columns
    first_k = strip * length
    end = min(length, K - first_k)
    offs_m, offs_k, near_k = tl.arange(0, 16), tl.arange(0, BLOCK_K), near(BLOCK_K, WIDE)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = (offs_m < M)[None, :], offs_n < N
    mask_r = tl.arange(0, BLOCK_R) < count
    x_offs = near(16, WIDE)[None, :] * stride_xm + near_k[:, None]
    w_offs = near(BLOCK_N, WIDE)[:, None] * stride_wn + near_k[None, :] * stride_wk
    x_first = x_ptr + first_k
    w_first = w_ptr + column.to(tl.int64) * BLOCK_N * stride_wn + first_k.to(tl.int64) * stride_wk
    a_ptrs = _waist_rows(a_ptr, slot_ptr, 0, count, ALIGNED, BLOCK_R)[:, None] + (first_k + offs_k)[None, :]

    # one walk for the layer and the first slots, which are all of them in most steps
    y_t = tl.zeros((BLOCK_N, 16), tl.float32)
    z_t = tl.zeros((BLOCK_R, 16), tl.float32)
    for k in range(0, end, BLOCK_K):
        mask_k = offs_k < end - k
        x_t = tl.load(x_first + k + x_offs, mask_k[:, None] & mask_m, other=0.0)
        w = tl.load(w_first + w_offs, mask_n[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs + k, mask_r[:, None] & mask_k[None, :], other=0.0).to(x_t.dtype)
        y_t = plus(y_t, w, x_t, PRECISION)
        z_t = plus(z_t, a, x_t, PRECISION)
        w_first += tl.cast(BLOCK_K, tl.int64) * stride_wk
    y_t = _with_delta(
        y_t, z_t, b_ptr, slot_ptr, scale_ptr, 0, count, offs_n, mask_n, x_ptr.dtype.element_ty, PRECISION,
        BLOCK_R,
    )  # fmt: skip

    for first in range(BLOCK_R, count, BLOCK_R):
        mask_r = first + tl.arange(0, BLOCK_R) < count
        a_rows = _waist_rows(a_ptr, slot_ptr, first, count, ALIGNED, BLOCK_R)
        a_ptrs = a_rows[:, None] + (first_k + offs_k)[None, :]
        z_t = tl.zeros((BLOCK_R, 16), tl.float32)
        for k in range(0, end, BLOCK_K):
            mask_k = offs_k < end - k
            x_t = tl.load(x_first + k + x_offs, mask_k[:, None] & mask_m, other=0.0)
            a = tl.load(a_ptrs + k, mask_r[:, None] & mask_k[None, :], other=0.0).to(x_t.dtype)
            z_t = plus(z_t, a, x_t, PRECISION)
        y_t = _with_delta(
            y_t, z_t, b_ptr, slot_ptr, scale_ptr, first, count, offs_n, mask_n, x_ptr.dtype.element_ty,
            PRECISION, BLOCK_R,
        )  # fmt: skip

    if not PARTS:
        y_t = _finished(y_t, gain_ptr, bias_ptr, offs_n, mask_n)
    out = (strip.to(tl.int64) * M + offs_m[None, :]) * N + offs_n[:, None]
    tl.store(y_ptr + out, y_t.to(y_ptr.dtype.element_ty), mask_m & mask_n[:, None])


@triton.jit
def _finished(y_t, gain_ptr, bias_ptr, offs_n, mask_n):
    """y ⊙ gain + bias, upright."""
    if gain_ptr is not None:
        y_t *= tl.load(gain_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[:, None]
    if bias_ptr is not None:
        y_t += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[:, None]
    return y_t


@triton.jit(do_not_specialize=["M", "strips"])
def finish(
    part_ptr,  # [strips, M, N]  fp32, contiguous
    gain_ptr,  # [N], or None
    bias_ptr,  # [N], or None
    y_ptr,  # [M, N]  contiguous
    M,
    N,
    strips,
    BLOCK_N: tl.constexpr,
):
    """y of all strips, upright [BLOCK_N, 16]."""
    offs_m = tl.arange(0, 16)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    mask = (offs_m < M)[None, :] & mask_n[:, None]
    out = offs_m[None, :].to(tl.int64) * N + offs_n[:, None]
    y_t = tl.zeros((BLOCK_N, 16), tl.float32)
    for strip in range(strips):
        y_t += tl.load(part_ptr + strip * M.to(tl.int64) * N + out, mask, other=0.0)
    y_t = _finished(y_t, gain_ptr, bias_ptr, offs_n, mask_n)
    tl.store(y_ptr + out, y_t.to(y_ptr.dtype.element_ty), mask)


def takes(x: Tensor, named: bool) -> bool:
    """Whether x may be a step of these kernels': what can be said without its layer.

    Triton's interpreter is for tests: it computes only where the caller named this hand.
    """
    return (x.is_cuda or (INTERPRETED and named)) and x.dtype in DTYPES


def why_not(w: Tensor, bias: Tensor | None, deltas) -> str:
    """Why these kernels cannot take these deltas beside w [N, K], or another road is faster, or ""."""
    if why := why_not_here(w):
        return why.replace("x is", "the weight is")
    if not w.numel():
        return f"takes a weight with numbers in it, this one is {list(w.shape)}"
    for t in (w, bias, *(t for delta in deltas for t in (delta.a, delta.b))):
        if t is None:
            continue
        if t.is_inference():
            return "must see writes to a parameter, and those to an inference tensor cannot be seen"
        if t.device != w.device or t.dtype not in DTYPES:
            return f"takes float32, bfloat16 and float16 on {w.device}, here is {t.dtype} on {t.device}"
    for t in (t for delta in deltas for t in (delta.a, delta.b)):
        if t.numel() and t.stride(1) != 1:
            return f"takes a and b with the numbers of a row side by side, here are strides {t.stride()}"
    if any(len({getattr(delta, side).dtype for delta in deltas}) > 1 for side in ("a", "b")):
        return "takes adapters of one dtype"
    distinct, rows = _distinct(deltas), 1 + max((delta.row for delta in deltas), default=0)
    # in numbers of the weight's size: those of fp32 masters count twice beside a narrow weight
    slots = sum(len(delta.a) * delta.a.element_size() for delta, _ in distinct) // w.element_size()
    s = forms.Shape(rows, *w.shape, slots, size=w.element_size())
    name = torch.cuda.get_device_name(w.device) if w.is_cuda else ""
    strips, _ = tiles.decode_strips(*w.shape, w.dtype)
    return forms.why_not_a_step(s, strips, len(distinct), forms.rates_of(name))


class Plan:
    """y = (x wᵀ + each row's deltas) ⊙ gain + bias, as long as every tensor stays at its address."""

    def __init__(self, w: Tensor, bias: Tensor | None, deltas, rows: int, gain: Tensor | None = None):
        self.w, self.bias, self.gain, self.rows = w.detach(), bias, gain, rows
        distinct = _distinct(deltas)
        # places are counted from the first in memory
        a, b = (
            min((getattr(delta, side) for delta, _ in distinct), key=Tensor.data_ptr, default=self.w)
            for side in ("a", "b")
        )
        self.a, self.b = a.detach(), b.detach()
        table = [
            [_place(delta.a, a, 0, r), _place(delta.b, b, 1, r), delta.b.stride(0), bits]
            for delta, bits in distinct
            for r in range(len(delta.a))
        ]
        scales = [delta.scale for delta, _ in distinct for _ in range(len(delta.a))]
        self.slots = torch.tensor(table, dtype=torch.int64, device=w.device).reshape(-1, 4)
        self.scales = torch.tensor(scales, dtype=torch.float32, device=w.device)
        # what the table points to, which must live as long as it does
        self.slots.holds = [t.detach() for delta, _ in distinct for t in (delta.a, delta.b)]
        step_of_8 = all(row[0] % 8 == 0 for row in table)
        self.aligned = step_of_8 and self.a.data_ptr() % 16 == 0
        self.block = tiles.decode(w.dtype)
        self.strips, self.length = tiles.decode_strips(*w.shape, w.dtype)

    def run(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        """y, in x's dtype."""
        y = x.new_empty((*x.shape[:-1], self.w.shape[0]))
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        # triton launches on the current device, which need not be x's
        with torch.cuda.device_of(x):
            self._launch(rows, y)
        return y

    def _launch(self, x: Tensor, y: Tensor) -> None:
        (n, k), m, count = self.w.shape, len(x), len(self.slots)
        parts = x.new_empty((self.strips, m, n), dtype=torch.float32) if self.strips > 1 else None
        tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        wide = any(stride >= 2**22 for stride in (x.stride(0), *self.w.stride()))
        step[(triton.cdiv(n, self.block["BLOCK_N"]) * self.strips,)](
            x, self.w, self.a, self.b, self.slots, self.scales, self.gain, self.bias,
            y if parts is None else parts, m, n, k, count, self.length, x.stride(0), *self.w.stride(),
            PARTS=parts is not None, ALIGNED=self.aligned, PRECISION="tf32" if tf32 else "ieee", WIDE=wide,
            BLOCK_R=min(128 // self.a.element_size(), max(16, triton.next_power_of_2(count))), **self.block,
        )  # fmt: skip
        if parts is not None:
            finish[(triton.cdiv(n, 64),)](parts, self.gain, self.bias, y, m, n, self.strips, BLOCK_N=64)


def _distinct(deltas) -> list[tuple]:
    """Each delta once, and the bits of its rows: an adapter that several rows share is read once."""
    found, bits = {}, {}
    for delta in deltas:
        key = (delta.a.data_ptr(), delta.b.data_ptr(), delta.scale)
        found.setdefault(key, delta)
        bits[key] = bits.get(key, 0) | 1 << delta.row
    return [(delta, bits[key]) for key, delta in found.items()]


def _place(t: Tensor, first: Tensor, side: int, r: int) -> int:
    """Numbers between the first number of `first` and that of row or column r of t."""
    return (t.data_ptr() - first.data_ptr()) // t.element_size() + r * t.stride(side)
