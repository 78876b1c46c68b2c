"""partial_linear: a frozen linear layer of which some entries train.

    w' = w, with values in the chosen entries    [N, K]
    y  = x w'ᵀ + bias                            [M, N]

    dx      = dy w'                              [M, K]
    dvalues = (dyᵀ x) at the chosen entries      never the whole of dyᵀ x
    dbias   = Σ_m dy                             [N]    w gets a gradient only where it is asked for

The entries are rows, columns, tiles or single elements of w; heads are rows of q, k, v and columns of o.

Papers: training a part of the weights, Houlsby et al. 2019 (arXiv:1902.00751, section 3.2) for layers,
Sung et al. 2021 (arXiv:2111.09839) for a fixed sparse mask.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pefast.dispatch import Operation
from pefast.eager import partial_linear as eager
from pefast.eager.partial_linear import tile_places, tiled
from pefast.kernels import partial_linear as triton_hand
from pefast.native import partial_linear as native_hand

KINDS = ("rows", "columns", "tiles", "elements")


class Index(NamedTuple):
    """Chosen entries of a weight [N, K], or elements of a tensor of any shape."""

    kind: str  # rows, columns, tiles or elements
    at: Tensor  # [C] int64, rising: numbers of rows, of columns, of tiles or elements in row-major order
    tile: tuple[int, int] = (1, 1)  # height and width of a tile

    def sizes(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the values."""
        c = len(self.at)
        if self.kind == "rows":
            return (c, *shape[1:])
        if self.kind == "columns":
            return (shape[0], c)
        return (c, *self.tile) if self.kind == "tiles" else (c,)


class Call(NamedTuple):
    """What a hand is given. Leading dimensions are flattened to M rows."""

    x: Tensor  # [M, K]
    w: Tensor  # [N, K]  frozen, any strides
    bias: Tensor | None  # [N]
    parts: tuple[tuple[Tensor, Index], ...] | list[tuple[Tensor, Index]]  # no entry is in two of them


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    w: bool
    bias: bool
    parts: list[bool]


def put(w: Tensor, values: Tensor, index: Index) -> Tensor:
    """w with values in the chosen entries; w stays as it is. Plain autograd."""
    v = values.to(w.dtype)
    if index.kind == "rows":
        return w.index_copy(0, index.at, v)
    if index.kind == "columns":
        return w.index_copy(1, index.at, v)
    if index.kind == "elements":
        return w.reshape(-1).index_copy(0, index.at, v).view(w.shape)
    by_tile = tiled(w, index.tile).index_put(tile_places(w.shape, index), v)  # [N/h, K/w, h, w]
    return by_tile.transpose(1, 2).reshape(w.shape)


def take(w: Tensor, index: Index) -> Tensor:
    """The chosen entries of w, in the shape of the values."""
    if index.kind == "rows":
        return w[index.at]
    if index.kind == "columns":
        return w[:, index.at]
    if index.kind == "elements":
        return w.reshape(-1)[index.at]
    return tiled(w, index.tile)[tile_places(w.shape, index)]


def mask(index: Index, shape: Sequence[int]) -> Tensor:
    """True at the chosen entries of a tensor of that shape, on the CPU."""
    bare = index._replace(at=index.at.cpu())
    return put(torch.zeros(tuple(shape), dtype=torch.bool), torch.ones(bare.sizes(shape)), bare)


def reference(
    x: Tensor,  # [..., K]
    w: Tensor,  # [N, K]
    values: Tensor | Sequence[Tensor],
    index: Index | Sequence[Index],
    bias: Tensor | None = None,  # [N]
) -> Tensor:  # [..., N]
    """The formula and nothing else: any device, any dtype, plain autograd. The tests' oracle."""
    for v, at in _parts(values, index):
        w = put(w, v, at)
    y = x @ w.t()
    return y if bias is None else y + bias.to(y.dtype)


