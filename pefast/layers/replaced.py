"""An adapter's tensors in the place of a module's own: `module.weight` gives the adapter's while it computes.

The module's own parameter stays where it is, frozen, under its name in the state dict; a property before it
looks at the router. So an adapter is switched without a write, and leaving gives the module its class back.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pefast.formats import format_of
from pefast.layers.in_place import mix_in, take_out
from pefast.layers.router import Router
from pefast.ops.partial_linear import Index, partial_linear, put, take


class Replacement(nn.Module):
    """Trained values of one tensor: all of it, or those entries of it that an index names.

    Entries count in the tensor as the formulas have it: [N, K] for a Conv1D too, which stores [K, N].
    """

    at: Tensor | None

    def __init__(self, values: nn.Parameter, index: Index | None = None, transposed: bool = False):
        super().__init__()
        self.values, self.transposed = values, transposed
        self.kind, self.tile = (None, None) if index is None else (index.kind, index.tile)
        self.register_buffer("at", None if index is None else index.at, persistent=False)
        self.before: Tensor | None = None  # while merged: what the own tensor held
        self.placed = False  # whether a module has it already

    @property
    def index(self) -> Index | None:
        """Which entries; None: all."""
        return None if self.at is None else Index(self.kind, self.at, self.tile)

    def over(self, own: Tensor) -> Tensor:
        """The tensor that the module computes with, given its own."""
        if self.before is not None:
            return own
        if self.at is None:
            return self.values
        full = put(own.t() if self.transposed else own, self.values, self.index)
        return full.t() if self.transposed else full

    @torch.no_grad()
    def merge(self, own: Tensor) -> None:
        """Writes the values into the own tensor, and keeps what they cover."""
        view = own.t() if self.transposed else own
        before = own.clone() if self.at is None else take(view, self.index).clone()
        own.copy_(self.over(own))
        self.before = before

    @torch.no_grad()
    def unmerge(self, own: Tensor) -> None:
        """Gives the own tensor back as it was, bit for bit."""
        view = own.t() if self.transposed else own
        view.copy_(self.before if self.at is None else put(view, self.before, self.index))
        self.before = None


class Replaced(nn.ModuleDict):
    """The replacements of one module's tensors: [adapter name][key][tensor name]."""

    router: Router

    def __init__(self):
        super().__init__()
        # values that another module has too, as the save_pretrained of transformers asks for them
        self._tied_weights_keys: dict[str, str] = {}

    def active(self, tensor: str) -> Iterator[Replacement]:
        """Those of one tensor that compute now."""
        for name, _ in self.router.turns:
            if name in self:
                for parts in self[name].values():
                    if tensor in parts and parts[tensor].before is None:
                        yield parts[tensor]


@functools.cache
def _standing(tensor: str) -> type:
    """A class whose attribute of that name is what the active adapters put in its place."""

    def look(self: nn.Module) -> Tensor:
        now = self._parameters[tensor]
        # between two uses FSDP has its shard of the module's own tensor here, and wants it back as it is
        if hasattr(now, "device_mesh"):
            return now
        for replacement in self.replaced.active(tensor):
            now = replacement.over(now)
        return now

    return type(f"Standing_{tensor}", (nn.Module,), {tensor: property(look)})


def __getattr__(name: str) -> type:
    """Where pickle finds a class that _standing made."""
    if name.startswith("Standing_"):
        return _standing(name.removeprefix("Standing_"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class ChosenHost(nn.Module):
    """Mixed into a linear layer of which some entries train: product and their gradient in one operation.

    It stands under a host of deltas, which comes here where its deltas leave the product alone; where they
    ride on it, they take the whole weight with the values in it, and the gradient of all of it.
    """

    hosts_deltas = True
    turned: bool  # whether memory holds the transposed weight

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        active = list(self.replaced.active("weight"))
        if not active or any(each.at is None for each in active):
            return super().forward(x)
        own = self._parameters["weight"]
        values, indices = [each.values for each in active], [each.index for each in active]
        return partial_linear(x, own.t() if self.turned else own, values, indices, self.bias)


def replace(module: nn.Module, tensor: str, router: Router, name: str, key: str, given: Replacement) -> None:
    """Puts a replacement on one of a module's tensors."""
    if not hasattr(module, "replaced"):
        module.replaced = Replaced()
        module.replaced.router = router
    if not isinstance(module, _standing(tensor)):
        mix_in(module, _standing(tensor), "Replaced")
    if (
        tensor == "weight"
        and given.at is not None
        and not isinstance(module, ChosenHost)
        and (form := format_of(module))
    ):
        module.turned = form.transposed(module)
        mix_in(module, ChosenHost, "Chosen", lowest=True)
    keys = module.replaced
    for step in (name, key):
        if step not in keys:
            keys[step] = nn.ModuleDict()
        keys = keys[step]
    keys[tensor] = given
    if given.placed:
        module.replaced._tied_weights_keys[f"{name}.{key}.{tensor}.values"] = tensor
    given.placed = True


def give_back(module: nn.Module, name: str, key: str) -> None:
    """Takes what one method of an adapter put on a module off; the last to go gives the class back."""
    tensors = {each for keys in module.replaced.values() for parts in keys.values() for each in parts}
    ties = module.replaced._tied_weights_keys
    for tensor in module.replaced[name][key]:
        ties.pop(f"{name}.{key}.{tensor}.values", None)
    del module.replaced[name][key]
    if not module.replaced[name]:
        del module.replaced[name]
    left = {each for keys in module.replaced.values() for parts in keys.values() for each in parts}
    for tensor in tensors - left:
        take_out(module, _standing(tensor))
    if "weight" not in left and isinstance(module, ChosenHost):
        take_out(module, ChosenHost)
        del module.turned
    if not left:
        del module.replaced


def replacements(model: nn.Module, name: str, key: str) -> Iterator[tuple[str, nn.Module, str, Replacement]]:
    """All that one method of an adapter put on a model: path of the module, module, tensor, replacement."""
    for path, module in model.named_modules():
        found = module._modules.get("replaced")
        if isinstance(found, Replaced) and name in found and key in found[name]:
            for tensor, replacement in found[name][key].items():
                yield path, module, tensor, replacement
