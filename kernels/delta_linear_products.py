"""delta_linear's products in Triton. Names: pefast/ops/delta_linear.py; slots: waist.py.

    waist       h = σ(x̂ aᵀ + c)                   of the rows that a slot belongs to
    product     y = Σ s·h bᵀ + x wᵀ               the waist's part first, then one walk along K
                dx = Σ mask ⊙ (dz a)/(1-p) + du w
    whole       h and y of one walk along K; every column of tiles makes the waist again

x̂ is made in registers from the seed and never stored. Rows and slots count as 64-bit numbers. In fp32 each
step of a walk is a sum of its own.
"""

from . import tl, triton
from .activations import activate_slots
from .dropout import dropped, keep_tile

_RUN_TIME = ["M", "N", "R", "seed", "tiles"]


@triton.jit
def own_rows(ids_ptr, adapter_ptr, offs_m, offs_r, M, R, EVERY: tl.constexpr):
    """Which slots belong to which rows [BLOCK_M, BLOCK_R]."""
    adapter = tl.load(adapter_ptr + offs_r, offs_r < R, other=-3)[None, :]
    ids = tl.load(ids_ptr + offs_m, offs_m < M, other=-2)[:, None]
    return (adapter == EVERY) | (adapter == ids)


@triton.jit
def near(LENGTH: tl.constexpr, WIDE: tl.constexpr):
    """Numbers from 0 on that address a tile from its first element: 64 bits only where strides ask for it.

    Sums of 32-bit offsets beside one 64-bit base keep half of the registers free for the product.
    """
    offsets = tl.arange(0, LENGTH)
    if WIDE:
        offsets = offsets.to(tl.int64)
    return offsets


@triton.jit
def plus(y, left, right, PRECISION: tl.constexpr):
    """y + left right, where an inner dimension is cut into tiles and y is the sum so far.

    In fp32 each tile's product is a sum of its own: one chain of all products would round each at y's size.
    """
    if left.dtype == tl.float32 and PRECISION == "ieee":
        # a limit of sums at once, without which the compiler makes one chain of it
        length: tl.constexpr = left.shape[1]
        y += tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=length)
    else:
        y = tl.dot(left, right, y, input_precision=PRECISION)
    return y


