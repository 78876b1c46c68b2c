"""How the segments of a delta_linear call lie side by side in one waist.

    slots   computed | given | ones      [R] in all
            a waist made here, in the order of the segments; one that was computed elsewhere; and for a
            segment with a bias d a slot that is always 1, so that d is one more column of b
    tiles   runs of at most `width` computed slots that share one dropout mask, or none

A slot's scale, adapter and activation are run-time numbers in small tables, made once for each arrangement.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import triton
from .dropout import mask_numbers

# the adapter of a slot for every row; ids are adapters from 0 on, or -1
EVERY = -(2**62)


class Part(NamedTuple):
    """One segment, as pefast/ops/delta_linear.py describes it."""

    a: Tensor | None  # [R, K]
    b: Tensor  # [N, R]
    c: Tensor | None  # [R]
    d: Tensor | None  # [N]
    h: Tensor | None  # [M, R]
    scale: float
    activation: str
    rate: float
    adapter: int

    def outline(self):
        """What the arrangement depends on."""
        given, has_d = self.h is not None, self.d is not None
        return self.b.shape[1], self.scale, self.activation, self.rate, self.adapter, given, has_d


class Places(NamedTuple):
    """Where the slots are."""

    computed: int  # slots whose waist is made here
    inner: int  # those and the given ones
    total: int
    first: tuple[int, ...]  # of each segment
    one: tuple[int, ...]  # of each segment: the slot of d, or -1


class Layout(NamedTuple):
    """Where the slots are, and the tables that kernels read."""

    computed: int
    inner: int
    total: int
    first: tuple[int, ...]
    one: tuple[int, ...]
    kinds: tuple[str, ...]  # activations that occur
    drops: bool
    width: int  # of a tile
    tiles: int
    tile: Tensor  # [tiles, 4]  int32: first slot, slots, stream, threshold
    keep: Tensor  # [tiles]  fp32, 1/(1-p)
    plain_tiles: int
    plain_tile: Tensor  # [plain_tiles, 4]  over all slots, without masks
    scale: Tensor  # [total]  fp32
    adapter: Tensor | None  # [total]  int64; None where every slot is for every row
    kind: Tensor | None  # [total]  int32, counts in kinds; None where there is one


def place(outlines: tuple) -> Places:
    """Where the slots of segments with these outlines are."""
    first, end = [0] * len(outlines), 0
    for given in (False, True):
        for i, outline in enumerate(outlines):
            if outline[5] == given:
                first[i] = end
                end += outline[0]
        if not given:
            computed = end
    one, inner = [-1] * len(outlines), end
    for i, outline in enumerate(outlines):
        if outline[6]:
            one[i] = end
            end += 1
    return Places(computed, inner, end, tuple(first), tuple(one))


@functools.lru_cache(maxsize=1024)
def arrange(outlines: tuple, most: int, device: torch.device) -> Layout:
    """The arrangement of segments with these outlines, in tiles of at most `most` slots."""
    places = place(outlines)
    order = sorted(range(len(outlines)), key=lambda i: (outlines[i][5], i))
    slots = [i for i in order for _ in range(outlines[i][0])]
    inner = len(slots)
    slots += [i for i, outline in enumerate(outlines) if outline[6]]
    kinds = tuple(sorted({outlines[i][2] for i in slots[:inner]})) or ("identity",)
    runs = _runs(outlines, [i for i in order if not outlines[i][5]])
    longest = max((run[1] for run in runs), default=len(slots))
    # a dot's inner dimension is at least 16
    width = min(most, max(16, triton.next_power_of_2(longest)))
    tiles = [
        (start + at, min(width, count - at), stream, threshold, factor)
        for start, count, stream, threshold, factor in runs
        for at in range(0, count, width)
    ]
    plain = [(at, min(width, len(slots) - at), 0, 0) for at in range(0, len(slots), width)]

    def table(values, dtype):
        return torch.tensor(values, dtype=dtype, device=device)

    adapters = [outlines[i][4] for i in slots]
    kind = [kinds.index(outlines[i][2]) for i in slots[:inner]] + [0] * (len(slots) - inner)
    return Layout(
        *places, kinds, any(run[3] for run in runs), width,
        len(tiles), table([t[:4] for t in tiles], torch.int32), table([t[4] for t in tiles], torch.float32),
        len(plain), table(plain, torch.int32), table([outlines[i][1] for i in slots], torch.float32),
        table(adapters, torch.int64) if set(adapters) != {EVERY} else None,
        table(kind, torch.int32) if len(kinds) > 1 else None,
    )  # fmt: skip


def _runs(outlines, computed):
    """Runs of slots under one mask: first slot, slots, stream, threshold, 1/(1-p). Those without join."""
    runs, end = [], 0
    for i in computed:
        rank, rate = outlines[i][0], outlines[i][3]
        threshold, factor = mask_numbers(rate) if rate else (0, 1.0)
        if runs and not threshold and not runs[-1][3]:
            runs[-1][1] += rank
        else:
            runs.append([end, rank, i, threshold, factor])
        end += rank
    return runs


def down(parts, layout: Layout, dtype) -> Tensor:  # [computed, K]
    """The a's side by side; the only one as it is."""
    rows = [p.a for p in parts if p.h is None]
    return rows[0] if len(rows) == 1 else torch.cat([a.to(dtype) for a in rows])


def up(parts, layout: Layout, dtype) -> Tensor:  # [N, total]
    """The b's side by side, then the d's; the only one as it is."""
    if layout.total == parts[0].b.shape[1]:
        return parts[0].b
    order = sorted(range(len(parts)), key=lambda i: layout.first[i])
    columns = [parts[i].b for i in order] + [p.d[:, None] for p in parts if p.d is not None]
    return torch.cat([column.to(dtype) for column in columns], 1)


def inner_bias(parts, layout: Layout, device) -> Tensor | None:  # [computed]  fp32
    """The c's side by side, zeros where there is none; None where no segment has one."""
    if all(p.c is None for p in parts):
        return None
    c = torch.zeros(layout.computed, dtype=torch.float32, device=device)
    for p, first in zip(parts, layout.first, strict=True):
        if p.c is not None and p.h is None:
            c[first : first + len(p.c)] = p.c
    return c


def fill(h: Tensor, parts, layout: Layout, ids: Tensor | None) -> None:
    """Puts what is not computed into h [M, total]: waists from elsewhere, and the ones."""
    for p, first, one in zip(parts, layout.first, layout.one, strict=True):
        own = None if p.adapter == EVERY else (ids == p.adapter).to(h.dtype)
        if p.h is not None:
            rows = p.h.reshape(-1, p.h.shape[-1])
            h[:, first : first + rows.shape[1]] = rows if own is None else rows * own[:, None]
        if one >= 0:
            h[:, one] = 1 if own is None else own
