"""A frozen weight as plain numbers: nn.Linear, stored [N, K], and transformers' Conv1D (GPT-2), stored [K,
N]."""

from torch import Tensor, nn


def knows(module: nn.Module) -> bool:
    """Whether the module computes x wᵀ + bias, and nothing else, from a weight stored in this format."""
    # a subclass with a forward of its own computes something else; a host of deltas says that it is one
    line = type(module).__mro__
    own = next(cls for cls in line if "forward" in vars(cls) and not vars(cls).get("hosts_deltas"))
    # Conv1D by its name, so that transformers is not imported for a model that does not use it
    return own is nn.Linear or (own.__name__ == "Conv1D" and own.__module__ == "transformers.pytorch_utils")


def weight(module: nn.Module) -> Tensor:  # [N, K]
    """The weight as the formulas have it; a view for Conv1D. It shares memory with the module's parameter, or
    is what an adapter put in its place."""
    own = module.weight
    return own.t() if transposed(module) else own


def transposed(module: nn.Module) -> bool:
    """Whether memory holds wᵀ; PEFT writes this to its files as fan_in_fan_out."""
    return not isinstance(module, nn.Linear)
