"""Attention over [prefix ; sequence] in Triton. Formula and names: pefast/ops/prefix_attention.py.

    attend       o, and of each row the logarithm of its sum of powers, in base 2
    towards_q    dq, and Σ_d do ⊙ o of each row
    towards_keys dk, dv, and for each row of the batch its part of dprefix_k, dprefix_v

Keys are counted through prefix and sequence as one: a tile's rows are addresses in either, so nothing is
concatenated and a tile may hold both. Weights are made again on the way back; no atomics.

In fp32 a row keeps its largest score and one over its weights' sum: taking a logarithm of 10 from a score
would round every weight by 3e-7. Scores stay natural until the largest is taken from them.
"""

from . import tl, triton
from .delta_linear_products import plus
from .dropout import keep_tile

_RUN_TIME = ["L", "S", "P", "seed", "threshold"]


@triton.jit
def _key_rows(t_ptr, prefix_ptr, offs_c, P, stride_t, stride_p, ALIGNED: tl.constexpr):
    """Addresses of the first number of each key: of the prefix below P, then of the sequence.

    All counted from the sequence: triton's AMD compiler fails on a tile with addresses in two tensors.
    """
    apart = (prefix_ptr.to(tl.int64) - t_ptr.to(tl.int64)) // (t_ptr.dtype.element_ty.primitive_bitwidth // 8)
    # what a difference says about alignment, the compiler cannot see
    if ALIGNED:
        apart = tl.multiple_of(apart, 8)
    of_prefix = apart + offs_c.to(tl.int64) * stride_p
    return t_ptr + tl.where(offs_c < P, of_prefix, (offs_c - P).to(tl.int64) * stride_t)


@triton.jit
def _visible(mask_ptr, row, key, L, S, P, stride_ml, stride_ms, CAUSAL: tl.constexpr):
    """Which keys which queries see; one of row and key stands upright, the other lies."""
    see = (row < L) & (key < P + S)
    after = key - P
    if CAUSAL:
        see = see & ((after < 0) | (after <= row + (S - L)))
    if mask_ptr is not None:
        places = mask_ptr + row.to(tl.int64) * stride_ml + after.to(tl.int64) * stride_ms
        allowed = tl.load(places, see & (after >= 0), other=0)
        see = see & ((after < 0) | (allowed != 0))
    return see


@triton.jit
def _powers(left, right, see, scale, PRECISION: tl.constexpr):
    """scale · left rightᵀ, -inf where unseen; times log2 e but in fp32."""
    if left.dtype != tl.float32:
        scale *= 1.4426950408889634
    x = tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale
    return tl.where(see, x, float("-inf"))


@triton.jit
def _raised(x, NATURAL: tl.constexpr):
    """e^x where NATURAL, otherwise 2^x."""
    if NATURAL:
        # log2 e in two parts: the rounding of one counts once for each unit of x
        x = x * 1.4426950216293335 + x * 1.9259629911266175e-8
    return tl.exp2(x)


@triton.jit
def _sums(lse_ptr, row, mask_l, APART: tl.constexpr):
    """Of each row what is taken from its powers, and what its weights are multiplied with."""
    if APART:
        base = tl.load(lse_ptr + 2 * row, mask_l, other=0.0)
        share = tl.load(lse_ptr + 2 * row + 1, mask_l, other=0.0)
    else:
        base = tl.load(lse_ptr + row, mask_l, other=0.0)
        share = tl.full(row.shape, 1.0, tl.float32)
    return base, share


@triton.jit
def _weights(x, base, share, NATURAL: tl.constexpr):
    """exp of x over its row's sum; 0 where x is -inf, also in a row that sees nothing."""
    return tl.where(x == float("-inf"), 0.0, _raised(x - base, NATURAL)) * share


