"""A frozen weight as plain numbers: nn.Linear, stored [N, K], and transformers' Conv1D (GPT-2), stored [K,
N]."""

import functools

from torch import Tensor, nn


@functools.cache
def _is_conv1d(cls: type) -> bool:
    # by its name, so that transformers is not imported for a model that does not use it
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils" for base in cls.__mro__
    )


@functools.cache
def _known(cls: type) -> bool:
    # a subclass with a forward of its own computes something else; a host of deltas says that it is one
    own = next(base for base in cls.__mro__ if "forward" in vars(base) and not vars(base).get("hosts_deltas"))
    return own is nn.Linear or (own.__name__ == "Conv1D" and _is_conv1d(cls))


def knows(module: nn.Module) -> bool:
    """Whether the module computes x wᵀ + bias, and nothing else, from a weight stored in this format."""
    return _known(type(module))


def weight(module: nn.Module) -> Tensor:  # [N, K]
    """The weight as the formulas have it; a view for Conv1D. It shares memory with the module's parameter."""
    own = module._parameters["weight"]
    return own.t() if _is_conv1d(type(module)) else own


def transposed(module: nn.Module) -> bool:
    """Whether memory holds wᵀ; PEFT writes this to its files as fan_in_fan_out."""
    return _is_conv1d(type(module))
