"""What the methods share that put tensors of their own in the place of the model's: all of a tensor, or some
entries of it. Their plan is {path of the tensor: Index, or None for all of it}.

Files hold `<path>` for a whole tensor; `<path>.values` and `<path>.indices` for entries, counted as the
formulas have the weight, [N, K], in a Conv1D too. A tensor that modules share is trained and stored once.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pefast.architectures import heads
from pefast.formats import format_of
from pefast.layers.lowrank import master_dtype
from pefast.layers.replaced import Replacement, give_back, replace, replacements
from pefast.methods.method import Method
from pefast.ops.partial_linear import Index, mask, take

Plan = dict[str, Index | None]


class Replacing(Method):
    """Enters and leaves with the tensors of its plan; whoever inherits says what the plan is."""

    merges = True
    routes = False

    def claims(self, plan: Plan) -> Plan:
        """What it puts its own in the place of: all of its plan."""
        return plan

    def enter(self, model: nn.Module, name: str, key: str, plan: Plan, router) -> None:
        """Copies the planned entries and puts the copies in their place, in every module that shares them."""
        own, spots = own_tensors(model), {}
        for module in model.modules():
            for tensor, parameter in module._parameters.items():
                spots.setdefault(id(parameter), []).append((module, tensor))
        for path, index in plan.items():
            places = spots[id(own[path])]
            replacement = _replacement(own[path].detach(), index, _turned(*places[0]))
            for module, tensor in places:
                replace(module, tensor, router, name, key, replacement)

    def leave(self, model: nn.Module, name: str, key: str) -> None:
        """Takes them away again."""
        for module in {module: None for _, module, _, _ in replacements(model, name, key)}:
            give_back(module, name, key)

    def tensors(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """Its tensors under the names that the file gives them."""
        found = {}
        for path, (_, replacement) in replaced_by_path(model, name, key).items():
            if replacement.at is None:
                found[path] = replacement.values
            else:
                at = replacement.at
                small = not len(at) or int(at[-1]) <= torch.iinfo(torch.int32).max
                found[f"{path}.values"] = replacement.values
                found[f"{path}.indices"] = at.to(torch.int32) if small else at
        return found

    def parameters(self, model: nn.Module, name: str, key: str) -> dict[str, Tensor]:
        """What trains of them: all but the indices."""
        return {path: each.values for path, (_, each) in replaced_by_path(model, name, key).items()}

    def merge(self, model: nn.Module, name: str, key: str) -> None:
        """Writes them into the model's own tensors."""
        for own, replacement in replaced_by_path(model, name, key).values():
            replacement.merge(own)

    def unmerge(self, model: nn.Module, name: str, key: str) -> None:
        """Gives the model's own tensors back, bit for bit."""
        for own, replacement in replaced_by_path(model, name, key).values():
            replacement.unmerge(own)

    @staticmethod
    def owns(key: str) -> bool:
        """Whether a tensor of that name in a file is the method's own, and not the head's."""
        return not key.startswith("base_model.")


def own_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base model's own parameters by path, without a task head; one that modules share stands once."""
    state = getattr(model, "_pefast", None)
    names = [name for name, _ in model.named_parameters()] if state is None else state.own
    # the model's word on which of the shared names is the source
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    closed = tuple(f"{head}." for head in heads(model))
    found = {}
    for name in names:
        if not name.startswith(closed):
            path, _, tensor = ties.get(name, name).rpartition(".")
            found[ties.get(name, name)] = model.get_submodule(path)._parameters[tensor]
    return found


def _turned(module: nn.Module, tensor: str) -> bool:
    """Whether memory holds the transpose of what the formulas have."""
    form = format_of(module) if tensor == "weight" else None
    return form is not None and form.transposed(module)


def _replacement(own: Tensor, index: Index | None, turned: bool) -> Replacement:
    """A fresh one, which starts as the own tensor; beside a half, the values of entries are fp32 masters."""
    if index is None:
        return Replacement(nn.Parameter(own.clone()))
    values = take(own.t() if turned else own, index).to(master_dtype(own.dtype), copy=True)
    index = index._replace(at=index.at.to(own.device))
    return Replacement(nn.Parameter(values.contiguous()), index, turned)


def replaced_by_path(model: nn.Module, name: str, key: str) -> dict[str, tuple[nn.Parameter, Replacement]]:
    """The own tensor and its replacement, by the path that the file uses."""
    paths = {id(parameter): path for path, parameter in own_tensors(model).items()}
    found = {}
    for _, module, tensor, replacement in replacements(model, name, key):
        own = module._parameters[tensor]
        found.setdefault(paths[id(own)], (own, replacement))
    return found


def refuse_overlap(who: str, model: nn.Module, claims: Iterable[tuple[str, Plan]]) -> None:
    """Raises ValueError where two methods would put something in the place of one entry."""
    seen: dict[str, list[tuple[str, Index | None]]] = {}
    for label, plan in claims:
        for path, index in plan.items():
            for other, taken in seen.get(path, ()):
                if _overlap(model, path, index, taken):
                    raise ValueError(
                        f"{who}: {other} and {label} both train entries of {path};"
                        " methods that share none would be right"
                    )
            seen.setdefault(path, []).append((label, index))


def _overlap(model: nn.Module, path: str, one: Index | None, other: Index | None) -> bool:
    if one is None or other is None:
        return True
    return bool((mask(one, shape_of(model, path)) & mask(other, shape_of(model, path))).any())


def turned(model: nn.Module, path: str) -> bool:
    """Whether memory holds the transpose of a tensor as the formulas have it."""
    module, _, tensor = path.rpartition(".")
    return _turned(model.get_submodule(module), tensor)


def shape_of(model: nn.Module, path: str) -> tuple[int, ...]:
    """The sizes of an own tensor as the formulas have it."""
    module, _, tensor = path.rpartition(".")
    module = model.get_submodule(module)
    sizes = tuple(module._parameters[tensor].shape)
    return sizes[::-1] if _turned(module, tensor) else sizes
