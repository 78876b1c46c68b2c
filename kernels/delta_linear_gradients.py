"""Gradients of delta_linear's narrow factors in Triton. Names: pefast/ops/delta_linear.py; slots: waist.py.

    back        dx, dz and db            of one read of dy: a walk along N makes a tile of dx and the waist's
                                         gradient beside it; the tiles of a row share the columns of db
    narrow      dh = du b, db = s·duᵀ h  of one read of dy; each block of columns leaves its part of dh, each
                                         strip of rows its part of db
    finish      dz = s·dh ⊙ σ'(z)        the parts of dh in a fixed order
    down        da = dzᵀ x̂               each strip of rows leaves its part
    column_sums dg = Σ_m dy ⊙ u          each strip of rows leaves its part

The parts are fp32 and no atomics add them: same input, same bits.
"""

from . import tl, triton
from .activations import slope_slots
from .delta_linear_products import near, own_rows, plus, swizzled
from .dropout import dropped, keep_tile

_RUN_TIME = ["M", "R", "rows", "strips", "share", "tiles", "parts", "seed"]


@triton.jit(do_not_specialize=_RUN_TIME)
def back(
    dy_ptr,  # [M, N]
    w_ptr,  # [N, K]
    a_ptr,  # [R, K]
    b_ptr,  # [N, R]
    gain_ptr,  # [N], or None
    ids_ptr,  # [M]  int64, or None
    adapter_ptr,  # [R]  int64, or None
    kind_ptr,  # [R]  int32, or None
    scale_ptr,  # [R]  fp32
    tile_ptr,  # [1, 4]  int32
    keep_ptr,  # [1]  fp32
    h_ptr,  # [M, R]  contiguous
    z_ptr,  # [M, R]  contiguous, or None
    dz_ptr,  # [M, R]  contiguous
    dx_ptr,  # [M, K]  contiguous
    db_ptr,  # [strips, R, N]  contiguous, fp32
    M,
    N,
    K,
    R,
    rows,  # of a strip, a multiple of BLOCK_M
    strips,
    share,  # columns of db that one program makes, a multiple of BLOCK_U
    stride_dm,
    stride_dn,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    seed: tl.int64,
    USED: tl.constexpr,
    EVERY: tl.constexpr,
    UP: tl.constexpr,  # db is wanted
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of 128 where DROPOUT
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_U: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One column of tiles of dx in a strip of rows, and that strip's part of some columns of db."""
    strip, column = swizzled(strips * BLOCK_M, K, BLOCK_M, BLOCK_K, GROUP_M)
    first_m = strip.to(tl.int64) * rows
    offs_k = column.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    mask_k, mask_r = (offs_k < K)[None, :], offs_r < R
    near_m, near_r = near(BLOCK_M, WIDE), near(BLOCK_R, WIDE)
    scale = tl.load(scale_ptr + offs_r, mask_r, other=0.0)

    for m in tl.range(0, min(rows, M - first_m), BLOCK_M, disable_licm=True):
        # always 0, read anew: what is addressed through it is not kept in registers from tile to tile
        zero = tl.multiple_of(tl.load(tile_ptr), 128)
        near_n, near_k = zero + near(BLOCK_N, WIDE), zero + near(BLOCK_K, WIDE)
        row = m + near_m
        offs_m = first_m + row
        mask_m = (offs_m < M)[:, None]
        dy_first, b_first = dy_ptr + first_m * stride_dm, b_ptr
        w_first = w_ptr + column.to(tl.int64) * BLOCK_K * stride_wk

        # one walk along N feeds both products, so dy is read once
        dx = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for n in range(0, N, BLOCK_N):
            mask_n = tl.arange(0, BLOCK_N) < N - n
            dy_ptrs = dy_first + (row[:, None] * stride_dm + near_n[None, :] * stride_dn)
            w_ptrs = w_first + (near_n[:, None] * stride_wn + near_k[None, :] * stride_wk)
            b_ptrs = b_first + (near_n[:, None] * stride_bn + near_r[None, :] * stride_br)
            dy = tl.load(dy_ptrs, mask_m & mask_n[None, :], other=0.0)
            w = tl.load(w_ptrs, mask_n[:, None] & mask_k, other=0.0)
            b = tl.load(b_ptrs, mask_n[:, None] & mask_r[None, :], other=0.0).to(dy.dtype)
            if gain_ptr is not None:
                gain = tl.load(gain_ptr + n + tl.arange(0, BLOCK_N), mask_n, other=0.0).to(tl.float32)
                dy = (dy.to(tl.float32) * gain[None, :]).to(dy.dtype)
            dx = plus(dx, dy, w, PRECISION)
            dh = plus(dh, dy, b, PRECISION)
            dy_first += tl.cast(BLOCK_N, tl.int64) * stride_dn
            w_first += tl.cast(BLOCK_N, tl.int64) * stride_wn
            b_first += tl.cast(BLOCK_N, tl.int64) * stride_bn

        dz = _through(dh, scale, z_ptr, ids_ptr, adapter_ptr, kind_ptr, offs_m, offs_r, M, R, USED, EVERY)
        dz = dz.to(dz_ptr.dtype.element_ty)
        # every column of tiles has made the same waist; the first stores it
        if column == 0:
            tl.store(dz_ptr + offs_m[:, None] * R + offs_r[None, :], dz, mask_m & mask_r[None, :])
        a_ptrs = a_ptr + offs_k[None, :] * stride_ak + offs_r[:, None].to(tl.int64) * stride_ar
        a = tl.load(a_ptrs, mask_r[:, None] & mask_k, other=0.0).to(dz.dtype)
        if DROPOUT:
            threshold, stream = tl.load(tile_ptr + 3), tl.load(tile_ptr + 2)
            keep = keep_tile(offs_m, column * BLOCK_K, threshold, seed, stream, BLOCK_M, BLOCK_K)
            dx += dropped(tl.dot(dz, a, input_precision=PRECISION), keep, tl.load(keep_ptr))
        else:
            dx = plus(dx, dz, a, PRECISION)
        dx_first = dx_ptr + first_m * K + column.to(tl.int64) * BLOCK_K
        dx_ptrs = dx_first + (row[:, None] * K + near_k[None, :])
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask_m & mask_k)

        if UP:
            h_ptrs = h_ptr + offs_m[None, :] * R + offs_r[:, None]
            h_t = tl.load(h_ptrs, mask_r[:, None] & (offs_m < M)[None, :], other=0.0)
            # these columns of dy went by a moment ago and are still in the cache
            for n in range(0, min(share, N - column * share), BLOCK_U):
                first_n = column.to(tl.int64) * share + n
                offs_n = first_n + tl.arange(0, BLOCK_U)
                mask_n = (offs_n < N)[None, :]
                dy_first = dy_ptr + first_m * stride_dm + first_n * stride_dn
                dy_offs = row[:, None] * stride_dm + (zero + near(BLOCK_U, WIDE))[None, :] * stride_dn
                dy = tl.load(dy_first + dy_offs, mask_m & mask_n, other=0.0)
                db = tl.dot(h_t, dy, input_precision=PRECISION) * scale[:, None]
                if gain_ptr is not None:
                    db *= tl.load(gain_ptr + offs_n, offs_n < N, other=0.0).to(tl.float32)[None, :]
                db_ptrs = db_ptr + (strip.to(tl.int64) * R + offs_r[:, None]) * N + offs_n[None, :]
                # the strip's rows add up in their order, in a part that is this program's alone
                db += tl.load(db_ptrs, mask_r[:, None] & mask_n & (m > 0), other=0.0)
                tl.store(db_ptrs, db, mask_r[:, None] & mask_n)


