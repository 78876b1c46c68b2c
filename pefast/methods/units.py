"""Units of choice: whole tensors, rows, columns, attention heads, tiles or elements of a model's tensors."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pefast.methods.heads import attentions, entries
from pefast.methods.places import pick_linears
from pefast.methods.replacing import Plan, own_tensors
from pefast.ops.partial_linear import Index

UNITS = {
    "tensor": "all",
    "row": "rows",
    "column": "columns",
    "head": "heads",
    "tile": "tiles",
    "element": "elements",
}


def check_unit(who: str, unit: str, tile) -> None:
    """Raises ValueError for a unit that is none, or a tile without sizes."""
    if unit not in UNITS:
        raise ValueError(f"{who}: unit is {unit!r}; one of {', '.join(UNITS)} would be right")
    sizes = (tile, tile) if isinstance(tile, int) else tuple(tile)
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{who}: tile is {tile!r}; a size, or height and width, would be right")


def check_share(who: str, what: str, share) -> None:
    """Raises ValueError unless the share is above 0 and at most 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{who}: {what} is {share!r}; a share above 0 and up to 1 would be right")


def pick_tensors(model: nn.Module, targets, exclude=(), layers: Sequence[int] | None = None) -> list[str]:
    """Paths of the tensors that are chosen from: the weights of linear layers as LoRA picks them, or with
    targets="all" every parameter but the task head's. Raises ValueError where none matches."""
    own = own_tensors(model)
    if targets == "all":
        return list(own)
    weights = {f"{path}.weight" for path in pick_linears(model, targets, exclude, layers)}
    # a tied output embedding goes by the name of its source
    return [path for path in own if path in weights]


def index_of(who: str, path: str, shape: tuple[int, ...], unit: str, tile) -> Index | None:
    """Every unit of a tensor; None where it counts whole. Vectors have elements only.

    Raises ValueError where tiles do not divide it.
    """
    if unit == "tensor":
        return None
    sizes = (tile, tile) if isinstance(tile, int) else tuple(tile)
    if len(shape) != 2 or unit == "element":
        return Index("elements", torch.arange(torch.Size(shape).numel()))
    if unit == "tile":
        if shape[0] % sizes[0] or shape[1] % sizes[1]:
            raise ValueError(
                f"{who}: {path} is {list(shape)}, which tiles of {sizes[0]}x{sizes[1]} do not divide;"
                " another tile, or targets without it, would be right"
            )
        return Index("tiles", torch.arange(shape[0] * shape[1] // (sizes[0] * sizes[1])), sizes)
    return Index(UNITS[unit], torch.arange(shape[0] if unit == "row" else shape[1]))


def head_plans(model: nn.Module, layers: Sequence[int] | None = None) -> list[Plan]:
    """For each attention head of the model, in order, its entries; heads share rows of k and v where several
    read the same."""
    plans = []
    for attention in attentions(model):
        number = next((int(step) for step in attention.q.split(".") if step.isdigit()), None)
        if layers is None or number in layers:
            plans += [entries(model, attention, {head}) for head in range(attention.heads)]
    return plans


def union(order: Iterable[str], plans: Iterable[Plan]) -> Plan:
    """The entries of several plans whose indices of one tensor have one kind, by the order of the paths."""
    parts: dict[str, list[Index]] = {}
    for plan in plans:
        for path, index in plan.items():
            parts.setdefault(path, []).append(index)
    whole = {
        path: some[0]._replace(at=torch.cat([index.at for index in some]).unique())
        for path, some in parts.items()
    }
    return {path: whole[path] for path in order if path in whole}


def sums(values: Tensor, index: Index | None) -> Tensor:
    """The sum over each unit's entries, for all units of a tensor in the formula's order of sizes."""
    if index is None:
        return values.sum().view(1)
    if index.kind == "elements":
        return values.reshape(-1)
    if index.kind == "tiles":
        h, wide = index.tile
        return values.unflatten(1, (-1, wide)).unflatten(0, (-1, h)).sum((1, 3)).flatten()
    return values.sum(1 if index.kind == "rows" else 0)


def unit_size(shape: tuple[int, ...], index: Index | None) -> int:
    """How many entries one unit of a tensor of that shape has."""
    if index is None:
        return torch.Size(shape).numel()
    if index.kind == "tiles":
        return index.tile[0] * index.tile[1]
    return {"rows": shape[-1], "columns": shape[0]}.get(index.kind, 1)