def partial_linear(
    x: Tensor,  # [..., K]
    w: Tensor,  # [N, K]
    values: Tensor | Sequence[Tensor],
    index: Index | Sequence[Index],
    bias: Tensor | None = None,  # [N]
    backend: str | None = None,
) -> Tensor:  # [..., N]
    """y = x w'ᵀ + bias, with w' = w but for the entries of `index`, which are `values`.

    values is [C, K] for C rows, [N, C] for columns, [C, h, w] for tiles and [C] for elements; it may be wider
    than w (an fp32 master of bf16) and its gradient comes in its own dtype. Several indices with their values
    may come as sequences, as long as no entry is in two of them. x and w share a dtype, or autocast gives
    them one.

    Raises ValueError where shapes or dtypes do not fit, or the named `backend` cannot run the call; an
    IndexError for entries that w does not have. Formula and papers: the head of this file.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w = x.to(dtype), w.to(dtype)
    parts = _parts(values, index)
    _check(x, w, parts)
    flat = x.dim() == 2
    # flattened outside autograd: a view of x and one of y would be two more nodes of the graph
    rows = x if flat else x.detach().reshape(-1, x.shape[-1])
    call = Call(rows, w, bias, parts)
    hand = OP.pick(call, backend)
    tensors = [x, w, bias, *(v for v, _ in parts)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _PartialLinear.apply(call, hand, *tensors)
    y, _ = _forward(hand, call)
    return y if flat else y.view(*x.shape[:-1], y.shape[-1])


class _PartialLinear(torch.autograd.Function):
    """Wiring only: the mathematics is in the hands."""

    @staticmethod
    def forward(ctx, call, hand, x, w, bias, *values):
        # call holds the same tensors, x flattened; they stand in the list as well so that autograd sees them
        ctx.hand, ctx.shape = hand, x.shape
        ctx.kinds = [(index.kind, index.tile) for _, index in call.parts]
        y, saved = _forward(hand, call)
        at = [index.at for _, index in call.parts]
        ctx.save_for_backward(x, w, bias, *values, *at, *saved)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("partial_linear: has no second derivative; create_graph=False would be right")
        x, w, bias, *rest = ctx.saved_tensors
        count = len(ctx.kinds)
        each = zip(ctx.kinds, rest[count : 2 * count], strict=True)
        indices = [Index(kind, at, tile) for (kind, tile), at in each]
        flat = len(ctx.shape) == 2
        if not flat:
            x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        call = Call(x, w, bias, list(zip(rest[:count], indices, strict=True)))
        need = ctx.needs_input_grad
        needs = Needs(*need[2:5], need[5:])
        dx, dw, dbias, dvalues = _backward(ctx.hand, call, rest[2 * count :], dy, needs)
        if dx is not None and not flat:
            dx = dx.view(ctx.shape)
        return None, None, dx, dw, dbias, *dvalues


def _forward(hand: str, call: Call):
    return getattr(OP.hands[hand], "forward", eager.forward)(call)


def _backward(hand: str, call: Call, saved, dy: Tensor, needs: Needs):
    """By the hand; one that makes the chosen entries' gradient alone leaves the rest to the eager hand."""
    whole = getattr(OP.hands[hand], "backward", None)
    if whole is not None:
        return whole(call, saved, dy, needs)
    return eager.backward(call, saved, dy, needs, OP.hands[hand].chosen_gradient)


def _parts(values, index) -> tuple[tuple[Tensor, Index], ...]:
    if isinstance(index, Index):
        return ((values, index),)
    return tuple(zip(values, index, strict=True))


def _check(x: Tensor, w: Tensor, parts) -> None:
    n, k = w.shape
    if x.shape[-1] != k:
        raise ValueError(f"partial_linear: x has {x.shape[-1]} columns, the weight [{n}, {k}] takes {k}")
    if x.dtype != w.dtype:
        raise ValueError(
            f"partial_linear: x is {x.dtype} and the weight {w.dtype}; one dtype, or autocast, would be right"
        )
    for values, index in parts:
        if index.kind not in KINDS:
            raise ValueError(f"partial_linear: no kind of index {index.kind!r}; there are {', '.join(KINDS)}")
        h, wide = index.tile
        if n % h or k % wide:
            raise ValueError(f"partial_linear: tiles of {h}x{wide} do not divide a weight of [{n}, {k}]")
        if values.shape != index.sizes(w.shape):
            raise ValueError(
                f"partial_linear: values are {list(values.shape)},"
                f" {list(index.sizes(w.shape))} would be right for these {index.kind}"
            )


OP = Operation("partial_linear", {"native": native_hand, "triton": triton_hand, "eager": eager})