@triton.jit
def _through(dh, scale, z_ptr, ids_ptr, adapter_ptr, kind_ptr, offs_m, offs_r, M, R,
             USED: tl.constexpr, EVERY: tl.constexpr):  # fmt: skip
    """dz = s·dh ⊙ σ'(z) of the rows that a slot belongs to [BLOCK_M, BLOCK_R]."""
    dz = dh * scale[None, :]
    if z_ptr is not None:
        kind = 0
        if kind_ptr is not None:
            kind = tl.load(kind_ptr + offs_r, offs_r < R, other=0)
        mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
        z = tl.load(z_ptr + offs_m[:, None] * R + offs_r[None, :], mask, other=0.0)
        dz *= slope_slots(z.to(tl.float32), kind, USED)
    if ids_ptr is not None:
        dz = tl.where(own_rows(ids_ptr, adapter_ptr, offs_m, offs_r, M, R, EVERY), dz, 0.0)
    return dz


@triton.jit(do_not_specialize=_RUN_TIME)
def narrow(
    dy_ptr,  # [M, N]
    b_ptr,  # [N, R]
    gain_ptr,  # [N], or None
    h_ptr,  # [M, R]  contiguous
    scale_ptr,  # [R]  fp32
    dh_ptr,  # [columns of tiles, M, R]  contiguous, fp32
    db_ptr,  # [strips, R, N]  contiguous, fp32
    M,
    N,
    R,
    rows,  # of a strip, a multiple of BLOCK_M
    tiles,  # of slots
    stride_dm,
    stride_dn,
    stride_bn,
    stride_br,
    DOWN: tl.constexpr,  # dh is wanted
    UP: tl.constexpr,  # db is wanted
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One block of columns' part of dh, and one strip of rows' part of db, of one read of dy."""
    columns = tl.cdiv(N, BLOCK_N)
    column = tl.program_id(0) // tiles % columns
    strip = (tl.program_id(0) // tiles // columns).to(tl.int64)
    offs_n = column.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n, mask_r = offs_n < N, offs_r < R
    db = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    if DOWN:
        b_ptrs = b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :] * stride_br
        b = tl.load(b_ptrs, mask_n[:, None] & mask_r[None, :], other=0.0).to(dy_ptr.dtype.element_ty)
        if gain_ptr is not None:
            gain = tl.load(gain_ptr + offs_n, mask_n, other=0.0).to(tl.float32)
            b = (b.to(tl.float32) * gain[:, None]).to(b.dtype)

    dy_first = dy_ptr + strip * rows * stride_dm + column.to(tl.int64) * BLOCK_N * stride_dn
    dy_offs = near(BLOCK_M, WIDE)[:, None] * stride_dm + near(BLOCK_N, WIDE)[None, :] * stride_dn
    for m in range(0, rows, BLOCK_M):
        offs_m = strip * rows + m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        dy = tl.load(dy_first + dy_offs, mask_m[:, None] & mask_n[None, :], other=0.0)
        if DOWN:
            dh = tl.dot(dy, b, input_precision=PRECISION)
            dh_ptrs = dh_ptr + (column * M.to(tl.int64) + offs_m[:, None]) * R + offs_r[None, :]
            tl.store(dh_ptrs, dh, mask_m[:, None] & mask_r[None, :])
        if UP:
            h_ptrs = h_ptr + offs_m[None, :] * R + offs_r[:, None]
            h_t = tl.load(h_ptrs, mask_r[:, None] & mask_m[None, :], other=0.0)
            db = plus(db, h_t, dy, PRECISION)
        dy_first += tl.cast(BLOCK_M, tl.int64) * stride_dm

    if UP:
        db *= tl.load(scale_ptr + offs_r, mask_r, other=0.0)[:, None]
        if gain_ptr is not None:
            db *= tl.load(gain_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[None, :]
        db_ptrs = db_ptr + (strip * R + offs_r[:, None]) * N + offs_n[None, :]
        tl.store(db_ptrs, db, mask_r[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=_RUN_TIME)
def finish(
    dh_ptr,  # [parts, M, R]  contiguous, fp32
    scale_ptr,  # [R]  fp32
    z_ptr,  # [M, R]  contiguous, or None
    ids_ptr,  # [M]  int64, or None
    adapter_ptr,  # [R]  int64, or None
    kind_ptr,  # [R]  int32, or None
    dz_ptr,  # [M, R]  contiguous
    M,
    R,
    parts,
    USED: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dz = s·dh ⊙ σ'(z) [BLOCK_M, BLOCK_R], from the parts of dh."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    out = offs_m[:, None] * R + offs_r[None, :]
    dz = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for part in range(parts):
        dz += tl.load(dh_ptr + part * M.to(tl.int64) * R + out, mask, other=0.0)

    scale = tl.load(scale_ptr + offs_r, offs_r < R, other=0.0)
    dz = _through(dz, scale, z_ptr, ids_ptr, adapter_ptr, kind_ptr, offs_m, offs_r, M, R, USED, EVERY)
    tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def down(
    x_ptr,  # [M, K]
    dz_ptr,  # [M, R]  contiguous
    tile_ptr,  # [tiles, 4]  int32
    keep_ptr,  # [tiles]  fp32
    da_ptr,  # [strips, computed, K]  contiguous, fp32
    M,
    K,
    R,
    computed,
    rows,  # of a strip, a multiple of BLOCK_M
    tiles,  # of slots
    stride_xm,
    stride_xk,
    seed: tl.int64,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # a multiple of 128 where DROPOUT
    BLOCK_R: tl.constexpr,
):
    """One strip of rows' part of da."""
    number = tl.program_id(0) % tiles
    tile = tile_ptr + number * 4
    columns = tl.cdiv(K, BLOCK_K)
    first = tl.program_id(0) // tiles % columns * BLOCK_K
    strip = (tl.program_id(0) // tiles // columns).to(tl.int64)
    offs_k = first.to(tl.int64) + tl.arange(0, BLOCK_K)
    offs_r = tl.load(tile).to(tl.int64) + tl.arange(0, BLOCK_R)
    mask_k = (offs_k < K)[None, :]
    mask_r = (tl.arange(0, BLOCK_R) < tl.load(tile + 1))[:, None]

    da = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    x_first = x_ptr + strip * rows * stride_xm + first.to(tl.int64) * stride_xk
    x_offs = near(BLOCK_M, WIDE)[:, None] * stride_xm + near(BLOCK_K, WIDE)[None, :] * stride_xk
    for m in range(0, rows, BLOCK_M):
        offs_m = strip * rows + m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        x = tl.load(x_first + x_offs, mask_m[:, None] & mask_k, other=0.0)
        if DROPOUT:
            threshold, stream = tl.load(tile + 3), tl.load(tile + 2)
            keep = keep_tile(offs_m, first, threshold, seed, stream, BLOCK_M, BLOCK_K)
            x = dropped(x, keep, tl.load(keep_ptr + number))
        dz_t = tl.load(dz_ptr + offs_m[None, :] * R + offs_r[:, None], mask_r & mask_m[None, :], other=0.0)
        da = plus(da, dz_t, x, PRECISION)
        x_first += tl.cast(BLOCK_M, tl.int64) * stride_xm

    da_ptrs = da_ptr + (strip * computed + offs_r[:, None]) * K + offs_k[None, :]
    tl.store(da_ptrs, da, mask_r & mask_k)


@triton.jit(do_not_specialize=_RUN_TIME)
def column_sums(
    dy_ptr,  # [M, N]
    u_ptr,  # [M, N]  contiguous
    dg_ptr,  # [strips, N]  contiguous, fp32
    M,
    N,
    rows,  # of a strip, a multiple of BLOCK_M
    stride_dm,
    stride_dn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One strip of rows' part of dg."""
    columns = tl.cdiv(N, BLOCK_N)
    strip = (tl.program_id(0) // columns).to(tl.int64)
    offs_n = (tl.program_id(0) % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dg = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m in range(0, rows, BLOCK_M):
        offs_m = strip * rows + m + tl.arange(0, BLOCK_M)
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dm + offs_n[None, :] * stride_dn, mask, other=0.0)
        u = tl.load(u_ptr + offs_m[:, None] * N + offs_n[None, :], mask, other=0.0)
        dg += dy.to(tl.float32) * u.to(tl.float32)
    tl.store(dg_ptr + strip * N + offs_n, tl.sum(dg, 0), mask_n)