@triton.jit(do_not_specialize=_RUN_TIME)
def attend(
    q_ptr,  # [B, H, L, D]
    k_ptr,  # [B, G, S, D]
    v_ptr,
    pk_ptr,  # [B, G, P, D]
    pv_ptr,
    mask_ptr,  # [B, L, S]  integers, or None
    o_ptr,  # [B, H, L, D]
    lse_ptr,  # [B, H, L]  fp32; of fp32 [B, H, L, 2]
    H,
    G,
    L,
    S,
    P,
    D,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kg, stride_ks,
    stride_vb, stride_vg, stride_vs,
    stride_pkb, stride_pkg, stride_pkp,
    stride_pvb, stride_pvg, stride_pvp,
    stride_mb, stride_ml, stride_ms,
    stride_ob, stride_oh, stride_ol,
    scale: tl.float32,
    threshold: tl.uint32,
    keep_scale: tl.float32,
    seed: tl.int64,
    CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row begins at a multiple of eight numbers
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,  # keys of a tile, a multiple of 128 where DROPOUT
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of queries' o."""
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    tiles = tl.cdiv(L, BLOCK_L)
    first = tl.program_id(0) % tiles * BLOCK_L
    h = tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    g = (h // (H // G)).to(tl.int64)
    h = h.to(tl.int64)
    offs_l, offs_d = first + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    mask_l, mask_d = (offs_l < L)[:, None], (offs_d < D)[None, :]
    near = offs_l[:, None].to(tl.int64) * stride_ql + offs_d[None, :]
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + near, mask_l & mask_d, other=0.0)
    k_first, v_first = k_ptr + b * stride_kb + g * stride_kg, v_ptr + b * stride_vb + g * stride_vg
    pk_first, pv_first = pk_ptr + b * stride_pkb + g * stride_pkg, pv_ptr + b * stride_pvb + g * stride_pvg
    if mask_ptr is not None:
        mask_ptr += b * stride_mb
    row = (b * H + h) * L + offs_l

    o = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    top = tl.full((BLOCK_L,), float("-inf"), tl.float32)
    end = P + S
    if CAUSAL:
        end = min(end, P + S - L + first + BLOCK_L)
    for c in range(0, end, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = (offs_c < P + S)[:, None] & mask_d
        k = tl.load(
            _key_rows(k_first, pk_first, offs_c, P, stride_ks, stride_pkp, ALIGNED)[:, None]
            + offs_d[None, :],
            mask_c,
            other=0.0,
        )
        v = tl.load(
            _key_rows(v_first, pv_first, offs_c, P, stride_vs, stride_pvp, ALIGNED)[:, None]
            + offs_d[None, :],
            mask_c,
            other=0.0,
        )
        see = _visible(mask_ptr, offs_l[:, None], offs_c[None, :], L, S, P, stride_ml, stride_ms, CAUSAL)
        x = _powers(q, k, see, scale, PRECISION)
        higher = tl.maximum(top, tl.max(x, 1))
        # a row that has seen nothing yet has no largest power; 0 is as good
        base = tl.where(higher == float("-inf"), 0.0, higher)
        w = _raised(x - base[:, None], FP32)
        shrink = _raised(top - base, FP32)
        total = total * shrink + tl.sum(w, 1)
        if DROPOUT:
            w = tl.where(keep_tile(row, c, threshold, seed, 0, BLOCK_L, BLOCK_C), w * keep_scale, 0.0)
        o = plus(o * shrink[:, None], w.to(v.dtype), v, PRECISION)
        top = higher

    seen = total > 0
    o = o / tl.where(seen, total, 1.0)[:, None]
    near = offs_l[:, None].to(tl.int64) * stride_ol + offs_d[None, :]
    tl.store(o_ptr + b * stride_ob + h * stride_oh + near, o.to(o_ptr.dtype.element_ty), mask_l & mask_d)
    if FP32:
        tl.store(lse_ptr + 2 * row, tl.where(seen, top, 0.0), offs_l < L)
        tl.store(lse_ptr + 2 * row + 1, tl.where(seen, 1.0 / tl.where(seen, total, 1.0), 0.0), offs_l < L)
    else:
        lse = tl.where(seen, top + tl.log2(tl.where(seen, total, 1.0)), 0.0)
        tl.store(lse_ptr + row, lse, offs_l < L)


@triton.jit(do_not_specialize=_RUN_TIME)
def towards_q(
    q_ptr,  # [B, H, L, D]
    k_ptr,  # [B, G, S, D]
    v_ptr,
    pk_ptr,  # [B, G, P, D]
    pv_ptr,
    mask_ptr,  # [B, L, S]  integers, or None
    o_ptr,  # [B, H, L, D]
    do_ptr,
    lse_ptr,  # [B, H, L]  fp32; of fp32 [B, H, L, 2]
    dot_ptr,  # [B, H, L]  fp32, Σ_d do ⊙ o
    dq_ptr,  # [B, H, L, D]  contiguous
    H,
    G,
    L,
    S,
    P,
    D,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kg, stride_ks,
    stride_vb, stride_vg, stride_vs,
    stride_pkb, stride_pkg, stride_pkp,
    stride_pvb, stride_pvg, stride_pvp,
    stride_mb, stride_ml, stride_ms,
    stride_ob, stride_oh, stride_ol,
    stride_db, stride_dh, stride_dl,
    scale: tl.float32,
    threshold: tl.uint32,
    keep_scale: tl.float32,
    seed: tl.int64,
    CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of queries' dq."""
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    tiles = tl.cdiv(L, BLOCK_L)
    first = tl.program_id(0) % tiles * BLOCK_L
    h = tl.program_id(0) // tiles % H
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    g = (h // (H // G)).to(tl.int64)
    h = h.to(tl.int64)
    offs_l, offs_d = first + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    mask, mask_d = (offs_l < L)[:, None] & (offs_d < D)[None, :], (offs_d < D)[None, :]
    wide = offs_l[:, None].to(tl.int64)
    q = tl.load(q_ptr + b * stride_qb + h * stride_qh + wide * stride_ql + offs_d[None, :], mask, other=0.0)
    o = tl.load(o_ptr + b * stride_ob + h * stride_oh + wide * stride_ol + offs_d[None, :], mask, other=0.0)
    do = tl.load(do_ptr + b * stride_db + h * stride_dh + wide * stride_dl + offs_d[None, :], mask, other=0.0)
    k_first, v_first = k_ptr + b * stride_kb + g * stride_kg, v_ptr + b * stride_vb + g * stride_vg
    pk_first, pv_first = pk_ptr + b * stride_pkb + g * stride_pkg, pv_ptr + b * stride_pvb + g * stride_pvg
    if mask_ptr is not None:
        mask_ptr += b * stride_mb
    row = (b * H + h) * L + offs_l
    base, share = _sums(lse_ptr, row, offs_l < L, FP32)
    products = o.to(tl.float32) * do.to(tl.float32)
    if FP32:
        # or each lane's product joins the sum unrounded, and lanes of one row get sums that differ in a bit
        products = tl.where(mask, products, 0.0)
    dot = tl.sum(products, 1)
    tl.store(dot_ptr + row, dot, offs_l < L)

    dq = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    end = P + S
    if CAUSAL:
        end = min(end, P + S - L + first + BLOCK_L)
    for c in range(0, end, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = (offs_c < P + S)[:, None] & mask_d
        k = tl.load(
            _key_rows(k_first, pk_first, offs_c, P, stride_ks, stride_pkp, ALIGNED)[:, None]
            + offs_d[None, :],
            mask_c,
            other=0.0,
        )
        v = tl.load(
            _key_rows(v_first, pv_first, offs_c, P, stride_vs, stride_pvp, ALIGNED)[:, None]
            + offs_d[None, :],
            mask_c,
            other=0.0,
        )
        see = _visible(mask_ptr, offs_l[:, None], offs_c[None, :], L, S, P, stride_ml, stride_ms, CAUSAL)
        x = _powers(q, k, see, scale, PRECISION)
        w = _weights(x, base[:, None], share[:, None], FP32)
        dw = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dw = tl.where(keep_tile(row, c, threshold, seed, 0, BLOCK_L, BLOCK_C), dw * keep_scale, 0.0)
        dx = w * (dw - dot[:, None])
        dq = plus(dq, dx.to(k.dtype), k, PRECISION)
    tl.store(dq_ptr + row[:, None] * D + offs_d[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=_RUN_TIME)
def towards_keys(
    q_ptr,  # [B, H, L, D]
    k_ptr,  # [B, G, S, D]
    v_ptr,
    pk_ptr,  # [B, G, P, D]
    pv_ptr,
    mask_ptr,  # [B, L, S]  integers, or None
    do_ptr,  # [B, H, L, D]
    lse_ptr,  # [B, H, L]  fp32; of fp32 [B, H, L, 2]
    dot_ptr,  # [B, H, L]  fp32
    dk_ptr,  # [B, G, S, D]  contiguous
    dv_ptr,
    dpk_ptr,  # [B, G, P, D]  contiguous, fp32
    dpv_ptr,
    H,
    G,
    L,
    S,
    P,
    D,
    stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kg, stride_ks,
    stride_vb, stride_vg, stride_vs,
    stride_pkb, stride_pkg, stride_pkp,
    stride_pvb, stride_pvg, stride_pvp,
    stride_mb, stride_ml, stride_ms,
    stride_db, stride_dh, stride_dl,
    scale: tl.float32,
    threshold: tl.uint32,
    keep_scale: tl.float32,
    seed: tl.int64,
    CAUSAL: tl.constexpr,
    ALIGNED: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys' dk and dv: the queries of every head that reads them, in their order."""
    FP32: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    tiles = tl.cdiv(P + S, BLOCK_C)
    first = tl.program_id(0) % tiles * BLOCK_C
    g = tl.program_id(0) // tiles % G
    b = (tl.program_id(0) // tiles // G).to(tl.int64)
    offs_c, offs_d = first + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_D)
    mask_d = (offs_d < D)[None, :]
    mask_c = (offs_c < P + S)[:, None] & mask_d
    k_first, v_first = (
        k_ptr + b * stride_kb + g.to(tl.int64) * stride_kg,
        v_ptr + b * stride_vb + g.to(tl.int64) * stride_vg,
    )
    pk_first, pv_first = (
        pk_ptr + b * stride_pkb + g.to(tl.int64) * stride_pkg,
        pv_ptr + b * stride_pvb + g.to(tl.int64) * stride_pvg,
    )
    k = tl.load(
        _key_rows(k_first, pk_first, offs_c, P, stride_ks, stride_pkp, ALIGNED)[:, None] + offs_d[None, :],
        mask_c,
        other=0.0,
    )
    v = tl.load(
        _key_rows(v_first, pv_first, offs_c, P, stride_vs, stride_pvp, ALIGNED)[:, None] + offs_d[None, :],
        mask_c,
        other=0.0,
    )
    if mask_ptr is not None:
        mask_ptr += b * stride_mb

    dk, dv = tl.zeros((BLOCK_C, BLOCK_D), tl.float32), tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    begin = 0
    if CAUSAL:
        # rows above see none of these keys; of the prefix every row does
        begin = tl.where(first < P, 0, max(0, first - P - (S - L)) // BLOCK_L * BLOCK_L)
    for number in range(H // G):
        h = (g * (H // G) + number).to(tl.int64)
        q_first, do_first = q_ptr + b * stride_qb + h * stride_qh, do_ptr + b * stride_db + h * stride_dh
        # beside a mask, what is hoisted out of the loop no longer fits into registers
        for l in tl.range(begin, L, BLOCK_L, disable_licm=DROPOUT):
            offs_l = l + tl.arange(0, BLOCK_L)
            mask = (offs_l < L)[:, None] & mask_d
            wide = offs_l[:, None].to(tl.int64)
            q = tl.load(q_first + wide * stride_ql + offs_d[None, :], mask, other=0.0)
            do = tl.load(do_first + wide * stride_dl + offs_d[None, :], mask, other=0.0)
            row = (b * H + h) * L + offs_l
            base, share = _sums(lse_ptr, row, offs_l < L, FP32)
            dot = tl.load(dot_ptr + row, offs_l < L, other=0.0)
            # keys stand upright, as in dk and dv: the warps share out their rows
            see = _visible(mask_ptr, offs_l[None, :], offs_c[:, None], L, S, P, stride_ml, stride_ms, CAUSAL)
            x = _powers(k, q, see, scale, PRECISION)  # [BLOCK_C, BLOCK_L]
            w = _weights(x, base[None, :], share[None, :], FP32)
            dw = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            dropped_w = w
            if DROPOUT:
                keep = tl.trans(keep_tile(row, first, threshold, seed, 0, BLOCK_L, BLOCK_C))
                dw = tl.where(keep, dw * keep_scale, 0.0)
                dropped_w = tl.where(keep, w * keep_scale, 0.0)
            dv = plus(dv, dropped_w.to(do.dtype), do, PRECISION)
            dx = w * (dw - dot[None, :])
            dk = plus(dk, dx.to(q.dtype), q, PRECISION)

    dk *= scale
    of_prefix = (offs_c < P)[:, None] & mask_d
    near = ((b * G + g) * P + offs_c[:, None]) * D + offs_d[None, :]
    tl.store(dpk_ptr + near, dk, of_prefix)
    tl.store(dpv_ptr + near, dv, of_prefix)
    near = ((b * G + g) * S + (offs_c - P)[:, None]) * D + offs_d[None, :]
    of_sequence = (offs_c >= P)[:, None] & mask_c
    tl.store(dk_ptr + near, dk.to(dk_ptr.dtype.element_ty), of_sequence)
    tl.store(dv_ptr + near, dv.to(dv_ptr.dtype.element_ty), of_sequence)
