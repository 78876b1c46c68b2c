"""A weighted average of adapters as a new one.

Of LoRAs exactly: Σ w·s·b a is one LoRA whose factors stand side by side, so its rank is the sum of the ranks;
`rank` keeps the nearest LoRA of a smaller one (Eckart and Young 1936). Of all other methods parameter by
parameter, as model soups are made (Wortsman et al. 2022, arXiv:2203.05482).
"""

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor, nn

from pefast.methods import LoRA
from pefast.methods.choosing import Choosing
from pefast.methods.lora import file_names
from pefast.methods.places import deltas_of
from pefast.model import attach, attached, head_tensors, parameters_of


def average(
    model: nn.Module, weights: Mapping[str, float], name: str = "mix", *, rank: int | None = None
) -> nn.Module:
    """Attaches the weighted sum of attached adapters as a new one called `name`, in place, and activates it.

    `weights` says how much of each, {"a": 0.5, "b": 0.5}; they need not sum to 1. The adapters must have the
    same methods, and but for LoRA with the same settings; task heads are averaged with them. The dropout of
    LoRAs is that of the first.

    Raises ValueError, and changes nothing, where adapters or their heads do not fit together.
    """
    state = attached(model, "average")
    names = list(weights)
    _check(state, weights, rank)
    methods = []
    for key, first in state.adapters[names[0]].items():
        others = [state.adapters[each][key] for each in names[1:]]
        if isinstance(first, LoRA):
            methods.append(_lora(model, names, key, rank))
        elif isinstance(first, Choosing):
            methods.append(_chosen(model, names, key))
        elif any(other != first for other in others):
            raise ValueError(
                f"average: {', '.join(names)} have a {type(first).__name__} of different settings"
            )
        else:
            methods.append(first)
    heads = {each: head_tensors(model, each) for each in names}
    if any(_shapes(heads[each]) != _shapes(heads[names[0]]) for each in names):
        raise ValueError(
            f"average: the task heads of {', '.join(names)} differ; heads of one size would be right"
        )
    values = _values(model, weights, rank)
    # the numbers drawn for parameters that the average replaces do not count
    rng = torch.get_rng_state()
    attach(model, methods, name, head=state.labels.get(names[0], False) if heads[names[0]] else False)
    torch.set_rng_state(rng)
    with torch.no_grad():
        for key, parameter in parameters_of(model, name).items():
            parameter.copy_(values[key])
    return model


def _check(state, weights: Mapping[str, float], rank: int | None) -> None:
    if not weights:
        raise ValueError(f"average: no adapter is named; there are {sorted(state.adapters)}")
    for each, weight in weights.items():
        if each not in state.adapters:
            raise ValueError(f"average: no adapter is called {each!r}; there are {sorted(state.adapters)}")
        if not isinstance(weight, Real) or weight != weight:
            raise ValueError(f"average: the weight of {each!r} is {weight!r}; a number would be right")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise ValueError(f"average: rank is {rank!r}; a whole number from 1 up, or None, would be right")
    first = next(iter(weights))
    for each in weights:
        if list(state.adapters[each]) != list(state.adapters[first]):
            raise ValueError(
                f"average: {first!r} has {', '.join(state.adapters[first])} and {each!r} has"
                f" {', '.join(state.adapters[each])}; adapters of the same methods would be right"
            )
        for method in state.adapters[each].values():
            if isinstance(method, LoRA) and method.bias:
                raise ValueError(
                    f"average: {each!r} is a LoRA with a bias of its own; LoRAs without would be right"
                )
            if isinstance(method, LoRA) and method.dora:
                raise ValueError(
                    f"average: {each!r} is a DoRA, whose lengths do not add up; LoRAs would be right"
                )


def _chosen(model: nn.Module, names: list[str], key: str) -> Choosing:
    """The same entries once more, however they were chosen. Raises ValueError where adapters have others."""
    state, entries = attached(model, "average"), []
    for each in names:
        method = state.adapters[each][key]
        tensors = method.tensors(model, each, key)
        entries.append(type(method).from_config(method.config(model, each, key), tensors))
    numbers = [
        {path: index and (index.kind, index.tile, index.at.tolist()) for path, index in each.saved.items()}
        for each in entries
    ]
    for each, other in zip(names, numbers, strict=True):
        if other != numbers[0]:
            raise ValueError(
                f"average: {names[0]!r} and {each!r} train different entries; the same ones would be right"
            )
    return entries[0]


def _lora(model: nn.Module, names: list[str], key: str, rank: int | None) -> LoRA:
    """The settings of the sum: a rank for each path, alpha the same, so that its scale is 1."""
    ranks: dict[str, int] = {}
    for each in names:
        for path, delta in deltas_of(model, each, key):
            ranks[path] = ranks.get(path, 0) + delta.factors()[0].shape[0]
    ranks = {path: min(total, rank or total) for path, total in ranks.items()}
    first = attached(model, "average").adapters[names[0]][key]
    return LoRA(max(ranks.values()), None, first.dropout, list(ranks), ranks=ranks, plus=first.plus)


def _values(model: nn.Module, weights: Mapping[str, float], rank: int | None) -> dict[str, Tensor]:
    """The new adapter's parameters, by the names that parameters_of gives them."""
    state = attached(model, "average")
    sums: dict[str, Tensor] = {}
    for each, weight in weights.items():
        for place, parameter in parameters_of(model, each).items():
            if isinstance(state.adapters[each].get(place.split("/")[0]), LoRA):
                continue
            part = weight * parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            sums[place] = sums[place] + part if place in sums else part
    for key, method in state.adapters[next(iter(weights))].items():
        if isinstance(method, LoRA):
            sums |= {f"{key}/{own}": value for own, value in _factors(model, weights, key, rank).items()}
    return sums


def _factors(model: nn.Module, weights: Mapping[str, float], key: str, rank: int | None) -> dict[str, Tensor]:
    """a and b of the sum, by PEFT's names."""
    parts: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
    for each, weight in weights.items():
        for path, delta in deltas_of(model, each, key):
            a, b = delta.factors()
            parts.setdefault(file_names(path, delta), []).append(
                (a.detach(), weight * delta.scale * b.detach())
            )
    found = {}
    for names, pairs in parts.items():
        a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)  # [ΣR, K], [N, ΣR]
        if rank is not None and rank < a.shape[0]:
            a, b = _nearest(a, b, rank)
        found |= dict(zip(names, (a, b), strict=True))
    return found


def _nearest(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of the matrix of this rank nearest to b a; b a itself is never made."""
    q_b, r_b = torch.linalg.qr(b.double())  # [N, R], [R, R]
    q_a, r_a = torch.linalg.qr(a.double().t())  # [K, R], [R, R]
    u, s, v_t = torch.linalg.svd(r_b @ r_a.t())
    root = s[:rank].sqrt()
    return (root[:, None] * (v_t[:rank] @ q_a.t())).to(a.dtype), ((q_b @ u[:, :rank]) * root).to(b.dtype)


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in tensors.items()}
