"""A frozen linear layer with nothing beside it, computed by pefast: an fp32 product is cheaper on AMX."""

import torch
from torch import Tensor, nn

from pefast.formats import format_of
from pefast.layers.in_place import mix_in, take_out
from pefast.ops.delta_linear import OP, Call, delta_linear

COMPUTE = (None, "bf16")


def check_compute(who: str, compute: str | None) -> None:
    """Raises ValueError for a way to multiply that no hand knows."""
    if compute not in COMPUTE:
        raise ValueError(f"{who}: compute is {compute!r}; None or 'bf16' would be right")


class FrozenLinear(nn.Module):
    """Mixed into a linear layer: while its weight is frozen, x wᵀ + bias goes through delta_linear."""

    hosts_deltas = True
    compute: str | None = None
    alone: bool  # whether nothing was mixed in under it that computes another product

    def __init_subclass__(cls):
        below = cls.__mro__[cls.__mro__.index(FrozenLinear) + 1 :]
        cls.alone = not any(vars(each).get("hosts_deltas") for each in below)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        # the weight of a layer of which entries train is made anew at each look
        if not self.alone:
            return super().forward(x)
        w, bias = self.weight, self.bias
        trains = w.requires_grad or (bias is not None and bias.requires_grad)
        plain = not trains and x.dtype == w.dtype and not torch.is_autocast_enabled(x.device.type)
        if not plain:
            return super().forward(x)
        return delta_linear(x, format_of(self).weight(self), (), bias, compute=self.compute)


def why_not(module: nn.Module) -> str:
    """Why the native hand does not take this layer's product, or ""."""
    w = format_of(module).weight(module)
    x = torch.empty(64, w.shape[1], dtype=w.dtype, device=w.device)
    return OP.hands["native"].refuse(Call(x, w, module.bias, None, None, None, ()))


def takes(module: nn.Module) -> bool:
    """Whether a module is a plain frozen linear layer that gains by this."""
    hosts = any(vars(cls).get("hosts_deltas") for cls in type(module).__mro__)
    if hosts or format_of(module) is None or module.weight.requires_grad:
        return False
    return not why_not(module)


def switch(model: nn.Module, on: bool) -> None:
    """Mixes FrozenLinear into every layer that gains by it, or takes it out again."""
    for module in list(model.modules()):
        if isinstance(module, FrozenLinear):
            if not on:
                take_out(module, FrozenLinear)
        elif on and takes(module):
            mix_in(module, FrozenLinear, "Frozen")


def choose_compute(model: nn.Module, compute: str | None) -> None:
    """Lets products of the layers that pefast computes round to bf16, or takes that back."""
    for module in model.modules():
        if hasattr(type(module), "compute"):
            module.__dict__.pop("compute", None)
            if compute is not None:
                module.compute = compute