@triton.jit
def swizzled(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """This program's tile. GROUP_M rows of tiles share their columns of w while those are in the cache."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    return first_m + tl.program_id(0) % group % rows, tl.program_id(0) % group // rows


@triton.jit(do_not_specialize=_RUN_TIME)
def waist(
    x_ptr,  # [M, K]
    a_ptr,  # [computed, K]
    c_ptr,  # [computed]  fp32, or None
    ids_ptr,  # [M]  int64, or None
    adapter_ptr,  # [R]  int64, or None
    kind_ptr,  # [R]  int32, or None
    tile_ptr,  # [tiles, 4]  int32
    keep_ptr,  # [tiles]  fp32
    h_ptr,  # [M, R]  contiguous
    z_ptr,  # [M, R]  contiguous, or None
    M,
    K,
    R,
    tiles,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    seed: tl.int64,
    USED: tl.constexpr,
    EVERY: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of 128 where DROPOUT
    BLOCK_R: tl.constexpr,
):
    """h = σ(x̂ aᵀ + c) of one tile of slots [BLOCK_M, BLOCK_R]."""
    # the slots of one row tile run side by side, so x comes from the cache for all but the first
    tile = tile_ptr + tl.program_id(0) % tiles * 4
    first, count = tl.load(tile), tl.load(tile + 1)
    offs_m = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = first.to(tl.int64) + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    in_tile = tl.arange(0, BLOCK_R) < count
    mask_m = (offs_m < M)[:, None]
    mask_r = in_tile[None, :]
    near_k = near(BLOCK_K, WIDE)
    x_first = x_ptr + (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M * stride_xm
    a_first = a_ptr + first.to(tl.int64) * stride_ar
    x_offs = near(BLOCK_M, WIDE)[:, None] * stride_xm + near_k[None, :] * stride_xk
    a_offs = near(BLOCK_R, WIDE)[None, :] * stride_ar + near_k[:, None] * stride_ak
    walk = K
    if ids_ptr is not None:
        own = own_rows(ids_ptr, adapter_ptr, offs_m, offs_r, M, R, EVERY) & mask_r
        # where no row of the tile has one of these adapters there is nothing to walk
        walk = tl.where(tl.max(tl.max(own.to(tl.int32), 1), 0) > 0, K, 0)

    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, walk, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_first + x_offs, mask_m & mask_k[None, :], other=0.0)
        a_t = tl.load(a_first + a_offs, mask_k[:, None] & mask_r, other=0.0).to(x.dtype)
        if DROPOUT:
            threshold, stream = tl.load(tile + 3), tl.load(tile + 2)
            keep = keep_tile(offs_m, k, threshold, seed, stream, BLOCK_M, BLOCK_K)
            x = dropped(x, keep, tl.load(keep_ptr + tl.program_id(0) % tiles))
        z = plus(z, x, a_t, PRECISION)
        x_first += tl.cast(BLOCK_K, tl.int64) * stride_xk
        a_first += tl.cast(BLOCK_K, tl.int64) * stride_ak

    if c_ptr is not None:
        z += tl.load(c_ptr + offs_r, in_tile, other=0.0)[None, :]
    out = offs_m[:, None] * R + offs_r[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + out, z.to(z_ptr.dtype.element_ty), mask_m & mask_r)
    kind = 0
    if kind_ptr is not None:
        kind = tl.load(kind_ptr + offs_r, in_tile, other=0)
    h = activate_slots(z, kind, USED)
    if ids_ptr is not None:
        h = tl.where(own, h, 0.0)
    # rounded as PyTorch would when it stores it: backward reads the stored h
    tl.store(h_ptr + out, h.to(h_ptr.dtype.element_ty), mask_m & mask_r)


@triton.jit
def _beside(
    y,  # [BLOCK_M, BLOCK_N]
    tile,  # [4]  int32
    keep_ptr,
    h_ptr,
    b_ptr,
    scale_ptr,
    offs_m,
    mask_m,
    mask_n,
    first_m,
    first_n,
    R,
    stride_bn,
    stride_br,
    seed,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y and one tile of slots' part of it."""
    in_tile = tl.arange(0, BLOCK_R) < tl.load(tile + 1)
    near_r = near(BLOCK_R, WIDE)
    slot = tl.load(tile).to(tl.int64)
    h_ptrs = h_ptr + (first_m * R + slot) + (near(BLOCK_M, WIDE)[:, None] * R + near_r[None, :])
    h = tl.load(h_ptrs, mask_m & in_tile[None, :], other=0.0)
    # the scale goes into the narrow factor: beside the sum it would need a second one, which spills
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + slot + near_r, in_tile, other=0.0)
        h = (h.to(tl.float32) * scale[None, :]).to(h.dtype)
    b_first = b_ptr + first_n.to(tl.int64) * stride_bn + slot * stride_br
    b_offs = near(BLOCK_N, WIDE)[None, :] * stride_bn + near_r[:, None] * stride_br
    b_t = tl.load(b_first + b_offs, in_tile[:, None] & mask_n, other=0.0).to(h.dtype)
    if DROPOUT:
        through = tl.dot(h, b_t, input_precision=PRECISION)
        threshold, stream = tl.load(tile + 3), tl.load(tile + 2)
        keep = keep_tile(offs_m, first_n, threshold, seed, stream, BLOCK_M, BLOCK_N)
        y += dropped(through, keep, tl.load(keep_ptr))
    else:
        y = tl.dot(h, b_t, y, input_precision=PRECISION)
    return y


