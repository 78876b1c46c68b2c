"""partial_linear in plain PyTorch. Formula: pefast/ops/partial_linear.py.

Few rows or columns stand beside the frozen product; tiles and elements are put into a copy of w that lives
for one product. The gradient of elements is a product of some rows of w at a time, never all of dw.
"""

import torch
from torch import Tensor

# entries of dw that may live at once, for elements; numbers that may be gathered at once, for tiles
_AT_ONCE = 1 << 20
# from one entry in so many on, a copy of w is cheaper than a product beside it
_MANY = 8


def refuse(call) -> str:
    """Never: the eager hand takes every call."""
    return ""


def forward(call) -> tuple[Tensor, tuple]:
    """y = x w'ᵀ + bias [M, N], and nothing that backward would need besides."""
    x, w, dtype = call.x, call.w, call.x.dtype
    bias = None if call.bias is None else call.bias.to(dtype)
    kind = _beside(call)
    y = _product(x, w if kind else changed(w, call.parts), bias)
    for values, index in call.parts if kind else ():
        v, at = values.to(dtype), index.at
        if kind == "rows":
            own = _product(x, v, None if bias is None else bias[at])  # [M, C]
            y.index_copy_(1, at, own)
        else:
            y.addmm_(x[:, at], (v - w[:, at]).t())
    return y, ()


def backward(call, saved: tuple, dy: Tensor, needs, gradient=None):
    """dx, dw, dbias and dvalues of each part; None for what is not needed.

    `gradient` is another hand's chosen_gradient.
    """
    gradient = gradient or chosen_gradient
    dx = _dx(call, dy) if needs.x else None
    dbias = dy.sum(0).to(call.bias.dtype) if needs.bias else None
    dw = None
    if needs.w:
        # what stands in the place of an entry leaves it without a gradient
        zeros = [(torch.zeros_like(values), index) for values, index in call.parts]
        dw = changed(torch.mm(dy.t(), call.x), zeros)
    parts = [
        gradient(dy, call.x, index).to(values.dtype) if need else None
        for (values, index), need in zip(call.parts, needs.parts, strict=True)
    ]
    return dx, dw, dbias, parts


def _product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, w.t()) if bias is None else torch.addmm(bias, x, w.t())


def _beside(call) -> str:
    """rows or columns, where every part is a few of them; otherwise empty."""
    kinds = {index.kind for _, index in call.parts}
    few = _MANY * sum(values.numel() for values, _ in call.parts) <= call.w.numel()
    return kinds.pop() if len(kinds) == 1 and few and kinds <= {"rows", "columns"} else ""


def changed(w: Tensor, parts) -> Tensor:  # [N, K]
    """A copy of w with each part's values in place."""
    full = w.clone(memory_format=torch.contiguous_format)
    for values, index in parts:
        v, at = values.to(w.dtype), index.at
        if index.kind == "rows":
            full.index_copy_(0, at, v)
        elif index.kind == "columns":
            full.index_copy_(1, at, v)
        elif index.kind == "elements":
            full.view(-1).index_copy_(0, at, v)
        else:
            tiled(full, index.tile)[tile_places(full.shape, index)] = v
    return full


def tiled(w: Tensor, tile: tuple[int, int]) -> Tensor:  # [N/h, K/w, h, w]
    """A view of w by tiles."""
    h, wide = tile
    return w.unflatten(1, (-1, wide)).unflatten(0, (-1, h)).transpose(1, 2)


def tile_places(shape, index) -> tuple[Tensor, Tensor]:
    """Row and column of each tile in the grid of tiles."""
    across = shape[1] // index.tile[1]
    return index.at // across, index.at % across


def _dx(call, dy: Tensor) -> Tensor:  # [M, K]
    w, dtype, kind = call.w, dy.dtype, _beside(call)
    dx = torch.mm(dy, w if kind else changed(w, call.parts))
    for values, index in call.parts if kind else ():
        v, at = values.to(dtype), index.at
        if kind == "rows":
            dx.addmm_(dy[:, at], v - w[at])
        else:
            dx.index_copy_(1, at, torch.mm(dy, v))
    return dx


def chosen_gradient(dy: Tensor, x: Tensor, index) -> Tensor:
    """The entries of dyᵀ x that the index names, in the shape of its values."""
    at = index.at
    if index.kind == "rows":
        return torch.mm(dy[:, at].t(), x)  # [C, K]
    if index.kind == "columns":
        return torch.mm(dy.t(), x[:, at])  # [N, C]
    return (_tiles if index.kind == "tiles" else _elements)(dy, x, index)


def _tiles(dy: Tensor, x: Tensor, index) -> Tensor:  # [C, h, w]
    (h, wide), m = index.tile, len(x)
    i, j = tile_places((dy.shape[1], x.shape[1]), index)
    by_row, by_column = dy.view(m, -1, h).permute(1, 2, 0), x.view(m, -1, wide).transpose(0, 1)
    found = dy.new_empty(len(index.at), h, wide)
    count = max(1, _AT_ONCE // max(1, m * (h + wide)))
    for start in range(0, len(found), count):
        some = slice(start, start + count)
        torch.bmm(by_row[i[some]], by_column[j[some]], out=found[some])
    return found


def _elements(dy: Tensor, x: Tensor, index) -> Tensor:  # [C]
    n, k = dy.shape[1], x.shape[1]
    rows = max(1, _AT_ONCE // max(1, k))
    if rows >= n or torch.compiler.is_compiling():
        return torch.mm(dy.t(), x).view(-1)[index.at]
    starts = range(0, n, rows)
    # at is in order, so the entries of some rows lie side by side
    edges = torch.searchsorted(
        index.at, torch.tensor([r * k for r in (*starts, n)], device=dy.device)
    ).tolist()
    found = dy.new_empty(len(index.at))
    for r, begin, end in zip(starts, edges, edges[1:], strict=False):
        if begin < end:
            some = torch.mm(dy[:, r : r + rows].t(), x).view(-1)  # [rows * K]
            torch.index_select(some, 0, index.at[begin:end] - r * k, out=found[begin:end])
    return found
