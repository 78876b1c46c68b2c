"""The gradient of partial_linear's chosen entries, in Triton; the rest is the eager hand's.

    dvalues = (dyᵀ x) at the chosen entries    Formula and kinds of indices: pefast/ops/partial_linear.py.

    chosen    rows, columns and tiles: products of the columns of dy and x that an index names, read where
              they lie; nothing is gathered first
    sampled   elements: a tile of dyᵀ x on tensor cores, of which the chosen elements alone leave the program.
              Tiles without any are not computed

Nothing of dyᵀ x but the chosen entries is ever in memory. Strips of rows leave their parts in fp32, added in
their order: no atomics, the same bits each time. int64 numbers address dy, x and the values.

Shown without a GPU, as kernels/delta_linear.py says. Not yet run or timed on one.
"""

import torch
from torch import Tensor

from . import tiles, tl, triton
from .delta_linear_products import near, plus
from .launch import INTERPRETED, checked, through_the_registry, why_not_here

# programs that keep a large GPU busy
_PROGRAMS = 256


@triton.jit(do_not_specialize=["M", "rows", "blocks_n", "blocks_k", "tiles"])
def chosen(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    row_ptr,  # [height]  int64: the columns of dy that are wanted; None: side by side
    column_ptr,  # [width]  int64: the columns of x that are wanted; None: side by side
    tile_ptr,  # [tiles]  int64: numbers of tiles in the grid of tiles; None: one tile, at the origin
    part_ptr,  # [strips, tiles, height, width]  fp32, contiguous
    M,
    height,  # of a tile
    width,
    across,  # tiles that stand side by side in w
    rows,  # of a strip, a multiple of BLOCK_M
    blocks_n,  # of a tile
    blocks_k,
    tiles,
    stride_dm,
    stride_dn,
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One strip of rows' part of a block of the chosen entries [BLOCK_N, BLOCK_K]."""
    number = tl.program_id(0)
    block_k, number = number % blocks_k, number // blocks_k
    block_n, number = number % blocks_n, number // blocks_n
    tile, strip = (number % tiles).to(tl.int64), (number // tiles).to(tl.int64)
    near_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    near_k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = near_n < height, near_k < width
    offs_n, offs_k = near_n, near_k
    if row_ptr is not None:
        offs_n = tl.load(row_ptr + near_n, mask_n, other=0)
    if column_ptr is not None:
        offs_k = tl.load(column_ptr + near_k, mask_k, other=0)
    if tile_ptr is not None:
        at = tl.load(tile_ptr + tile)
        offs_n, offs_k = offs_n + at // across * height, offs_k + at % across * width

    dw = _strip_of_products(
        dy_ptr + strip * rows * stride_dm, x_ptr + strip * rows * stride_xm,
        _narrow(offs_n, WIDE) * stride_dn, _narrow(offs_k, WIDE) * stride_xk,
        mask_n, mask_k, min(rows, M - strip.to(tl.int32) * rows), stride_dm, stride_xm, PRECISION, WIDE,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    out = ((strip * tiles + tile) * height + near_n[:, None]) * width + near_k[None, :]
    tl.store(part_ptr + out, dw, mask_n[:, None] & mask_k[None, :])


@triton.jit
def _narrow(offsets, WIDE: tl.constexpr):
    """64 bits only where a row of tiles asks for them: a tile of addresses takes half of the registers so."""
    return offsets.to(tl.int64) if WIDE else offsets.to(tl.int32)


@triton.jit
def _strip_of_products(
    dy_first,  # address of the strip's first row
    x_first,
    dy_offs,  # [BLOCK_N]  from there to each column
    x_offs,  # [BLOCK_K]
    mask_n,
    mask_k,
    end,  # rows of the strip that there are
    stride_dm,
    stride_xm,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ_m dyᵀ x of a strip of rows [BLOCK_N, BLOCK_K]."""
    near_m, offs_m = near(BLOCK_M, WIDE), tl.arange(0, BLOCK_M)
    dy_offs, x_offs = (
        near_m[:, None] * stride_dm + dy_offs[None, :],
        near_m[:, None] * stride_xm + x_offs[None, :],
    )
    dw = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for m in range(0, end, BLOCK_M):
        mask_m = (offs_m < end - m)[:, None]
        dy = tl.load(dy_first + dy_offs, mask_m & mask_n[None, :], other=0.0)
        x = tl.load(x_first + x_offs, mask_m & mask_k[None, :], other=0.0)
        dw = plus(dw, tl.trans(dy), x, PRECISION)
        dy_first += tl.cast(BLOCK_M, tl.int64) * stride_dm
        x_first += tl.cast(BLOCK_M, tl.int64) * stride_xm
    return dw


@triton.jit(do_not_specialize=["M", "rows", "tiles", "count"])
def sampled(
    dy_ptr,  # [M, N]
    x_ptr,  # [M, K]
    tile_ptr,  # [tiles, 3]  int64: number of the tile, its first and last element's place in the tables
    near_ptr,  # [count]  int32: an element's place in its tile, tile by tile
    out_ptr,  # [count]  int64: its place among the values
    part_ptr,  # [strips, count]  fp32, contiguous
    M,
    N,
    K,
    rows,  # of a strip, a multiple of BLOCK_M
    tiles,
    count,
    stride_dm,
    stride_dn,
    stride_xm,
    stride_xk,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One strip of rows' part of the chosen elements of a tile."""
    strip = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tile_ptr + tl.program_id(0) % tiles * 3
    at, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    across = tl.cdiv(K, BLOCK_K)
    offs_n = at // across * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = at % across * BLOCK_K + tl.arange(0, BLOCK_K)
    dw = _strip_of_products(
        dy_ptr + strip * rows * stride_dm, x_ptr + strip * rows * stride_xm,
        _narrow(offs_n, WIDE) * stride_dn, _narrow(offs_k, WIDE) * stride_xk,
        offs_n < N, offs_k < K, min(rows, M - strip.to(tl.int32) * rows), stride_dm, stride_xm, PRECISION,
        WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    dw = tl.reshape(dw, (BLOCK_N * BLOCK_K,))
    for first in range(begin, end, BLOCK_E):
        offs_e = first + tl.arange(0, BLOCK_E)
        mask_e = offs_e < end
        values = tl.gather(dw, tl.load(near_ptr + offs_e, mask_e, other=0), 0)
        out = tl.load(out_ptr + offs_e, mask_e, other=0)
        tl.store(part_ptr + strip * count + out, values, mask_e)


def refuse(call) -> str:
    """Why these kernels cannot run this call, or ""."""
    if why := why_not_here(call.x):
        return why
    for tensor in (call.w, call.bias, *(t for values, index in call.parts for t in (values, index.at))):
        if tensor is not None and tensor.device != call.x.device:
            return f"needs every tensor on {call.x.device}, one is on {tensor.device}"
    return ""


def decline(call) -> str:
    """Why another hand is faster here, or ""."""
    if INTERPRETED:
        return "triton's interpreter is for tests, a thousand times slower"
    return ""


def chosen_gradient(dy: Tensor, x: Tensor, index) -> Tensor:
    """The entries of dyᵀ x that the index names, in the shape of its values, in fp32."""
    run = torch.ops.pefast.partial_linear_triton if through_the_registry(dy) else _chosen_gradient
    return run(dy, x, index.at, index.kind, *index.tile)


def _chosen_gradient(dy: Tensor, x: Tensor, at: Tensor, kind: str, height: int, width: int) -> Tensor:
    shape = _shape(dy, x, at, kind, height, width)
    if not len(dy) or not at.numel():
        return torch.zeros(shape, device=dy.device)
    with torch.cuda.device_of(dy):
        if kind == "elements":
            return _launch_sampled(dy, x, at)
        return _launch_chosen(dy, x, at, kind, shape).view(shape)


def _shape(dy: Tensor, x: Tensor, at: Tensor, kind: str, height: int, width: int) -> tuple[int, ...]:
    c = at.shape[0]
    wanted = {"rows": (c, x.shape[1]), "columns": (dy.shape[1], c), "tiles": (c, height, width)}
    return wanted.get(kind, (c,))


def _launch_chosen(dy, x, at, kind, shape):
    m, k = x.shape
    count, (height, width) = len(at) if kind == "tiles" else 1, shape[-2:]
    block = tiles.chosen(dy.dtype, height, width)
    blocks_n, blocks_k = triton.cdiv(height, block["BLOCK_N"]), triton.cdiv(width, block["BLOCK_K"])
    strips, rows = tiles.strips(m, blocks_n * blocks_k * count, block["BLOCK_M"], _PROGRAMS)
    parts = torch.empty((strips, count, height, width), device=dy.device)
    given = [at if kind == name else None for name in ("rows", "columns", "tiles")]
    chosen[(blocks_n * blocks_k * count * strips,)](
        dy, x, *given, parts, m, height, width, k // width, rows, blocks_n, blocks_k, count,
        *dy.stride(), *x.stride(), **_numbers(dy, x), **block,
    )  # fmt: skip
    return _added(parts)


def _launch_sampled(dy, x, at):
    (m, k), n = x.shape, dy.shape[1]
    block = tiles.sampled(dy.dtype)
    table, near_places, out = _by_tile(at, k, block["BLOCK_N"], block["BLOCK_K"])
    strips, rows = tiles.strips(m, len(table), block["BLOCK_M"], _PROGRAMS)
    parts = torch.empty((strips, len(at)), device=dy.device)
    sampled[(len(table) * strips,)](
        dy, x, table, near_places, out, parts, m, n, k, rows, len(table), len(at),
        *dy.stride(), *x.stride(), **_numbers(dy, x), BLOCK_E=128, **block,
    )  # fmt: skip
    return _added(parts)


def _added(parts: Tensor) -> Tensor:
    """The parts of all strips, in their order."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _by_tile(at: Tensor, k: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tables of `sampled`; kept with the index, which never changes."""
    key = (k, height, width, at._version)
    found = getattr(at, "pefast_by_tile", None)
    if found is None or found[0] != key:
        found = at.pefast_by_tile = (key, _tables(at, k, height, width))
    return found[1]


def _tables(at: Tensor, k: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    i, j = at // k, at % k
    tile = i // height * triton.cdiv(k, width) + j // width
    order = torch.argsort(tile, stable=True)
    numbers, counts = torch.unique_consecutive(tile[order], return_counts=True)
    ends = counts.cumsum(0)
    table = torch.stack((numbers, ends - counts, ends), 1)
    inside = (i % height * width + j % width).to(torch.int32)[order]
    return table.contiguous(), inside.contiguous(), order


def _numbers(dy: Tensor, x: Tensor) -> dict:
    """How products of fp32 are rounded, and whether a tile's rows leave 31 bits."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    # a tile spans at most 64 rows, and any of the columns
    wide = any(64 * t.stride(0) + t.shape[1] * t.stride(1) >= 2**31 for t in (dy, x))
    return {"PRECISION": "tf32" if tf32 else "ieee", "WIDE": wide}


_LIBRARY = torch.library.Library("pefast", "FRAGMENT")
_LIBRARY.define(
    "partial_linear_triton(Tensor dy, Tensor x, Tensor at, str kind, int height, int width) -> Tensor"
)
for _device in ("CUDA", "CPU"):
    _LIBRARY.impl("partial_linear_triton", checked(_chosen_gradient), _device)


@torch.library.register_fake("pefast::partial_linear_triton", lib=_LIBRARY)
def _(dy, x, at, kind, height, width):
    return dy.new_empty(_shape(dy, x, at, kind, height, width), dtype=torch.float32)