@triton.jit
def _put(y, u_ptr, gain_ptr, bias_ptr, y_ptr, first, offs_n, near_m, near_n, mask, N):
    """Stores u where it is kept, and y ⊙ gain + bias."""
    out = first + (near_m[:, None] * N + near_n[None, :])
    if u_ptr is not None:
        tl.store(u_ptr + out, y.to(u_ptr.dtype.element_ty), mask)
    if gain_ptr is not None:
        y *= tl.load(gain_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def product(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    inner_ptr,  # [K]  a gain on x, or None
    h_ptr,  # [M, R]  contiguous
    b_ptr,  # [N, tiles' slots]
    scale_ptr,  # [R]  fp32, or None: the scale is in h
    tile_ptr,  # [tiles, 4]  int32
    keep_ptr,  # [tiles]  fp32
    gain_ptr,  # [N], or None
    bias_ptr,  # [N], or None
    u_ptr,  # [M, N]  contiguous: what the gain multiplies, or None
    y_ptr,  # [M, N]  contiguous
    M,
    N,
    K,
    R,
    tiles,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bn,
    stride_br,
    seed: tl.int64,
    BESIDE: tl.constexpr,  # y holds x wᵀ already, from a library
    SEVERAL: tl.constexpr,  # more than one tile of slots
    DROPOUT: tl.constexpr,  # on the waist's part of y: the way back through x̂
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # a multiple of 128 where DROPOUT
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of y or dx, from a waist that is there."""
    pid_m, pid_n = swizzled(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    near_m, near_n = near(BLOCK_M, WIDE), near(BLOCK_N, WIDE)
    first = pid_m.to(tl.int64) * BLOCK_M * N + pid_n * BLOCK_N
    y_ptrs = y_ptr + first + (near_m[:, None] * N + near_n[None, :])

    first_m, first_n = pid_m.to(tl.int64) * BLOCK_M, pid_n * BLOCK_N
    y = _beside(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), tile_ptr, keep_ptr, h_ptr, b_ptr, scale_ptr, offs_m, mask_m,
        mask_n, first_m, first_n, R, stride_bn, stride_br, seed, DROPOUT, PRECISION, WIDE,
        BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    if SEVERAL:
        for t in range(1, tiles):
            y = _beside(
                y, tile_ptr + 4 * t, keep_ptr + t, h_ptr, b_ptr, scale_ptr, offs_m, mask_m, mask_n, first_m,
                first_n, R, stride_bn, stride_br, seed, DROPOUT, PRECISION, WIDE, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip

    if BESIDE:
        y += tl.load(y_ptrs, mask_m & mask_n, other=0.0).to(tl.float32)
    else:
        x_first = x_ptr + pid_m.to(tl.int64) * BLOCK_M * stride_xm
        w_first = w_ptr + pid_n.to(tl.int64) * BLOCK_N * stride_wn
        near_k = near(BLOCK_K, WIDE)
        x_offs = near_m[:, None] * stride_xm + near_k[None, :] * stride_xk
        w_offs = near_n[None, :] * stride_wn + near_k[:, None] * stride_wk
        for k in range(0, K, BLOCK_K):
            mask_k = offs_k < K - k
            x = tl.load(x_first + x_offs, mask_m & mask_k[None, :], other=0.0)
            w_t = tl.load(w_first + w_offs, mask_k[:, None] & mask_n, other=0.0)
            if inner_ptr is not None:
                gain = tl.load(inner_ptr + k + offs_k, mask_k, other=0.0).to(tl.float32)
                x = (x.to(tl.float32) * gain[None, :]).to(x.dtype)
            y = plus(y, x, w_t, PRECISION)
            x_first += tl.cast(BLOCK_K, tl.int64) * stride_xk
            w_first += tl.cast(BLOCK_K, tl.int64) * stride_wk

    _put(y, u_ptr, gain_ptr, bias_ptr, y_ptr, first, offs_n, near_m, near_n, mask_m & mask_n, N)


@triton.jit(do_not_specialize=_RUN_TIME)
def whole(
    x_ptr,  # [M, K]
    w_ptr,  # [N, K]
    a_ptr,  # [R, K]
    b_ptr,  # [N, R]
    c_ptr,  # [R]  fp32, or None
    ids_ptr,  # [M]  int64, or None
    adapter_ptr,  # [R]  int64, or None
    kind_ptr,  # [R]  int32, or None
    scale_ptr,  # [R]  fp32
    gain_ptr,  # [N], or None
    bias_ptr,  # [N], or None
    h_ptr,  # [M, R]  contiguous
    z_ptr,  # [M, R]  contiguous, or None
    u_ptr,  # [M, N]  contiguous, or None
    y_ptr,  # [M, N]  contiguous
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    USED: tl.constexpr,
    EVERY: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of y, and its waist of the same walk along K."""
    pid_m, pid_n = swizzled(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    mask_r = offs_r < R
    near_m, near_n, near_k = near(BLOCK_M, WIDE), near(BLOCK_N, WIDE), near(BLOCK_K, WIDE)
    x_first = x_ptr + pid_m.to(tl.int64) * BLOCK_M * stride_xm
    w_first = w_ptr + pid_n.to(tl.int64) * BLOCK_N * stride_wn
    x_offs = near_m[:, None] * stride_xm + near_k[None, :] * stride_xk
    w_offs = near_n[None, :] * stride_wn + near_k[:, None] * stride_wk
    a_offs = near(BLOCK_R, WIDE)[None, :] * stride_ar + near_k[:, None] * stride_ak

    # one walk along K feeds both products, so x is read once
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_first + x_offs, mask_m & mask_k[None, :], other=0.0)
        w_t = tl.load(w_first + w_offs, mask_k[:, None] & mask_n, other=0.0)
        a_t = tl.load(a_ptr + a_offs, mask_k[:, None] & mask_r[None, :], other=0.0).to(x.dtype)
        y = plus(y, x, w_t, PRECISION)
        z = plus(z, x, a_t, PRECISION)
        x_first += tl.cast(BLOCK_K, tl.int64) * stride_xk
        w_first += tl.cast(BLOCK_K, tl.int64) * stride_wk
        a_ptr += tl.cast(BLOCK_K, tl.int64) * stride_ak

    first = pid_m.to(tl.int64) * BLOCK_M * N + pid_n * BLOCK_N
    kind = 0
    if kind_ptr is not None:
        kind = tl.load(kind_ptr + offs_r, mask_r, other=0)
    scale = tl.load(scale_ptr + offs_r, mask_r, other=0.0)[None, :]
    out = offs_m[:, None] * R + offs_r[None, :]
    mask_out = mask_m & mask_r[None, :]
    if c_ptr is not None:
        z += tl.load(c_ptr + offs_r, mask_r, other=0.0)[None, :]
    if z_ptr is not None:
        if pid_n == 0:
            tl.store(z_ptr + out, z.to(z_ptr.dtype.element_ty), mask_out)
    h = activate_slots(z, kind, USED)
    if ids_ptr is not None:
        h = tl.where(own_rows(ids_ptr, adapter_ptr, offs_m, offs_r, M, R, EVERY), h, 0.0)
    h = h.to(h_ptr.dtype.element_ty)
    # every column of tiles has made the same waist; the first stores it
    if pid_n == 0:
        tl.store(h_ptr + out, h, mask_out)
    h = (h.to(tl.float32) * scale).to(h.dtype)

    b_ptrs = b_ptr + offs_n[None, :] * stride_bn + offs_r[:, None].to(tl.int64) * stride_br
    b_t = tl.load(b_ptrs, mask_r[:, None] & mask_n, other=0.0).to(h.dtype)
    y = tl.dot(h, b_t, y, input_precision=PRECISION)

    _put(y, u_ptr, gain_ptr, bias_ptr, y_ptr, first, offs_n, near_m, near_n, mask_m & mask_n, N)
